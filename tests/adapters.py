"""The life of a model with PEFT adapters, trained with a weighter, and once more by hand without this library's core.

`lived` and `lived_by_hand` do the same to the same model: between two steps each something happens to its adapters.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accel_weighting import Method, Statistics, Weighter

TASKS = ("a", "b")
LR = 0.05
ROWS = 12


class Net(nn.Module):
    """A trunk with two heads, one of them a single Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleDict(
            {"a": nn.Linear(6, 2), "b": nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = torch.tanh(self.trunk(x))
        return {task: head(z) for task, head in self.heads.items()}


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def data(step: int) -> Tensor:
    return torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"a": outputs["a"].square().mean(), "b": 3 * (outputs["b"] - 1).square().mean()}


# ---- what happens to adapters: from a model to the model that is trained on ------------------------------------------


def lora(**options: Any) -> Any:
    import peft

    given = {"target_modules": ["trunk", "a", "b.0", "b.2"], "init_lora_weights": False, "r": 2}
    return peft.LoraConfig(**(given | options))


def wrapped(model: Any, **options: Any) -> Any:
    import peft

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, lora(**options)).double()


def whole_heads(model: Any) -> Any:
    return wrapped(model, target_modules=["trunk"], modules_to_save=["a", "b"])


def second(model: Any) -> Any:
    torch.manual_seed(2)
    model.add_adapter("second", lora(r=3))
    model.double().set_adapter("second")
    return model


def back(model: Any) -> Any:
    model.set_adapter("default")
    return model


def merged_and_back(model: Any) -> Any:
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def deleted(model: Any) -> Any:
    model.delete_adapter("second")
    return model


def unloaded(model: Any) -> Any:
    """Merged into the layers, which are trained from there on."""
    return model.merge_and_unload().requires_grad_()


LIVES: dict[str, tuple[Callable[[Any], Any], ...]] = {
    "LoRA": (wrapped,),
    "DoRA": (lambda model: wrapped(model, use_dora=True),),
    "LoRA on one head": (lambda model: wrapped(model, target_modules=["trunk", "a"]),),
    "modules_to_save": (whole_heads,),
    "several adapters": (wrapped, second, back, deleted),
    "merged and back": (wrapped, merged_and_back),
    "merged and unloaded": (wrapped, unloaded),
    "modules_to_save, unloaded": (whole_heads, unloaded),
    "unloaded, wrapped again": (wrapped, unloaded, wrapped),
}


# ---- two ways of training --------------------------------------------------------------------------------------------


def stepped(model: Any) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= LR * p.grad
            p.grad = None


def ended(model: Any, seen: list[Any]) -> dict[str, Any]:
    return {"seen": seen, "parameters": {name: p.detach().clone() for name, p in model.named_parameters()}}


def lived(
    life: str,
    method: Method,
    built_at: int,
    trained_from: int = 0,
    accelerator: Any = None,
    rows: slice = slice(None),
    **options: Any,
) -> dict[str, Any]:
    """With a weighter that is built after so many events; before the first one at 0. Trained after each from then on.

    Args:
        life: One of `LIVES`.
        method: The weighter's.
        built_at: After how many events the weighter is built.
        trained_from: After how many the training begins, at the earliest.
        accelerator: That prepares the model before it is trained.
        rows: Of the batch, for this process.
        **options: For the weighter.
    """
    model: Any = make_net()
    weighter, seen, step = None, [], 0
    for n, event in enumerate((lambda model: model, *LIVES[life])):
        model = event(model)
        if event is unloaded:
            gc.collect()  # the wrapper that was taken off is gone
        if weighter is None and n >= built_at:
            named = {"heads": {task: f"heads.{task}" for task in TASKS}, "model": model}
            weighter = Weighter(method, TASKS, accelerator=accelerator, **{**named, **options})
        if weighter is None or n < trained_from:
            continue
        trained = model if accelerator is None else accelerator.prepare(model)
        for _ in range(2):
            weighter.backward(losses_of(trained(data(step)[rows])))
            stepped(model)
            statistics, step = weighter.statistics, step + 1
            seen.append(
                (statistics.losses, statistics.norms, statistics.gram, np.array(list(weighter.weights.values())))
            )
    return ended(model, seen)


def lived_by_hand(life: str, method: Method, built_at: int) -> dict[str, Any]:
    """The same by hand, trained from `built_at` on: `torch.autograd.grad` at z, and the method's update of that."""
    model: Any = make_net()
    weights, state = method.init(TASKS)
    seen, step = [], 0
    for n, event in enumerate((lambda model: model, *LIVES[life])):
        model = event(model)
        if n < built_at:
            continue
        base = getattr(model, "base_model", model)
        base = getattr(base, "model", base)
        for _ in range(2):
            z = torch.tanh(base.trunk(data(step)))
            leaf = z.detach().requires_grad_()
            losses = list(losses_of({task: base.heads[task](leaf) for task in TASKS}).values())
            g = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten() for loss in losses])
            on_losses = weights if method.acts_on == "losses" else np.ones(len(TASKS))
            sum(w * loss for w, loss in zip(on_losses, losses, strict=True)).backward()
            z.backward(torch.einsum("k,kn->n", torch.as_tensor(weights), g).view_as(z))
            stepped(model)
            L, gram = np.array([loss.item() for loss in losses]), (g @ g.T).numpy()
            weights, state = method.update(state, Statistics(L, [True, True], norms=np.sqrt(np.diag(gram)), gram=gram))
            seen.append((L, np.sqrt(np.diag(gram)), gram, weights))
            step += 1
    return ended(model, seen)


def assert_same(run: dict[str, Any], hand: dict[str, Any], tolerance: float = 1e-12) -> None:
    assert run["parameters"].keys() == hand["parameters"].keys() and len(run["seen"]) == len(hand["seen"]) > 1
    for found, expected in zip(run["seen"], hand["seen"], strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    for name, p in hand["parameters"].items():
        torch.testing.assert_close(run["parameters"][name], p, rtol=tolerance, atol=tolerance)
