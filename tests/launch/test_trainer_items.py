"""Rows of different lengths: what the Trainer's figures are, and what each task's mean over its own items is."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler

from accel_weighting import MGDA, EqualWeighting, GradNorm, RotoGrad, UncertaintyWeighting, Weighter
from tests.ranks import run_ranks

LENGTHS = (3, 21, 5, 17, 4, 25, 3, 9, 14, 2, 6, 11, 8, 19)
TASKS = ("tag", "kind")
METHODS = {
    "equal": EqualWeighting(),
    "gradnorm": GradNorm(alpha=1.5),
    "uncertainty": UncertaintyWeighting(),
    "mgda": MGDA(),
    "rotograd": RotoGrad(),
}


class Tagger(nn.Module):
    """A label for every token; with a count of the window's items it divides by that, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"tag": nn.Linear(8, 5), "kind": nn.Linear(8, 3)})

    def shared(self, input_ids):
        return torch.tanh(self.layer(self.embed(input_ids)))

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.heads["tag"](self.shared(input_ids))
        loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        loss = loss / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return {"loss": loss, "losses": {"tag": loss}, "logits": logits}


class Two(Tagger):
    """A label for every token, and one for some of the rows: the mean over none is not a number."""

    def forward(self, input_ids, labels_tag=None, kind_labels=None, **kwargs):
        assert not kwargs, kwargs  # num_items_in_batch must not come here
        z = self.shared(input_ids)
        tag, kind = self.heads["tag"](z), self.heads["kind"](z)[:, 0]
        losses = {
            "tag": F.cross_entropy(tag.flatten(0, -2), labels_tag.flatten()),
            "kind": F.cross_entropy(kind, kind_labels),
        }
        return {"losses": losses, "kind": kind}


def make(cls):
    torch.manual_seed(0)
    return cls().double()


def rows(two=False, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(7)
    found = []
    for i, n in enumerate(lengths):
        ids = torch.randint(0, 40, (n,), generator=generator)
        tags = torch.where(torch.rand(n, generator=generator) < 0.7, ids % 5, -100)
        tags[0] = ids[0] % 5
        kind = int(ids[-1] % 3) if i % 3 != 1 else -100
        found.append({"ids": ids, "labels": tags, "kind": kind} if two else {"ids": ids, "labels": tags})
    return found


def collate(batch):
    """Padded to the longest row, as every collator of texts does."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([row["ids"] for row in batch], batch_first=True)
    labels = pad([row["labels"] for row in batch], batch_first=True, padding_value=-100)
    if "kind" not in batch[0]:
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels_tag": labels, "kind_labels": torch.tensor([row["kind"] for row in batch])}


def nothing():
    """What there is to do where nothing is to be done."""


def trainer_of(cls, model, data, folder, batch, accumulation, arguments=None, first=nothing, then=nothing, **options):
    """`first` is called before the arguments are made, and `then` before the Trainer is."""
    from accelerate.state import AcceleratorState
    from transformers import TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    first()

    class InOrder(cls):
        def _get_train_sampler(self, *args):
            return SequentialSampler(self.train_dataset)

    args = TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 4,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 2,
            "learning_rate": 0.5,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **(arguments or {}),
        },
    )
    then()
    options = {"eval_dataset": data[:13], "data_collator": collate, **options}
    return InOrder(model=model, args=args, train_dataset=data, **options)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- one task, and Trainer itself --------------------------------------------------------------------------------


def beside_trainer(folder, batch, accumulation, arguments=None):
    """The parameters after two epochs of the Trainer, and of ours with one task."""
    from transformers import Trainer

    from accel_weighting.integrations.trainer import WeightedTrainer

    ends = []
    for cls, more in ((Trainer, {}), (WeightedTrainer, {"weighting": EqualWeighting(), "tasks": ["tag"]})):
        model = make(Tagger)
        trainer = trainer_of(cls, model, rows(), folder, batch, accumulation, arguments, **more)
        trainer.train()
        ends.append(parameters(model))
    return *ends, trainer.accelerator.num_processes


def causal_beside_trainer(folder, batch, accumulation):
    """The same for a model of transformers, whose labels are shifted and whose loss is in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    from accel_weighting.integrations.trainer import WeightedTrainer

    class Ours(WeightedTrainer):
        def compute_losses(self, model, inputs, return_outputs=False):
            outputs = model(**inputs)
            losses = {"lm": outputs.loss}
            return (losses, outputs) if return_outputs else losses

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
    config = LlamaConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=2, **sizes)
    ends = []
    for cls, more in ((Trainer, {}), (Ours, {"weighting": EqualWeighting(), "tasks": ["lm"]})):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).double()
        trainer_of(cls, model, rows(), folder, batch, accumulation, {"max_steps": 2}, **more).train()
        ends.append(parameters(model))
    return ends


def all_beside_trainer(folder, cuts):
    local = {"average_tokens_across_devices": False}
    return {
        "cuts": [beside_trainer(folder, *cut) for cut in cuts],
        "adam": beside_trainer(folder, *cuts[-1], {"optim": "adamw_torch", "learning_rate": 0.01}),
        "local": beside_trainer(folder, *cuts[-1], local),
        "causal": causal_beside_trainer(folder, *cuts[-1]),
        "tasks": two_tasks(folder, cuts),
    }


# ---- several tasks, each by its own items ------------------------------------------------------------------------


def two_tasks(folder, cuts):
    """What the Trainer gives for every method, under the last cut, and for GradNorm under all."""
    from accel_weighting.integrations.trainer import WeightedTrainer

    found = {}
    runs = [("gradnorm", cut) for cut in cuts] + [(name, cuts[-1]) for name in METHODS]
    for name, cut in runs:
        model, heads = make(Two), {task: f"heads.{task}" for task in TASKS}
        more = {"weighting": METHODS[name], "heads": heads}
        trainer = trainer_of(WeightedTrainer, model, rows(two=True), folder, *cut, **more)
        seen = []
        keep(trainer, seen)
        trainer.train()
        evaluated = trainer.evaluate()
        found[name, cut] = seen, parameters(model), {task: evaluated[f"eval_loss/{task}"] for task in TASKS}
    return found


def keep(trainer, seen):
    """Every step's statistics and weights."""
    step = trainer.weighter.step

    def stepped():
        step()
        if trainer.accelerator.sync_gradients:
            seen.append(statistics(trainer.weighter))

    trainer.weighter.step = stepped


def statistics(weighter):
    found, weights = weighter.statistics, list(weighter.weights.values())
    norms = torch.full((2,), torch.nan) if found.norms is None else torch.tensor(found.norms)
    return torch.cat([torch.tensor(found.losses), norms, torch.tensor(weights)]).double()


def by_hand(name, step_rows):
    """One process, a batch of all rows of a step, which are all items of it: no window, no Trainer."""
    model, data = make(Two), rows(two=True)
    weighter = Weighter(METHODS[name], TASKS, heads={task: model.heads[task] for task in TASKS})
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(2):
        for i in range(0, len(data), step_rows):
            weighter.backward(model(**collate(data[i : i + step_rows]))["losses"])
            optimizer.step()
            optimizer.zero_grad()
            seen.append(statistics(weighter))
    with torch.no_grad():
        losses = model(**collate(data[:13]))["losses"]
    return seen, parameters(model), {task: float(loss) for task, loss in losses.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(all_beside_trainer, 1, folder, folder, [(6, 1), (3, 2), (1, 6)], timeout=600)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(all_beside_trainer, 2, folder, folder, [(7, 1), (1, 7)], timeout=900)


def assert_close(a, b, tolerance=1e-12):
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("processes", [1, 2])
def test_equal_weighting_of_one_task_is_the_trainers_training(one, two, processes):
    for run in one if processes == 1 else two:
        for trainer, ours, world in [*run["cuts"], run["adam"], run["local"]]:
            assert world == processes
            assert_close(ours, trainer)
        trainer, ours = run["causal"]  # whose loss is in float32: as exact as that, or better where n·x/n is x
        assert_close(ours, trainer, 1e-12 if processes == 1 else 1e-7)
        assert float((run["cuts"][-1][0] - parameters(make(Tagger))).norm()) > 0.1  # it did train


def test_processes_count_alike_only_where_the_trainer_says_so(two):
    """A negative control: what the switch of the Trainer changes is seen here."""
    (_, across, _), (_, local, _) = two[0]["cuts"][-1], two[0]["local"]
    assert float((across - local).norm() / local.norm()) > 1e-6


@pytest.mark.parametrize("processes", [1, 2])
def test_every_task_is_the_mean_over_its_own_items_of_the_step(one, two, processes):
    for run in one if processes == 1 else two:
        for (name, (batch, accumulation)), (seen, end, evaluated) in run["tasks"].items():
            expected, end_by_hand, evaluated_by_hand = by_hand(name, batch * accumulation * processes)
            assert len(seen) == len(expected)
            for row, expected_row in zip(seen, expected, strict=True):
                torch.testing.assert_close(row, expected_row, rtol=1e-12, atol=1e-13, equal_nan=True, msg=name)
            assert_close(end, end_by_hand)
            for task, loss in evaluated_by_hand.items():  # 13 rows: two processes repeat three of them
                assert evaluated[task] == pytest.approx(loss, rel=1e-12)


# ---- counts ------------------------------------------------------------------------------------------------------


def test_labels_are_found_and_counted():
    from accel_weighting.integrations.items import count_labels

    label = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    for batch, expected in (
        ({"labels": label}, {"a": 3, "b": 3}),
        ({"labels": label, "labels_b": label[0]}, {"a": 3, "b": 2}),
        ({"a_labels": label, "b": label[1]}, {"a": 3, "b": 1}),
        ({"labels": {"a": label}}, {"a": 3}),
        ({"labels": label, "num_items": {"a": 7}}, {"a": 7}),
        ({"x": label, "labels": [1, 2]}, {}),
        ({"labels": torch.tensor([0.5, -100.0, torch.nan])}, {"a": 1, "b": 1}),
    ):
        assert count_labels(batch, ["a", "b"], shifted=False) == expected
    assert count_labels({"labels": label}, ["a"], shifted=True) == {"a": 2}
    assert count_labels({"labels": label, "shift_labels": label}, ["a"], shifted=True) == {"a": 3}


def test_shares_of_a_window():
    from accel_weighting.integrations.items import ItemsOfWindow
    from accel_weighting.losses import Shares

    def shares(counted, losses=("a", "b"), said=None, at=0, **more):
        items = ItemsOfWindow(["a", "b"], counted, **more)
        for _ in range(at + 1):
            assert items.next()
        found = items.shares(dict.fromkeys(losses), said)
        return {task: found.of(task) for task in ("a", "b")} if isinstance(found, Shares) else found

    assert shares([5]) is None  # one micro-batch is the window
    assert shares([None, None]) is None and shares([1, 1]) is None
    assert shares([{"b": 0}]) == {"b": 0} and shares([{"b": 0}, None]) == {"b": 0}
    assert shares([{"a": 1, "b": 2}, {"a": 3, "b": 2}]) == {"a": 0.5, "b": 1.0}
    assert shares([{"a": 1, "b": 2}, {"a": 3, "b": 0}], at=1) == {"a": 1.5, "b": 0.0}
    assert shares([{"a": 1}, {"a": 3}]) == {"a": 0.5, "b": 1.0}  # b cannot be counted
    assert shares([{"a": 1, "b": 2}, {"a": 3}], losses=["a"], at=1) == {"a": 1.5, "b": 0.0}
    assert shares([2, 4], gather=lambda sums: [2 * x for x in sums], copies=2) == {"a": 4 / 3, "b": 4 / 3}
    assert shares([{"a": 1, "b": 2}], said={"a": 1, "b": 2}) is None
    for wrong, words in (
        (lambda: shares([{"a": 1, "b": 2}], losses=["a"]), r"gave no loss: {'b': 2}"),
        (lambda: shares([{"a": 1, "b": 2}, {"a": 1}], at=1), r"The items of \['b'\] were counted in some"),
        (lambda: shares([{"a": 1, "b": 2}], said={"a": 1, "b": 3}), r"over {'b': 3} items, and {'b': 2}"),
        (lambda: shares([{"a": 1}], said={"b": 0}), r"over {'b': 0} items, and {'b': None}"),
        (lambda: shares([{"a": 1.5, "c": 1}]), r"Found {'a': 1.5, 'c': 1}"),
        (lambda: shares([-1]), r"whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


def uncounted(folder):
    """Labels of a name that says nothing; the same with a count of one's own."""
    from accel_weighting.integrations.trainer import WeightedTrainer

    class Silent(Two):
        def forward(self, input_ids, y_tag=None, y_kind=None):
            return super().forward(input_ids, labels_tag=y_tag, kind_labels=y_kind)

    class Counting(WeightedTrainer):
        def count_items(self, inputs):
            return {"tag": int((inputs["y_tag"] != -100).sum()), "kind": (inputs["y_kind"] != -100).sum()}

    class Equal(WeightedTrainer):
        def count_items(self, inputs):
            return 1

    def renamed(batch):
        batch = collate(batch)
        return {"input_ids": batch["input_ids"], "y_tag": batch["labels_tag"], "y_kind": batch["kind_labels"]}

    data = [row for row in rows(two=True) if row["kind"] != -100]
    more = {"weighting": GradNorm(), "heads": {task: f"heads.{task}" for task in TASKS}, "data_collator": renamed}
    ends, said = [], []
    for cls, cut in ((WeightedTrainer, (2, 4)), (Equal, (2, 4)), (Counting, (2, 4)), (WeightedTrainer, (8, 1))):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = trainer_of(cls, make(Silent), data[:8], folder, *cut, **more)
            trainer.train()
        ends.append(parameters(trainer.model))
        said.append([str(w.message) for w in caught if "could not be counted" in str(w.message)])
    return ends, said


def test_items_that_cannot_be_counted_are_said(tmp_path):
    ((ends, said),) = run_ranks(uncounted, 1, tmp_path, tmp_path, timeout=400)
    equal, asked_for, counted, whole = ends
    assert torch.equal(equal, asked_for)
    assert_close(counted, whole)
    assert float((equal - whole).norm() / whole.norm()) > 1e-4  # a negative control
    assert said[0] and not any(said[1:])
    assert "['tag', 'kind']" in said[0][0] and "`count_items(inputs)`" in said[0][0] and "'y_tag'" in said[0][0]


# ---- overrides ---------------------------------------------------------------------------------------------------


def that_can_be_wrapped():
    """Trainers with a metric of their own, of somebody else and of a user."""
    from transformers import Trainer

    from accel_weighting.integrations.trainer import WeightedTrainer, WeightingMixin

    class Metrics(Trainer):
        """Somebody's Trainer, with a metric of its own and a loss beside."""

        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            assert self.accelerator.unwrap_model(model).heads is self.model.heads
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.seen = (*self.seen, outputs["kind"].argmax(-1).float().mean().item())
            loss = loss + 0 * outputs["kind"].sum()
            return (loss, outputs) if return_outputs else loss

    class Wrapped(WeightingMixin, Metrics):
        pass

    class Within(WeightedTrainer):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            assert set(outputs["losses"]) == set(TASKS)
            self.seen = (*self.seen, outputs["kind"].argmax(-1).float().mean().item())
            return (loss, outputs) if return_outputs else loss

    return Wrapped, Within


def that_cannot():
    """Overrides by mistake, and Trainers that cannot be wrapped."""
    from transformers import Trainer

    from accel_weighting.integrations.trainer import WeightedTrainer, WeightingMixin

    class ByMistake(WeightedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            losses = model(**inputs)["losses"]
            return losses["tag"] + losses["kind"]

    class OfOld(WeightedTrainer):
        def count_items(self, inputs, outputs):
            return None

    class Elsewhere(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return (self.model(**inputs)["losses"]["tag"], {})

    class NotWrapped(WeightingMixin, Elsewhere):
        pass

    class Twice(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            model(**inputs)
            return super().compute_loss(model, inputs, return_outputs, **kwargs)

    class CalledTwice(WeightingMixin, Twice):
        pass

    return ByMistake, OfOld, NotWrapped, CalledTwice


def overridden(folder):
    from accel_weighting.integrations.trainer import WeightedTrainer

    more = {"weighting": GradNorm(), "heads": {task: f"heads.{task}" for task in TASKS}}

    def build(cls):
        return trainer_of(cls, make(Two), rows(two=True)[:12], folder, 2, 3, {"num_train_epochs": 1}, **more)

    Wrapped, Within = that_can_be_wrapped()
    ByMistake, OfOld, NotWrapped, CalledTwice = that_cannot()

    def message(call):
        with pytest.raises(TypeError) as error:
            call()
        return str(error.value)

    def on_the_object():
        trainer = build(WeightedTrainer)
        trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs)["losses"]["tag"]
        trainer.train()

    plain, wrapped, within = (build(cls) for cls in (WeightedTrainer, Wrapped, Within))
    for trainer in (plain, wrapped, within):
        trainer.train()
    words = [
        message(lambda: build(ByMistake)),
        message(lambda: build(OfOld)),
        message(on_the_object),
        message(build(NotWrapped).train),
        message(build(CalledTwice).train),
    ]
    return [parameters(trainer.model) for trainer in (plain, wrapped, within)], wrapped.seen, within.seen, words


def test_compute_loss_is_wrapped_and_an_override_by_mistake_is_named(tmp_path):
    ((ends, wrapped, within, words),) = run_ranks(overridden, 1, tmp_path, tmp_path, timeout=400)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert len(wrapped) == 6 and wrapped == within
    by_mistake, of_old, on_the_object, not_wrapped, twice = words
    assert "`ByMistake.compute_loss`" in by_mistake and "`compute_losses(self, model" in by_mistake
    assert "count_items(self, inputs, outputs)" in of_old and "`count_items(self, inputs)`" in of_old
    assert "`compute_losses(self, model" in on_the_object
    assert "without calling the model" in not_wrapped and "more than once" in twice
