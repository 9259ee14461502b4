"""The model that is handed out is the one that was evaluated: checkpoints, the best model, saving and retries."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from accel_weighting import CoVWeighting, GradNorm, RotoGrad
from accel_weighting.methods.wrappers import Warmup
from tests.ranks import run_ranks

METHODS = {
    "cov": CoVWeighting(total="tasks"),
    "gradnorm": GradNorm(alpha=1.5),
    "rotograd": RotoGrad(burn_in=0, lr=0.5),
    "warmup": Warmup(RotoGrad(burn_in=0, lr=0.5), 2),
}
HEADS = {"topic": "topic", "mood": "mood"}


def make_model(plain_heads=True):
    """A model of transformers, which `from_pretrained` loads again."""
    from transformers import PreTrainedConfig, PreTrainedModel

    class Two(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed, self.layer = nn.Embedding(30, 8), nn.Linear(8, 8)
            self.topic, self.mood = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
            if not config.plain_heads:
                self.mood = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1))
            self.post_init()

        def forward(self, input_ids, labels_topic=None, labels_mood=None):
            z = torch.tanh(self.layer(self.embed(input_ids)))
            topic, mood = self.topic(z).mean(1), self.mood(z).mean(1).squeeze(-1)
            losses = {"topic": F.cross_entropy(topic, labels_topic), "mood": F.mse_loss(mood, labels_mood)}
            return {"losses": losses, "topic": topic, "mood": mood}

    torch.manual_seed(0)
    return Two(PreTrainedConfig(plain_heads=plain_heads))


def rows(n):
    ids = torch.randint(0, 30, (n, 5), generator=torch.Generator().manual_seed(n))
    return [{"input_ids": i, "labels_topic": int(i[0]) % 4, "labels_mood": float(i.sum() % 7)} for i in ids]


def make_trainer(folder, method="rotograd", model=None, cls=None, init=None, callbacks=None, metrics=None, **arguments):
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    from accel_weighting.integrations.trainer import WeightedTrainer

    AcceleratorState._reset_state(reset_partial_state=True)

    class InOrder(cls or WeightedTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "max_steps": 8,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **arguments,
        },
    )
    return InOrder(
        model=None if init else make_model() if model is None else model,
        model_init=init,
        args=args,
        train_dataset=rows(32),
        eval_dataset=rows(13),
        weighting=METHODS[method],
        heads=HEADS,
        callbacks=callbacks,
        compute_metrics=metrics,
    )


def losses_of(metrics):
    return [metrics[f"eval_{name}"] for name in ("loss", "loss/topic", "loss/mood")]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def turned(weighter):
    """How far the rotations are from none."""
    return min(float((R - torch.eye(len(R))).norm()) for R in weighter.rotations.values())


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def best(folder, method, **more):
    """Logged for the best checkpoint, after training, and in a new Trainer; the best is the second of four."""
    from transformers import EarlyStoppingCallback

    scores = iter([1.0, 3.0, 1.0, 1.0])
    trainer = make_trainer(
        folder,
        method,
        metrics=lambda results: {"score": next(scores)},
        callbacks=[EarlyStoppingCallback(2)],
        **EVALUATED,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        max_steps=20,
        **more,
    )
    trainer.train()
    logged = [losses_of(entry) for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 4 and trainer.state.global_step == 8  # stopped early
    trainer.compute_metrics = None
    found = [logged[1], losses_of(trainer.evaluate())]
    trainer.save_model(str(Path(folder) / "handed_out"))
    alone = make_trainer(folder, method, model=load(Path(folder) / "handed_out", trainer))
    return *found, losses_of(alone.evaluate())[1:], trainer.weighter.state_dict()["step"], logged[-1]


def load(folder, trainer):
    trainer.accelerator.wait_for_everyone()  # the main process writes
    return type(make_model()).from_pretrained(str(folder))


def by_selection(folder):
    """The best by a task's own loss."""
    trainer = make_trainer(
        folder, "gradnorm", **EVALUATED, load_best_model_at_end=True, metric_for_best_model="eval_loss/topic"
    )
    trainer.train()
    seen = [entry["eval_loss/topic"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return min(seen), trainer.state.best_metric, trainer.evaluate()["eval_loss/topic"]


def resumed(folder, method):
    """In one go; stopped at half and gone on with; and from a model that was loaded by itself."""
    whole = make_trainer(folder / "whole", method, save_strategy="steps", save_steps=4)
    whole.train()
    whole.accelerator.wait_for_everyone()
    again = make_trainer(folder / "again", method)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    alone = make_trainer(folder / "alone", method, model=load(folder / "whole" / "checkpoint-8", whole))
    return {
        "parameters": [parameters(t.model) for t in (whole, again)],
        "weights": [list(t.weighter.weights.values()) for t in (whole, again)],
        "rotations": [t.weighter.rotations for t in (whole, again)] if method != "gradnorm" else None,
        "evaluated": [losses_of(t.evaluate())[1:] for t in (whole, again, alone)],
        "world": whole.accelerator.num_processes,
    }


def only_the_model(folder):
    trainer = make_trainer(folder, save_strategy="steps", save_steps=8, save_only_model=True)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    files = sorted(path.name for path in (Path(folder) / "checkpoint-8").iterdir())
    alone = make_trainer(folder, model=load(Path(folder) / "checkpoint-8", trainer))
    before = turned(trainer.weighter)
    return files, losses_of(trainer.evaluate())[1:], losses_of(alone.evaluate())[1:], before


def unfoldable(folder):
    """A head that begins with a LayerNorm: said, saved beside, and taken up by a resume."""
    trainer = make_trainer(folder / "a", model=make_model(plain_heads=False), save_strategy="steps", save_steps=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(w.message) for w in caught if "without its rotations" in str(w.message)]
    again = make_trainer(folder / "b", model=make_model(plain_heads=False))
    again.train(resume_from_checkpoint=str(folder / "a" / "checkpoint-4"))
    return said, parameters(trainer.model), parameters(again.model)


def all_of_saving(folder, methods):
    return {
        "best": {method: best(folder / f"best-{method}", method) for method in methods},
        "best_only_model": best(folder / "best-only", "rotograd", save_only_model=True),
        "resumed": {method: resumed(folder / f"resumed-{method}", method) for method in methods if method != "cov"},
        "selected": by_selection(folder / "selected"),
        "only": only_the_model(folder / "only"),
        "unfoldable": unfoldable(folder / "unfoldable"),
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(all_of_saving, 1, folder, folder, list(METHODS), timeout=600)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(all_of_saving, 2, folder, folder, ["gradnorm", "rotograd"], timeout=900)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_best_model_is_the_one_that_was_evaluated(one, two, processes):
    for run in one if processes == 1 else two:
        for logged, after, alone, step, last in [*run["best"].values(), run["best_only_model"]]:
            assert after == pytest.approx(logged, rel=1e-6)
            assert alone == pytest.approx(logged[1:], rel=1e-5)  # folded in float32, and without weights
            assert step == 4  # of the weighter too
            assert last != pytest.approx(logged, rel=1e-3)  # the last one was another
        least, selected, after = run["selected"]
        assert least == selected and after == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_and_a_saved_model_stands_alone(one, two, processes):
    for run in one if processes == 1 else two:
        for found in run["resumed"].values():
            assert found["world"] == processes
            whole, again = found["parameters"]
            assert all(torch.equal(value, again[name]) for name, value in whole.items())
            assert found["weights"][0] == found["weights"][1]
            if found["rotations"]:
                whole, again = found["rotations"]
                assert all(torch.equal(value, again[task]) for task, value in whole.items())
                assert min(float((R - torch.eye(8)).norm()) for R in whole.values()) > 0.1
            whole, again, alone = found["evaluated"]
            assert whole == again and alone == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_that_is_saved_alone_holds_its_rotations(one, two, processes):
    for run in one if processes == 1 else two:
        files, before, after, turned_by = run["only"]
        assert "optimizer.pt" not in files and "weighter.pt" in files
        assert turned_by > 0.1 and after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_rotations_that_cannot_be_folded_are_saved_beside_and_said(one, two, processes):
    for run in one if processes == 1 else two:
        said, whole, again = run["unfoldable"]
        assert said and "weighter.pt" in said[0] and "task `mood` cannot be folded" in said[0]
        assert all(torch.equal(value, again[name]) for name, value in whole.items())


# ---- the weighter of the accelerator in use ----------------------------------------------------------------------


def retried(folder):
    """The first size runs out of memory in its third step, the second is that of a run that starts with it."""
    from accel_weighting.integrations.trainer import WeightedTrainer

    class Small(WeightedTrainer):
        steps, limit = 0, 4

        def compute_losses(self, model, inputs, return_outputs=False):
            self.steps += torch.is_grad_enabled()
            if len(inputs["input_ids"]) > self.limit and self.steps > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_losses(model, inputs, return_outputs)

    seen = {}
    for method in ("cov", "rotograd"):
        trainer = make_trainer(folder, method, cls=Small, per_device_train_batch_size=5, auto_find_batch_size=True)
        trainer.train()
        assert trainer._train_batch_size == 4 and trainer.steps > 8
        seen[method] = (
            trainer.weighter.state_dict()["step"],
            trainer.state.global_step,
            trainer.weighter.accelerator is trainer.accelerator,
        )
    return seen


def twice(folder):
    """A second training goes on; with `model_init` it starts anew."""
    trainer = make_trainer(folder, "rotograd")
    trainer.train()
    before, weighter = trainer.weighter.state_dict(), trainer.weighter
    evaluated = losses_of(trainer.evaluate())
    assert losses_of(trainer.evaluate()) == evaluated
    trainer.train()
    same, steps = trainer.weighter is weighter, (before["step"], trainer.weighter.state_dict()["step"])

    anew = make_trainer(folder, "rotograd", init=make_model)
    ends = []
    for _ in range(2):
        anew.train()
        ends.append((anew.weighter, parameters(anew.model), anew.weighter.state_dict()["step"]))
    assert len(anew.accelerator._custom_objects) == 1
    return same, steps, ends[0][0] is ends[1][0], [end[1] for end in ends], [end[2] for end in ends]


def searched(folder):
    """Three trials of optuna; the same settings give the same end as a run of their own."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = make_trainer(folder, "gradnorm", init=make_model, eval_strategy="steps", eval_steps=8)
    seen, loop = [], trainer._inner_training_loop

    def watched(*args, **kwargs):
        found = loop(*args, **kwargs)
        objects = [entry._weighter() for entry in trainer.accelerator._custom_objects]
        seen.append(
            (
                trainer.weighter.accelerator is trainer.accelerator,
                objects == [trainer.weighter],
                trainer.weighter.state_dict()["step"],
                trainer.args.learning_rate,
                parameters(trainer.model),
            )
        )
        return found

    trainer._inner_training_loop = watched
    run = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 0.01, 0.05)},
        compute_objective=lambda metrics: metrics["eval_loss/topic"],
        n_trials=3,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert run.objective > 0
    by_itself = make_trainer(folder, "gradnorm", learning_rate=seen[1][3])
    by_itself.train()
    return [entry[:4] for entry in seen], seen[1][4], parameters(by_itself.model)


def test_an_attempt_that_ran_out_of_memory_leaves_no_trace(tmp_path):
    (seen,) = run_ranks(retried, 1, tmp_path, tmp_path, timeout=400)
    for step, global_step, same in seen.values():
        assert step == global_step == 8 and same


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_training_goes_on_and_a_new_model_starts_anew(tmp_path, processes):
    for same, steps, same_anew, ends, anew in run_ranks(twice, processes, tmp_path, tmp_path, timeout=400):
        assert same and steps == (8, 16)
        assert not same_anew and anew == [8, 8]
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_every_trial_of_a_search_has_the_weighter_of_its_accelerator(tmp_path):
    pytest.importorskip("optuna")
    ((seen, trial, by_itself),) = run_ranks(searched, 1, tmp_path, tmp_path, timeout=400)
    assert len(seen) == 3
    for same_accelerator, registered, step, _ in seen:
        assert same_accelerator and registered and step == 8
    assert len({rate for *_, rate in seen}) == 3
    assert all(torch.equal(value, by_itself[name]) for name, value in trial.items())
