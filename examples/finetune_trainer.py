r"""The encoder of `finetune_text.py`, with several heads on the same texts, fine-tuned by transformers' Trainer.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/finetune_trainer.py --cpu

`WeightedTrainer` is the Trainer with a weighting method. The model returns one loss per task in `losses`. The collator
puts into `num_items` how many texts or words of each task a micro-batch has, so that every item of an optimizer step
counts the same. The Trainer uses the weighted sum as its loss. Its logs contain the weights, losses and gradient norms
of every task, its evaluations the mean loss of every task, and its checkpoints the weighter's state.

With your own encoder and data, from the hub or from local folders:

    accelerate launch examples/finetune_trainer.py --model google-bert/bert-base-cased --dataset MY/TEXTS \
        --text tokens --classification subject --regression --tagging ner_tags pos_tags --lr 5e-5

The default takes about a minute on two CPU cores. Prints a table of metrics on test texts, and writes
`finetune_trainer.json`, `finetune_trainer.png` (weights, losses, gradient norms and cosines) and TensorBoard logs to
`--output_dir`.
"""

import argparse
import os

import torch
from common import add_output_arguments, add_training_arguments, check_processes, table, write_results
from finetune_text import METHODS
from text_data import Collator, add_arguments, load_texts, load_tokenizer, make_model, make_tokenizer, metrics, score
from transformers import EvalPrediction, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from accel_weighting.integrations.trainer import WeightedTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--method", choices=METHODS, default="gradnorm", help="weighting method (default: gradnorm)")
    add_training_arguments(parser, samples="texts", steps=400, batch_size=16, lr=2e-3)
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the model and the order of samples (default: 0)"
    )
    parser.add_argument(
        "--save_every", type=int, default=200, help="optimizer steps between checkpoints (default: 200)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --output_dir, if any"
    )
    add_output_arguments(parser, "finetune_trainer")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(args.output_dir / "tensorboard")
    training = TrainingArguments(
        str(args.output_dir),
        use_cpu=args.cpu,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=128,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
        seed=args.seed,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=args.save_every,
        save_steps=args.save_every,
        save_total_limit=1,
        report_to="tensorboard",
        remove_unused_columns=False,  # the collator needs all columns
        ddp_find_unused_parameters=False,  # the head of a missing task still gets a gradient of zeros
        label_names=[*args.classification, *args.regression, *args.tagging],
    )
    set_seed(args.seed)
    with training.main_process_first():  # the main process fills the cache and trains the tokenizer
        texts, tasks = load_texts(args)
        if training.process_index == 0 and not args.model:
            make_tokenizer(texts["train"][args.text], args.output_dir / "tokenizer")
    tokenizer = load_tokenizer(args)

    def compute_metrics(results: EvalPrediction) -> dict[str, float]:
        outputs = {name: torch.tensor(output) for name, output in zip(tasks, results.predictions, strict=True)}
        given = results.label_ids if len(tasks) > 1 else [results.label_ids]
        labels = {name: torch.tensor(label) for name, label in zip(tasks, given, strict=True)}
        return metrics(tasks, score(tasks, outputs, labels))

    trainer = WeightedTrainer(
        model=make_model(args, tasks, tokenizer),
        args=training,
        data_collator=Collator(tokenizer, tasks, args.text, args.max_length),
        train_dataset=texts["train"],
        eval_dataset=texts["test"],
        compute_metrics=compute_metrics,
        weighting=METHODS[args.method],
        heads={name: f"heads.{name}" for name in tasks},
    )
    accelerator = trainer.accelerator
    check_processes(accelerator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.output_dir)) if args.resume else None)

    result = trainer.evaluate()
    result = {name: result[f"eval_{name}"] for name in tasks}
    weights = trainer.weighter.weights
    rows = [[name, task.metric, f"{result[name]:.4f}", f"{weights[name]:.3f}"] for name, task in tasks.items()]
    accelerator.print(table([["task", "metric on test texts", args.method, "final weight"], *rows]))
    accelerator.print(trainer.weighter.describe())
    if accelerator.is_main_process:
        run = {
            "processes": accelerator.num_processes,
            "metrics": result,
            "weights": weights,
            "history": trainer.weighter.history,
        }
        write_results(args.output_dir, "finetune_trainer", args, {args.method: run})
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
