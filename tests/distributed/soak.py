"""A long run with faults: real DDP processes that lose nothing, against one process that nothing happened to.

`python -m tests.distributed.soak [--steps 5000] [--seed 0] [--ranks 2] [--method gradnorm]` draws from the seed what
befalls every optimizer step, runs it on `--ranks` processes over gloo, checks them (the process group, one collective a
step, held steps, the method's update replayed by hand, memory), runs the same global batches in one process without
interruptions and resumes, and prints the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from accel_weighting import CarryForward, CoVWeighting, GradNorm, Method, RotoGrad, Statistics, Weighter
from accel_weighting.growth import growth_of
from accel_weighting.history import CAPACITY
from tests.ranks import accelerator_for, run_ranks
from tests.scenarios import CountCollectives
from tests.small import ROWS, WIDTH, Net, batch, names, task_losses, tensor

METHODS: dict[str, Method] = {
    "gradnorm": GradNorm(),
    "cov": CoVWeighting(),
    "rotograd": RotoGrad(),
    "carry": CarryForward(GradNorm(), steps=8),
}
TASKS = names(3)
MICRO = 3  # micro-batches of a whole window, per process
LIMIT = 3  # max_skipped_steps
SPARE = 32.0  # MiB that memory may grow by after the first tenth of a run: the history fills
SPARE_WHEN_FULL = 2.0  # and once it is full
SPARE_TENSORS = 4  # after a resume there are two more
PLACES = ("between micro-batches", "after a forward", "in a backward")

CHANCE = {  # of what begins at a step, or is in it
    "short window": 0.2,
    "counted window": 0.15,
    "non-finite loss": 0.04,
    "non-finite gradient": 0.04,
    "storm": 0.004,  # more non-finite steps in a row than allowed
    "resume in a storm": 0.3,
    "task missing on one rank": 0.08,
    "task missing everywhere": 0.05,
    "one task alone": 0.08,
    "all tasks missing on one rank": 0.03,
    "frozen spell": 0.01,
    "frozen micro-batch": 0.03,
    "evaluation": 0.1,
    "exception": 0.05,
    "resume": 0.008,
    "closure": 0.05,
    "rebuilt weighter": 0.02,
}


@dataclass(frozen=True)
class Turn:
    """What befalls one optimizer step. Block b is micro-batch b // ranks of process b % ranks.

    Attributes:
        sizes: Rows of every block.
        counted: Whether blocks come with their numbers of rows.
        bad: `{block: (task, where, value)}`: where is "loss", "loss alone" (its gradient is finite) or
            "gradient" (at the shared representation).
        absent: `(block, task)`, said by a count of 0; the loss is NaN then.
        frozen: Whether the step is part of a frozen spell.
        unrecorded: The micro-batch, on all processes, whose backward is asked for with `freeze=True`.
        evaluated: The micro-batch before which there is an evaluation.
        interrupted: Micro-batch and place of an exception on all processes, after which the window is begun again.
        resumed: Whether all is saved and built anew before the step.
        closed: Whether the optimizer calls a closure, which runs all of the window's backwards again.
        rebuilt: Whether a new weighter takes the place of the old one before the step.
    """

    step: int
    micro: int
    sizes: tuple[int, ...]
    counted: bool = False
    bad: dict[int, tuple[str, str, float]] = field(default_factory=dict)
    absent: frozenset[tuple[int, str]] = frozenset()
    frozen: bool = False
    unrecorded: int | None = None
    evaluated: int | None = None
    interrupted: tuple[int, str] | None = None
    resumed: bool = False
    closed: bool = False
    rebuilt: bool = False

    def recorded(self, ranks: int) -> list[int]:
        """The blocks that the statistics take in."""
        return [b for b in range(len(self.sizes)) if not self.frozen and b // ranks != self.unrecorded]

    def held(self, ranks: int) -> bool:
        return any(b in self.bad for b in self.recorded(ranks))


def script(steps: int, seed: int, ranks: int) -> tuple[list[Turn], Counter[str]]:
    """All turns of a run, and how often each kind of fault is in them."""
    rng, counts = random.Random(seed), Counter[str]()
    frozen = storm = 0

    def happens(kind: str) -> bool:
        found = rng.random() < CHANCE[kind]
        counts[kind] += found
        return found

    turns = []
    for step in range(steps):
        micro = rng.randrange(1, MICRO) if happens("short window") else MICRO
        blocks = ranks * micro
        counted = happens("counted window")
        cuts = sorted(rng.sample(range(1, ROWS), blocks - 1)) if counted else range(0, ROWS, ROWS // blocks)[1:]
        if happens("frozen spell"):
            frozen = rng.randint(1, 8)
        if happens("storm"):
            storm = LIMIT + rng.randint(1, 2)
        of_one_rank = range(rng.randrange(ranks), blocks, ranks)
        absent: set[tuple[int, str]] = set()
        for kind, missing, tasks in (
            ("task missing on one rank", of_one_rank, 1),
            ("task missing everywhere", range(blocks), rng.randint(1, 2)),
            ("one task alone", range(blocks), len(TASKS) - 1),
            ("all tasks missing on one rank", of_one_rank, len(TASKS)),
        ):
            if happens(kind):
                absent |= {(b, task) for task in rng.sample(TASKS, tasks) for b in missing}
        there = [(b, task) for b in range(blocks) for task in TASKS if (b, task) not in absent]
        bad = {}
        for place in ("loss", "gradient"):
            if there and (happens(f"non-finite {place}") or (place == "loss" and storm)):
                b, task = rng.choice(there)
                where = rng.choice(["loss", "loss alone"]) if place == "loss" else place
                bad[b] = task, where, rng.choice([torch.nan, torch.inf, -torch.inf])
        interrupted = None
        if happens("exception"):
            m = rng.randrange(micro)
            possible = PLACES[m == 0 :] if m < micro - 1 else PLACES[m == 0 : 2]  # DDP's last backward cannot be undone
            interrupted = m, rng.choice(possible)
        turns.append(
            Turn(
                step,
                micro,
                tuple(b - a for a, b in itertools.pairwise([0, *cuts, ROWS])),
                counted,
                bad,
                frozenset(absent),
                frozen > 0,
                rng.randrange(micro) if happens("frozen micro-batch") else None,
                rng.randrange(micro) if happens("evaluation") else None,
                interrupted,
                happens("resume") or bool(storm and happens("resume in a storm")),
                happens("closure"),
                happens("rebuilt weighter"),
            )
        )
        counts["frozen step"] += frozen > 0
        frozen, storm = max(frozen - 1, 0), max(storm - 1, 0)
    return turns, counts


class Interruption(Exception):
    """An error in the user's own code, on all processes."""


class Trainer:
    """A model and its weighter under DDP, or in one process that takes all blocks by itself."""

    def __init__(self, method: Method, ranks: int, alone: bool, seed: int = 0) -> None:
        self.share = ranks if alone else 1  # blocks per micro-batch that this process takes
        self.ranks = ranks
        engine: Any = "plain" if alone else "ddp"
        self.accelerator = accelerator_for(engine, gradient_accumulation_steps=MICRO * self.share)
        self.rank = self.accelerator.process_index
        torch.manual_seed(seed)
        self.inner = Net(TASKS).double()
        optimizer = torch.optim.SGD(self.inner.parameters(), lr=1e-5)  # too small for the model itself to be chaotic
        model: Any
        model, self.optimizer = self.accelerator.prepare(self.inner, optimizer)
        self.model = model
        self.weighter = self.new_weighter(method)

    def new_weighter(self, method: Method) -> Weighter:
        heads = dict(self.inner.heads)
        return Weighter(method, TASKS, accelerator=self.accelerator, heads=heads, max_skipped_steps=LIMIT)

    def rebuild(self) -> None:
        """A new weighter on the same heads, with the state of the old one."""
        state = self.weighter.state_dict()
        self.weighter.detach()
        self.weighter = self.new_weighter(self.weighter.method)
        self.weighter.load_state_dict(state)

    def save(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()

    def window(self, turn: Turn, interrupted: tuple[int, str] | None, count: CountCollectives) -> None:
        """All micro-batches of an optimizer step, and the step unless a gradient is not finite."""
        x, y = batch(turn.step, len(TASKS), torch.float64)
        rows = list(zip(x.split(turn.sizes), y.split(turn.sizes), strict=True))
        for m in range(turn.micro):
            place = interrupted[1] if interrupted is not None and interrupted[0] == m else None
            if place == "between micro-batches":
                raise Interruption
            if turn.evaluated == m:
                self.evaluate(x, y, count)
            self.micro_batch(turn, m, rows, place, count)
        gradients = [p.grad.sum() for p in self.inner.parameters() if p.grad is not None]
        if not torch.stack(gradients).isfinite().all():
            return
        if not turn.closed or self.share > 1:
            self.optimizer.step()
            return

        def closure() -> None:
            self.model.zero_grad()
            for m in range(turn.micro):
                self.micro_batch(turn, m, rows, None, count)

        self.optimizer.step(closure)

    def micro_batch(
        self, turn: Turn, m: int, rows: list[tuple[Tensor, Tensor]], place: str | None, count: CountCollectives
    ) -> None:
        """The blocks of micro-batch `m` that are this process's."""
        mine = range(m * self.ranks, (m + 1) * self.ranks) if self.share > 1 else [m * self.ranks + self.rank]
        for b in mine:
            last = b >= len(rows) - self.ranks and b == mine[-1]
            self.accelerator.sync_gradients = last
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                self.block(turn, b, m == turn.unrecorded, *rows[b], place, count)

    def block(
        self, turn: Turn, b: int, unrecorded: bool, x: Tensor, y: Tensor, place: str | None, count: CountCollectives
    ) -> None:
        task, where, value = turn.bad.get(b, (None, None, 0.0))
        for name, head in self.inner.heads.items():
            head.overflows = (name, where) == (task, "gradient")
        outputs = self.model(x)
        losses = task_losses(outputs, y)
        if where in ("loss", "loss alone"):
            losses[task] = losses[task] * value if where == "loss" else losses[task] + value
        gone = {name for block, name in turn.absent if block == b}
        losses |= {name: losses[name] * torch.nan for name in gone}
        items = dict.fromkeys(losses, len(x)) if turn.counted else {}
        items |= dict.fromkeys(gone, 0)
        if place == "after a forward":
            raise Interruption
        if place == "in a backward":
            outputs[TASKS[0]].register_hook(interrupt)
        with count:
            self.weighter.backward(losses, num_items=items or None, freeze=unrecorded)

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, count: CountCollectives) -> None:
        losses = task_losses(self.model(x), y)
        with count:
            total = self.weighter.combine(losses)
        on_losses = self.weighter.method.acts_on == "losses"
        expected = sum(loss * (self.weighter.weights[t] if on_losses else 1.0) for t, loss in losses.items())
        assert torch.allclose(total, torch.as_tensor(expected), rtol=1e-12)


def interrupt(_: Tensor) -> None:
    raise Interruption


class Replay:
    """The method alone, fed by hand with the statistics of every step that was not held."""

    def __init__(self, method: Method) -> None:
        self.method: Any = method
        self.weights, self.state = method.init(TASKS)
        if "moments" in method.needs:
            self.state = self.method.widen(self.state, WIDTH)
        self.growth = growth_of(method, TASKS, 2.0, lag=1)  # which has tests of its own; here its life is looked at
        self.sum, self.steps = np.zeros_like(self.weights), 0

    def follow(self, recorded: bool, statistics: Statistics | None) -> None:
        if recorded:
            self.sum, self.steps = self.sum + self.weights, self.steps + 1
        if statistics is not None:
            weights, self.state = self.method.update(self.state, statistics)
            bounded = self.growth is not None and self.method.settled(self.state)
            self.weights = self.growth.bound(weights, self.weights, statistics) if bounded else weights


@dataclass
class Outcome:
    """What one process saw: per step where `[steps, …]`, and at the end."""

    weights: Tensor
    losses: Tensor
    norms: Tensor
    gram: Tensor
    state: dict[str, Tensor]
    average: dict[str, float]
    parameters: dict[str, Tensor]
    held: int = 0
    ended: int = 0
    resumes: int = 0
    interruptions: int = 0
    unfrozen: int = 0
    collectives: int = 0
    memory: list[tuple[int, float, int]] = field(default_factory=list)  # step, MiB, live tensors
    history: list[int] = field(default_factory=list)
    seconds: float = 0.0


def live_tensors() -> int:
    """All that Python holds."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def soak(name: str, steps: int, seed: int, ranks: int, alone: bool, folder: Path) -> Outcome:
    """Runs the script on this process and checks every step. `alone`: all blocks here, and nothing that interrupts."""
    turns, _ = script(steps, seed, ranks)
    method, started = METHODS[name], time.monotonic()
    trainer, replay, count = Trainer(method, ranks, alone), Replay(method), CountCollectives()
    K = len(TASKS)
    nothing = torch.full((steps, K), torch.nan, dtype=torch.float64)
    gram = torch.full((steps, K, K), torch.nan, dtype=torch.float64)
    out = Outcome(nothing, nothing.clone(), nothing.clone(), gram, {}, {}, {})
    in_a_row = 0
    for turn in turns:
        if turn.resumed and not alone:
            trainer.save(folder / "checkpoint")
            trainer = Trainer(method, ranks, alone, seed=1 + turn.step)
            trainer.accelerator.load_state(str(folder / "checkpoint"))
            assert_same(trainer.weighter.state_dict()["state"], replay.state)
            out.resumes += 1
        elif turn.rebuilt and not alone:
            trainer.rebuild()
        weighter = trainer.weighter
        if turn.frozen and not weighter.frozen:
            weighter.freeze()
        elif weighter.frozen and not turn.frozen:
            weighter.unfreeze()

        if turn.interrupted and not alone:
            before = count.calls
            try:
                trainer.window(turn, turn.interrupted, count)
            except Interruption:
                weighter.reset()
                out.interruptions += 1
            assert count.calls == before, f"step {turn.step}: a collective on the way out of an exception"
            trainer.model.zero_grad()
        recorded, held = bool(turn.recorded(ranks)), turn.held(ranks)
        in_a_row = in_a_row + 1 if held else 0 if recorded else in_a_row
        beyond = held and in_a_row > LIMIT
        before = count.calls
        try:
            trainer.window(turn, None, count)
            assert not beyond, f"step {turn.step}: {in_a_row} held steps in a row went through"
        except RuntimeError as error:
            if not beyond or f"{in_a_row} steps in a row exceed `max_skipped_steps = {LIMIT}`" not in str(error):
                raise
            out.ended += 1
        trainer.model.zero_grad()
        calls = count.calls - before
        assert calls == (recorded and not alone), f"step {turn.step}: {calls} collectives"

        statistics = weighter.statistics if recorded and not held else None
        assert statistics is None or statistics.step == turn.step, f"step {turn.step} was held and should not have been"
        replay.follow(recorded, statistics)
        out.weights[turn.step] = torch.tensor(list(weighter.weights.values()), dtype=torch.float64)
        assert torch.equal(out.weights[turn.step], tensor(replay.weights)), (
            f"step {turn.step}: not the update of its statistics"
        )
        if statistics is not None:
            there = [any((b, task) not in turn.absent for b in turn.recorded(ranks)) for task in TASKS]
            assert (statistics.present.tolist(), statistics.micro_batches) == (there, len(turn.recorded(ranks)))
            assert statistics.norms is not None and statistics.gram is not None
            out.losses[turn.step], out.norms[turn.step] = tensor(statistics.losses), tensor(statistics.norms)
            out.gram[turn.step] = tensor(statistics.gram)
        if held or turn.step % 50 == 0:
            assert_same(weighter.state_dict()["state"], replay.state)
        out.held += held
        out.unfrozen += recorded
        if (turn.step + 1) % max(steps // 20, 1) == 0:
            memory = psutil.Process().memory_info().rss / 2**20
            out.memory.append((turn.step + 1, memory, live_tensors()))
            if trainer.rank == 0:
                with open(folder / "progress", "a") as file:
                    file.write(
                        f"{turn.step + 1:6d} of {steps} steps, {time.monotonic() - started:5.0f} s, {memory:.1f} MiB, "
                        f"{out.held} held, {out.resumes} resumes\n"
                    )
    out.collectives = count.calls
    out.state = weighter.state_dict()["state"]
    assert_same(out.state, replay.state)
    out.average = weighter.average_weights
    expected = dict(zip(TASKS, (replay.sum / replay.steps).tolist(), strict=True))
    assert out.average == expected, f"average weights {out.average}, by hand {expected}"
    assert weighter.log_values()["weighting/skipped_steps"] == out.held
    out.history = [step for step, _ in weighter.history]
    out.parameters = {name: p.detach().clone() for name, p in trainer.inner.named_parameters()}
    out.seconds = time.monotonic() - started
    return out


def assert_same(state: dict[str, Tensor], replayed: dict[str, Any]) -> None:
    """Bit by bit, and nothing in it that is not finite."""
    assert state.keys() == replayed.keys()
    for name, value in state.items():
        assert torch.equal(value, tensor(replayed[name])), f"state `{name}` is not the one of the replayed updates"
        assert value.double().isfinite().all(), f"state `{name}` is not finite"


def deviation(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of each step; what one has not, the other has not."""
    assert torch.equal(a.isnan(), b.isnan())
    a, b = (x.nan_to_num().flatten(1) for x in (a, b))
    return ((a - b).abs().amax(1) / b.abs().amax(1).clamp(min=1e-300)).max().item()


def check(outcomes: Sequence[Outcome], reference: Outcome, steps: int) -> dict[str, float]:
    """What must hold of a run as a whole; returns the deviations from one process."""
    first = outcomes[0]
    for other in outcomes[1:]:
        for name in ("weights", "losses", "norms", "gram"):
            assert torch.equal(getattr(first, name).nan_to_num(), getattr(other, name).nan_to_num()), f"{name} differ"
        assert_same(other.state, first.state)
        assert other.average == first.average and other.history == first.history
        assert all(torch.equal(p, other.parameters[name]) for name, p in first.parameters.items())
    for outcome in (*outcomes, reference):
        assert outcome.weights.isfinite().all() and (outcome.weights > 0).all()
        warm, *later = outcome.memory[1:]
        assert len(later) > 10
        assert max(tensors for _, _, tensors in later) <= warm[2] + SPARE_TENSORS, f"tensors grow: {outcome.memory}"
        assert max(memory for _, memory, _ in later) <= warm[1] + SPARE, f"memory grows: {outcome.memory}"
        filling = [memory for step, memory, _ in outcome.memory if step <= CAPACITY]
        full = [memory for step, memory, _ in outcome.memory if step > CAPACITY]
        assert max([0.0, *full]) <= max(filling) + SPARE_WHEN_FULL, f"memory grows: {outcome.memory}"
        assert len(outcome.history) <= CAPACITY and outcome.history[-1] >= steps - 2
    for outcome in outcomes:
        assert outcome.collectives == outcome.unfrozen
    assert (reference.held, reference.ended) == (first.held, first.ended)
    names = ("weights", "losses", "norms", "gram")
    found = {name: deviation(getattr(first, name), getattr(reference, name)) for name in names}
    found["method state"] = max(_relative(first.state[name], x) for name, x in reference.state.items())
    found["model"] = max(_relative(first.parameters[name], x) for name, x in reference.parameters.items())
    assert max(found.values()) < 1e-10, f"largest deviations {found}"
    return found


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-300)).item()


@contextlib.contextmanager
def shown(file: Path, show: Callable[[str], None]) -> Iterator[None]:
    """Lines that another process writes are shown as they come."""
    file.touch()
    over = threading.Event()

    def follow() -> None:
        with file.open() as lines:
            while True:
                ends = over.wait(0.5)
                for line in lines:
                    show(line.rstrip())
                if ends:
                    return

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def run(
    name: str, steps: int, seed: int, ranks: int, folder: Path, show: Callable[[str], None]
) -> tuple[list[Outcome], Outcome]:
    """The processes, then the one process."""
    results = []
    for world in (ranks, 1):
        part = folder / str(world)
        part.mkdir(parents=True)
        show(f"{name}, {world} process{'es' if world > 1 else ''}:")
        with shown(part / "progress", show):
            patience = 120 + steps  # a machine that does other things too
            results.append(run_ranks(soak, world, part, name, steps, seed, ranks, world == 1, part, timeout=patience))
    return results[0], results[1][0]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.distributed.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and the data (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, choices=[2, 3], help="processes (default: %(default)s)")
    parser.add_argument(
        "--method", choices=list(METHODS), default="gradnorm", help="the weighting method (default: %(default)s)"
    )
    args = parser.parse_args()
    _, counts = script(args.steps, args.seed, args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, reference = run(
            args.method, args.steps, args.seed, args.ranks, Path(folder), lambda line: print(line, flush=True)
        )
    found = check(outcomes, reference, args.steps)
    first = outcomes[0]
    print(f"\n{METHODS[args.method]}, {args.steps} steps, {args.ranks} processes, seed {args.seed}")
    for kind, number in sorted(counts.items()):
        print(f"  {kind:32s} {number:6d}")
    print(f"steps held {first.held}, of which {first.ended} beyond the limit of {LIMIT} in a row")
    print(f"resumes {first.resumes}, interrupted windows {first.interruptions}")
    print(f"collectives {first.collectives} in {first.unfrozen} steps that were not frozen")
    print("largest deviation from one process: " + ", ".join(f"{name} {x:.1e}" for name, x in found.items()))
    for rank, outcome in enumerate(outcomes):
        (start, before, tensors), (_, after, left) = outcome.memory[1], outcome.memory[-1]
        print(
            f"process {rank}: {before:.1f} MiB after {start} steps, {after:.1f} at the end; tensors but the history's "
            f"{tensors}, {left}; entries of the history {len(outcome.history)}"
        )
    print(f"seconds: {first.seconds:.0f} on {args.ranks} processes, {reference.seconds:.0f} on one")


if __name__ == "__main__":
    main()
