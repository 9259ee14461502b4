"""Finds heads and layers in a model by name, through whatever an engine wrapped around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from . import checks


def locate(name: str, model: nn.Module) -> nn.Module | None:
    """The submodule called ``name``, looking through the wrappers that engines and torch.compile put in between."""
    module = _unwrap(model)
    for part in name.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = _unwrap(found)
    return module


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        for inner in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
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
        raise checks.modules_not_found(missing)
    return found


def find_layer(layer: nn.Linear | str, model: nn.Module | None) -> nn.Linear:
    """The shared layer, given as a module or by name.

    Raises:
        ValueError: The name leads nowhere, or there is no model to look it up in.
        TypeError: It is not an ``nn.Linear``.
    """
    if not isinstance(layer, str):
        return checks.shared_layer(layer)
    if model is None:
        raise checks.layer_without_model(layer)
    found = locate(layer, model)
    if found is None:
        raise checks.modules_not_found([layer])
    return checks.shared_layer(found)
