"""Finds heads and layers in a model by name, through whatever an engine wrapped around them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from . import errors

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which torch's wrappers hold what they wrap."""


def locate(name: str, model: nn.Module) -> nn.Module | None:
    """The submodule called ``name``, looking through the wrappers that engines and torch.compile put in between."""
    module = unwrapped(model)
    for part in name.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = unwrapped(found)
    return module


def links_to(name: str, model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The way to the submodule called ``name``: parent, attribute, child, from the model on."""
    module, links = unwrapped(model), []
    for part in name.split("."):
        child = getattr(module, part)
        links.append((holder(part, module), part, child))
        module = unwrapped(child)
    return links


def holder(name: str, model: nn.Module) -> nn.Module:
    """The module that holds the first part of a dotted name. PEFT's wrappers answer for the model that they wrap."""
    module, part = unwrapped(model), name.split(".")[0]
    if part in module._modules:
        return module
    child = getattr(module, part, None)
    holders = (m for m in module.modules() if m._modules.get(part) is child)
    return module if child is None else next(holders, module)


def name_of(module: nn.Module, model: nn.Module) -> str | None:
    """The dotted name under which ``locate`` finds a module; None where it does not."""
    root = unwrapped(model)
    for name, part in root.named_modules(remove_duplicate=False):
        if part is module:
            inner = inner_name(name)
            return inner if inner and locate(inner, root) is module else None
    return None


def inner_name(name: str) -> str:
    """A dotted name without the wrappers in it."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def parameter_names(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under every name that it has, without the wrappers in it."""
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        yield inner_name(name), parameter


Link = tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module]]
"""A parent, the attribute in which it holds a child, and the child."""


def links_on_the_way(name: str | None, model: nn.Module | None) -> list[Link]:
    """Those to the submodule called ``name``; none of them is kept alive."""
    if not name or model is None:
        return []
    return [(weakref.ref(parent), part, weakref.ref(child)) for parent, part, child in links_to(name, model)]


def holds(link: Link) -> bool:
    """Whether the parent still holds the child, or is gone itself."""
    parent, name, child = link[0](), link[1], link[2]()
    return parent is None or parent._modules.get(name) is child


def unwrapped(module: nn.Module) -> nn.Module:
    """What an engine or torch.compile wrapped."""
    while True:
        for inner in WRAPPERS:
            if isinstance(getattr(module, inner, None), nn.Module):
                module = getattr(module, inner)
                break
        else:
            if type(module).__name__ not in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
                return module
            module = module.module  # type: ignore[assignment]


def heads_by_task(
    tasks: Sequence[str], heads: Mapping[str, nn.Module | str], model: nn.Module | None
) -> list[nn.Module]:
    """The heads' modules in task order.

    Raises:
        ValueError: Names lead nowhere; all of them are in the message.
    """
    found: list[nn.Module] = []
    missing: list[str] = []
    for task in tasks:
        head = heads[task]
        module = head if isinstance(head, nn.Module) else locate(head, model) if model is not None else None
        if module is None:
            missing.append(str(head))
        else:
            found.append(module)
    if missing:
        raise errors.modules_not_found(missing, () if model is None else dict(model.named_modules()))
    return found


def find_layer(layer: nn.Module | str, model: nn.Module | None) -> nn.Module:
    """A layer, given as a module or by name.

    Raises:
        ValueError: The name leads nowhere, or there is no model to look it up in.
    """
    if not isinstance(layer, str):
        return layer
    if model is None:
        raise errors.layer_without_model(layer)
    found = locate(layer, model)
    if found is None:
        raise errors.modules_not_found([layer], dict(model.named_modules()))
    return found
