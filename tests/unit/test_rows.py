"""Tasks that own rows of one tensor, in one process: norms by row, and inner products at a layer's weight."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from accel_weighting import IMTLG, MGDA, CoVWeighting, GradNorm, Method, RotoGrad, Weighter, measure
from tests.small import assert_close, most_bytes

TASKS = ["news", "code", "law"]
OWNERS = torch.tensor([0, 1, 2, 2, -1, 1, 0, 2])
OWNERS_OF_TOKENS = torch.stack([OWNERS, OWNERS.roll(1), OWNERS.roll(3)], 1)
EXACT = {"rtol": 1e-12, "atol": 1e-15}


class Net(nn.Module):
    """A trunk, one layer whose output is z, and one head for all tasks."""

    def __init__(self, layer: nn.Module | None = None, recompute: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Linear(3, 4), layer or nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)
        self.rows: Callable[[Tensor, Tensor], Tensor] = lambda z, owner: z
        self.recompute = recompute
        self.double()

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        if self.recompute is None:
            return self.top(x, owner)
        y: Tensor = checkpoint(self.top, x, owner, use_reentrant=self.recompute)
        return y

    def top(self, x: Tensor, owner: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv1d):
            self.z = self.layer(x.mT)
            return self.head(torch.sin(self.rows(self.z, owner)).mT)  # type: ignore[no-any-return]
        self.z = self.layer(x)
        return self.head(torch.sin(self.rows(self.z, owner)))  # type: ignore[no-any-return]


def inputs(step: int = 0) -> Tensor:
    return torch.randn(8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def losses_of(output: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """The mean over each task's own rows; a task without rows is left out."""
    owned = {task: output[owner == k] for k, task in enumerate(TASKS)}
    return {task: 3.0**k * (rows - k).square().mean() for k, (task, rows) in enumerate(owned.items()) if len(rows)}


def plain(net: Net) -> Net:
    """The same model without a weighter and without checkpoints."""
    twin = Net(copy.deepcopy(net.layer))
    twin.load_state_dict(net.state_dict())
    return twin


def by_hand(net: Net, owner: Tensor, at_layer: bool, step: int = 0, x: Tensor | None = None) -> Tensor:
    """`[K, …]`: every task's gradient at z, or at the layer's weight, by `torch.autograd.grad`."""
    twin = plain(net)
    losses = losses_of(twin(inputs(step) if x is None else x, owner), owner)
    place: Any = twin.layer.weight if at_layer else twin.z
    return torch.stack(
        [
            torch.autograd.grad(losses[task], place, retain_graph=True)[0].flatten()
            if task in losses
            else torch.zeros_like(place).flatten()
            for task in TASKS
        ]
    )


def on(net: Net, method: Method | None = None, **options: Any) -> Weighter:
    weighter = Weighter(method or GradNorm(), TASKS, model=net, **options)
    net.rows = weighter.rows
    return weighter


@pytest.mark.parametrize("owner", [OWNERS, OWNERS_OF_TOKENS, OWNERS.int()], ids=["samples", "tokens", "int32"])
@pytest.mark.parametrize("recompute", [None, False, True])
def test_norms_are_those_of_each_tasks_own_rows(owner: Tensor, recompute: bool | None) -> None:
    net = Net(recompute=recompute)
    weighter = on(net)
    for step in range(2):
        weights = weighter.weights
        net.zero_grad()
        weighter.backward(losses_of(net(inputs(step), owner), owner))
        G = by_hand(net, owner, at_layer=False, step=step)
        assert_close(weighter.statistics.norms, G.norm(dim=1), **EXACT)
        assert weighter.statistics.gram is None
        twin = plain(net)
        sum(weights[t] * loss for t, loss in losses_of(twin(inputs(step), owner), owner).items()).backward()  # type: ignore[union-attr]
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **EXACT)
    assert "[8, 3, 5]" in weighter.summary()


def test_z_is_handed_back_as_it_is() -> None:
    net = Net()
    weighter = on(net)
    z = torch.randn(8, 3, 5, requires_grad=True)
    assert weighter.rows(z, OWNERS) is z
    weighter.reset()
    net(inputs(), OWNERS)
    assert net.z._backward_hooks
    with weighter.freeze(), torch.no_grad():
        assert weighter.rows(z, OWNERS) is z


@pytest.mark.parametrize("kind", ["Linear", "Conv1d"])
@pytest.mark.parametrize("owner", [OWNERS, OWNERS_OF_TOKENS], ids=["samples", "tokens"])
def test_inner_products_at_a_layers_weight(kind: str, owner: Tensor) -> None:
    net = Net(nn.Conv1d(4, 5, 2) if kind == "Conv1d" else None)
    weighter = on(net, IMTLG(), shared_layer="layer")
    if kind == "Conv1d" and owner.ndim == 2:
        with pytest.raises(ValueError, match=r"the task of every sample: shape \[batch\]. Found \[8, 5\]"):
            net(inputs(), torch.zeros(8, 5, dtype=torch.int64))
        return
    for step in range(2):
        net.zero_grad()
        weighter.backward(losses_of(net(inputs(step), owner), owner))
        G = by_hand(net, owner, at_layer=True, step=step)
        assert_close(weighter.statistics.gram, G @ G.T, **EXACT)


def test_weights_on_the_shared_path_act_on_the_rows() -> None:
    """The head keeps its raw gradient; what goes on to the layer is each row's times its task's weight."""
    net = Net()
    weighter = on(net, MGDA(), shared_layer="layer")
    for step in range(3):
        weights = weighter.weights
        net.zero_grad()
        weighter.backward(losses_of(net(inputs(step), OWNERS), OWNERS))
        twin = plain(net)
        losses = losses_of(twin(inputs(step), OWNERS), OWNERS)
        raw = torch.autograd.grad(sum(losses.values()), twin.head.weight, retain_graph=True)[0]  # type: ignore[arg-type]
        weighed = sum(weights[task] * loss for task, loss in losses.items())
        shared = torch.autograd.grad(weighed, [twin.layer.weight, twin.embed.weight])  # type: ignore[arg-type]
        torch.testing.assert_close(net.head.weight.grad, raw, **EXACT)
        torch.testing.assert_close(net.layer.weight.grad, shared[0], **EXACT)  # type: ignore[union-attr]
        torch.testing.assert_close(net.embed.weight.grad, shared[1], **EXACT)
    assert max(weights.values()) > 0.4


def test_counts_and_absent_tasks() -> None:
    """Blocks with other numbers of each task's rows, one of them without one: the mean over all of its rows."""
    net = Net()
    weighter = on(net)
    for block in (slice(0, 3), slice(3, 8)):
        owner = OWNERS[block]
        items = {task: int((owner == k).sum()) for k, task in enumerate(TASKS) if (owner == k).any()}
        losses = losses_of(net(inputs()[block], owner), owner)
        (weighter.combine(losses, num_items=items, last=block.stop == 8) / 2).backward()
        weighter.step()
    assert_close(weighter.statistics.norms, by_hand(net, OWNERS, at_layer=False).norm(dim=1), **EXACT)
    owner = OWNERS.where(OWNERS != 1, -1)
    net.zero_grad()
    weighter.backward(losses_of(net(inputs(), owner), owner))
    assert weighter.statistics.norms[1] == 0 and not weighter.statistics.present[1]


@pytest.mark.parametrize("still", ["frozen", "evaluation", "paused", "between updates"])
def test_where_nothing_is_measured_z_passes(still: str) -> None:
    net = Net()
    weighter = on(net, update_every=2)
    weighter.backward(losses_of(net(inputs(), OWNERS), OWNERS))
    before = weighter.statistics
    net.zero_grad()
    if still == "frozen":
        weighter.freeze()
    with torch.set_grad_enabled(still != "evaluation"):
        output = net(inputs(1), OWNERS)
    assert not net.z._backward_hooks
    if still == "paused":
        with weighter.paused():
            weighter.backward(losses_of(output, OWNERS))
    elif still != "evaluation":
        weighter.backward(losses_of(output, OWNERS))
    assert weighter.statistics is before


class Largest(TorchDispatchMode):
    """The most elements that an operator gave which is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("at_layer", [False, True])
def test_a_large_tensor_is_read_in_pieces(at_layer: bool) -> None:
    torch.manual_seed(0)
    g, a = torch.randn(64, 128, 256), torch.randn(64, 128, 32)
    index = torch.randint(4, (64, 128))
    with Largest() as largest:
        if at_layer:
            from accel_weighting.layers import Layer

            found = measure.layer_gradients_of_rows(g, index, 3, Layer.of(nn.Linear(32, 256)), a)
        else:
            found = measure.squares_of_rows(g, index, 3)
    rows = [torch.where((index == k)[..., None], g, 0).double() for k in range(3)]
    expected = [x.flatten(0, 1).T @ a.double().flatten(0, 1) if at_layer else x.square().sum() for x in rows]
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if at_layer else {"rtol": 1e-9, "atol": 0.0}
    torch.testing.assert_close(found, torch.stack(expected), **tolerance)
    assert largest.elements <= g.numel() / 4


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    net = Net()
    weighter = on(net)
    compiled = torch.compile(net, backend="aot_eager")
    for step in range(2):
        net.zero_grad()
        weighter.backward(losses_of(compiled(inputs(step), OWNERS), OWNERS))
        G = by_hand(net, OWNERS, at_layer=False, step=step)
        assert_close(weighter.statistics.norms, G.norm(dim=1), rtol=1e-10, atol=0)


def test_losses_on_derivatives_are_refused_by_methods_that_compare_gradients() -> None:
    for method in (GradNorm(), CoVWeighting()):
        net = Net()
        weighter = on(net, method)
        x = inputs().requires_grad_()
        losses = losses_of(net(x, OWNERS), OWNERS)
        slope = torch.autograd.grad(losses["news"], x, create_graph=True)[0]
        losses["news"] = losses["news"] + slope.square().sum()
        if isinstance(method, GradNorm):
            with pytest.raises(RuntimeError, match="derivatives that were taken through the branch"):
                weighter.backward(losses)
        else:
            weighter.backward(losses)
            assert weighter.statistics.norms is None


# ---- in words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "error", "text"),
    [
        (OWNERS.double(), TypeError, r"must be an integer tensor.* Found a tensor of torch.float64"),
        (OWNERS > 0, TypeError, r"Found a tensor of torch.bool"),
        ([0, 1], TypeError, "Found list"),
        (OWNERS[:7], ValueError, r"`z` has the shape \[8, 3, 5\]. Found \[7\]"),
        (OWNERS_OF_TOKENS[:, :2], ValueError, r"Found \[8, 2\]"),
        (torch.zeros(8, 3, 5, dtype=torch.int64), ValueError, r"Found \[8, 3, 5\]"),
        (torch.tensor(0), ValueError, r"Found \[\]"),
        (OWNERS + 1, ValueError, "the place of a task, 0 to 2. Found 3"),
        (OWNERS - 1, ValueError, "Found -2"),
    ],
)
def test_owners_that_are_wrong(owner: Any, error: type[Exception], text: str) -> None:
    net = Net()
    on(net)
    with pytest.raises(error, match=text):
        net(inputs(), owner)


def test_what_does_not_go_with_rows() -> None:
    z = torch.randn(8, 5, requires_grad=True)
    net = Net()
    heads: Any = dict.fromkeys(TASKS)
    parts = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
    cases: list[tuple[Any, type[Exception], str]] = [
        (Weighter(MGDA(), TASKS), ValueError, "MGDA.* needs the inner products .* Give `shared_layer`"),
        (Weighter(RotoGrad(), TASKS), ValueError, "RotoGrad.* rotates"),
        (Weighter(GradNorm(), TASKS, heads={**heads, **parts}), RuntimeError, "built with `heads`"),
        (
            Weighter(GradNorm(), TASKS, model=net, shared_parameters=["head.weight"]),
            RuntimeError,
            "built with `shared_parameters`",
        ),
    ]
    for weighter, error, text in cases:
        with pytest.raises(error, match=text):
            weighter.rows(z, OWNERS)
    weighter = Weighter(GradNorm(), TASKS)
    with pytest.raises(TypeError, match=r"one floating-point tensor `z`\. Found tuple"):
        weighter.rows((z,), OWNERS)  # type: ignore[arg-type]
    weighter.rows(z, OWNERS)
    with pytest.raises(RuntimeError, match="called twice with one `z`"):
        weighter.rows(z, OWNERS)


@pytest.mark.parametrize("wrong", ["no rows", "no gradient"])
def test_a_loss_without_rows_is_named(wrong: str) -> None:
    net = Net()
    weighter = on(net)
    if wrong == "no gradient":
        net.rows = lambda z, owner: weighter.rows(z.detach(), owner)
        text = "does not depend on the branch|do not depend on the branch"
    else:
        net.rows = lambda z, owner: weighter.rows(z, owner.where(owner != 1, -1))
        text = "Loss `code` was given, and no row of the tensor .* belongs to it"
    with pytest.raises(RuntimeError, match=text):
        weighter.backward(losses_of(net(inputs(), OWNERS), OWNERS))


def test_an_owner_that_cannot_be_looked_at_holds_the_weights() -> None:
    """On a device other than the CPU nobody waits for it: here the measurement itself."""
    g = torch.randn(8, 5)
    for index in (OWNERS + 2, OWNERS - 5):
        assert measure.squares_of_rows(g, index, 3).isnan().all()


# ---- losses that read rows of another task ---------------------------------------------------------------------------


def crossed_losses(output: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """`code` forgot its mask."""
    return losses_of(output, owner) | {"code": output.square().mean()}


@pytest.mark.parametrize("owner", [OWNERS, OWNERS_OF_TOKENS], ids=["samples", "tokens"])
@pytest.mark.parametrize("recompute", [None, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(GradNorm(), {}), (IMTLG(), {"shared_layer": "layer"}), (MGDA(), {"shared_layer": "layer"})],
    ids=["GradNorm", "IMTLG at a layer", "MGDA at a layer"],
)
def test_a_loss_that_reads_rows_of_others_is_refused_by_names(
    owner: Tensor, recompute: bool | None, method: Method, options: Any
) -> None:
    net = Net(recompute=recompute)
    weighter = on(net, method, **options)
    with pytest.raises(RuntimeError, match="loss `code` comes to rows of `news`, the gradient") as e:
        weighter.backward(crossed_losses(net(inputs(), owner), owner))
    said = (f"{type(method).__name__}() compares", "rows of `law`", "its mask")
    assert all(words in str(e.value) for words in said)
    assert "loss `news`" not in str(e.value) and "loss `law`" not in str(e.value)
    assert all(p.grad is None for p in net.parameters())
    weighter.reset()
    weighter.backward(losses_of(net(inputs(), owner), owner))  # and it goes on


def test_what_mixes_rows_behind_them_is_refused() -> None:
    net = Net()
    net.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(15), nn.Linear(15, 2)).double()  # type: ignore[assignment]
    weighter = on(net)
    with pytest.raises(RuntimeError, match=r"loss `news` comes to rows of `code`.* a batch norm"):
        weighter.backward(losses_of(net(inputs(), OWNERS), OWNERS))


def test_rows_that_come_later_are_looked_at_then() -> None:
    """The first batches hold rows of one task each; a loss that reads all rows is seen where others' come."""
    net = Net()
    weighter = on(net)
    for k, task in enumerate(TASKS):
        owner = torch.full((8,), k)
        weighter.backward({task: net(inputs(k), owner).square().mean()})
        net.zero_grad()
    with pytest.raises(RuntimeError, match="loss `code` comes to rows of `news`"):
        weighter.backward(crossed_losses(net(inputs(), OWNERS), OWNERS))


def test_a_gradient_at_rows_of_nobody_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    weighter = on(net)
    for step in range(2):
        output = net(inputs(step), OWNERS)
        law = output[(OWNERS == 2) | (OWNERS == -1)].square().mean()
        weighter.backward(losses_of(output, OWNERS) | {"law": law})
        net.zero_grad()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "The gradient of loss `law` also comes to rows that `owner`" in said[0]
    assert "loss `law` reaches rows of no task" in weighter.summary()


def test_what_passes_the_rows_by_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    weighter = on(net)
    early = torch.tanh(net.embed(inputs()))
    losses = losses_of(net.top(early, OWNERS), OWNERS)
    weighter.backward(losses | {"law": losses["law"] + early.square().mean()})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "around `z` in `weighter.rows(z, owner)` (loss `law` at the trunk's Tanh)" in said[0]


SEPARATE = {
    "rows taken out": losses_of,
    "a mask": lambda output, owner: {
        task: (output.square().mean((1, 2)) * (owner == k)).sum() for k, task in enumerate(TASKS)
    },
    "zeros in place of the others": lambda output, owner: {
        task: output.where((owner == k)[:, None, None], 0.0).square().mean() for k, task in enumerate(TASKS)
    },
    "ignore_index": lambda output, owner: {
        task: nn.functional.cross_entropy(
            output.flatten(0, 1), torch.where(owner == k, 1, -100).repeat_interleave(3), ignore_index=-100
        )
        for k, task in enumerate(TASKS)
    },
    "stacked": lambda output, owner: torch.stack(
        [(output.square().mean((1, 2)) * (owner == k)).sum() for k in range(3)]
    ),
    "an infinite slope beside": lambda output, owner: {
        task: (output.square().mean((1, 2)) * (owner == k) * 0).sqrt().sum() + output[owner == k].sum()
        for k, task in enumerate(TASKS)
    },
}


@pytest.mark.parametrize("how", SEPARATE)
def test_losses_of_their_own_rows_raise_no_alarm(how: str, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    weighter = on(net)
    losses: Any = SEPARATE[how]
    weighter.combine(losses(net(inputs(), OWNERS), OWNERS))
    assert_nothing_was_found(weighter)
    assert not caplog.records


def assert_nothing_was_found(weighter: Weighter) -> None:
    found = weighter._audit.findings  # type: ignore[union-attr]
    assert found.visited and not found.lines()


@pytest.mark.parametrize("at_layer", [False, True])
def test_absent_tasks_and_accumulation_raise_no_alarm(at_layer: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    weighter = on(net, **({"method": IMTLG(), "shared_layer": "layer"} if at_layer else {}))
    for block in (slice(0, 2), slice(2, 5), slice(5, 8)):
        owner = OWNERS_OF_TOKENS[block].where(OWNERS_OF_TOKENS[block] != 2, -1)
        (weighter.combine(losses_of(net(inputs()[block], owner), owner), last=block.stop == 8) / 3).backward()
        weighter.step()
        assert_nothing_was_found(weighter)
    assert not caplog.records


def test_a_loss_whose_count_is_0_may_be_computed_from_anything() -> None:
    net = Net()
    weighter = on(net)
    owner = OWNERS.where(OWNERS != 1, -1)
    items = {"news": 2, "code": 0, "law": 3}
    weighter.backward(crossed_losses(net(inputs(), owner), owner), num_items=items)
    assert_nothing_was_found(weighter)


def test_every_loss_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (asked.append(1), grad(*args, **kwargs))[1])
    net = Net()
    weighter = on(net)
    counts = []
    for owner in (OWNERS, OWNERS.roll(1), OWNERS_OF_TOKENS):
        weighter.backward(losses_of(net(inputs(), owner), owner))
        net.zero_grad()
        counts.append(len(asked))
    assert counts == [3, 3, 3]


def test_what_retain_grad_keeps_is_that_of_the_backward() -> None:
    net = Net()
    weighter = on(net)
    net.rows = lambda z, owner: (z.retain_grad(), weighter.rows(z, owner))[1]
    losses = losses_of(net(inputs(), OWNERS), OWNERS)
    losses["code"].retain_grad()
    weighter.backward(losses)
    torch.testing.assert_close(net.z.grad.flatten(), by_hand(net, OWNERS, at_layer=False).sum(0), **EXACT)  # type: ignore[union-attr]
    assert float(losses["code"].grad) == 1  # type: ignore[arg-type]


class InPlace(torch.autograd.Function):
    """Changes what it saved, as fused losses do, and does not bear to run twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return ctx.slope.mul_(g)  # type: ignore[no-any-return]


def test_what_may_not_bear_to_be_asked_is_not_and_that_is_said() -> None:
    net = Net()
    weighter = on(net)
    output = InPlace.apply(net(inputs(), OWNERS))  # type: ignore[no-untyped-call]
    weighter.backward(losses_of(output, OWNERS))
    twin = plain(net)
    sum(losses_of(twin(inputs(), OWNERS).square(), OWNERS).values()).backward()  # type: ignore[union-attr]
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **EXACT)
    assert weighter._audit.findings.unasked == dict.fromkeys(TASKS, "InPlace")  # type: ignore[union-attr]
    assert "it is not known whose rows loss `law` reads, because of InPlace" in weighter.summary()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_parts_behind_the_rows_are_said_to_hide() -> None:
    torch._dynamo.reset()
    net = Net()
    net.head = torch.compile(net.head, backend="aot_eager")  # type: ignore[assignment]
    weighter = on(net)
    weighter.backward(losses_of(net(inputs(), OWNERS), OWNERS))
    found = weighter._audit.findings  # type: ignore[union-attr]
    assert not found.crossed and found.unasked.keys() == set(TASKS)
    assert "it is not known whose rows loss `law` reads, because of CompiledFunction" in weighter.summary()
    net, trunk = Net(), torch.compile(nn.Linear(3, 4).double(), backend="aot_eager")
    net.embed = trunk  # type: ignore[assignment]
    weighter = on(net)
    weighter.backward(losses_of(net(inputs(), OWNERS), OWNERS))  # what is compiled before them hides nothing
    assert_nothing_was_found(weighter)
    with pytest.raises(RuntimeError, match="comes to rows of"):
        weighter._audit._met.clear()  # type: ignore[union-attr]
        weighter.backward(crossed_losses(net(inputs(), OWNERS), OWNERS))


def test_checkpoints_of_the_reentrant_kind_are_said_to_hide() -> None:
    net = Net()
    weighter = on(net)
    z = net.rows(net.layer(torch.tanh(net.embed(inputs()))), OWNERS)
    weighter.backward(losses_of(checkpoint(net.head, z, use_reentrant=True), OWNERS))
    assert weighter._audit.findings.unasked == dict.fromkeys(TASKS, "CheckpointFunction")  # type: ignore[union-attr]


def test_a_gradient_is_looked_at_in_pieces_and_infinity_is_no_sign() -> None:
    g, index = torch.zeros(64, 128, 256), torch.randint(3, (64, 128))
    with Largest() as largest:
        assert not measure.rows_touched(g, index, 3).any()
    assert largest.elements <= g.numel() / 4
    g[5, 7, 3], index[5, 7] = 1e-30, 3
    g[6, 7, 3], index[6, 7] = torch.nan, 1
    assert measure.rows_touched(g, index, 3).tolist() == [False, False, False, True]


# ---- memory ----------------------------------------------------------------------------------------------------------

BATCH, LENGTH, WIDTH = 8, 256, 128
Z = BATCH * LENGTH * WIDTH * 4


def peak(method: Method | None, words: int, at_layer: bool = False) -> int:
    """The most bytes of tensors that were alive at one moment of three steps, the audited first one included."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    owner = torch.randint(-1, 3, (BATCH, LENGTH))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trunk, layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), nn.Linear(WIDTH, WIDTH)
        head, x = nn.Linear(WIDTH, words), torch.randn(BATCH, LENGTH, WIDTH)
        weighter = Weighter(method, TASKS, shared_layer=layer if at_layer else None) if method else None
        optimizer = torch.optim.SGD([*trunk.parameters(), *layer.parameters(), *head.parameters()], 1e-4)
        for _ in range(3):
            z = layer(trunk(x))
            if weighter is not None:
                z = weighter.rows(z, owner)
            output = head(z)
            del z
            losses = {task: (output[owner == k] - k).square().mean() for k, task in enumerate(TASKS)}
            del output
            if weighter is not None:
                weighter.backward(losses)
            else:
                sum(losses.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    return most_bytes(profiler)


@pytest.mark.parametrize(
    ("method", "words", "at_layer"),
    [("GradNorm()", 8, False), ("GradNorm()", 512, False), ("CoVWeighting()", 8, False), ("IMTLG()", 8, True)],
)
def test_memory_is_that_of_a_plain_loop(method: str, words: int, at_layer: bool) -> None:
    """At a layer's weight the matrices of all tasks, which go into the all-reduce, come on top."""
    code = (
        "from accel_weighting import *; from tests.unit.test_rows import peak\n"
        f"print(peak(None, {words}), peak(None, {words}), peak({method}, {words}, {at_layer}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    plain, again, ours = map(int, done.stdout.split()[-3:])
    assert abs(again - plain) < 0.01 * Z
    matrices = len(TASKS) * WIDTH * WIDTH * 8 if at_layer else 0
    assert ours - plain <= 0.1 * Z + matrices, (ours - plain) / Z
