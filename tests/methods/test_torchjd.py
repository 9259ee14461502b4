"""The adapter against TorchJD called by hand, and the traps of peers.md §3.3."""

import copy
import io
import sys

import numpy as np
import pytest
import torch
import torchjd.aggregation as tj
from torchjd.linalg import QuadprogProjector

from accel_weighting.methods.algebra import mixed_seed
from accel_weighting.methods.torchjd import TorchJDWeighting
from accel_weighting.statistics import Statistics

MAKE = {
    "UPGrad": tj.UPGradWeighting,
    "UPGrad, preferences": lambda: tj.UPGradWeighting(pref_vector=torch.tensor([1.0, 2.0, 1.0, 0.5])),
    "DualProj": tj.DualProjWeighting,
    "MGDA": tj.MGDAWeighting,
    "PCGrad": tj.PCGradWeighting,
    "GradVac": tj.GradVacWeighting,
    "CAGrad": lambda: tj.CAGradWeighting(c=0.4),
    "AlignedMTL": tj.AlignedMTLWeighting,
    "IMTLG": tj.IMTLGWeighting,
    "FairGrad": lambda: tj.FairGradWeighting(alpha=1.0),
    "Krum": lambda: tj.KrumWeighting(n_byzantine=0),
    "PCD": tj.PCDWeighting,
    "Mean": tj.MeanWeighting,
    "Random": tj.RandomWeighting,
    "Constant": lambda: tj.ConstantWeighting(torch.tensor([1.0, 2.0, 3.0, 4.0])),
    "CRMOGM of UPGrad": lambda: tj.CRMOGMWeighting(tj.UPGradWeighting()),
    "CRMOGM of GradVac": lambda: tj.CRMOGMWeighting(tj.GradVacWeighting(), alpha=0.5),
}
STATEFUL = ["GradVac", "PCD", "CRMOGM of UPGrad", "CRMOGM of GradVac"]
RANDOM = ["PCGrad", "GradVac", "Random", "CRMOGM of GradVac"]
K = 4


def gram(seed, K=K, rank=7):
    J = torch.randn(K, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    return J @ J.T


def window(M, present=None):
    present = np.ones(len(M), np.bool_) if present is None else np.asarray(present)
    M = M * present * present[:, None]
    return Statistics(np.ones(len(M)), present, norms=np.sqrt(M.diagonal()), gram=M)


def start(method, K=K):
    return method.init([f"task{k}" for k in range(K)])[1]


def normalised(M):
    return torch.from_numpy(M / M.diagonal().mean())


def float64(weighting):
    """TorchJD keeps preferences in the dtype they came in, and multiplies them with a float64 matrix."""
    for module in weighting.modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                vars(module)[key] = value.double()
    return weighting


@pytest.mark.parametrize("name", MAKE)
def test_the_trajectory_is_torchjds(name):
    method, theirs = TorchJDWeighting(MAKE[name](), seed=3), float64(MAKE[name]())
    state = start(method)
    for counter in range(1, 6):
        M = gram(counter)
        weights, state = method.update(state, window(M))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(3, counter))
            expected = theirs(normalised(M)).double()
        assert weights.dtype == np.float64
        np.testing.assert_allclose(weights, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_update_is_pure_whatever_was_called_before(name):
    used = MAKE[name]()
    method = TorchJDWeighting(used)
    state = start(method)
    _, state = method.update(state, window(gram(1)))
    before = {key: value.copy() for key, value in state.items()}
    generator = torch.get_rng_state()
    first, new = method.update(state, window(gram(2)))
    assert np.array_equal(torch.get_rng_state(), generator)  # the global generator is left alone
    assert all(np.array_equal(state[key], before[key]) for key in before)
    assert {key: (v.shape, v.dtype) for key, v in new.items()} == {key: (v.shape, v.dtype) for key, v in state.items()}

    float64(used)(torch.from_numpy(gram(7)))  # the user's own object
    torch.rand(5)
    method.update(start(method), window(gram(8)))
    again, same = method.update(state, window(gram(2)))
    assert np.array_equal(again, first) and all(np.array_equal(same[key], new[key]) for key in new)
    other, _ = TorchJDWeighting(used).update(state, window(gram(2)))  # a used weighting starts anew
    assert np.array_equal(other, first)


@pytest.mark.parametrize("name", MAKE)
def test_a_resumed_run_goes_on(name):
    method = TorchJDWeighting(MAKE[name]())
    state, weights = start(method), []
    for seed in range(5):
        if seed == 3:
            file = io.BytesIO()
            torch.save({key: torch.from_numpy(value) for key, value in state.items()}, file)
            file.seek(0)
            resumed = {key: value.numpy() for key, value in torch.load(file, weights_only=True).items()}
        w, state = method.update(state, window(gram(seed)))
        weights.append(w)
    method = TorchJDWeighting(MAKE[name]())
    for seed in (3, 4):
        w, resumed = method.update(resumed, window(gram(seed)))
        assert np.array_equal(w, weights[seed])


@pytest.mark.parametrize("name", RANDOM)
def test_random_weightings_draw_anew_in_every_window_and_alike_everywhere(name):
    method = TorchJDWeighting(MAKE[name]())
    M = gram(5, rank=2)
    torch.manual_seed(0)
    one = method.update(start(method), window(M))
    torch.manual_seed(1)
    two = TorchJDWeighting(MAKE[name]()).update(start(method), window(M))
    assert np.array_equal(one[0], two[0])
    assert any(not np.array_equal(method.update(one[1], window(M))[0], one[0]) for _ in range(1)) or name == "PCGrad"
    seeds = [TorchJDWeighting(MAKE[name](), seed=s).update(start(method), window(M))[0] for s in range(8)]
    assert any(not np.array_equal(seeds[0], other) for other in seeds[1:])


@pytest.mark.parametrize("name", [name for name in MAKE if name not in STATEFUL])
def test_absent_tasks_are_dropped_before_the_solver(name):
    present = [True, False, True, True]
    rows = np.array(present)
    method = TorchJDWeighting(MAKE[name]())
    first, state = method.update(start(method), window(gram(1)))
    weights, _ = method.update(state, window(gram(2), present))
    assert np.array_equal(weights[~rows], first[~rows])
    theirs = float64(MAKE[name]())
    if name == "Constant":
        expected = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64)
    elif name == "UPGrad, preferences":
        expected = tj.UPGradWeighting(torch.tensor([1.0, 1.0, 0.5]).double())(normalised(gram(2)[rows][:, rows]))
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(0, 2))
            expected = theirs(normalised(gram(2)[rows][:, rows])).double()
    tolerance = 1e-5 if name == "CAGrad" else 1e-12  # its solver turns the last bit of its input into 1e-8
    np.testing.assert_allclose(weights[rows], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", STATEFUL)
def test_an_absent_task_keeps_its_part_of_the_memory(name):
    present = [True, False, True, True]
    rows = np.array(present)
    method = TorchJDWeighting(MAKE[name]())
    first, state = method.update(start(method), window(gram(1)))
    weights, new = method.update(state, window(gram(2), present))
    assert np.array_equal(weights[~rows], first[~rows]) and np.isfinite(weights).all()
    memory = [key for key in state if key.startswith("memory.")]
    assert memory and bool(state["started"])
    moved = False
    for key in memory:
        before, after = state[key][0], new[key][0]
        assert after.shape == before.shape
        if after.ndim:
            assert np.array_equal(after[~rows], before[~rows])
            moved |= not np.array_equal(after, before)
    assert moved


def test_memory_of_the_present_tasks_moves_as_if_the_others_did_not_exist():
    rows = np.array([True, False, True, True])
    method = TorchJDWeighting(tj.CRMOGMWeighting(tj.MeanWeighting(), alpha=0.75))
    _, state = method.init(list("abcd"))
    state = {**state, "started": np.asarray(True), "memory._lambda": np.arange(4.0)[None]}
    weights, new = method.update(state, window(gram(2), rows.tolist()))
    np.testing.assert_allclose(weights[rows], 0.75 * np.array([0.0, 2.0, 3.0]) + 0.25 / 3)
    assert np.array_equal(new["memory._lambda"][0, rows], weights[rows]) and new["memory._lambda"][0, 1] == 1


@pytest.mark.parametrize("name", STATEFUL)
def test_the_memory_begins_with_the_first_complete_window(name):
    method = TorchJDWeighting(MAKE[name]())
    weights, state = method.update(start(method), window(gram(1), [True, True, False, True]))
    assert np.isfinite(weights).all() and not state["started"]
    weights, later = method.update(state, window(gram(2)))
    theirs = float64(MAKE[name]())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(0, 2))
        np.testing.assert_allclose(weights, theirs(normalised(gram(2))), rtol=1e-12, atol=1e-12)
    assert later["started"]


@pytest.mark.parametrize("name", MAKE)
def test_a_window_without_tasks_changes_nothing_but_the_counter(name):
    method = TorchJDWeighting(MAKE[name]())
    first, state = method.update(start(method), window(gram(1)))
    weights, new = method.update(state, window(gram(2), [False] * 4))
    assert np.array_equal(weights, first) and new["counter"] == state["counter"] + 1
    assert all(np.array_equal(new[key], state[key]) for key in state if key != "counter")


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("UPGrad, preferences", "Constant")])
def test_one_task_has_weight_one(name):
    method = TorchJDWeighting(MAKE[name]())
    weights, state = method.init(["only"])
    assert weights.tolist() == [1.0]
    assert method.update(state, window(gram(1, K=1)))[0].tolist() == [1.0]


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("PCD", "GradVac", "CRMOGM of GradVac")])
@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_the_size_of_the_gradients_is_of_no_consequence(name, scale):
    # By hand, `norm_eps` makes UPGrad the plain mean and CAGrad zero for gradients of 1e-7.
    method = TorchJDWeighting(MAKE[name]())
    M = gram(3, rank=3)
    plain, scaled = (method.update(start(method), window(G))[0] for G in (M, M * scale))
    np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-4)
    assert abs(scaled).sum() > 0


def test_no_gradient_at_all_means_orthonormal_gradients():
    method = TorchJDWeighting(tj.CAGradWeighting(c=0.5))
    initial, state = method.init(list("abc"))
    np.testing.assert_allclose(initial, np.full(3, 0.5), rtol=1e-6, atol=0)
    weights, _ = method.update(state, window(np.zeros((3, 3))))
    assert np.array_equal(weights, initial)


def test_initial_weights_may_be_given():
    weights, state = TorchJDWeighting(tj.MeanWeighting()).init(["a", "b"], {"a": 0.2, "b": 0.8})
    assert weights.tolist() == [0.2, 0.8] == state["weights"].tolist()


class Broken(tj.MeanWeighting):
    def forward(self, stat, /):
        return torch.full((len(stat),), torch.nan if stat[0, 1] < 0 else 0.5)


class Counting(tj.MeanWeighting):
    """A weighting of the user's own, with a buffer and a plain tensor that conflicts alone change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("conflicts", torch.zeros(3))
        self.total = torch.tensor(0)

    def forward(self, stat, /):
        self.conflicts = self.conflicts + (stat < 0).sum(0)
        self.total = self.total + 1
        return self.conflicts * self.total


def test_tensors_of_any_kind_are_remembered():
    method = TorchJDWeighting(Counting())
    _, state = method.init(list("abc"))
    conflict = np.array([[1.0, -0.5, 0.5], [-0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    _, state = method.update(state, window(np.eye(3)))
    assert state["memory.conflicts"].tolist() == [[0, 0, 0]]
    weights, state = method.update(state, window(conflict))
    assert weights.tolist() == [2, 2, 0]
    weights, state = method.update(state, window(conflict, [True, True, False]))
    assert weights.tolist() == [6, 6, 0] and state["memory.conflicts"].tolist() == [[2, 2, 0]]


def test_an_answer_that_is_not_finite_leaves_the_weights_as_they_were():
    method = TorchJDWeighting(Broken())
    _, state = method.init(["a", "b"], {"a": 0.2, "b": 0.8})
    conflict = np.array([[1.0, -0.5], [-0.5, 1.0]])
    weights, state = method.update(state, window(conflict))
    assert weights.tolist() == [0.2, 0.8]
    assert method.update(state, window(abs(conflict)))[0].tolist() == [0.5, 0.5]


def test_it_compares_by_the_settings_that_torchjds_repr_leaves_out():
    one, same, other = (TorchJDWeighting(tj.CAGradWeighting(c=c)) for c in (0.4, 0.4, 0.5))
    assert one == same and hash(one) == hash(same) and one != other and one != "CAGrad"
    assert repr(one) == "TorchJDWeighting(CAGradWeighting(c=0.4, norm_eps=0.0001), seed=0)"
    projector = QuadprogProjector(norm_eps=0, reg_eps=1e-9)
    assert "reg_eps=1e-09" in repr(TorchJDWeighting(tj.UPGradWeighting(projector=projector)))
    assert TorchJDWeighting(tj.UPGradWeighting()) != TorchJDWeighting(tj.UPGradWeighting(projector=projector))
    assert TorchJDWeighting(tj.MeanWeighting()) != TorchJDWeighting(tj.MeanWeighting(), seed=1)
    for make in MAKE.values():
        method = TorchJDWeighting(make())
        assert "0x" not in repr(method) and method == copy.deepcopy(method)
        _, state = method.init(list("abcd"))
        method.update(state, window(gram(1)))
        assert repr(method) == repr(TorchJDWeighting(make()))


def test_what_is_not_a_weighting_of_a_gramian_is_refused():
    with pytest.raises(TypeError, match="such as `UPGradWeighting"):
        TorchJDWeighting(tj.UPGrad())
    for weighting in (tj.MoDoWeighting(), tj.SDMGradWeighting(), tj.ExcessMTLWeighting()):
        with pytest.raises(ValueError, match="needs the Jacobian, or two batches"):
            TorchJDWeighting(weighting)
    with pytest.raises(ValueError, match="at least 3 rows"):
        TorchJDWeighting(tj.KrumWeighting(n_byzantine=0)).init(["a", "b"])


def test_without_torchjd_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ImportError, match=r"pip install accel_weighting\[torchjd\]"):
        TorchJDWeighting(object())
