"""``max_growth``: one silent window of a task must not make the next step leap."""

import functools

import numpy as np
import pytest
import torch
import torchjd.aggregation as tj
from accelerate import Accelerator
from torch import nn

from accel_weighting import (
    DBMTL,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    Clamp,
    ConFIG,
    CosineGate,
    DualProj,
    EqualWeighting,
    FairGrad,
    GradientBalancer,
    GradNorm,
    GradVac,
    NashMTL,
    NTKWeighting,
    PCGrad,
    ReferenceNorm,
    RotoGrad,
    Smooth,
    Statistics,
    TorchJDWeighting,
    UPGrad,
    Warmup,
    Weighter,
)
from accel_weighting.growth import Growth

TASKS = ("a", "b", "margin")
METHODS = [
    RotoGrad(rotate=False),
    ConFIG(),
    NashMTL(),
    CAGrad(),
    CAGrad(0.9),
    AlignedMTL(),
    AlignedMTL("median"),
    AlignedMTL("rmse"),
    PCGrad(),
    IMTLG(),
    UPGrad(),
    DualProj(),
    FairGrad(),
    FairGrad(2.0),
    GradVac(),
    GradientBalancer(decay=0.0),
    GradientBalancer(),
    DBMTL(),
    NTKWeighting(),
    ReferenceNorm("a"),
    ReferenceNorm("a", decay=0.9),
    TorchJDWeighting(tj.UPGradWeighting()),
    TorchJDWeighting(tj.FairGradWeighting(alpha=2.0)),
    TorchJDWeighting(tj.IMTLGWeighting()),
    MGDA(),
    CosineGate("a"),
    GradNorm(alpha=0.0),
]


def run(method, factors, lag=1, dtype=torch.float64, max_growth=2.0, starts=0, **options):
    """Lengths of the trunk's gradient and the weighter, where the third loss has these factors; it may start late."""
    torch.manual_seed(1)
    trunk, heads = nn.Linear(8, 16, dtype=dtype), nn.ModuleDict({t: nn.Linear(16, 1, dtype=dtype) for t in TASKS})
    weighter = Weighter(method, TASKS, heads=dict(heads), lag=lag, max_growth=max_growth, **options)
    lengths, weights = [], []
    for t, factor in enumerate(factors):
        z = trunk(torch.randn(64, 8, generator=torch.Generator().manual_seed(t), dtype=dtype))
        losses = {"a": heads["a"](z).square().mean(), "b": (heads["b"](z) - 1).square().mean()}
        losses["margin"] = factor * torch.relu(2 - heads["margin"](z)).mean()
        trunk.zero_grad()
        weights.append(np.array(list(weighter.weights.values())))
        weighter.backward(losses, num_items={"margin": 0} if t < starts else None)
        lengths.append(float(torch.cat([p.grad.flatten() for p in trunk.parameters()]).norm()))
    return np.array(lengths), np.stack(weights), weighter


def silence(windows, factor, before=6, after=4):
    return [1.0] * before + [factor] * windows + [1.0] * after


@functools.cache
def equal_largest():
    return run(EqualWeighting(), [1.0] * 40)[0].max()


@functools.cache
def largest_at_once(method):
    if method.acts_on == "losses":  # whose weights at once would be those of the next window
        return run(method, [1.0] * 40)[0].max()
    return run(method, [1.0] * 40, lag=0)[0].max()


def limit(method, windows):
    return (6.0 if windows > 6 else 4.0) * max(equal_largest(), largest_at_once(method))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_silent_task_does_not_make_the_trunk_leap_when_it_is_back(method):
    for windows, factor in ((1, 0.1), (1, 1e-3), (1, 1e-9), (1, 0.0), (3, 1e-2), (6, 0.1), (6, 1e-9), (20, 1e-3)):
        for before in (1, 6):
            lengths, _, _ = run(method, silence(windows, factor, before, 2))
            assert lengths.max() <= limit(method, windows), (windows, factor, before, lengths)


@pytest.mark.parametrize("method", [CAGrad(), ConFIG(), NashMTL(), RotoGrad(rotate=False)], ids=repr)
def test_without_the_bound_it_leaps(method):
    """Else the test above would not see anything."""
    lengths, _, weighter = run(method, silence(1, 1e-4), max_growth=None)
    assert lengths.max() > limit(method, 1)
    assert "weighting/limited_steps" not in weighter.log_values()


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("start", [1, 8, 30])
def test_an_adversary_that_starts_late_is_no_leap(decay, start):
    """Absent, or with a gradient of exactly 0, until it starts; silent later on."""
    method = ReferenceNorm("a", decay=decay)
    for absent in (True, False):
        for event in ([], [1e-9] * 3 + [1.0] * 4):
            factors = [0.0] * start + [1e-3] * 8 + event + [1.0] * 4
            lengths, weights, _ = run(method, factors, starts=start if absent else 0)
            assert lengths.max() <= 4 * max(equal_largest(), largest_at_once(method))
            assert (weights[: start + 1, 2] == 1).all() and weights[start + 1, 2] <= 2.0


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_within_the_bound_nothing_changes_to_the_last_bit(method):
    bounded, weights, weighter = run(method, [1.0] * 30)
    free, same, _ = run(method, [1.0] * 30, max_growth=None)
    if weighter.log_values().get("weighting/limited_steps"):
        assert isinstance(method, (IMTLG, TorchJDWeighting, AlignedMTL)), "it acts in an ordinary run"
    else:
        assert np.array_equal(bounded, free) and np.array_equal(weights, same)


def test_it_is_for_methods_without_a_bound_of_their_own_and_a_lag():
    for method, lag, expected in (
        (ConFIG(), 1, True),
        (Smooth(ConFIG(), 0.5), 1, True),
        (ConFIG(), 0, False),
        (MGDA(), 1, False),
        (CosineGate("a"), 1, False),
        (GradNorm(), 1, False),
    ):
        _, _, weighter = run(method, [1.0], lag=lag)
        assert ("weighting/limited_steps" in weighter.log_values()) is expected
    with pytest.raises(ValueError, match="`max_growth` must be None or a finite number above 1"):
        Weighter(ConFIG(), TASKS, max_growth=1.0)


def test_it_says_when_it_acts_and_leaves_the_methods_state_alone():
    _, weights, weighter = run(NashMTL(), silence(2, 1e-5, after=0))
    assert weighter.log_values()["weighting/limited_steps"] == 2
    raw = weighter.state_dict()["state"]["weights"][2]
    assert raw > 1e3 > 100 * weighter.weights["margin"]
    assert weights.max() < 10


def statistics(present=(True, True), norms=(1.0, 1.0)):
    return Statistics(np.ones(2), present, np.asarray(norms) * present)


def follow(growth, answers, windows=None):
    before, applied = np.ones(2), []
    for t, answer in enumerate(answers):
        before = growth.bound(np.array(answer), before, statistics() if windows is None else windows[t])
        applied.append(before)
    return np.stack(applied)


def test_the_first_update_is_not_bounded_and_a_rise_of_any_pace_comes_through():
    steep = follow(Growth(2, 2.0), [[1e5, 1e-5]] * 3)
    assert (steep == [1e5, 1e-5]).all()
    steady = [[1.0, 1.05**t] for t in range(12)]
    assert (follow(Growth(2, 2.0), steady) == steady).all()
    for_good = follow(Growth(2, 2.0), [[1.0, 1.0]] + [[1.0, 100.0]] * 200)[:, 1]
    assert (np.diff(for_good) >= 0).all() and for_good[-1] == 100.0


def test_falls_are_not_bounded_and_neither_zero_nor_next_to_nothing_is_a_ban():
    for low in (0.0, 1e-9, -1e-9):
        applied = follow(Growth(2, 2.0), [[1.0, 3.0]] * 10 + [[1.0, low]] * 6 + [[1.0, 3.0]] * 6)[:, 1]
        assert (applied[10:16] == low).all() and applied[16] > 2.2 and applied[-1] > 2.7
    assert (follow(Growth(2, 2.0), [[1.0, 0.0]] * 50 + [[1.0, 7.0]])[-1] == [1.0, 7.0]).all()


def test_signs_stay():
    applied = follow(Growth(2, 2.0), [[1.0, -1.0]] * 8 + [[1.0, -90.0], [1.0, 90.0]])[:, 1]
    assert applied[8] == pytest.approx(-2.0) and 2.0 < applied[9] < 2.2


def test_a_kept_sum_gives_way_to_the_bound_and_no_other_weight_does():
    """Scaled up to their sum again all weights would be beyond their bounds, and one of another sign would turn."""
    J = np.random.default_rng(2).normal(size=(4, 9))
    faint = J * [[1], [1], [1], [1e-3]]
    weighter, free = (Weighter(IMTLG(), list("abcd"), max_growth=factor) for factor in (2.0, None))
    answers, applied = [], []
    for rows in (J, J, faint, J):
        window = Statistics(np.ones(4), [True] * 4, np.linalg.norm(rows, axis=1), rows @ rows.T)
        for one, found in ((weighter, applied), (free, answers)):
            one._progress.update(window)
            found.append(np.array(list(one.weights.values())))
    assert np.array_equal(applied[2][:3], answers[2][:3]) and applied[2][3] == pytest.approx(2 * answers[0][3])
    assert abs(applied[2].sum() - 1) > 0.1
    for step in (0, 1, 3):
        assert np.array_equal(applied[step], answers[step]) and applied[step].sum() == pytest.approx(1)


def test_an_absent_task_keeps_its_weight_also_at_the_bound():
    here, gone, zero = statistics(), statistics((True, False)), statistics(norms=(1.0, 0.0))
    for missing in (gone, zero):
        windows = [here] * 10 + [missing] * 30
        applied = follow(Growth(2, 2.0), [[1.0, 1.0]] * 9 + [[1.0, 1e6]] * 31, windows)[:, 1]
        assert applied[9] == pytest.approx(2.0) and (applied[10:] == applied[9]).all()
    late = follow(Growth(2, 2.0), [[1.0, 1.0]] * 30 + [[1.0, 1e4]] * 2, [gone] * 30 + [here] * 2)[:, 1]
    assert (late[:30] == 1).all() and late[30] == pytest.approx(2.0)


def test_a_warm_up_is_no_measure():
    """While a wrapper holds initial weights the mean has not begun: then the method's own come unbounded."""
    _, weights, weighter = run(Warmup(NashMTL(), 12), [1e-3] * 20)
    assert (weights[:13] == 1).all() and weights[13, 2] > 100
    assert weighter.log_values()["weighting/limited_steps"] == 0
    assert "weighting/limited_steps" in run(Clamp(NashMTL(), 0.0, 9.0), [1.0])[2].log_values()


def test_it_is_in_the_checkpoint_and_older_ones_load():
    factors = silence(3, 1e-6, after=6)
    whole, _, reference = run(NashMTL(), factors)
    _, _, first = run(NashMTL(), factors[:8])
    saved = first.state_dict()
    torch.manual_seed(1)
    second = Weighter(NashMTL(), TASKS)
    second.load_state_dict(saved)
    J = np.random.default_rng(0).normal(size=(3, 5)) * [[1], [1], [1e6]]
    for weighter in (first, second):
        weighter._progress.update(Statistics(np.ones(3), [True] * 3, np.linalg.norm(J, axis=1), J @ J.T))
    assert first.weights == second.weights
    assert first.log_values()["weighting/limited_steps"] == second.log_values()["weighting/limited_steps"] == 3
    assert reference.log_values()["weighting/limited_steps"] >= 3 and np.isfinite(whole).all()

    del saved["growth"]
    second.load_state_dict(saved)
    assert second.log_values()["weighting/limited_steps"] == 0
    three = dict(saved, growth=first.state_dict()["growth"])
    other = Weighter(NashMTL(), ["new", "margin"])
    other.load_state_dict(three, strict=False)
    assert other._progress.growth._count.tolist() == [0.0, first._progress.growth._count[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_masked_sample_at_a_time(dtype):
    """The event of a margin loss: one sample of 64 left, times 0.01."""
    for method in (ConFIG(), NashMTL(), CAGrad(), AlignedMTL("rmse"), RotoGrad(rotate=False)):
        lengths, _, _ = run(method, silence(1, 0.01 / 64), dtype=dtype)
        assert lengths.max() <= limit(method, 1)


def follow_cut(method, micro_batches):
    """Weights of a run in which the third loss is silent for two windows, each window in so many micro-batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    torch.manual_seed(1)
    trunk = nn.Linear(8, 16, dtype=torch.float64)
    heads = nn.ModuleDict({t: nn.Linear(16, 1, dtype=torch.float64) for t in TASKS})
    model = accelerator.prepare(nn.ModuleDict({"trunk": trunk, "heads": heads}))
    weighter = Weighter(method, TASKS, accelerator=accelerator, heads=dict(model["heads"]))
    weights = []
    for t in range(9):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        for part in x.chunk(micro_batches):
            with accelerator.accumulate(model):
                z = model["trunk"](part)
                losses = {
                    "a": model["heads"]["a"](z).square().mean(),
                    "b": (model["heads"]["b"](z) - 1).square().mean(),
                }
                losses["margin"] = (1e-5 if t in (5, 6) else 1.0) * torch.relu(2 - model["heads"]["margin"](z)).mean()
                weighter.backward(losses)
        weights.append(list(weighter.weights.values()))
    return np.array(weights), weighter.log_values()["weighting/limited_steps"]


@pytest.mark.parametrize("method", [NashMTL(), ConFIG(), ReferenceNorm("a"), DBMTL(), CAGrad()], ids=repr)
def test_the_bound_does_not_see_how_a_batch_is_cut(method):
    (whole, acted), *others = (follow_cut(method, n) for n in (1, 2, 8))
    assert acted >= 2
    for weights, again in others:
        assert again == acted
        np.testing.assert_allclose(weights, whole, rtol=1e-9)
