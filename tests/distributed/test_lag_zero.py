"""`lag=0`: the micro-batch itself decides, in its own backward, whatever the number of processes it is divided over.

Every run is compared with `by_hand`: no weighter, no join, one process, `torch.autograd.grad` for every task, the
method's formula on the gradients of all blocks together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accel_weighting import MGDA, GeometricLoss, GradNorm, Method, RotoGrad, Statistics, Weighter
from tests.methods.catalogue import CATALOGUE
from tests.ranks import accelerator_for, run_ranks
from tests.scenarios import Cell, Run, assert_ranks_agree, cut, net, train_all
from tests.small import WIDTH, Net, batch, names, task_losses

METHODS: dict[str, Method] = {row.id: row.build(names(3)) for row in CATALOGUE if row.lag_0}
DECIDES = Cell(MGDA(normalize="norm"), steps=4, options={"lag": 0}, interleaved=True)
ONE_BATCH = {name: replace(DECIDES, method=method) for name, method in METHODS.items()}
TWO_BATCHES = {
    name: replace(DECIDES, method=METHODS[name], micro=2)
    for name in (
        "mgda norm",
        "pcgrad",
        "nash-mtl",
        "balancer shares",
        "rotograd",
        "rotograd magnitudes",
        "gls",
        "stch warmup",
        "rlw",
    )
}
CHECKPOINTED = {
    f"{kind} checkpoint, {name}": replace(DECIDES, method=METHODS[name], checkpoint=kind, micro=micro)
    for kind, (name, micro) in {
        "trunk": ("mgda norm", 2),
        "trunk reentrant": ("rotograd", 2),
        "join": ("rotograd", 2),
        "join reentrant": ("mgda norm", 2),
    }.items()
}


# ---- the reference ------------------------------------------------------------------------------------------------


def without_rotation(model: Net, x: Tensor) -> Tensor:
    """The shared representation."""
    z = model.embed(x)
    for block in model.blocks:
        z = block(z)
    return model.shared(z)


@dataclass
class Part:
    """One block: its shared representation, losses, and gradients at z, `[K, rows * width]`."""

    z: Tensor
    losses: dict[str, Tensor]
    gradients: Tensor


@dataclass
class Trajectory:
    """What `by_hand` gives."""

    weights: list[Tensor] = field(default_factory=list)  # after every window
    applied: list[Tensor] = field(default_factory=list)  # in every micro-batch
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of the model, in every window
    parameters: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def look(model: Net, x: Tensor, y: Tensor, tasks: Sequence[str], R: Tensor | None) -> Part:
    z = without_rotation(model, x)
    seen = z.detach().requires_grad_()
    inputs = {task: seen if R is None else seen @ R[k].T for k, task in enumerate(tasks)}
    losses = task_losses({task: head(inputs[task]) for task, head in model.heads.items()}, y)
    gradients = [torch.autograd.grad(losses[task], seen, retain_graph=True)[0].flatten() for task in tasks]
    return Part(z, losses, torch.stack(gradients))


def statistics(parts: Sequence[Part], here: Sequence[Sequence[bool]], step: int, rotates: bool) -> Statistics:
    """Of all blocks together; `here[b][k]`: whether task k is in block b."""
    there = torch.tensor(here, dtype=torch.float64)
    G = torch.cat([part.gradients * on[:, None] for part, on in zip(parts, there, strict=True)], 1) / len(parts)
    L = torch.stack([torch.stack(list(part.losses.values())).detach() for part in parts])
    present = there.sum(0) > 0
    moments = None
    if rotates:
        rows = G.view(len(G), -1, WIDTH)
        i, j = torch.triu_indices(WIDTH, WIDTH, 1)
        S = [rows[a].T @ rows[b] for a, b in itertools.combinations(range(len(G)), 2)]
        moments = torch.stack([(s - s.T)[i, j] for s in S])
    return Statistics(
        (L * there).sum(0) / there.sum(0).clamp(min=1), present, G.norm(dim=1), G @ G.T, moments, len(parts), step
    )


def by_hand(cell: Cell, processes: int = 1) -> Trajectory:
    """The run of a cell; a micro-batch is what it has on all processes together."""
    assert cell.method is not None
    tasks, method, model, result = names(cell.tasks), cell.method, net(cell), Trajectory()
    weights, state = method.init(tasks)
    rotates = "moments" in method.needs
    if rotates:
        state = method.widen(state, WIDTH)  # type: ignore[attr-defined]
    blocks = processes * cell.micro
    for step in range(cell.steps):
        x, y = batch(step, cell.tasks, cell.dtype)
        R: Any = state.get("rotations")
        parts = [look(model, x[rows], y[rows], tasks, R) for rows in cut(cell, blocks)]
        gone = {(b, task) for s, b, task in cell.absent if s in (None, step)}
        here = [[(b, task) not in gone for task in tasks] for b in range(blocks)]
        model.zero_grad()
        for first in range(0, blocks, processes):
            these = range(first, first + processes)
            saw = statistics([parts[b] for b in these], [here[b] for b in these], step, rotates=False)
            w = torch.from_numpy(np.array(method.weigh(state, saw)))
            result.applied.append(w)
            for b in these:
                part, on = parts[b], torch.tensor(here[b], dtype=cell.dtype) / blocks
                on_losses = torch.as_tensor(state.get("loss_weights", np.ones(len(tasks))))
                heads = w if method.acts_on == "losses" else on_losses
                (heads * on @ torch.stack(list(part.losses.values()))).backward()
                part.z.backward((w * on_losses * on @ part.gradients).view_as(part.z))
        result.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for p in model.parameters():
                p -= cell.lr * p.grad  # type: ignore[operator]
        weights, state = method.update(state, statistics(parts, here, step, rotates))
        result.weights.append(torch.from_numpy(weights))
    result.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    result.state = {key: torch.as_tensor(value) for key, value in state.items()}
    return result


def far(run: Run, expected: Trajectory, limit: float = 1e-12) -> list[str]:
    """What of a run is not as it was by hand."""
    wrong = []
    for step, (found, wanted) in enumerate(zip(run.weights, expected.weights, strict=True)):
        if (found - wanted).abs().max() > limit * wanted.abs().max():
            wrong.append(f"weights of step {step}: {found.tolist()}, not {wanted.tolist()}")
    for name, wanted in expected.parameters.items():
        if (run.parameters[name] - wanted).abs().max() > limit * wanted.abs().max():
            wrong.append(name)
    for key, wanted in expected.state.items():
        found, wanted = run.state[key].double(), wanted.double()
        if found.shape != wanted.shape or (found - wanted).abs().max() > limit * max(1.0, wanted.abs().max().item()):
            wrong.append(f"state {key}")
    return wrong


@pytest.fixture(scope="module")
def expected() -> dict[str, Trajectory]:
    return {name: by_hand(cell) for name, cell in {**ONE_BATCH, **by_two(TWO_BATCHES), **CHECKPOINTED}.items()}


def by_two(cells: dict[str, Cell]) -> dict[str, Cell]:
    return {f"{name}, 2 micro-batches": cell for name, cell in cells.items()}


# ---- the algorithm ------------------------------------------------------------------------------------------------


def shared_gradient(kind: str, losses: list[Tensor], z: Tensor, first: list[float]) -> Tensor:
    """The gradient at z by the paper's own words, for two tasks."""
    G = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    if kind == "gls":
        return torch.autograd.grad((losses[0] * losses[1]).sqrt(), z)[0]
    if kind == "si":
        return torch.autograd.grad(losses[0].log() + losses[1].log(), z)[0]
    dot, squares = (G[0] * G[1]).sum(), [g.square().sum() for g in G]
    if kind == "mgda":  # Sener and Koltun, eq. 4
        gamma = (((G[1] - G[0]) * G[1]).sum() / (G[0] - G[1]).square().sum()).clamp(0, 1)
        return gamma * G[0] + (1 - gamma) * G[1]
    if kind == "pcgrad":
        if dot >= 0:
            return G[0] + G[1]
        return G[0] - dot / squares[1] * G[1] + G[1] - dot / squares[0] * G[0]
    assert kind == "rotograd magnitudes"
    n = [square.sqrt() for square in squares]
    alpha = [n[k] / (first[k] or n[k]) for k in (0, 1)]
    C = (alpha[0] * n[0] + alpha[1] * n[1]) / (alpha[0] + alpha[1])
    return C * (G[0] / n[0] + G[1] / n[1])


@pytest.mark.parametrize("kind", ["mgda", "pcgrad", "rotograd magnitudes", "gls", "si"])
def test_without_accumulation_it_is_the_papers_algorithm(kind: str) -> None:
    cell = Cell(METHODS[kind], tasks=2, options={"lag": 0})
    model = net(cell)
    model.heads["t1"].load_state_dict(model.heads["t0"].state_dict())
    weighter = Weighter(METHODS[kind], names(2), heads=dict(model.heads), lag=0)
    first, conflicts = [0.0, 0.0], 0
    for step in range(6):
        x, y = batch(step, 2, cell.dtype)
        y[:, 1] = y[:, 0] * (-1) ** step  # from step to step the tasks agree and disagree
        losses = task_losses(model(x), y)
        model.zero_grad()
        weighter.backward(losses)
        z = without_rotation(model, x)
        seen = z.detach().requires_grad_()
        first = [0.0, 0.0] if step == 2 else first  # the burn-in is over
        again = list(task_losses({task: head(seen) for task, head in model.heads.items()}, y).values())
        g = shared_gradient(kind, again, seen, first)
        trunk = [p for name, p in model.named_parameters() if not name.startswith("heads")]
        for p, wanted in zip(trunk, torch.autograd.grad(z, trunk, g), strict=True):
            torch.testing.assert_close(p.grad, wanted, rtol=1e-10, atol=1e-12)
        gram = weighter.statistics.gram
        conflicts += bool(gram[0, 1] < 0)
        first = weighter.statistics.norms.tolist() if step in (0, 2) else first
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-2 * p.grad
    assert 0 < conflicts < 6


@pytest.mark.parametrize("name", ONE_BATCH)
def test_gradients_of_the_model_are_those_written_by_hand(name: str, expected: dict[str, Trajectory]) -> None:
    cell, wanted = ONE_BATCH[name], expected[name]
    assert cell.method is not None
    model = net(cell)
    weighter = Weighter(cell.method, names(cell.tasks), heads=dict(model.heads), lag=0)
    for step in range(cell.steps):
        x, y = batch(step, cell.tasks, cell.dtype)
        model.zero_grad()
        weighter.backward(task_losses(model(x), y))
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad, wanted.gradients[step][key], rtol=1e-10, atol=1e-10, msg=f"{step} {key}")
        with torch.no_grad():
            for p in model.parameters():
                p -= cell.lr * p.grad


# ---- on several processes -------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("plain", 1, {}),
    "ddp": ("ddp", 2, {}),
    "ddp, one process": ("ddp", 1, {}),
    "ddp, three processes": ("ddp", 3, {}),
    "ddp find_unused": ("ddp", 2, {"ddp": {"find_unused_parameters": True}}),
    "ddp static_graph": ("ddp", 2, {"ddp": {"static_graph": True}}),
    "fsdp2": ("fsdp2", 2, {}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_any_number_of_processes_is_one_process_on_their_rows_together(
    kind: str, expected: dict[str, Trajectory], tmp_path
) -> None:
    engine, world, setup = RUNS[kind]
    cells = ONE_BATCH | by_two(TWO_BATCHES) | CHECKPOINTED
    if "static_graph" in setup.get("ddp", {}):  # torch: counts the hooks of one backward, breaks when it accumulates
        cells = ONE_BATCH | {name: replace(cell, micro=1) for name, cell in CHECKPOINTED.items()}
        expected = expected | {name: by_hand(cells[name]) for name in CHECKPOINTED}
    if "find_unused_parameters" in setup.get("ddp", {}):  # torch: marks a parameter ready twice
        cells = {name: cell for name, cell in cells.items() if not cell.checkpoint.endswith("reentrant")}
    given = [replace(cell, setup=setup) for cell in cells.values()]
    ranks = run_ranks(train_all, world, tmp_path, engine, given, timeout=200)
    wrong = {}
    for i, (name, cell) in enumerate(cells.items()):
        run = ranks[0][i]
        assert run.world == world and ("FSDP" in run.distributed_type) == (engine == "fsdp2")
        assert_ranks_agree([rank[i] for rank in ranks])
        if found := far(run, expected[name]):
            wrong[name] = found
        assert run.micro_batches == [world * cell.micro] * cell.steps, "the state advances once per window"
        wanted = cell.steps * (cell.micro + 1) if world > 1 else 0
        assert run.collectives == wanted, f"{name}: not one collective per micro-batch and one per window"
    assert not wrong


def test_micro_batches_decide_for_themselves(expected: dict[str, Trajectory]) -> None:
    """By its meaning lag=0 is not invariant to accumulation: the references differ."""
    one, two = expected["mgda norm"], expected["mgda norm, 2 micro-batches"]
    assert len(two.applied) == 2 * len(one.applied)
    assert (two.applied[0] - two.applied[1]).abs().max() > 1e-3
    assert (one.parameters["embed.weight"] - two.parameters["embed.weight"]).abs().max() > 1e-6


# Tasks that are not everywhere: in blocks 0 to 5, of which a process has every second one.
SOMEWHERE = {
    "absent on a process": ((None, 1, "t1"),),
    "absent on another and elsewhere": ((1, 0, "t0"), (1, 1, "t2"), (2, 1, "t0"), (2, 1, "t1")),
    "absent everywhere": ((2, 0, "t1"), (2, 1, "t1")),
    "nobody on a process": ((2, 1, "t0"), (2, 1, "t1"), (2, 1, "t2")),
}
ABSENT = {
    f"{where}, {name}, {micro} micro-batches": replace(DECIDES, method=METHODS[name], absent=absent, micro=micro)
    for (where, absent), name, micro in itertools.product(
        SOMEWHERE.items(), ("mgda norm", "config", "rotograd", "rotograd magnitudes", "gls"), (1, 2)
    )
}


@pytest.mark.parametrize(
    ("engine", "absence"), [("ddp", "zero"), ("fsdp2", "zero"), ("ddp", "leave")], ids=lambda value: value
)
def test_different_tasks_on_different_processes_neither_wait_nor_mix(engine: str, absence: str, tmp_path) -> None:
    setup = {"ddp": {"find_unused_parameters": True}} if absence == "leave" else {}
    cells = {name: replace(cell, absence=absence, setup=setup) for name, cell in ABSENT.items()}
    if absence == "leave":  # there have to be losses
        cells = {name: cell for name, cell in cells.items() if not name.startswith("nobody")}
    ranks = run_ranks(train_all, 2, tmp_path, engine, list(cells.values()), timeout=200)
    wrong = {}
    for i, (name, cell) in enumerate(cells.items()):
        assert_ranks_agree([rank[i] for rank in ranks])
        if found := far(ranks[0][i], by_hand(cell, processes=2)):
            wrong[name] = found
        assert ranks[0][i].collectives == cell.steps * (cell.micro + 1)
    assert not wrong


# ---- what goes wrong ------------------------------------------------------------------------------------------------

HALF = replace(DECIDES, steps=6, dtype=torch.float32, setup={"mixed_precision": "fp16", "loss_scale": 256.0})
OVERFLOWS = {
    "tap": replace(HALF, overflow=((2, 1, "tap"),)),
    "tap, rotograd": replace(HALF, method=METHODS["rotograd"], overflow=((2, 1, "tap"),)),
    "loss": replace(HALF, method=GeometricLoss(), micro=2, overflow=((2, 3, "loss"),)),
}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_what_is_not_finite_on_one_process_holds_the_weights_on_all(engine: str, tmp_path) -> None:
    ranks = run_ranks(train_all, 2, tmp_path, engine, list(OVERFLOWS.values()), timeout=100)
    for i, name in enumerate(OVERFLOWS):
        run = ranks[0][i]
        assert run.skipped == [step == 2 for step in range(6)], name
        assert run.statistics_steps == {0, 1, 3, 4, 5}, name
        assert torch.equal(run.weights[2], run.weights[1]) and not torch.equal(run.weights[3], run.weights[2]), name
        assert all(torch.isfinite(p).all() for p in run.parameters.values()), name
        assert_ranks_agree([rank[i] for rank in ranks])


def two_forwards() -> str:
    """A step of two forwards and one backward; what it ends in."""
    accelerator = accelerator_for("ddp", ddp={"find_unused_parameters": True})
    model = accelerator.prepare(net(DECIDES))
    heads = dict(accelerator.unwrap_model(model).heads)
    weighter = Weighter(MGDA(), names(3), accelerator=accelerator, heads=heads, lag=0)
    x, y = batch(0, 3, torch.float64)
    a, b = task_losses(model(x[:18]), y[:18]), task_losses(model(x[18:]), y[18:])
    try:
        weighter.backward({task: a[task] + b[task] for task in a})
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_gradients_that_meet_twice_are_an_error_on_every_process(tmp_path) -> None:
    messages = run_ranks(two_forwards, 2, tmp_path)
    assert all("must meet once" in message and "`lag = 1`" in message for message in messages), messages


def test_lag_0_is_refused_where_it_is_not_possible() -> None:
    model = net(DECIDES)
    with pytest.raises(ValueError, match="lag = 0` is not possible"):
        Weighter(GradNorm(), names(3), heads=dict(model.heads), lag=0)
    with pytest.raises(ValueError, match="leave `shared_layer` out"):
        Weighter(MGDA(), names(3), heads=dict(model.heads), shared_layer=model.shared, lag=0)


# ---- again and again ------------------------------------------------------------------------------------------------


def many_steps(engine: Any, steps: int, repetitions: int) -> list[list[float]]:
    """The last weights, and the sum of the parameters, of the same run many times over."""
    found = []
    for _ in range(repetitions):
        fsdp = {"transformer_cls_names_to_wrap": ["Tanh"]} if engine == "fsdp2" else None
        accelerator = accelerator_for(engine, ddp={"bucket_cap_mb": 1} if engine == "ddp" else None, fsdp=fsdp)
        torch.manual_seed(0)
        model: Any = Tiny()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
        tiny = accelerator.unwrap_model(model)
        heads = {"a": tiny.a, "b": tiny.b}
        weighter = Weighter(RotoGrad(rotate=False), ["a", "b"], accelerator=accelerator, heads=heads, lag=0)
        torch.manual_seed(accelerator.process_index)
        x = torch.randn(8, 2, 4)
        for step in range(steps):
            a, b = model(x[step % 8])
            weighter.backward({"a": (a - 1).square().mean(), "b": 10 * (b + 1).square().mean()})
            optimizer.step()
            optimizer.zero_grad()
        weighter.detach()
        total = sum(p.full_tensor().sum() if hasattr(p, "full_tensor") else p.sum() for p in model.parameters())
        found.append([*weighter.weights.values(), float(total)])
    return found


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.trunk(x)
        return self.a(z), self.b(z)


@pytest.mark.parametrize(("engine", "repetitions"), [("ddp", 20), ("fsdp2", 5)])
def test_many_steps_many_times_end_alike(engine: str, repetitions: int, tmp_path) -> None:
    ranks = run_ranks(many_steps, 2, tmp_path, engine, 200, repetitions, timeout=280)
    first = ranks[0][0]
    assert all(last == first for rank in ranks for last in rank)
    assert first[0] != first[1]
