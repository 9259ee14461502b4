"""Texts with several kinds of labels, and an encoder with a head for each kind.

For `finetune_text.py` and `finetune_trainer.py`. A data set comes from `datasets.load_dataset` and a model from
`AutoModel`, by its name on the hub or from a local folder. The columns named on the command line become tasks:
`--classification` (one label per text), `--regression` (one number per text), `--tagging` (one label per word). A text
without a label for a task is used for the other tasks only.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SENTENCES = Path(__file__).parent / "data" / "sentences"
IGNORED = -100  # the label of a text or a word that has none


@dataclass(frozen=True)
class Task:
    """What a head predicts, and how it is evaluated.

    Attributes:
        kind: "classification", "regression" or "tagging".
        labels: Names of the labels; none for a regression.
        mean: Of a regression's numbers in the training texts.
        deviation: Their standard deviation; the head predicts in units of it.
    """

    kind: str
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def metric(self) -> str:
        """Name of the metric that `score` measures."""
        return {"classification": "accuracy", "regression": "mean absolute error", "tagging": "F1 of tagged words"}[
            self.kind
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both examples have."""
    data = parser.add_argument_group("texts and model")
    data.add_argument("--model", help="encoder: a name on the hub or a folder (default: a small BERT, from scratch)")
    data.add_argument(
        "--dataset",
        default=str(SENTENCES),
        help="a name on the hub or a folder, with a split `train` and one `test` or `validation` (default: 1,550 short "
        "reviews that are part of the examples)",
    )
    data.add_argument("--dataset_config", help="configuration of the data set, if it has several")
    data.add_argument("--text", default="text", help="column of texts, or of lists of words (default: text)")
    for kind, column, what in (
        ("classification", "topic", "classes"),
        ("regression", "rating", "numbers"),
        ("tagging", "tags", "a class per word"),
    ):
        data.add_argument(
            f"--{kind}",
            nargs="*",
            default=[column],
            metavar="COLUMN",
            help=f"columns of {what}, one task per column; give no name for none (default: {column})",
        )
    data.add_argument("--max_length", type=int, default=128, help="maximum length of a text in tokens (default: 128)")
    data.add_argument("--lora", action="store_true", help="train only low-rank adapters of the encoder, with PEFT")


def load_texts(args: argparse.Namespace) -> tuple[DatasetDict, dict[str, Task]]:
    """Loads the splits `train` and `test`, and finds the tasks."""
    splits = load_dataset(args.dataset, args.dataset_config)
    if "test" not in splits:
        splits["test"] = splits["validation"]
    tasks = {}
    for kind in ("classification", "regression", "tagging"):
        for column in getattr(args, kind):
            if column not in splits["train"].column_names:
                raise SystemExit(f"--{kind}: no column {column!r} among {', '.join(splits['train'].column_names)}")
            if kind == "regression":
                numbers = [float(number) for number in splits["train"][column] if number is not None]
                tasks[column] = Task(kind, mean=fmean(numbers), deviation=pstdev(numbers) or 1.0)
            else:
                tasks[column] = Task(kind, tuple(label_names(splits["train"], column)))
    return splits, tasks


def label_names(split: Any, column: str) -> list[str]:
    """Names of a column's labels: those that the data set declares, or else all that occur."""
    feature = split.features[column]
    feature = getattr(feature, "feature", feature)  # of a list
    if isinstance(feature, ClassLabel):
        return feature.names
    return sorted({str(label) for value in split[column] if value is not None for label in as_words(value)})


def as_words(value: Any) -> list[Any]:
    """Words of a value: a list as it is, a string split at spaces, a number as a list of one."""
    if isinstance(value, str):
        return value.split()
    return list(value) if isinstance(value, Sequence) else [value]


def make_tokenizer(texts: Sequence[Any], folder: Path) -> None:
    """Trains a small byte-pair tokenizer on `texts` and saves it to `folder`."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator((" ".join(as_words(text)) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


class Collator:
    """Rows of a data set as one padded batch, with the number of items that every task has in it.

    Args:
        tokenizer: A fast one, which knows the word of every token.
        tasks: `{column: task}`.
        text: Column of texts.
        max_length: In tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tasks: dict[str, Task], text: str, max_length: int):
        self.tokenizer, self.tasks, self.text, self.max_length = tokenizer, tasks, text, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns `input_ids`, `attention_mask`, labels by task, and `num_items` as integers on the host."""
        encoded = self.tokenizer(
            [as_words(row[self.text]) for row in rows],
            is_split_into_words=True,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        for name, task in self.tasks.items():
            values = [row[name] for row in rows]
            if task.kind == "regression":
                batch[name] = torch.tensor([math.nan if value is None else float(value) for value in values])
            elif task.kind == "classification":
                batch[name] = torch.tensor([self.index(task, value) for value in values])
            else:
                tags = [self.tags(task, value, encoded.word_ids(i)) for i, value in enumerate(values)]
                batch[name] = torch.tensor(tags)
        return {**batch, "num_items": {name: int(is_labelled(batch[name]).sum()) for name in self.tasks}}

    def index(self, task: Task, label: Any) -> int:
        """The index of a label."""
        if label is None:
            return IGNORED
        return label if isinstance(label, int) else task.labels.index(str(label))

    def tags(self, task: Task, value: Any, words: Sequence[int | None]) -> list[int]:
        """One label per token: that of a word at its first token, and none at its other tokens."""
        if value is None:
            return [IGNORED] * len(words)
        labels = [self.index(task, label) for label in as_words(value)]
        firsts = [word is not None and word not in words[:i] for i, word in enumerate(words)]
        return [labels[word] if first else IGNORED for word, first in zip(words, firsts, strict=True)]


def is_labelled(labels: Tensor) -> Tensor:
    """A mask that is true where there is a label."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED


class SentenceHead(nn.Module):
    """Predicts one vector per text, from the mean over its tokens."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, z: Tensor, attention_mask: Tensor) -> Tensor:
        """shape: [batch, tokens, width] → [batch, outputs]."""
        mask = attention_mask.unsqueeze(-1).to(z.dtype)
        mean = (z * mask).sum(1) / mask.sum(1)
        return self.outer(F.gelu(self.inner(mean)))


class TokenHead(nn.Module):
    """Predicts one vector per token."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.outer = nn.Linear(width, outputs)

    def forward(self, z: Tensor, attention_mask: Tensor) -> Tensor:
        """shape: [batch, tokens, width] → [batch, tokens, outputs]."""
        return self.outer(z)


class MultiTaskEncoder(nn.Module):
    """A shared encoder, and one head per task on its last hidden states."""

    def __init__(self, encoder: nn.Module, tasks: dict[str, Task]):
        super().__init__()
        self.encoder, self.tasks = encoder, tasks
        width = encoder.config.hidden_size
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            head = TokenHead if task.kind == "tagging" else SentenceHead
            self.heads[name] = head(width, len(task.labels) or 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, num_items: dict[str, int] | None = None, **labels: Tensor
    ) -> dict[str, Any]:
        """Predictions for all tasks; with labels also the losses, each a mean over the items that have a label."""
        z = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        outputs: dict[str, Any] = {name: head(z, attention_mask) for name, head in self.heads.items()}
        if labels:
            losses = {name: self.loss(name, outputs[name].float(), labels[name]) for name in self.tasks}
            outputs = {"losses": losses, "num_items": num_items, **outputs}
        return outputs

    def loss(self, name: str, output: Tensor, labels: Tensor) -> Tensor:
        """The mean over the items that have a label; 0 if there are none."""
        task = self.tasks[name]
        if task.kind == "regression":
            wanted = (labels - task.mean) / task.deviation
            total = ((output.squeeze(-1) - wanted.nan_to_num(0.0)).square() * is_labelled(labels)).sum()
        else:
            total = F.cross_entropy(output.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / is_labelled(labels).sum().clamp(min=1)


def make_model(
    args: argparse.Namespace, tasks: dict[str, Task], tokenizer: PreTrainedTokenizerBase
) -> MultiTaskEncoder:
    """Makes the chosen encoder with its heads."""
    if args.model:
        encoder = AutoModel.from_pretrained(args.model)
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # no task uses it, and DDP fails on parameters without a gradient
    else:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=args.max_length,
            initializer_range=0.1,  # with the usual 0.02, such a narrow encoder starts slowly
            hidden_dropout_prob=0.0,  # each process draws its own dropout, so weights would depend on their number
            attention_probs_dropout_prob=0.0,
        )
        encoder = BertModel(config, add_pooling_layer=False)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        encoder = get_peft_model(encoder, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        encoder.print_trainable_parameters()
    return MultiTaskEncoder(encoder, tasks)


def load_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer, or the one that `make_tokenizer` saved in the output folder."""
    return AutoTokenizer.from_pretrained(args.model or args.output_dir / "tokenizer")


def score(tasks: dict[str, Task], outputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Two numbers per text and task, whose sums over all texts give the metric; shape: [batch, 2 · tasks]."""
    columns = []
    for name, task in tasks.items():
        output, label = outputs[name], labels[name]
        labelled = is_labelled(label)
        if task.kind == "regression":
            answer = output.squeeze(-1) * task.deviation + task.mean
            columns += [(answer - label).abs().nan_to_num(0.0), labelled]
        elif task.kind == "classification":
            columns += [(output.argmax(-1) == label) & labelled, labelled]
        else:
            outside = task.labels.index("O") if "O" in task.labels else IGNORED
            found, there = (output.argmax(-1) != outside) & labelled, (label != outside) & labelled
            hits = found & there & (output.argmax(-1) == label)
            columns += [2 * hits.sum(-1), found.sum(-1) + there.sum(-1)]
    return torch.stack([column.double() for column in columns], dim=-1)


def metrics(tasks: dict[str, Task], scores: Tensor) -> dict[str, float]:
    """Returns `{task: metric}` from the sums of `score`."""
    above, below = scores.sum(0).view(-1, 2).T
    return dict(zip(tasks, (above / below.clamp(min=1)).tolist(), strict=True))
