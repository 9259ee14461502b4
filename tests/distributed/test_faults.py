"""What can go wrong on one process of several, and that all of them hold, go on, or end with the same error.

Functions without `test` in their names run inside the processes, many in one launch;
the table in tests/README.md says which failure each test shows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  timeouts of groups, and a user's own group
from torch import Tensor

from accel_weighting import MGDA, CoVWeighting, GradNorm, Method, RotoGrad, Smooth, Weighter, processes
from tests.distributed.setups import F64, GRADNORM, NAMES, Setup, build, error_of, rank, table
from tests.distributed.test_all_methods import CASES
from tests.ranks import accelerator_for, run_ranks
from tests.small import assert_close, batch, gradients_by_hand, net, task_losses, tensor


def results_of(scenarios: list[Callable[[], Any]]) -> dict[str, Any]:
    return {scenario.__name__: scenario() for scenario in scenarios}


def whole_state(weighter: Weighter) -> dict[str, Tensor]:
    """All tensors that a resume takes up and training depends on."""
    saved = weighter.state_dict()
    return {"weights": saved["weights"], "sum": saved["weight_sum"], **saved["state"]}


# ---- values that are not finite --------------------------------------------------------------------------------------

BAD_WINDOWS = {1, 3, 4}
METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "GradNorm": (GRADNORM, {}),
    "CoV": (CoVWeighting(), {}),
    "Smooth": (Smooth(GRADNORM, 0.5), {}),
    "RotoGrad": (RotoGrad(lr=0.5), {}),
    "MGDA, lag 0": (MGDA(), {"lag": 0}),
}
BAD = {
    "loss is nan": ("loss", math.nan),
    "loss is inf": ("loss", math.inf),
    "gradient is nan": ("gradient", math.nan),
    "gradient is inf": ("gradient", -math.inf),
}


def windows(method: str, bad: str | None, which: set[int]) -> dict[str, Any]:
    """Windows of two micro-batches; in those of `which`, one task of one micro-batch of process 1 is `bad`, or, with
    None, they are left out."""
    chosen, options = METHODS[method]
    setup = build(method=chosen, gradient_accumulation_steps=2, options=options)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accel_weighting").addHandler(handler)
    seen = []
    for step in range(6):
        if bad is None and step in which:
            continue
        for part in range(2):
            with setup.accelerator.accumulate(setup.model):
                x, y = batch(step, 3, F64)
                rows = setup.rows(step, part=part, parts=2)
                outputs = setup.model(x[rows])
                here = bad is not None and step in which and part == 1 and rank() == 1
                if here and BAD[bad][0] == "gradient":
                    outputs["t1"].register_hook(lambda g: g * BAD[bad][1])
                losses = task_losses(outputs, y[rows])
                if here and BAD[bad][0] == "loss":
                    losses["t1"] = losses["t1"] * BAD[bad][1]
                setup.weighter.backward(losses)
        setup.model.zero_grad()
        seen.append(setup.weighter.weights)
    logging.getLogger("accel_weighting").removeHandler(handler)
    saved = setup.weighter.state_dict()
    state = {"weights": saved["weights"], **saved["state"], "loss moments": saved["record"]["loss_moments"]}
    return {
        "weights": seen,
        "state": state,
        "finite": all(x.isfinite().all() for x in [*state.values(), saved["weight_sum"]]),
        "messages": messages,
        "skipped": setup.weighter.log_values()["weighting/skipped_steps"],
        "history": [(step, "loss/t0" in values) for step, values in setup.weighter.history],
    }


def all_windows() -> dict[tuple[str, str | None], dict[str, Any]]:
    return {(method, bad): windows(method, bad, BAD_WINDOWS) for method in METHODS for bad in [None, *BAD]}


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(all_windows, 2, tmp_path_factory.mktemp("finite"), timeout=120)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", BAD)
def test_nonfinite_windows_are_skipped_as_if_they_had_not_been(method: str, bad: str, not_finite) -> None:
    first = not_finite[0][method, bad]
    what = "Loss `t1`" if BAD[bad][0] == "loss" else "Gradient of loss `t1` at the shared representation"
    for number, runs in enumerate(not_finite):
        run, without = runs[method, bad], runs[method, None]
        assert run["finite"] and run["skipped"] == 3
        for name, value in without["state"].items():
            assert torch.equal(run["state"][name], value), name
            assert torch.equal(run["state"][name], first["state"][name]), name
        w = run["weights"]
        assert [w[0], w[2], w[5]] == without["weights"] and (w[1], w[3], w[4]) == (w[0], w[2], w[2])
        assert run["history"] == [(step, step not in BAD_WINDOWS) for step in range(6)]
        where = "process 1 of 2" if number else "another process"
        assert run["messages"] == [f"{what} was not finite on {where} at optimizer step 1; weights are held."]
    if method != "MGDA, lag 0":
        assert first["weights"][0] != first["weights"][2] != first["weights"][5]


def as_many_skipped_steps_as_allowed() -> Any:
    """Twice, with one good window in between: the counter begins again."""
    setup = build(options={"max_skipped_steps": 2})

    def bad() -> None:
        losses = setup.losses(0)
        setup.weighter.backward({task: loss * torch.nan if rank() else loss for task, loss in losses.items()})

    seen = []
    for step in range(3):
        seen.append(setup.step(step))
        bad()
        bad()
        held = setup.weighter.weights
        assert held == seen[-1]
    message = error_of(bad)
    other = build()
    return seen, [other.step(step) for step in range(3)], message


# ---- gradients of zero, alike, opposite ------------------------------------------------------------------------------

FACTORS = [(1.0, 0.5, 2.0), (1.0, 0.0, 2.0), (1.0, -1.0, 2.0), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0.5, 2.0)]


def degenerate_gradients() -> dict[tuple[str, float | None], Any]:
    """Every method, bounded and not, on gradients that are multiples of one another, over all processes."""
    accelerator = accelerator_for("ddp")
    found = {}
    for (name, case), max_growth in product(CASES.items(), (2.0, None)):
        weighter = Weighter(case.method, NAMES, accelerator=accelerator, max_growth=max_growth)
        torch.manual_seed(rank())
        x = torch.randn(4, 5, dtype=F64)
        weights = []
        for factors in FACTORS:
            z = weighter.branch(x.clone().requires_grad_())
            weighter.backward([10 + f * z[task].tanh().sum() for task, f in zip(NAMES, factors, strict=True)])
            weights.append(list(weighter.weights.values()))
        found[name, max_growth] = weights, all(v.isfinite().all() for v in whole_state(weighter).values())
    return found


# ---- one bit ---------------------------------------------------------------------------------------------------------


def flip(x: Any, bit: int) -> Any:
    """`x`, an array or a tensor, with one bit of its last entry changed."""
    flipped = tensor(x).clone().contiguous()
    raw = flipped.view(-1).view(torch.uint8).view(-1, flipped.element_size())
    raw[-1, bit // 8] ^= 1 << bit % 8
    return flipped if isinstance(x, Tensor) else flipped.numpy()


def healed_by(before: Any, after: Any) -> bool:
    """Whether the change is one that rounding explains: 1e-6 of the largest entry."""
    x, y = tensor(before), tensor(after)
    return x.is_floating_point() and bool((x - y).abs().max() <= 1e-6 * x.abs().max())


def one_bit_on_one_process() -> dict[str, tuple[str | dict[str, Tensor], str, bool]]:
    """Every entry of the state of several methods, its lowest and its highest bit, on process 1 alone: the error, or
    the state after the step, and whether it is to be healed."""
    found: dict[str, Any] = {}
    for method in (GRADNORM, CoVWeighting(decay=0.9), RotoGrad(lr=0.5), Smooth(RotoGrad(), 0.5)):
        probe = build(method=method)
        probe.step(0)
        entries = {name: tensor(x) for name, x in probe.weighter._progress.method_state.items()}
        places = [("weights", 8 * 8)]
        places += [(name, 1 if x.dtype == torch.bool else 8 * x.element_size()) for name, x in entries.items()]
        probe.step(1)
        found[f"{method!r}"] = whole_state(probe.weighter), "", True
        for name, bits in places:
            for bit in (0, bits - 1, *((33, 47) if name.endswith("rotations") else ())):
                setup = build(method=method, wrap=False)
                setup.step(0)
                state = setup.weighter._progress
                before = state.weights if name == "weights" else state.method_state[name]
                after = flip(before, bit)
                if rank() == 1 and name == "weights":
                    state.weights = after
                elif rank() == 1:
                    state.method_state = {**state.method_state, name: after}
                heals = healed_by(before, after)
                result: Any = None
                if heals:
                    setup.step(1)
                    result = whole_state(setup.weighter)
                else:
                    result = error_of(lambda setup=setup: setup.step(1))  # type: ignore[misc]
                of = "rotations" if name.endswith("rotations") else "state"
                found[f"{method!r} {name} bit {bit}"] = result, of, heals
    return found


def settings_of_one_process() -> dict[str, str]:
    """Settings that differ on the last process alone."""
    odd = rank() == dist.get_world_size() - 1
    differing: dict[str, dict[str, Any]] = {
        "method": {"method": GradNorm(alpha=1.0, lr=0.05 + 1e-16 * 70) if odd else GRADNORM},
        "update_every": {"options": {"update_every": 2 if odd else 1}},
        "max_losses": {"options": {"max_losses": {"t0": 1.0 if odd else 2.0}}},
        "max_skipped_steps": {"options": {"max_skipped_steps": 9 if odd else 10}},
        "weights": {"options": {"initial_weights": {"t0": 1.5 + 1e-5 if odd else 1.5}}},
        "lag": {"method": MGDA(), "options": {"lag": 0 if odd else 1}},
    }
    found = {name: error_of(build(wrap=False, **given).step) for name, given in differing.items()}
    late = build()
    late.step(0)
    late.weighter.max_skipped_steps -= odd
    return found | {"max_skipped_steps, later": error_of(lambda: late.step(1))}


def dictionaries_in_any_order() -> tuple[dict[str, float], dict[str, float]]:
    """Of heads, caps, initial weights and a method's own; that of losses has its test among the windows."""
    one: dict[str, Any] = {"max_losses": {"t0": 2.0, "t1": 3.0}, "initial_weights": {"t0": 1.5, "t1": 0.5}}
    first = {"t0": 1.0, "t1": 20.0}

    def turned(x: dict[str, Any]) -> dict[str, Any]:
        return dict(reversed(x.items())) if rank() == 1 else x

    def weighter(heads: dict[str, Any], options: dict[str, Any], initial_losses: dict[str, float]) -> dict[str, float]:
        setup.weighter.detach()
        method = GradNorm(alpha=1.0, lr=0.05, initial_losses=initial_losses)
        setup.weighter = Weighter(method, NAMES, accelerator=setup.accelerator, heads=heads, **options)
        for step in range(3):
            setup.step(step)
        return setup.weighter.weights

    setup = build()
    heads = dict(setup.inner.heads)
    alike = weighter(heads, one, first)
    return alike, weighter(turned(heads), {name: turned(x) for name, x in one.items()}, turned(first))


# ---- two weighters, two models ---------------------------------------------------------------------------------------


def two_weighters() -> dict[str, Any]:
    """On one trunk, each with heads of its own, in both orders; windows open and close independently."""
    found = {}
    for order in ((0, 1), (1, 0)):
        setup = build(gradient_accumulation_steps=2)
        setup.weighter.detach()
        heads = dict(setup.inner.heads)
        pairs = [["t0", "t1"], ["t2"]]
        weighters = [
            Weighter(GRADNORM, pair, accelerator=setup.accelerator, heads={t: heads[t] for t in pair}) for pair in pairs
        ]
        for part in range(2):
            with setup.accelerator.accumulate(setup.model):
                losses = setup.losses(0, part=part, parts=2)
                totals = [weighters[i].combine({task: losses[task] for task in pairs[i]}) for i in order]
                setup.accelerator.backward(sum(totals))
                for i in order:
                    weighters[i].step()
        found[str(order)] = [weighter.statistics for weighter in weighters]
    return found


def one_weighter_around_two_models() -> Any:
    """One weighter over the heads of two models: no representation is shared, so that norms alone are known."""
    accelerator = accelerator_for("ddp")
    x, y = batch(0, 1, F64)
    rows = slice(18 * rank(), 18 * rank() + 18)
    inner = [net(["t0"], seed=seed) for seed in range(2)]
    models = [accelerator.prepare(model) for model in inner]
    heads = {f"t{seed}": model.heads["t0"] for seed, model in enumerate(inner)}
    weighter = Weighter(GRADNORM, ["t0", "t1"], accelerator=accelerator, heads=heads)
    for _ in range(2):
        losses = [task_losses(model(x[rows]), y[rows])["t0"] for model in models]
        weighter.backward(losses)
    return weighter.statistics, weighter.weights


# ---- the loss scale --------------------------------------------------------------------------------------------------

SMALL = 1e-4  # losses so small that nothing overflows at a scale of 2^16


def fp16_run(
    scale: float = 2.0**10,
    overflows: dict[int, str] | None = None,
    left_out: set[int] = frozenset(),  # type: ignore[assignment]
    scales: dict[int, float] | None = None,
    method: Method = GRADNORM,
    precision: str = "fp16",
    **options: Any,
) -> dict[str, Any]:
    """Eight steps with a real scaler; `overflows` on process 1 at those steps, the scale set by hand at others."""
    fp16 = {"mixed_precision": "fp16", "loss_scale": scale} if precision == "fp16" else {}
    setup = build(method=method, dtype=torch.float32, options=options, **fp16)
    setup.weighter.max_skipped_steps = options.get("max_skipped_steps", 10)
    weights, skipped, found = [], [], []
    for step in range(8):
        if step in left_out:
            continue
        if scales and step in scales:
            setup.accelerator.scaler.update(scales[step])
        where = (overflows or {}).get(step) if rank() == 1 else None
        setup.inner.overflows = where == "parameters"
        setup.inner.heads["t2"].overflows = where == "tap"
        losses = {task: SMALL * loss for task, loss in setup.losses(step).items()}
        if where == "loss":
            losses["t2"] = losses["t2"] * torch.inf
        setup.weighter.backward(losses)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        skipped.append(setup.accelerator.optimizer_step_was_skipped)
        weights.append(torch.tensor(list(setup.weighter.weights.values()), dtype=F64))
        found.append(setup.weighter.statistics)
    return {"weights": weights, "skipped": skipped, "statistics": found, "steps": [s.step for s in found]}


SCRIPT = {1: "loss", 3: "tap", 4: "tap", 6: "parameters"}


def scripted_overflows() -> dict[str, Any]:
    runs = {}
    for name, method in (("GradNorm", GRADNORM), ("CoV", CoVWeighting()), ("RotoGrad", RotoGrad(lr=0.5))):
        runs[name] = (
            fp16_run(overflows=SCRIPT, method=method),
            fp16_run(precision="no", left_out={1, 3, 4}, method=method),
        )
    return runs


def overflows_that_count() -> tuple[list[int], str]:
    """Gradients that overflow under a scaler are its business; losses are not."""
    run = fp16_run(overflows=dict.fromkeys(range(1, 7), "tap"), max_skipped_steps=0)
    return run["steps"], error_of(lambda: fp16_run(overflows={2: "loss"}, max_skipped_steps=0))


def changing_loss_scale() -> dict[str, Any]:
    return {
        "changing": fp16_run(scale=2.0**16, scales={2: 2.0**15, 4: 2.0**10, 5: 2.0**14}),
        "constant": fp16_run(scale=2.0**16),
        "float32": fp16_run(precision="no"),
    }


# ---- saved inside a window -------------------------------------------------------------------------------------------


INSIDE = "Saved inside an accumulation window: 1 of its micro-steps is lost; save on `accelerator.sync_gradients`."


def saved_inside_a_window(folder: Path) -> Any:
    import warnings

    def micro(setup: Setup, step: int, part: int) -> None:
        with setup.accelerator.accumulate(setup.model):
            setup.weighter.backward(setup.losses(step, part=part, parts=2))
            setup.model.zero_grad()

    setup = build(gradient_accumulation_steps=2)
    for part in range(2):
        micro(setup, 0, part)
    micro(setup, 1, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        setup.accelerator.save_state(str(folder))
    before = setup.weighter.weights
    again = build(gradient_accumulation_steps=2)
    again.accelerator.load_state(str(folder))
    resumed = again.weighter.weights
    micro(again, 1, 1)
    short, closed = again.weighter.statistics, again.accelerator.sync_gradients
    for part in range(2):
        micro(again, 2, part)
    ours = [str(w.message) for w in told if "accumulation window" in str(w.message)]
    return ours, before, resumed, short, closed, again.weighter.statistics


# ---- the launch ------------------------------------------------------------------------------------------------------

AGREEMENT = [dictionaries_in_any_order, one_bit_on_one_process, settings_of_one_process]
ON_TWO = [
    as_many_skipped_steps_as_allowed,
    degenerate_gradients,
    scripted_overflows,
    overflows_that_count,
    changing_loss_scale,
    two_weighters,
    one_weighter_around_two_models,
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(results_of, 3, tmp_path_factory.mktemp("three"), AGREEMENT, timeout=120)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(results_of, 2, tmp_path_factory.mktemp("two"), ON_TWO, timeout=120)


def each(ranks: list[dict[str, Any]], scenario: Callable[..., Any]) -> list[Any]:
    return [rank[scenario.__name__] for rank in ranks]


def test_nonfinite_steps_in_a_row_are_counted_anew_after_a_finite_one(two) -> None:
    for number, (seen, without, message) in enumerate(each(two, as_many_skipped_steps_as_allowed)):
        where = "on process 1 of 2" if number else "on another process"
        assert seen == without
        assert "3 steps in a row exceed `max_skipped_steps = 2`" in message and where in message


def test_zero_equal_or_opposite_gradients_give_finite_weights_of_the_same_sum(two) -> None:
    first, second = each(two, degenerate_gradients)
    assert first == second and {name for name, _ in first} == CASES.keys()
    for (name, max_growth), (weights, finite) in first.items():
        method = CASES[name].method
        keeps_sum = method.keeps_sum and not (max_growth and method.grows)  # the bound holds one weight, not the others
        start = method.init(NAMES)[0].sum().item()
        assert finite and all(math.isfinite(w) for step in weights for w in step), name
        for step in weights:
            assert not keeps_sum or sum(step) == pytest.approx(start, rel=1e-9), name
            assert method.acts_on != "losses" or min(step) > 0, name


def test_any_bit_of_weights_state_or_rotations_on_one_process_is_healed_or_raises_in_that_very_step(three) -> None:
    ranks = each(three, one_bit_on_one_process)
    assert len({tuple((name, heals) for name, (_, _, heals) in found.items()) for found in ranks}) == 1
    for found in ranks:
        healed = [name for name, (_, _, heals) in found.items() if heals]
        assert len(found) > 40 and 15 < len(healed) < len(found) - 15
        assert any("rotations bit 47" in name for name in found)
        for name, (result, of, heals) in found.items():
            if heals:
                whole = found[f"{name.split(') ')[0]})" if ") " in name else name][0]
                torch.testing.assert_close(result, whole, rtol=1e-6, atol=1e-9)
                first = ranks[0][name][0]
                assert all(torch.equal(result[key], first[key]) for key in whole if key != "sum"), name
                continue
            assert result.startswith("RuntimeError: The processes no longer agree at step 1"), name
            rows = table(result, of)
            assert rows[0] == rows[2] != rows[1] and f"{of}:\n  processes 0, 2: " in result, name


def test_a_setting_that_differs_in_its_last_digit_raises_with_its_process(three) -> None:
    for found in each(three, settings_of_one_process):
        for name, message in found.items():
            key, _, later = name.partition(", ")
            assert message.startswith("RuntimeError: The processes no longer agree at step " + "01"[bool(later)]), name
            rows = table(message, key)
            assert rows[0] == rows[1] != rows[2], name
    assert each(three, settings_of_one_process)[0] == each(three, settings_of_one_process)[2]


def test_every_dictionary_may_be_in_any_order_on_any_process(three) -> None:
    for alike, mixed in each(three, dictionaries_in_any_order):
        assert alike == mixed == each(three, dictionaries_in_any_order)[0][0]


def test_fp16_overflows_skip_windows_as_if_they_had_not_been(two) -> None:
    for runs, others in zip(*[each(two, scripted_overflows)[i].items() for i in (0, 1)], strict=True):
        (name, (run, without)), (_, (other, _)) = runs, others
        assert run["skipped"] == [step in SCRIPT for step in range(8)], name
        assert run["steps"] == [0, 0, 2, 2, 2, 5, 6, 7], name  # at 6 the parameters alone saw the overflow
        assert all(map(torch.equal, run["weights"], other["weights"])), name
        # Without a scaler nothing overflows in the parameters at 6, so that the models part after it.
        kept = [run["weights"][step] for step in (0, 2, 5, 6)]
        for mine, theirs in zip(kept, without["weights"], strict=False):
            torch.testing.assert_close(mine, theirs, rtol=4e-3, atol=0)  # fp16 has 11 bits


def test_fp16_gradient_overflows_do_not_count_as_skipped_and_nonfinite_losses_do(two) -> None:
    for number, (steps, message) in enumerate(each(two, overflows_that_count)):
        where = "process 1 of 2" if number else "another process"
        assert steps == [0] * 7 + [7]
        assert f"Loss `t2` was not finite on {where} at optimizer step 2" in message
        assert "1 steps in a row exceed `max_skipped_steps = 0`" in message


def test_fp16_loss_scale_that_changes_between_steps_leaves_the_statistics(two) -> None:
    for runs in each(two, changing_loss_scale):
        assert not any(runs["changing"]["skipped"])
        for other, tolerance in (("constant", 1e-3), ("float32", 4e-3)):  # fp16 has 11 bits
            for mine, theirs in zip(runs["changing"]["statistics"], runs[other]["statistics"], strict=True):
                for what in ("losses", "norms"):
                    assert_close(getattr(mine, what), getattr(theirs, what), rtol=tolerance, atol=0)
            for mine, theirs in zip(runs["changing"]["weights"], runs[other]["weights"], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=0)


def test_two_weighters_on_two_processes_see_their_own_tasks_in_any_order(two) -> None:
    G = [gradients_by_hand(net(NAMES), 0, slice(9 * b, 9 * b + 9)) for b in range(4)]
    gram = sum(g @ g.T for g in G) / 16
    for found in each(two, two_weighters):
        for first, second in found.values():
            assert_close(first.gram, gram[:2, :2], rtol=1e-12, atol=0)
            assert_close(second.gram, gram[2:, 2:], rtol=1e-12, atol=0)
            assert first.micro_batches == second.micro_batches == 4


def test_one_weighter_around_two_models_knows_norms_only(two) -> None:
    x, y = batch(0, 1, F64)
    norms = []
    for seed in range(2):
        model = net(["t0"], seed=seed)
        model.shared.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
        taken: list[Tensor] = []
        model.heads["t0"].register_forward_pre_hook(lambda module, args, taken=taken: taken.append(args[0]))
        loss = task_losses(model(x), y)["t0"]
        norms.append(torch.autograd.grad(loss, taken[0])[0].norm())
    for statistics, weights in each(two, one_weighter_around_two_models):
        assert_close(statistics.norms, torch.stack(norms), rtol=1e-12, atol=0)
        assert statistics.gram is None and statistics.step == 1
        assert weights == each(two, one_weighter_around_two_models)[0][1] and weights["t0"] != weights["t1"]


def test_checkpoint_inside_an_accumulation_window_warns_and_resumes_with_a_window_of_one(tmp_path) -> None:
    ranks = run_ranks(saved_inside_a_window, 2, tmp_path, tmp_path / "checkpoint")
    for number, (told, before, resumed, short, closed, whole) in enumerate(ranks):
        assert told == ([] if number else [INSIDE])
        assert before == resumed and closed
        assert (short.step, short.micro_batches) == (1, 2) and (whole.step, whole.micro_batches) == (2, 4)
        blocks = [gradients_by_hand(net(NAMES), 1, slice(18 * r + 9, 18 * r + 18)) for r in range(2)]
        assert_close(short.gram, sum(g @ g.T for g in blocks) / 4, rtol=1e-12, atol=0)


# ---- a process that does not come ------------------------------------------------------------------------------------

PATIENCE = 2.0
MISSED = "RuntimeError: Another process did not reach optimizer step {}: it exited, raised an error"


def patient(setup: Setup, seconds: float = PATIENCE) -> Setup:
    """Collectives, ours and the engine's, give up soon."""
    for group in {dist.group.WORLD, setup.weighter._steps._processes.group}:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    return setup


def timed(act: Callable[[], Any]) -> tuple[str, float]:
    begin = time.monotonic()
    return error_of(act), time.monotonic() - begin


def lonely(act: Callable[[Setup], Any], wrap: bool, **arguments: Any) -> tuple[Any, ...]:
    """Process 0 does `act`, which must end in an error, while process 1 waits for it without any collective."""
    setup = build(wrap=wrap, **arguments)
    start = setup.step(0)
    store = dist.PrefixStore("lonely", dist.distributed_c10d._get_default_store())
    patient(setup)
    name = f"{id(act)}"
    if rank() == 1:
        store.wait(["done"], timedelta(seconds=30))
        store.delete_key("done")
        return (None, 0.0, True)
    message, seconds = timed(lambda: act(setup))
    held = setup.weighter.weights == start
    store.set("done", name)
    return message, seconds, held


def two_batches_against_three() -> tuple[Any, ...]:
    return lonely(lambda setup: setup.step(1), wrap=False)


def one_sided_step() -> tuple[Any, ...]:
    """`combine`, the engine's backward and `step`, as in a loop of the user's own, on process 0 alone."""

    def act(setup: Setup) -> None:
        setup.accelerator.backward(setup.weighter.combine(setup.losses(1)))
        setup.weighter.step()

    return lonely(act, wrap=False)


def one_sided_step_in_a_group_of_the_users() -> tuple[Any, ...]:
    """Process 1 sums something of its own over that same group meanwhile: the two must not meet."""
    group = dist.new_group()
    setup = build(wrap=False, options={"process_group": group})
    start = setup.step(0)
    patient(setup)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE), group)
    if rank() == 1:
        return (*timed(lambda: dist.all_reduce(torch.full((200,), 1e6, dtype=F64), group=group)), True)
    return (*timed(lambda: setup.step(1)), setup.weighter.weights == start)


def frozen_on_one_process() -> tuple[Any, ...]:
    setup = patient(build(wrap=False))
    start = setup.step(0)
    if rank() == 1:
        setup.weighter.freeze()
        return None, 0.0, setup.step(1) == start  # nothing of it needs the others
    return (*timed(lambda: setup.step(1)), setup.weighter.weights == start)


def frozen_for_one_step_on_one_process() -> tuple[Any, ...]:
    """Its next window meets the others' last one, which says another step."""
    setup = patient(build(wrap=False))
    start = setup.step(0)
    if rank() == 1:
        with setup.weighter.freeze():
            setup.step(1)
    return (*timed(lambda: setup.step(2)), setup.weighter.weights == start)


def two_weighters_in_opposite_orders() -> tuple[Any, ...]:
    one, other = build(wrap=False), build(wrap=False, names=["t0", "t1", "t2", "t3"])
    start = one.step(0), other.step(0)
    for setup in (one, other):
        patient(setup)
    order = (one, other) if rank() == 0 else (other, one)
    message, seconds = timed(lambda: [setup.step(1) for setup in order])
    return message, seconds, (one.weighter.weights, other.weighter.weights) == start


def joined_uneven_inputs() -> tuple[Any, ...]:
    """Five batches of four rows for two processes: three against two."""
    setup = build(wrap=False, mesh={"dp_replicate_size": 2})
    data = torch.utils.data.TensorDataset(*(x[:20] for x in batch(0, 3, F64)))
    loader = setup.accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=4))
    # By hand: `join_uneven_inputs` acts on several GPUs only, and there Accelerate would look for them.
    setup.model = torch.nn.parallel.DistributedDataParallel(setup.inner)
    start = setup.weighter.weights

    def epoch(even: bool | None) -> int:
        batches = 0
        with setup.accelerator.join_uneven_inputs([setup.model], even_batches=even):
            for x, y in loader:
                setup.weighter.backward(task_losses(setup.model(x), y))
                batches += 1
        return batches

    found = timed(lambda: epoch(False))
    held = setup.weighter.weights == start
    setup.model.zero_grad()
    lengths = setup.accelerator.distributed_type.value, epoch(None)
    return *found, held, lengths


WITHOUT_ENGINE = [
    joined_uneven_inputs,
    two_batches_against_three,
    one_sided_step,
    one_sided_step_in_a_group_of_the_users,
    frozen_on_one_process,
    frozen_for_one_step_on_one_process,
    two_weighters_in_opposite_orders,
]


def apart(scenarios: list[Callable[[], Any]]) -> dict[str, Any]:
    """Each with groups of its own; the last that broke is no reason to meet at the end."""
    found = {}
    for scenario in scenarios:
        processes._OWN.clear()
        found[scenario.__name__] = scenario()
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(apart, 2, tmp_path_factory.mktemp("waiting"), WITHOUT_ENGINE, timeout=90)


def assert_left_waiting(found: tuple[Any, ...], step: int = 1) -> None:
    message, seconds, held = found[:3]
    assert message.startswith(MISSED.format(step)), message
    assert held and seconds < PATIENCE + 20


@pytest.mark.parametrize("scenario", [two_batches_against_three, one_sided_step])
def test_a_step_of_one_process_alone_times_out_with_the_causes(scenario, waiting) -> None:
    assert_left_waiting(each(waiting, scenario)[0])
    for cause in ("break", "weighter.step()", "weighter.freeze()", "even_batches=False", "join_uneven_inputs"):
        assert f"`{cause}`" in each(waiting, scenario)[0][0]


def test_a_step_of_one_process_alone_never_mixes_with_an_all_reduce_of_the_user(waiting) -> None:
    ours, theirs = each(waiting, one_sided_step_in_a_group_of_the_users)
    assert_left_waiting(ours)
    assert theirs[0].startswith("RuntimeError") and "Another process" not in theirs[0]


def test_a_process_frozen_alone_ends_the_others_with_an_error(waiting) -> None:
    ours, frozen = each(waiting, frozen_on_one_process)
    assert_left_waiting(ours)
    assert frozen[2]


def test_a_process_frozen_alone_for_one_step_raises_at_its_next_step(waiting) -> None:
    for message, _, held in each(waiting, frozen_for_one_step_on_one_process):
        assert held and message.startswith("RuntimeError: The processes no longer agree at step ")
        assert table(message, "step") == {0: "1", 1: "2"}


def test_two_weighters_in_opposite_orders_say_so_and_do_not_mix(waiting) -> None:
    for message, seconds, held in each(waiting, two_weighters_in_opposite_orders):
        assert message.startswith("RuntimeError: The processes were built with different tasks.")
        assert table(message, "weighter number") == {0: "1", 1: "2"}
        assert held and seconds < 10


def test_join_uneven_inputs_is_refused_at_once_on_all_processes(waiting) -> None:
    for message, seconds, held, lengths in each(waiting, joined_uneven_inputs):
        assert message.startswith("ValueError: Uneven inputs are not supported: the DataLoaderShard that is being")
        assert held and seconds < 10
        assert lengths == ("MULTI_GPU", 3)  # evened out, the same context is of no consequence


KEPT: list[Setup] = []
"""DDP's destructor holds the GIL while it waits for gloo's threads, one of which may want it: torch's own deadlock."""


def under_ddp(freeze: bool) -> Any:
    """Process 1 has one batch less, or is frozen: DDP's own sum and ours wait for different things."""
    setup = build()
    setup.step(0)
    start = setup.step(1)  # in the second forward DDP still sorts its buckets
    patient(setup)
    if rank() == 1 and not freeze:
        dist.distributed_c10d._get_default_store().wait(["done"], timedelta(seconds=30))
        found: tuple[Any, ...] = (None, 0.0, True)
    else:
        if rank() == 1:
            setup.weighter.freeze()
        found = (*timed(lambda: [setup.step(step) for step in (2, 3)]), setup.weighter.weights == start)
        dist.distributed_c10d._get_default_store().set("done", "")
    dist.destroy_process_group()
    KEPT.append(setup)
    return found


def test_three_batches_against_two_under_ddp_time_out_with_the_causes(tmp_path) -> None:
    ours, _ = run_ranks(under_ddp, 2, tmp_path, False, timeout=60)
    assert_left_waiting(ours, step=2)


def test_a_process_frozen_alone_under_ddp_ends_all_with_an_error(tmp_path) -> None:
    ours, frozen = run_ranks(under_ddp, 2, tmp_path, True, timeout=60)
    assert_left_waiting(ours, step=2)
    assert_left_waiting(frozen, step=3)
