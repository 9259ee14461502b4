"""The Trainer gives what a plain Accelerate loop gives, logs it, saves it, and leaves evaluation alone."""

import json
import warnings
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SequentialSampler

from accel_weighting import MGDA, CoVWeighting, GradNorm, RotoGrad, Weighter
from accel_weighting.window import Window
from tests.ranks import accelerator_for, run_ranks
from tests.small import Block

TASKS = ("kind", "size")
HEADS = {task: f"heads.{task}" for task in TASKS}
METHODS = {
    "gradnorm": GradNorm(alpha=1.5),
    "cov": CoVWeighting(total="tasks"),
    "mgda": MGDA(),
    "rotograd": RotoGrad(),
}


class Model(nn.Module):
    """A forward like those of transformers: `**kwargs` makes the Trainer believe that it scales losses by items."""

    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Linear(6, 8), Block()
        self.heads = nn.ModuleDict({"kind": nn.Linear(8, 3), "size": nn.Linear(8, 1)})

    def forward(self, x, labels=None, labels_size=None, **kwargs):
        assert not kwargs, kwargs  # num_items_in_batch must not come here
        z = self.block(self.embed(x))
        outputs = {task: head(z) for task, head in self.heads.items()}
        losses = {
            "kind": F.cross_entropy(outputs["kind"], labels),
            "size": 10 * F.mse_loss(outputs["size"].squeeze(-1), labels_size),
        }
        return {"losses": losses, "num_items": None, **outputs}


def rows(n=40):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator)
    kinds = (x[:, :3] + 0.3 * torch.randn(n, 3, generator=generator)).argmax(-1)
    return [{"x": x[i], "labels": kinds[i], "labels_size": x[i].sum()} for i in range(n)]


def make_model():
    torch.manual_seed(0)
    return Model()


def make_trainer(folder, method="gradnorm", fsdp=False, **options):
    warnings.simplefilter("error", ResourceWarning)
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    from accel_weighting.integrations.trainer import WeightedTrainer
    from accel_weighting.selfcheck.cpu import allow_sharding_on_cpu

    AcceleratorState._reset_state(reset_partial_state=True)

    class InOrder(WeightedTrainer):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    arguments = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        **options,
    }
    if fsdp:
        arguments |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["Block"],
                "cpu_ram_efficient_loading": False,
            },
        }
    args = TrainingArguments(str(folder), **arguments)
    if fsdp:
        assert args.device.type == "cpu"
        allow_sharding_on_cpu()
    return InOrder(
        model=make_model(),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(12),
        weighting=METHODS[method],
        heads=HEADS,
    )


def parameters(model):
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in full.items()}


def told(trainer):
    """What a run saw, and where it ended."""
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "type": trainer.accelerator.distributed_type.value,
        "world": trainer.accelerator.num_processes,
        "weights": torch.tensor([[entry[f"weight/{task}"] for task in TASKS] for entry in logs]),
        "losses": torch.tensor([[entry[f"loss/{task}"] for task in TASKS] for entry in logs]),
        "micro_batches": trainer.weighter.statistics.micro_batches,
        "parameters": parameters(trainer.accelerator.unwrap_model(trainer.model_wrapped)),
        "logs": list(trainer.state.log_history),
        "state": trainer.weighter.state_dict(),
    }


def trained(folder, method="gradnorm", fsdp=False, resume=None, **options):
    trainer = make_trainer(folder, method, fsdp, **options)
    trainer.train(resume_from_checkpoint=resume)
    return told(trainer)


def plain_loop(method, batch_size=4, accumulation=3):
    """The same run by hand. Accelerate divides a short last window by the full number, the Trainer by its own."""
    import torch.distributed as dist  # noqa: TID251  is there a process group?

    accelerator = accelerator_for("ddp" if dist.is_initialized() else "plain", gradient_accumulation_steps=accumulation)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size))
    weighter = Weighter(METHODS[method], TASKS, accelerator=accelerator, heads=HEADS, model=model)
    weights = []
    for _ in range(2):
        for i, batch in enumerate(loader):
            with accelerator.accumulate(model):
                total = weighter.combine(model(**batch)["losses"])
                window = min(accumulation, len(loader) - i // accumulation * accumulation)
                accelerator.backward(total * accumulation / window)
                weighter.step()
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                weights.append(list(weighter.weights.values()))
    return {"weights": torch.tensor(weights), "parameters": parameters(accelerator.unwrap_model(model))}


def many_cuts(folder, cuts):
    return [trained(folder, per_device_train_batch_size=size, gradient_accumulation_steps=k) for size, k in cuts]


def interrupted(folder, fsdp=False):
    """Once in one go, once stopped in the middle of the second epoch and gone on with in a new Trainer."""
    whole = trained(folder / "whole", fsdp=fsdp)
    half = len(whole["weights"]) - 1
    trained(folder / "part", fsdp=fsdp, max_steps=half, save_strategy="steps", save_steps=half)
    checkpoint = folder / "part" / f"checkpoint-{half}"
    resumed = trained(folder / "part", fsdp=fsdp, resume=str(checkpoint))
    state = torch.load(checkpoint / "weighter.pt", weights_only=True)
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return whole, resumed, state["kind"], [entry["weight/kind"] for entry in log]


def evaluated(folder):
    import torch.distributed as dist  # noqa: TID251  counts the collectives

    without = trained(folder / "without")
    trainer = make_trainer(folder / "with", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    weighter, calls = trainer.weighter, []
    record, reduce = Window.record, dist.all_reduce

    def recorded(window, *args):
        calls.append(trainer.model.training)
        record(window, *args)

    with patch.object(Window, "record", recorded):
        trainer.train()
    with_evaluation = told(trainer)

    before = weighter.state_dict()
    dist.all_reduce = lambda *args, **kwargs: pytest.fail("evaluation called a collective of ours")
    metrics, predictions = trainer.evaluate(), trainer.predict(rows(12)).predictions
    dist.all_reduce = reduce
    after = weighter.state_dict()
    assert before["step"] == after["step"] and torch.equal(before["weights"], after["weights"])
    return without, with_evaluation, calls, metrics, [p.shape for p in predictions]


def all_runs(folder, methods, cuts, fsdp):
    """One launch for all, since what a launch costs is importing."""
    runs = {
        "loops": {method: (plain_loop(method), trained(folder / method, method)) for method in methods},
        "cuts": many_cuts(folder / "cuts", cuts),
        "interrupted": interrupted(folder / "ddp"),
        "evaluated": evaluated(folder / "evaluated"),
    }
    if fsdp:
        runs["fsdp2"] = interrupted(folder / "fsdp2", fsdp=True)
    return runs


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(all_runs, 1, folder, folder, list(METHODS), [(8, 1), (4, 2)], False, timeout=180)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(all_runs, 2, folder, folder, ["gradnorm", "rotograd"], [(4, 1), (2, 2)], True, timeout=300)


def assert_same(a, b, tolerance):
    assert a["weights"].shape == b["weights"].shape
    torch.testing.assert_close(a["weights"], b["weights"], rtol=tolerance, atol=0)
    torch.testing.assert_close(a["parameters"], b["parameters"], rtol=tolerance, atol=tolerance)


def test_the_trainer_gives_the_plain_loops_weights(one, two):
    for world, runs in ((1, one), *((2, run) for run in two)):
        for plain, trainer in runs["loops"].values():
            assert trainer["world"] == world
            assert trainer["type"] == ("MULTI_CPU" if world == 2 else "NO")
            assert trainer["micro_batches"] == {1: 1, 2: 4}[world]  # the last window is short: 10 = 3+3+3+1, 5 = 3+2
            assert_same(plain, trainer, 1e-6)
            assert trainer["weights"].std(0).min() > 1e-3  # they did move


def test_weights_do_not_depend_on_the_cut(one, two):
    """Steps of eight rows: at once, in two micro-batches, on two processes."""
    at_once, in_two = one["cuts"]
    for run in (in_two, *(run for rank in two for run in rank["cuts"])):
        assert_same(at_once, run, 1e-5)
        torch.testing.assert_close(at_once["losses"], run["losses"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("engine", ["one", "ddp", "fsdp2"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(one, two, engine):
    ranks = [one] if engine == "one" else two
    for run in ranks:
        whole, resumed, kind, _ = run["fsdp2" if engine == "fsdp2" else "interrupted"]
        assert whole["type"] == {"one": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}[engine]
        assert kind == "accel_weighting.Weighter"
        assert torch.equal(whole["weights"], resumed["weights"])
        assert torch.equal(whole["losses"], resumed["losses"])
        assert torch.equal(whole["state"]["record"]["rows"], resumed["state"]["record"]["rows"])
        for name, value in whole["parameters"].items():
            assert torch.equal(value, resumed["parameters"][name]), name


def test_fsdp2_gives_ddps_weights(two):
    for run in two:
        assert_same(run["interrupted"][0], run["fsdp2"][0], 1e-5)


def test_evaluation_in_between_changes_nothing(one, two):
    for run in (one, *two):
        without, with_evaluation, calls, metrics, shapes = run["evaluated"]
        assert torch.equal(without["weights"], with_evaluation["weights"])
        assert torch.equal(without["losses"], with_evaluation["losses"])
        steps = len(with_evaluation["weights"])
        assert sum("eval_loss" in entry for entry in with_evaluation["logs"]) == steps + 1  # and at the start
        assert set(calls) == {True} and len(calls) == (20 if run is one else 10)  # micro-batches of training alone
        assert metrics["eval_loss"] > 0
        assert not any("weight/" in name for name in metrics)
        assert shapes == [(12, 3), (12, 1)]  # predictions, no losses among them


def test_weights_losses_and_norms_are_in_the_logs_and_the_trainers_state(one):
    whole, _, _, in_the_file = one["interrupted"]
    logs = [entry for entry in whole["logs"] if "loss" in entry]
    names = {f"{group}/{task}" for group in ("weight", "loss", "loss_cov", "grad_norm") for task in TASKS}
    assert names | {"cosine/kind/size", "weighting/skipped_steps", "loss", "grad_norm", "epoch"} <= set(logs[-1])
    total = sum(logs[0][f"loss/{task}"] for task in TASKS)  # weights are 1 in the first step
    assert logs[0]["loss"] == pytest.approx(total, rel=1e-4)
    assert in_the_file == [entry["weight/kind"] for entry in logs[:-1]]


def refused(folder):
    from transformers import TrainingArguments

    from accel_weighting.integrations.trainer import WeightedTrainer

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.config = nn.Linear(6, 3), type("Config", (), {"use_cache": False})()

        def forward(self, x, labels=None):
            return {"logits": self.layer(x)}

    def build(model=None, smoothing=0.0, gpus=1, **options):
        args = TrainingArguments(str(folder), use_cpu=True, report_to="none", label_smoothing_factor=smoothing)
        args._n_gpu = gpus
        options = {"heads": HEADS, **options}
        return WeightedTrainer(
            model=model or make_model(), args=args, train_dataset=rows(), weighting=GradNorm(), **options
        )

    def message(kind, call):
        with pytest.raises(kind) as error:
            call()
        return str(error.value)

    smooth = Silent()
    return [
        message(ValueError, lambda: build(smooth, smoothing=0.1, heads={"kind": "layer"})),
        message(ValueError, lambda: build(compute_loss_func=lambda *args, **kwargs: None)),
        message(NotImplementedError, lambda: build(gpus=2)),
        message(ValueError, lambda: build(heads=None)),
        message(ValueError, lambda: build(smooth, heads={"kind": "layer"}).train()),
        message(ValueError, lambda: build(heads={"kind": "heads.kind", "size": "heads.sise"})),
    ]


def test_what_cannot_go_together_is_refused_in_words(tmp_path):
    (messages,) = run_ranks(refused, 1, tmp_path, tmp_path)
    words = ("label_smoothing_factor", "compute_losses", "one process per GPU", "`tasks`", "'logits'", "heads.sise")
    for word, message in zip(words, messages, strict=True):
        assert word in message


def other_ways(folder):
    from transformers import TrainingArguments

    from accel_weighting.integrations.trainer import WeightedTrainer

    class Own(WeightedTrainer):
        """Losses made outside of the model, and a task that every second batch lacks."""

        batches = 0

        def compute_losses(self, model, inputs, return_outputs=False):
            outputs = model(**inputs)
            losses = {task: 2 * loss for task, loss in outputs["losses"].items()}
            return (losses, outputs) if return_outputs else losses

        def count_items(self, inputs):
            self.batches += 1
            return {"size": 0} if self.batches % 2 else None

    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", max_steps=4, logging_steps=1, disable_tqdm=True, save_strategy="no"
    )
    first = Own(
        model_init=make_model,
        args=args,
        train_dataset=rows(),
        weighting=GradNorm(),
        heads=HEADS,
        weighter_options={"initial_weights": {"kind": 0.5, "size": 1.5}, "max_losses": {"size": 100.0}},
    )
    early = first.weighter
    first.train()
    return early is first.weighter, [sorted(n for n in log if "loss/" in n) for log in first.state.log_history[:-1]]


def test_losses_and_counts_of_ones_own_and_a_model_made_anew(tmp_path):
    ((same, seen),) = run_ranks(other_ways, 1, tmp_path, tmp_path)
    assert not same  # train() made the model anew
    assert seen == [["loss/kind"], ["loss/kind", "loss/size"]] * 2


class Unlabelled(nn.Module):
    """A forward whose labels do not have "label" in their names."""

    def __init__(self, tasks):
        super().__init__()
        self.embed, self.heads, self.tasks = nn.Linear(6, 8), nn.ModuleDict({t: nn.Linear(8, 1) for t in HEADS}), tasks

    def forward(self, x, kind, size):
        z = self.embed(x)
        losses = [F.mse_loss(self.heads[t](z).squeeze(-1), y) for t, y in (("kind", kind), ("size", size))]
        return {"losses": dict(zip(self.tasks, losses, strict=True))}


def newcomers(folder):
    from transformers import TrainingArguments

    from accel_weighting.integrations.trainer import WeightedTrainer

    data = [{"x": row["x"], "kind": float(row["labels"]), "size": float(row["labels_size"])} for row in rows()]

    def build(tasks=("kind", "size"), **more):
        args = TrainingArguments(
            str(folder), use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True, save_strategy="no", **more
        )
        return WeightedTrainer(
            model=Unlabelled(tasks),
            args=args,
            train_dataset=data,
            eval_dataset=data,
            weighting=GradNorm(alpha=0),
            heads=HEADS,
        )

    found = []
    for names in (None, ["kind", "size"]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metrics = build(label_names=names).evaluate()
        said = [str(w.message) for w in caught if "label_names" in str(w.message)]
        found.append((sorted(name for name in metrics if "loss" in name), said))
    with pytest.raises(ValueError) as error:
        build(["kynd", "size"]).train()
    return found, str(error.value)


def test_labels_that_the_trainer_does_not_know_and_losses_of_other_names_are_told(tmp_path):
    ((found, other_names),) = run_ranks(newcomers, 1, tmp_path, tmp_path)
    (without, said), (losses, silent) = found
    assert without == [] and len(said) == 1 and "gave no `eval_loss`" in said[0]
    assert losses == ["eval_loss", "eval_loss/kind", "eval_loss/size"] and silent == []
    assert "Unknown task 'kynd'" in other_names and "Did you mean 'kind'?" in other_names
