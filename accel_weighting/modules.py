"""Finds heads and layers in a model by name, through whatever an engine wrapped around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from . import errors

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which torch's wrappers hold what they wrap."""


def locate(name: str, model: nn.Module) -> nn.Module | None:
    """The submodule called ``name``, looking through the wrappers that engines and torch.compile put in between."""
    module = _unwrap(model)
    for part in name.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = _unwrap(found)
    return module


def links_to(name: str, model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """The way to the submodule called ``name``: parent, attribute, child, from the model on."""
    module, links = _unwrap(model), []
    for part in name.split("."):
        child = getattr(module, part)
        links.append((holder(part, module), part, child))
        module = _unwrap(child)
    return links


def holder(name: str, model: nn.Module) -> nn.Module:
    """The module that holds the first part of a dotted name. PEFT's wrappers answer for the model that they wrap."""
    module, part = _unwrap(model), name.split(".")[0]
    if part in module._modules:
        return module
    child = getattr(module, part, None)
    holders = (m for m in module.modules() if m._modules.get(part) is child)
    return module if child is None else next(holders, module)


def name_of(module: nn.Module, model: nn.Module) -> str | None:
    """The dotted name under which ``locate`` finds a module; None where it does not."""
    root = _unwrap(model)
    for name, part in root.named_modules(remove_duplicate=False):
        if part is module:
            inner = ".".join(word for word in name.split(".") if word not in WRAPPERS)
            return inner if inner and locate(inner, root) is module else None
    return None


def _unwrap(module: nn.Module) -> nn.Module:
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
