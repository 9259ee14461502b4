"""Five tasks on pairs of handwritten digits, weighted on two processes.

A small Vision Transformer sees two real digits side by side and answers five questions, as in RotoGrad's Multi-MNIST
experiment (https://arxiv.org/abs/2103.02631): the left digit, the right digit, their sum, the parity of their product,
and how many pixels are active. The losses differ in kind and in size, and so do their gradients at the shared trunk.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/multi_digits.py --cpu

The batch of an optimizer step is `--batch_size` pairs, however many processes and micro-batches it is divided among.
The weights are therefore the same on one machine or several, under DDP, FSDP or DeepSpeed (without gradient clipping).
With `--compare equal,gradnorm,cov` it trains once with each of these methods. A run of the default length takes two to
three minutes on two CPU cores. Prints a table and writes `multi_digits.json` and `multi_digits.png` to `--output_dir`.
"""

import argparse
import json
import math
import platform
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import matplotlib
import torch
import transformers
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, set_seed, tqdm
from common import (
    Progress,
    add_checkpoint_arguments,
    add_output_arguments,
    check_processes,
    micro_batch_size,
    resume,
    save_checkpoint,
    table,
)
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import ViTConfig, ViTModel

import accel_weighting
from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, RotoGrad, RotoGradNorm, Weighter, plot_history
from accel_weighting.plot import smooth
from accel_weighting.selfcheck.cpu import accelerator_on_cpu

# To try another method, add a row. Methods that weight losses keep their sum, so that learning rates stay comparable.
METHODS = {
    "equal": EqualWeighting(),
    "gradnorm": GradNorm(alpha=0.0),  # training rates of squared errors and cross entropies are not comparable
    "cov": CoVWeighting(total="tasks"),
    "rotograd": RotoGrad(),
    "rotate": RotoGrad(scale=False),
    "scale": RotoGrad(rotate=False),
    "rotograd_norm": RotoGradNorm(alpha=0.0),
}


class Task(NamedTuple):
    """The number of outputs of a task's head, its loss, and its metric."""

    outputs: int
    loss: str
    metric: str


TASKS = {
    "left": Task(10, "cross entropy", "accuracy"),
    "right": Task(10, "cross entropy", "accuracy"),
    "sum": Task(1, "squared error", "squared error"),
    "parity": Task(1, "binary cross entropy", "accuracy"),
    "pixels": Task(1, "squared error", "squared error"),
}
LOSSES = {
    "cross entropy": F.cross_entropy,
    "binary cross entropy": F.binary_cross_entropy_with_logits,
    "squared error": F.mse_loss,
}
PANELS = {"weight": "weight", "loss": "loss", "grad_norm": "norm of the unweighted gradient at the trunk's output"}
History = list[tuple[int, dict[str, float]]]


class DigitPairs(Dataset):
    """Pairs of images drawn with replacement, with the targets of all tasks."""

    def __init__(self, images: Tensor, digits: Tensor, size: int, seed: int):
        left, right = torch.randint(len(images), (2, size), generator=torch.Generator().manual_seed(seed))
        active = (images > 0.5).float().mean((1, 2))
        self.columns = {
            "image": torch.cat([images[left], images[right]], dim=2).unsqueeze(1),  # shape: [size, 1, 8, 16]
            "left": digits[left],
            "right": digits[right],
            "sum": (digits[left] + digits[right]).float(),
            "parity": (digits[left] * digits[right] % 2).float(),
            "pixels": (active[left] + active[right] - 2 * active.mean()) / (active.std() * math.sqrt(2)),
        }

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def load_pairs(seed: int) -> tuple[DigitPairs, DigitPairs]:
    """Training pairs and test pairs, which share no image."""
    digits = load_digits()  # 1,797 images of 8 × 8 pixels from 0 to 16
    train, test = train_test_split(range(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=seed)
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return DigitPairs(images[train], labels[train], 16_384, seed), DigitPairs(images[test], labels[test], 4_096, seed)


class MultiDigitModel(nn.Module):
    """A small Vision Transformer as the shared trunk, and one head per task on its class token."""

    _no_split_modules = ViTModel._no_split_modules  # where FSDP finds its units

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        config = ViTConfig(
            image_size=(8, 16),
            patch_size=4,
            num_channels=1,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            initializer_range=0.1,  # with the usual 0.02, such a narrow trunk stays on a plateau for hundreds of steps
            hidden_dropout_prob=0.0,  # each process draws its own dropout, so weights would depend on their number
            attention_probs_dropout_prob=0.0,
        )
        self.trunk = ViTModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict()
        for name, task in TASKS.items():
            self.heads[name] = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, task.outputs))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Predictions for all tasks."""
        z = self.trunk(image).last_hidden_state[:, 0]  # shape: [batch, width]
        return {name: head(z).squeeze(-1) for name, head in self.heads.items()}


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """An accelerator for the engine, the processes and the precision that the launcher chose."""
    AcceleratorState._reset_state()  # Accelerate sets up FSDP only for the first Accelerator of a process
    timeout = timedelta(seconds=args.timeout)
    options = {
        "mixed_precision": args.mixed_precision,
        "gradient_accumulation_steps": args.accumulation,
        "dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    }
    if args.cpu:
        return accelerator_on_cpu(timeout, **options)
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)], **options)


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with one method; returns its test metrics, final weights, history and duration."""
    accelerator = make_accelerator(args)
    set_seed(args.seed)
    train_set, test_set = load_pairs(args.seed)
    model = MultiDigitModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # Only whole batches: a partial last batch would be divided differently on another number of processes.
    train_set = Subset(train_set, range(len(train_set) // args.batch_size * args.batch_size))
    micro_batch = micro_batch_size(args.batch_size, accelerator, args.accumulation)
    train_loader = DataLoader(train_set, micro_batch, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=512)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    heads = {task: f"heads.{task}" for task in TASKS}
    weighter = Weighter(METHODS[name], list(TASKS), accelerator=accelerator, heads=heads, model=model)

    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    folder = args.checkpoint_dir and args.checkpoint_dir / name
    if args.resume:
        resume(accelerator, folder, progress)

    start = time.perf_counter()
    bar = tqdm(total=args.steps, initial=progress.step, desc=name, mininterval=1)
    while progress.step < args.steps:
        epoch, done = divmod(progress.step, len(train_set) // args.batch_size)
        train_loader.set_epoch(epoch)
        for batch in skip_first_batches(train_loader, done * args.accumulation):
            with accelerator.accumulate(model):
                outputs = model(batch["image"])
                losses = {task: LOSSES[TASKS[task].loss](outputs[task].float(), batch[task]) for task in TASKS}
                weighter.backward(losses)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                progress.step += 1
                last = progress.step == args.steps
                if progress.step % 20 == 0 or last:  # reading the weights waits for the device
                    bar.set_postfix_str(" ".join(f"{task} {weight:.2f}" for task, weight in weighter.weights.items()))
                bar.update()
                if folder and (last or progress.step % args.save_every == 0):
                    save_checkpoint(accelerator, folder, progress.step)
                if last:
                    break
    bar.close()
    seconds = time.perf_counter() - start

    metrics = evaluate(accelerator, model, test_loader)
    weighter.detach()
    return {
        "method": repr(weighter.method),
        "processes": accelerator.num_processes,
        "pairs_per_step": args.batch_size,
        "seconds": seconds,
        "metrics": metrics,
        "weights": weighter.weights,
        "history": brief(weighter.history),
    }


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader) -> dict[str, float]:
    """The metric of every task over the whole test set."""
    model.eval()
    scores = {task: [] for task in TASKS}
    for batch in loader:
        outputs = model(batch["image"])
        for name, task in TASKS.items():
            answer, truth = accelerator.gather_for_metrics((outputs[name], batch[name]))
            if task.metric == "accuracy":
                scores[name].append((answer.argmax(-1) if task.outputs > 1 else answer > 0) == truth)
            else:
                scores[name].append((answer - truth).square())
    return {task: torch.cat(values).float().mean().item() for task, values in scores.items()}


def improvement(metrics: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """Relative change in percent, positive where it is better."""
    signs = {name: 1 if task.metric == "accuracy" else -1 for name, task in TASKS.items()}
    return {task: 100 * signs[task] * (metrics[task] / baseline[task] - 1) for task in TASKS}


def compare(runs: dict[str, dict[str, Any]]) -> str:
    """Metrics of all runs as text, with the change against equal weights if these were run."""
    baseline = runs.get("equal", {}).get("metrics")
    lines = [["task", "metric", *runs]]
    for name, task in TASKS.items():
        cells = []
        for method, run in runs.items():
            cell = f"{run['metrics'][name]:.4f}"
            if baseline and method != "equal":
                cell += f" ({improvement(run['metrics'], baseline)[name]:+.1f} %)"
            cells.append(cell)
        lines.append([name, task.metric, *cells])
    if baseline and len(runs) > 1:
        changes = [sum(improvement(run["metrics"], baseline).values()) / len(TASKS) for run in runs.values()]
        lines.append(["mean change", "", *(f"{change:+.1f} %" for change in changes)])
    lines.append(["duration", "", *(f"{run['seconds']:.0f} s" for run in runs.values())])
    return table(lines)


def brief(history: History) -> History:
    """The part of a weighter's history that the picture shows, rounded to the precision of float32."""
    return [
        (step, {name: float(f"{value:.7g}") for name, value in values.items() if name.partition("/")[0] in PANELS})
        for step, values in history
    ]


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draws one row per method: its weights, and the losses and gradient norms that led to them."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, columns = len(runs), len(PANELS)
    figure = plt.figure(figsize=(13, 0.9 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey="col", squeeze=False)
    for (method, run), row in zip(runs.items(), axes, strict=True):
        history = smooth(run["history"])  # single batches are noisy
        for ax, values in zip(row, PANELS, strict=True):
            plot_history(history, ax, values=values)
            handles, labels = ax.get_legend_handles_labels()
            ax.get_legend().remove()
            ax.set(xlabel="", ylabel="")
        row[0].set_ylabel(method)
    for top, bottom, title in zip(axes[0], axes[-1], PANELS.values(), strict=True):
        top.set_title(title, fontsize="medium")
        bottom.set_xlabel("optimizer step")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(TASKS), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gradnorm", help="weighting method (default: gradnorm)")
    parser.add_argument(
        "--compare",
        metavar="A,B,…",
        help="train several methods one after the other, from the same seed with the same budget, instead of --method",
    )
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: 1000)")
    parser.add_argument(
        "--batch_size",
        type=int,
        default=128,
        help="pairs per optimizer step, of all processes and micro-batches together (default: 128)",
    )
    parser.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches per optimizer step and process (default: 1)"
    )
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW (default: 0.001)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the split, the pairs, the model and the order of samples (default: 0)",
    )
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], help="precision (default: the one that the launcher chose)"
    )
    add_checkpoint_arguments(parser)
    add_output_arguments(parser, "multi_digits")
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds that processes wait for a lost one (default: 300)"
    )
    args = parser.parse_args()
    args.methods = args.compare.split(",") if args.compare else [args.method]
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"--compare: {', '.join(unknown)} not among {', '.join(METHODS)}")
    if args.resume and not args.checkpoint_dir:
        parser.error("--resume needs --checkpoint_dir")
    return args


def main() -> None:
    args = parse_args()
    accelerator = make_accelerator(args)
    check_processes(accelerator)
    micro_batch_size(args.batch_size, accelerator, args.accumulation)  # ends the script if it cannot be divided
    runs = {method: train(method, args) for method in args.methods}
    accelerator.print(compare(runs))
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        draw(runs, args.output_dir / "multi_digits.png")
        results = {
            "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "versions": {
                "python": platform.python_version(),
                **{
                    module.__name__: module.__version__ for module in (torch, accelerate, transformers, accel_weighting)
                },
            },
            "processes": accelerator.num_processes,
            "runs": runs,
        }
        (args.output_dir / "multi_digits.json").write_text(json.dumps(results))
        print(f"Results are in {args.output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
