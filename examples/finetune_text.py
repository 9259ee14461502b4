r"""An encoder with several heads on the same texts, fine-tuned in a plain Accelerate loop with weighted losses.

The default needs no network. On short reviews that are part of the examples, with a tokenizer trained at the start, a
small BERT learns from scratch what a review is about (classification), how favourable it is (regression), and which
words are names (tagging). Two sentences in five have no tags and three in ten no rating, so a task can be missing from
a micro-batch: `num_items` gives the number of items of every task, and 0 means that the task is missing.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/finetune_text.py --cpu

With your own encoder and data, from the hub or from local folders, and low-rank adapters:

    accelerate launch examples/finetune_text.py --model google-bert/bert-base-cased --dataset MY/TEXTS --text tokens \
        --classification subject --regression --tagging ner_tags pos_tags --lora --lr 2e-4 --mixed_precision bf16

The default takes half a minute on two CPU cores. Prints a table of metrics on test texts, and writes
`finetune_text.json`, `finetune_text.png` (weights, losses, gradient norms and cosines) and TensorBoard logs to
`--output_dir`.
"""

import argparse
import time
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed, tqdm
from common import (
    Progress,
    add_checkpoint_arguments,
    add_output_arguments,
    add_training_arguments,
    check_processes,
    resume,
    save_checkpoint,
    table,
    write_results,
)
from text_data import Collator, add_arguments, load_texts, load_tokenizer, make_model, make_tokenizer, metrics, score
from torch.utils.data import DataLoader
from transformers import get_constant_schedule_with_warmup

from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, RotoGrad, Weighter

# To try another method, add a row.
METHODS = {
    "equal": EqualWeighting(),
    "gradnorm": GradNorm(alpha=1.5),
    "cov": CoVWeighting(total="tasks"),
    "rotograd": RotoGrad(),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="gradnorm", help="weighting method (default: gradnorm)")
    add_training_arguments(parser, samples="texts", steps=400, batch_size=16, lr=2e-3)
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the model and the order of samples (default: 0)"
    )
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="precision (default: no)"
    )
    add_checkpoint_arguments(parser)
    add_output_arguments(parser, "finetune_text")
    args = parser.parse_args()
    if args.resume and not args.checkpoint_dir:
        parser.error("--resume needs --checkpoint_dir")
    return args


def evaluate(accelerator: Accelerator, model: Any, loader: DataLoader, tasks: dict[str, Any]) -> dict[str, float]:
    """Returns `{task: metric}` on all test texts."""
    model.eval()
    scores = []
    with torch.no_grad():
        for batch in loader:
            outputs = model(batch["input_ids"], batch["attention_mask"])
            scores.append(accelerator.gather_for_metrics(score(tasks, outputs, batch)))
    model.train()
    return metrics(tasks, torch.cat(scores))


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        log_with="tensorboard",
        project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / "tensorboard")),
    )
    check_processes(accelerator)
    set_seed(args.seed)
    with accelerator.main_process_first():  # the main process fills the cache and trains the tokenizer
        texts, tasks = load_texts(args)
        if accelerator.is_main_process and not args.model:
            make_tokenizer(texts["train"][args.text], args.output_dir / "tokenizer")
    tokenizer = load_tokenizer(args)
    collate = Collator(tokenizer, tasks, args.text, args.max_length)
    model = make_model(args, tasks, tokenizer)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.lr)
    # Accelerate steps a schedule once per process at every optimizer step.
    scheduler = get_constant_schedule_with_warmup(optimizer, 20 * accelerator.num_processes)
    train_loader = DataLoader(texts["train"], args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    test_loader = DataLoader(texts["test"], 128, collate_fn=collate)
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )

    heads = {name: f"heads.{name}" for name in tasks}
    weighter = Weighter(METHODS[args.method], list(tasks), accelerator=accelerator, heads=heads, model=model)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        resume(accelerator, args.checkpoint_dir, progress)
    settings = {"method": args.method, "lr": args.lr, "seed": args.seed, "weighting": weighter.describe()}
    accelerator.init_trackers("finetune_text", config=settings)

    start, before = time.perf_counter(), progress.step
    bar = tqdm(total=args.steps, initial=progress.step, mininterval=1)
    while progress.step < args.steps:
        train_loader.set_epoch(progress.epoch)
        for batch in skip_first_batches(train_loader, progress.batches):
            with accelerator.accumulate(model):
                losses = model(**batch)["losses"]
                weighter.backward(losses, num_items=batch["num_items"])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.batches += 1
            if accelerator.sync_gradients:
                progress.step += 1
                accelerator.log(weighter.log_values(), progress.step)
                bar.set_postfix(weighter.weights, refresh=False)
                bar.update()
                last = progress.step == args.steps
                if args.checkpoint_dir and (last or progress.step % args.save_every == 0):
                    save_checkpoint(accelerator, args.checkpoint_dir, progress.step)
                if last:
                    break
        else:
            progress.epoch, progress.batches = progress.epoch + 1, 0
    bar.close()
    seconds = time.perf_counter() - start

    result = evaluate(accelerator, model, test_loader, tasks)
    accelerator.log({f"test/{name}": value for name, value in result.items()}, args.steps)
    weights = weighter.weights
    rows = [[name, task.metric, f"{result[name]:.4f}", f"{weights[name]:.3f}"] for name, task in tasks.items()]
    accelerator.print(table([["task", "metric on test texts", args.method, "final weight"], *rows]))
    accelerator.print(f"{args.steps - before} steps in {seconds:.0f} s; {weighter.describe()}")
    if accelerator.is_main_process:
        run = {
            "processes": accelerator.num_processes,
            "metrics": result,
            "weights": weights,
            "seconds": seconds,
            "history": weighter.history,
        }
        write_results(args.output_dir, "finetune_text", args, {args.method: run})
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
