"""sentence-transformers' trainer with weights: equal weights are its own training, and methods are a loop by hand."""

import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from accel_weighting import (
    MGDA,
    CarryForward,
    CoVWeighting,
    EqualWeighting,
    GradNorm,
    RotoGrad,
    Statistics,
    UncertaintyWeighting,
)
from tests.embeddings import make_model, paired, scored, sentences
from tests.ranks import forget_accelerators, run_ranks

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

LR = 0.02
STEPS = 6
GRADNORM = GradNorm(lr=0.1)


class Two(nn.Module):
    """A loss that returns a dictionary, as the library's own GlobalOrthogonalRegularizationLoss does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, labels=None):
        a, b = (self.model(column)["sentence_embedding"] for column in features)
        scores = 20 * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
        return {
            "rank": F.cross_entropy(scores, torch.arange(len(a))),
            "spread": (F.normalize(torch.cat([a, b]), dim=-1).mean(0)).square().sum(),
        }


class OneOfTwo(Two):
    """One of its values, with a forward of its own."""

    def __init__(self, model, name):
        super().__init__(model)
        self.name = name

    def forward(self, features, labels=None):
        return super().forward(features, labels)[self.name]


def the_losses(kind, model):
    """`(losses, data)`: the losses by data set, or those of one batch."""
    from sentence_transformers.sentence_transformer import losses as theirs

    sets = {"sts": scored(), "rank": paired()}
    rank = theirs.MultipleNegativesRankingLoss(model)
    if kind == "matryoshka":
        rank = theirs.MatryoshkaLoss(model, rank, [8, 4, 2])
    if kind == "layers":
        rank = theirs.AdaptiveLayerLoss(model, rank, n_layers_per_step=-1)
    if kind == "cached":
        rank = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    if kind == "cached matryoshka":
        cached = theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
        rank = theirs.MatryoshkaLoss(model, cached, [8, 4, 2])
    if kind == "triplets":
        sets["rank"] = paired(columns=3)
    if kind == "dictionary":
        return Two(model), paired()
    if kind == "several":
        return {name: OneOfTwo(model, name) for name in ("rank", "spread")}, paired()
    if kind == "wrapped":
        ranks = theirs.MatryoshkaLoss(model, OneOfTwo(model, "rank"), [8, 4])
        return {"rank": ranks, "spread": OneOfTwo(model, "spread")}, paired()
    return {"sts": theirs.CoSENTLoss(model), "rank": rank}, sets


SETS = ("sets", "matryoshka", "layers", "cached", "cached matryoshka", "triplets")
TOGETHER = ("dictionary", "several", "wrapped")


def arguments(folder, **options):
    from sentence_transformers import SentenceTransformerTrainingArguments

    forget_accelerators()
    return SentenceTransformerTrainingArguments(
        str(folder / "out"),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "learning_rate": LR,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "multi_dataset_batch_sampler": "round_robin",
            **options,
        },
    )


def make_trainer(folder, kind, weighting=None, evaluator=None, eval_dataset=None, more=None, model=None, **options):
    """Theirs, or ours where there is a method."""
    from sentence_transformers import SentenceTransformerTrainer

    from accel_weighting.integrations.sentence_transformers import WeightedSentenceTransformerTrainer

    model = model or make_model()
    losses, data = the_losses(kind, model)
    given = {"model": model, "args": arguments(folder, **options), "train_dataset": data, "loss": losses}
    given |= {"evaluator": evaluator, "eval_dataset": eval_dataset}
    if weighting is None:
        return SentenceTransformerTrainer(**given)
    if kind == "dictionary":
        given["tasks"] = ["rank", "spread"]
    return WeightedSentenceTransformerTrainer(**given, weighting=weighting, **(more or {}))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def told(trainer):
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    run = {"parameters": parameters(trainer.model), "logs": logs, "world": trainer.accelerator.num_processes}
    if hasattr(trainer, "weighter"):
        run["history"] = [values for _, values in trainer.weighter.history]
        run["weights"] = trainer.weighter.weights
        run["method"] = repr(trainer.weighter.method)
    return run


def trained(folder, kind, weighting=None, **options):
    trainer = make_trainer(folder, kind, weighting, **options)
    trainer.train()
    return told(trainer)


# ---- by hand -----------------------------------------------------------------------------------------------------


def gradients(model, loss, features, labels):
    """A loss, and its gradient at every sentence embedding that it was computed from, in one vector."""
    seen = []
    handle = model[-1].register_forward_hook(lambda module, args, out: seen.append(out["sentence_embedding"]))
    L = loss(features, labels)
    handle.remove()
    found = torch.autograd.grad(L, seen, retain_graph=True)
    return L, torch.cat([g.flatten() for g in found])


def by_hand(folder, kind, method, world, accumulation):
    """One process with all batches; the method is called with statistics made here."""
    the_data = "dictionary" if kind in TOGETHER else kind
    trainer = make_trainer(folder, the_data, gradient_accumulation_steps=accumulation, dataloader_drop_last=True)
    model, together = trainer.model, kind in TOGETHER
    losses = the_losses(kind.replace("dictionary", "several").replace("cached", "").strip() or "sets", model)[0]
    tasks = list(losses)
    weights, state = method.init(tasks)
    blocks = world * accumulation
    batches = iter(trainer._build_dataloader(trainer.train_dataset, 4, "train"))
    model.train()
    history = []
    for _ in range(STEPS):
        model.zero_grad()
        L, present = np.zeros(len(tasks)), np.zeros(len(tasks), bool)
        counts, gram = np.zeros(len(tasks)), np.zeros((len(tasks), len(tasks)))
        for _ in range(blocks):
            batch = next(batches)
            name = batch.pop("dataset_name", None)
            features, labels = trainer.collect_features(batch)
            here = list(range(len(tasks))) if together else [tasks.index(name)]
            found = [gradients(model, losses[tasks[k]], features, labels) for k in here]
            sum(weights[k] * loss for k, (loss, _) in zip(here, found, strict=True)).div(blocks).backward()
            for i, (loss, g) in zip(here, found, strict=True):
                L[i], counts[i], present[i] = L[i] + loss.item(), counts[i] + 1, True
                for j, (_, h) in zip(here, found, strict=True):
                    if together:
                        gram[i, j] += float(g @ h) / blocks**2
                    elif i == j:
                        gram[i, i] += float(g @ g) / blocks**2
        L = np.where(present, L / np.maximum(counts, 1), 0.0)
        norms = np.sqrt(np.diag(gram))
        weights, state = method.update(state, Statistics(L, present, norms=norms, gram=gram))
        seen = {f"weight/{task}": weights[k] for k, task in enumerate(tasks)}
        seen |= {f"loss/{task}": L[k] for k, task in enumerate(tasks) if present[k]}
        history.append(seen | {f"grad_norm/{task}": norms[k] for k, task in enumerate(tasks) if present[k]})
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= LR * p.grad
    return {"parameters": parameters(model), "history": history}


def assert_by_hand(run, hand, tolerance=1e-12):
    for name, p in hand["parameters"].items():
        torch.testing.assert_close(run["parameters"][name], p, rtol=tolerance, atol=tolerance)
    assert len(run["history"]) == len(hand["history"]) == STEPS
    for found, expected in zip(run["history"], hand["history"], strict=True):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name  # the history is kept in float32
    for task, weight in run["weights"].items():
        assert weight == pytest.approx(hand["history"][-1][f"weight/{task}"], rel=tolerance)
    assert max(abs(w - 1) for w in run["weights"].values()) > 1e-2  # they did move


def all_hands(folder):
    warnings.simplefilter("ignore")
    cells = [(kind, world, 1) for kind in (*SETS, *TOGETHER) for world in (1, 2)]
    cells += [(kind, world, 2) for kind in ("sets", "dictionary") for world in (1, 2)]
    hands = {}
    for kind, world, accumulation in cells:
        method = METHODS[kind] if kind in TOGETHER else CarryForward(METHODS[kind])
        hands[kind, world, accumulation] = by_hand(folder, kind, method, world, accumulation)
    return hands


METHODS = dict.fromkeys((*SETS, *TOGETHER), GRADNORM) | {"several": MGDA(), "triplets": CoVWeighting()}


def all_runs(folder):
    """One launch for all, since what a launch costs is importing."""
    warnings.simplefilter("ignore")
    runs = {}
    for kind in (*SETS, *TOGETHER):
        place = folder / kind.replace(" ", "-")
        runs[kind] = {"by the method": trained(place / "method", kind, METHODS[kind])}
        if kind in ("sets", "dictionary"):
            runs[kind]["accumulated"] = trained(place / "acc", kind, GRADNORM, gradient_accumulation_steps=2)
        if kind not in ("several", "wrapped"):  # which their trainer has no word for
            runs[kind]["theirs"] = trained(place / "theirs", kind)
            runs[kind]["equal"] = trained(place / "equal", kind, EqualWeighting())
    runs["interrupted"] = interrupted(folder / "interrupted")
    runs["evaluated"] = evaluated(folder / "evaluated")
    return runs


def interrupted(folder):
    """Once in one go, once stopped and gone on with in a new trainer."""
    whole = trained(folder / "whole", "sets", GRADNORM)
    trained(folder / "part", "sets", GRADNORM, max_steps=3, save_strategy="steps", save_steps=3)
    saved = folder / "part" / "out" / "checkpoint-3"
    trainer = make_trainer(folder / "part", "sets", GRADNORM)
    trainer.train(resume_from_checkpoint=str(saved))
    return whole, told(trainer), sorted(path.name for path in saved.iterdir())


def evaluated(folder):
    """Evaluation in between, of their trainer and of ours with equal weights and others."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    def run(name, kind, weighting, evaluator=None):
        data = {"sts": scored(8, 5), "rank": paired(8, 6)} if kind == "sets" else paired(8, 6)
        options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
        trainer = make_trainer(folder / name, kind, weighting, evaluator, data, **options)
        trainer.train()
        trainer.save_model(str(folder / name / "saved"))
        drop = ("runtime", "per_second", "epoch", "step")
        figures = [
            {key: value for key, value in entry.items() if not key.endswith(drop)}
            for entry in trainer.state.log_history
            if any(key.startswith("eval_") for key in entry)
        ]
        files = sorted(str(p.relative_to(folder / name)) for p in (folder / name / "saved").rglob("*") if p.is_file())
        return {**told(trainer), "eval": figures, "files": files}

    pairs = scored(8, 7)
    scores = EmbeddingSimilarityEvaluator(list(pairs["first"]), list(pairs["second"]), list(pairs["score"]))
    return {
        "sets": [run(f"sets{i}", "sets", w, scores) for i, w in enumerate((None, EqualWeighting(), GRADNORM))],
        "dictionary": [run(f"dict{i}", "dictionary", w) for i, w in enumerate((None, EqualWeighting(), GRADNORM))],
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(all_runs, 1, folder, folder, timeout=600)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(all_runs, 2, folder, folder, timeout=600)


@pytest.fixture(scope="module")
def hands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hands")
    return run_ranks(all_hands, 1, folder, folder, timeout=600)[0]


def assert_same(a, b, tolerance=1e-12):
    for name, p in a["parameters"].items():
        torch.testing.assert_close(b["parameters"][name], p, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [kind for kind in (*SETS, *TOGETHER) if kind not in ("several", "wrapped")])
def test_equal_weights_are_the_librarys_own_training(one, two, kind):
    for world, run in ((1, one), *((2, rank) for rank in two)):
        theirs, equal = run[kind]["theirs"], run[kind]["equal"]
        assert theirs["world"] == equal["world"] == world
        assert_same(theirs, equal, 0)
        assert [entry["loss"] for entry in theirs["logs"]] == [entry["loss"] for entry in equal["logs"]]
        assert set(theirs["logs"][0]) < set(equal["logs"][0])  # its own values stay, and ours come in


@pytest.mark.parametrize("kind", [*SETS, *TOGETHER])
def test_a_method_is_the_loop_by_hand(one, two, hands, kind):
    for world, run in ((1, one), *((2, rank) for rank in two)):
        assert_by_hand(run[kind]["by the method"], hands[kind, world, 1])
    for a, b in zip(*(rank[kind]["by the method"]["history"] for rank in two), strict=True):
        assert a == b  # bit by bit on both processes


@pytest.mark.parametrize("kind", ["sets", "dictionary"])
def test_a_method_is_the_loop_by_hand_under_accumulation(one, two, hands, kind):
    for world, run in ((1, one), *((2, rank) for rank in two)):
        assert_by_hand(run[kind]["accumulated"], hands[kind, world, 2])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(one, two):
    for run in (one, *two):
        whole, resumed, files = run["interrupted"]
        assert "weighter.pt" in files and "modules.json" in files
        assert whole["history"] == resumed["history"] and whole["weights"] == resumed["weights"]
        assert_same(whole, resumed, 0)


@pytest.mark.parametrize("kind", ["sets", "dictionary"])
def test_evaluation_and_saving_are_the_librarys_own(one, two, kind):
    for run in (one, *two):
        theirs, equal, weighed = run["evaluated"][kind]
        assert theirs["eval"] == equal["eval"] and len(theirs["eval"]) > 2
        assert any("eval_sts_loss" in entry for entry in theirs["eval"]) == (kind == "sets")
        assert [set(entry) for entry in weighed["eval"]] == [set(entry) for entry in theirs["eval"]]
        assert_same(theirs, equal, 0)
        assert theirs["files"] == [file for file in weighed["files"] if file != "saved/weighter.pt"]
        assert len(weighed["history"]) == STEPS  # evaluation records nothing


def test_methods_that_compare_data_sets_carry_values_forward(one):
    assert one["sets"]["by the method"]["method"] == repr(CarryForward(GRADNORM))
    assert one["sets"]["equal"]["method"] == repr(EqualWeighting())
    assert one["dictionary"]["by the method"]["method"] == repr(GRADNORM)


# ---- words, and what is left alone -------------------------------------------------------------------------------


def refused(folder):
    """What is refused, in which words."""
    from sentence_transformers.sentence_transformer import losses as theirs

    warnings.simplefilter("ignore")

    def message(kind, *args, **kwargs):
        with pytest.raises(kind) as error:
            trainer = make_trainer(folder, *args, **kwargs)
            trainer.train()
        return str(error.value)

    class Cached(theirs.CachedMultipleNegativesRankingLoss):
        pass

    def of_one_batch(make, method, tasks=("rank", "spread")):
        from accel_weighting.integrations.sentence_transformers import WeightedSentenceTransformerTrainer

        model = make_model()
        given = {"model": model, "args": arguments(folder), "train_dataset": paired()}
        trainer = WeightedSentenceTransformerTrainer(**given, loss=make(model), weighting=method, tasks=tasks)
        trainer.train()
        return told(trainer)

    def said(kind, *args, **kwargs):
        with pytest.raises(kind) as error:
            of_one_batch(*args, **kwargs)
        return str(error.value)

    def cached_beside(model):
        return {"rank": Cached(model, mini_batch_size=2), "spread": OneOfTwo(model, "spread")}

    def layers(model):
        return {"rank": theirs.AdaptiveLayerLoss(model, OneOfTwo(model, "rank")), "spread": OneOfTwo(model, "spread")}

    by_losses = [of_one_batch(make, CoVWeighting(), None) for make in (cached_beside, layers)]
    plain = theirs.MultipleNegativesRankingLoss
    return {
        "rotates": message(ValueError, "sets", RotoGrad()),
        "gram": message(ValueError, "sets", MGDA()),
        "no tasks": said(ValueError, Two, GRADNORM, None),
        "one loss": said(TypeError, plain, CoVWeighting()),
        "one loss, divided": said(TypeError, plain, GRADNORM),
        "unknown task": said(ValueError, Two, CoVWeighting(), ("rank", "spred")),
        "cached": said(ValueError, cached_beside, GRADNORM, None),
        "layers": said(ValueError, layers, GRADNORM, None),
        "by losses": by_losses,
        "made": of_one_batch(lambda model: {n: partial(OneOfTwo, name=n) for n in ("rank", "spread")}, MGDA(), None),
    }


def left_alone(folder):
    """A model after its training, a copy of it, and one that went through pickle."""
    warnings.simplefilter("ignore")
    trainer = make_trainer(folder, "dictionary", GRADNORM)
    trainer.train()
    model, texts = trainer.model, sentences(5, 9)
    before = trainer.weighter.history
    twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    encoded = [torch.as_tensor(m.encode(texts)) for m in (model, twin, other)]
    features = twin.preprocess(texts)
    twin(features)["sentence_embedding"].sum().backward()  # trained elsewhere: no weighter in it
    twin.save(str(folder / "saved"))
    from sentence_transformers import SentenceTransformer

    encoded.append(torch.as_tensor(SentenceTransformer(str(folder / "saved"), device="cpu").encode(texts)))
    methods = {}
    for kind, method in (("sets", UncertaintyWeighting()), ("sets", CarryForward(GRADNORM, steps=3))):
        methods[repr(method)] = repr(make_trainer(folder, kind, method).weighter.method)
    methods["off"] = repr(make_trainer(folder, "sets", GRADNORM, more={"carry": None}).weighter.method)
    return encoded, before == trainer.weighter.history, "forward" in vars(model), methods


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    return run_ranks(refused, 1, folder, folder, timeout=600)[0]


def test_what_cannot_be_weighed_is_refused_in_words(words):
    expected = {
        "rotates": "`weighting` must not rotate",
        "gram": "inner products are exactly 0",
        "no tasks": "or `tasks`, the keys of a loss that returns a dictionary. Found `loss` of type Two",
        "one loss": "must return a dictionary",
        "one loss, divided": "must return a dictionary",
        "unknown task": "spread",
        "cached": "Cached embeds the batch in its own way",
        "layers": "AdaptiveLayerLoss embeds the batch in its own way",
    }
    for name, text in expected.items():
        assert text in words[name], name


def test_losses_that_embed_on_their_own_are_weighed_by_their_values(words):
    for run in words["by losses"]:
        assert len(run["history"]) == STEPS
        assert max(abs(w - 0.5) for w in run["weights"].values()) > 1e-3
        assert not any(name.startswith("grad_norm/") for name in run["history"][-1])


def test_losses_that_are_made_of_the_model(words, one):
    assert words["made"]["weights"] == one["several"]["by the method"]["weights"]


def test_a_model_is_left_alone(tmp_path):
    encoded, history_kept, patched, methods = run_ranks(left_alone, 1, tmp_path, tmp_path, timeout=300)[0]
    for other in encoded[1:]:
        torch.testing.assert_close(encoded[0], other)
    assert history_kept and not patched
    assert list(methods.items())[:2] == [(name, name) for name in list(methods)[:2]]  # taken as they are
    assert methods["off"] == repr(GRADNORM)
