r"""A causal language model on texts of three domains, weighed by domain in transformers' Trainer.

All domains share one output layer, and a token belongs to one domain: a task has rows of the hidden states instead of
a head. `weighter.rows(z, owner)` before the output layer says to which domain each row belongs, and GradNorm compares
the gradients there. The model is a small Llama with random weights, which reads bytes. The script makes the texts:
tales in simple English, sums of two numbers, and lines of Python. Tales are frequent and sums are rare.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/finetune_domains.py --cpu

With a causal language model of yours, from the hub or from a local folder, and its tokenizer:

    accelerate launch examples/finetune_domains.py --model Qwen/Qwen3-0.6B --lr 1e-5

Trains once by every method with every seed, which takes about two minutes on one CPU core. Prints bits per byte on test
texts of every domain, and writes `finetune_domains.json` and `finetune_domains.png` to `--output_dir`.
"""

import argparse
import itertools
import math
import random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from common import (
    Run,
    add_comparison_arguments,
    add_output_arguments,
    add_training_arguments,
    by_method,
    check_processes,
    mean_and_range,
    plot_range,
    table,
    thinned,
    write_comparison,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from accel_weighting import CoBa, EqualWeighting, GradNorm, plot_history
from accel_weighting.integrations.trainer import WeightedTrainer
from accel_weighting.plot import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# To try another method, add a row.
METHODS = {
    "equal": EqualWeighting(),
    "gradnorm": GradNorm(alpha=0.0, start="balanced"),
    "coba": CoBa(window=20, warmup=20),
}
SHARES = {"tales": 0.6, "sums": 0.1, "code": 0.3}  # of the texts
DOMAINS = list(SHARES)
IGNORED = -100  # the label of what is not predicted

# ---- the texts ------------------------------------------------------------------------------------------------------

WHO = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas"]
WHAT = ["boat", "lamp", "letter", "ladder", "garden", "kite", "map", "bridge", "coat", "drum"]
HOW = ["old", "green", "heavy", "broken", "wooden", "little", "golden", "quiet"]
DID = ["found", "painted", "sold", "carried", "repaired", "lost", "hid", "drew"]
WHERE = ["by the river", "in the market", "behind the mill", "at the harbour", "under the oak", "near the tower"]
NAMES = ["total", "count", "left", "right", "value", "index", "width", "size"]


def tale(draw: random.Random) -> str:
    """Two sentences; the second goes back to the person and the thing of the first."""
    who, other = draw.sample(WHO, 2)
    what = draw.choice(WHAT)
    return (
        f"{who} {draw.choice(DID)} a {draw.choice(HOW)} {what} {draw.choice(WHERE)}. "
        f"Then {who} gave the {what} to {other}."
    )


def addition(draw: random.Random) -> str:
    """A sum of two numbers of up to two digits, and the result."""
    a, b = draw.randrange(100), draw.randrange(100)
    return f"{a}+{b}={a + b}"


def line_of_code(draw: random.Random) -> str:
    """A function of two arguments that returns one operation on them."""
    a, b = draw.sample(NAMES, 2)
    return f"def {a}_of_{b}({a}, {b}): return {draw.choice([a, b])} {draw.choice('+-*%')} {draw.randrange(1, 10)}"


MAKERS = {"tales": tale, "sums": addition, "code": line_of_code}


def make_texts(number: int, seed: int) -> list[dict[str, Any]]:
    """Texts in random order, `{"text": …, "domain": index}`."""
    draw = random.Random(seed)
    names = draw.choices(DOMAINS, list(SHARES.values()), k=number)
    return [{"text": MAKERS[name](draw), "domain": DOMAINS.index(name)} for name in names]


class Collator:
    """Tokenizes texts once, and makes batches of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def tokenized(self, texts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The texts as numbers; each begins and ends with the same token, so that its first byte is predicted too."""
        edge = [self.tokenizer.eos_token_id]
        rows = self.tokenizer([text["text"] for text in texts], add_special_tokens=False).input_ids
        return [
            {"input_ids": edge + row + edge, "domain": text["domain"], "bytes": len(text["text"].encode())}
            for row, text in zip(rows, texts, strict=True)
        ]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded `input_ids` and `labels`, `domain` and `bytes` of every text, and the number of tokens per domain."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        counts = dict.fromkeys(DOMAINS, 0)
        for row in rows:
            counts[DOMAINS[row["domain"]]] += len(row["input_ids"]) - 1  # the first token is not predicted
        return {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED),
            "domain": torch.tensor([row["domain"] for row in rows]),
            "bytes": torch.tensor([row["bytes"] for row in rows]),
            "num_items": counts,
        }


# ---- training -------------------------------------------------------------------------------------------------------


class DomainTrainer(WeightedTrainer):
    """Tells the weighter before the output layer to which domain each hidden state belongs; one loss per domain."""

    owner: Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model.get_output_embeddings().register_forward_pre_hook(self.tell_rows)

    def tell_rows(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Returns the hidden states as they are, `[batch, tokens, width]`; the weighter measures their gradients."""
        return (self.weighter.rows(inputs[0], self.owner),)

    def compute_losses(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
        """Mean losses over the tokens of each domain; as the model's output, how many bits every text takes."""
        labels, domain = inputs["labels"], inputs["domain"]
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # a hidden state predicts the next token
        self.owner = torch.where(targets == IGNORED, -1, domain[:, None])
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        losses = F.cross_entropy(logits.mT.float(), targets, ignore_index=IGNORED, reduction="none")
        counts = inputs["num_items"]
        means = {name: losses[domain == k].sum() / max(1, counts[name]) for k, name in enumerate(DOMAINS)}
        return (means, {"bits": losses.detach().sum(1) / math.log(2)}) if return_outputs else means


def bits_per_byte(results: EvalPrediction) -> dict[str, float]:
    """Over all texts of each domain."""
    domain, length = results.label_ids
    bits = results.predictions
    return {name: float(bits[domain == k].sum() / length[domain == k].sum()) for k, name in enumerate(DOMAINS)}


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The pretrained model, or a small Llama with random weights."""
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,  # with the usual 0.02, so narrow a model starts slowly
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(name: str, seed: int, args: argparse.Namespace) -> Run:
    """Makes one run; returns bits per byte over the steps, final weights and history."""
    folder = args.output_dir / f"{name}_{seed}"
    training = TrainingArguments(
        str(folder),
        use_cpu=args.cpu,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=128,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        seed=seed,
        logging_steps=max(1, args.steps // 5),
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 5),
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the collator needs all columns
        label_names=["domain", "bytes"],
    )
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else ByT5Tokenizer()
    collator = Collator(tokenizer)
    trainer = DomainTrainer(
        model=make_model(args, tokenizer),
        args=training,
        data_collator=collator,
        train_dataset=collator.tokenized(make_texts(4_096, seed=0)),
        eval_dataset=collator.tokenized(make_texts(256, seed=1)),
        compute_metrics=bits_per_byte,
        weighting=METHODS[name],
        tasks=DOMAINS,
    )
    if trainer.is_world_process_zero():
        print(f"{name}, seed {seed}")
    trainer.train()
    result = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if f"eval_{DOMAINS[0]}" in log]
    return {
        "method": name,
        "seed": seed,
        "processes": trainer.accelerator.num_processes,
        "metrics": {domain: result[f"eval_{domain}"] for domain in DOMAINS},
        "evaluations": [(log["step"], {domain: log[f"eval_{domain}"] for domain in DOMAINS}) for log in logs],
        "weights": trainer.weighter.weights,
        "describe": trainer.weighter.describe(),
        "history": thinned(trainer.weighter.history),
    }


def compare(runs: list[Run]) -> str:
    """Bits per byte of every domain for all methods, and the mean of their final weights, as text."""
    lines = [["method", *(f"{domain}, bits per byte" for domain in DOMAINS), "final weights"]]
    for name, group in by_method(runs).items():
        cells = [mean_and_range([run["metrics"][domain] for run in group]) for domain in DOMAINS]
        weights = " : ".join(f"{fmean(run['weights'][domain] for run in group):.2f}" for domain in DOMAINS)
        lines.append([name, *cells, weights])
    return table(lines)


def draw(runs: list[Run]) -> "Figure":
    """Draws every domain's bits per byte over the steps, and the weights of GradNorm or else of the last method."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(DOMAINS) + 1, figsize=(14, 3.6), layout="constrained")
    groups = by_method(runs)
    for domain, ax in zip(DOMAINS, axes, strict=False):
        for (name, group), colour in zip(groups.items(), itertools.cycle(COLOURS)):
            curves = [[(step, bits[domain]) for step, bits in run["evaluations"]] for run in group]
            plot_range(ax, curves, color=colour, label=name)
        ax.set_title(f"{domain}: mean and range over the seeds", fontsize="medium")
        ax.set_ylabel("bits per byte on test texts")
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    shown = groups.get("gradnorm", runs[-1:])[0]
    plot_history(shown["history"], axes[-1])
    axes[-1].set_title(f"weights of {shown['method']}, seed {shown['seed']}", fontsize="medium")
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a causal language model on the hub or in a folder (default: a small one is made)"
    )
    add_comparison_arguments(parser, METHODS, seeded="the model and the order of samples")
    add_training_arguments(parser, samples="texts", steps=200, batch_size=16, lr=3e-3)
    add_output_arguments(parser, "finetune_domains")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    check_processes(accelerator)
    runs = [train(name, seed, args) for seed in args.seeds for name in args.methods]
    if accelerator.is_main_process:
        write_comparison(args.output_dir, "finetune_domains", args, runs, compare(runs), lambda: draw(runs))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
