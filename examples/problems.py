"""The two problems of `compare_methods.py`: pairs of digits, whose gradients differ much in size, and short reviews.

- `digits`: the five tasks of `multi_digits.py` on two handwritten digits side by side, and a small MLP. One task, the
  sum of the digits in raw units, has by far the largest gradient.
- `text`: the three tasks of `finetune_text.py` on short reviews (topic, rating, names of persons, towns and things),
  and a transformer of one layer. Gradients are of similar size, and labels are missing from some of the reviews.
"""

import functools
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch
from multi_digits import LOSSES, TASKS, DigitPairs
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from text_data import Collator, MultiTaskEncoder, Task, as_words, make_tokenizer, metrics, score
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parent / "data"))
from make_sentences import Writer

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What the comparison needs to know of a problem.

    Attributes:
        tasks: `{task: unit of its error}`.
        cross_entropies: Tasks whose loss is a cross entropy.
        reference: The task that `ReferenceNorm` compares the others with.
        statics: The grid of static weights.
        steps, epoch, batch: Optimizer steps of a run, those of an epoch, and samples of one.
        lrs: Learning rates to choose from. They are half a decade apart: on a coarser grid they matter more than the
            methods.
        load: Training, validation and test data of a seed, every column with a row per sample.
        model: Makes an untrained model, with its `heads` by task.
        losses: Of a model on some rows.
        errors: Of a model on all rows, in the units of `tasks`.
    """

    tasks: dict[str, str]
    cross_entropies: tuple[str, ...]
    reference: str
    statics: tuple[dict[str, float], ...]
    steps: int
    epoch: int
    batch: int
    lrs: tuple[float, ...]
    load: Callable[[int], tuple[Data, Data, Data]]
    model: Callable[[], nn.Module]
    losses: Callable[[nn.Module, Data], dict[str, Tensor]]
    errors: Callable[[nn.Module, Data], dict[str, float]]


# ---- digits ----------------------------------------------------------------------------------------------------------


class DigitModel(nn.Module):
    """A shared trunk, and one head per task."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(128, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.heads = nn.ModuleDict()
        for name, task in TASKS.items():
            hidden = nn.Linear(width, width)
            self.heads[name] = nn.Sequential(nn.ReLU(), hidden, nn.ReLU(), nn.Linear(width, task.outputs))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predictions for all tasks."""
        z = self.trunk(image)
        return {name: head(z).squeeze(-1) for name, head in self.heads.items()}


@functools.cache
def load_pairs(seed: int) -> tuple[Data, Data, Data]:
    """Pairs for training, validation and test, which share no image."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    rest, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, valid = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=seed)
    sizes = {8_192: train, 4_096: valid, 4_095: test}
    one, two, three = (DigitPairs(images[part], labels[part], size, seed).columns for size, part in sizes.items())
    return one, two, three


def digit_losses(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    outputs = model(batch["image"])
    return {name: LOSSES[task.loss](outputs[name], batch[name]) for name, task in TASKS.items()}


@torch.no_grad()
def digit_errors(model: nn.Module, data: Data) -> dict[str, float]:
    """Percentage of wrong answers, or root mean squared error; a model that diverged counts as wrong."""
    outputs, result = model(data["image"]), {}
    for name, task in TASKS.items():
        answer, truth = outputs[name], data[name]
        if task.metric == "accuracy":
            wrong = (answer.argmax(-1) if task.outputs > 1 else answer > 0) != truth
            error = 100 * max(wrong.double().mean().item(), 0.5 / len(wrong))
        else:
            error = (answer - truth).square().mean().sqrt().item()
        result[name] = error if math.isfinite(error) and outputs[name].isfinite().all() else 1e3
    return result


# ---- text ------------------------------------------------------------------------------------------------------------

TRAIN, VALID, TEST, WIDTH, LENGTH = 512, 1024, 2048, 32, 32
WRITTEN = {"topic": "classification", "rating": "regression", "tags": "tagging"}


def sentences(split: str, size: int) -> list[dict[str, object]]:
    """Different reviews; a third of the names occurs in those of the split `test` only."""
    writer, found = Writer(split), dict[object, dict[str, object]]()
    while len(found) < size:
        sentence = writer.sentence()
        found.setdefault(sentence["text"], sentence)
    return list(found.values())


@functools.cache
def read_texts() -> tuple[dict[str, Task], int, Data, Data]:
    """The tasks, the number of tokens that there are, and all reviews as padded columns: to learn from, and to test."""
    known, new = sentences("train", TRAIN + VALID), sentences("test", TEST)
    tasks = {}
    for name, kind in WRITTEN.items():
        values = [row[name] for row in known if row[name] is not None]
        if kind == "regression":
            tasks[name] = Task(kind, mean=fmean(values), deviation=pstdev(values))
        else:
            tasks[name] = Task(kind, tuple(sorted({word for value in values for word in as_words(value)})))
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer([row["text"] for row in known], Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    collate = Collator(tokenizer, tasks, "text", LENGTH)
    learn, test = ({k: v for k, v in collate(rows).items() if k != "num_items"} for rows in (known, new))
    return tasks, len(tokenizer), learn, test


@functools.cache
def load_reviews(seed: int) -> tuple[Data, Data, Data]:
    """A seed divides the first part of the reviews into those for training and those for validation."""
    _, _, learn, test = read_texts()
    order = torch.randperm(TRAIN + VALID, generator=torch.Generator().manual_seed(seed))
    train, valid = ({k: column[rows] for k, column in learn.items()} for rows in (order[:TRAIN], order[TRAIN:]))
    return train, valid, test


def text_model() -> MultiTaskEncoder:
    """One transformer layer, and the heads of `finetune_text.py`."""
    tasks, tokens, _, _ = read_texts()
    config = BertConfig(
        vocab_size=tokens,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return MultiTaskEncoder(BertModel(config, add_pooling_layer=False), tasks)


def text_losses(model: nn.Module, batch: Data) -> dict[str, Tensor]:
    """Means over the labels that there are."""
    length = int(batch["attention_mask"].sum(1).max())
    losses: dict[str, Tensor] = model(**{k: v[:, :length] if v.ndim > 1 else v for k, v in batch.items()})["losses"]
    return losses


@torch.no_grad()
def text_errors(model: nn.Module, data: Data) -> dict[str, float]:
    """Percentages of wrong topics and of missing F1, and the mean absolute error of ratings."""
    tasks = read_texts()[0]
    outputs = model(data["input_ids"], data["attention_mask"])
    found = metrics(tasks, score(tasks, outputs, data))
    rows, result = len(data["input_ids"]), {}
    for name, task in tasks.items():
        error = found[name] if task.kind == "regression" else 100 * max(1 - found[name], 0.5 / rows)
        result[name] = error if math.isfinite(error) and outputs[name].isfinite().all() else 1e3
    return result


PROBLEMS = {
    "digits": Problem(
        tasks={name: "% wrong" if task.metric == "accuracy" else "RMSE" for name, task in TASKS.items()},
        cross_entropies=("left", "right", "parity"),
        reference="left",
        # For the sum, which has by far the largest gradients, and the pixels, which have the smallest.
        statics=tuple(
            {**dict.fromkeys(TASKS, 1.0), "sum": total, "pixels": pixels} for total in (0.1, 0.01) for pixels in (1, 10)
        ),
        steps=1000,
        epoch=64,
        batch=128,
        lrs=(1e-3, 3e-3, 1e-2, 3e-2),
        load=load_pairs,
        model=DigitModel,
        losses=digit_losses,
        errors=digit_errors,
    ),
    "text": Problem(
        tasks={"topic": "% wrong", "rating": "mean error", "tags": "% of F1 missing"},
        cross_entropies=("topic", "tags"),
        reference="topic",
        statics=tuple({"topic": topic, "rating": rating, "tags": 1.0} for topic in (1.0, 3.0) for rating in (0.3, 3.0)),
        steps=150,
        epoch=TRAIN // 32,
        batch=32,
        lrs=(1e-3, 3e-3, 1e-2, 3e-2),
        load=load_reviews,
        model=text_model,
        losses=text_losses,
        errors=text_errors,
    ),
}
