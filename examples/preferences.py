"""Two losses that TRL's DPO trainer adds up itself, weighed: a small language model learns to add.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/preferences.py --cpu

DPO takes several losses in `loss_type` and fixed numbers for them in `loss_weights`. `WeightedDPOTrainer` puts a
method's weights in their place. Here `sigmoid` prefers the right answer to a wrong one, measured against a reference
model, and `sft` imitates the right answer. Everything else is TRL's: its metrics, logs and checkpoints stay.

The model is a small Llama with random weights, and its tokenizer knows a few words, so that nothing is downloaded.
`--compare` trains once with each of several methods, from the same seed. `static` is what `loss_weights=[1.0, 1.0]`
does without this library.

The default takes a minute on two CPU cores. Prints a table of the share of sums that the model answers rightly, how
often it prefers the right answer, and the final weights, and writes `preferences.json` and `preferences.png` (weights
and losses) to `--output_dir`.
"""

import argparse
import copy
import os
from typing import Any

import torch
from common import add_output_arguments, add_training_arguments, check_processes, listed, table, write_results
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig

from accel_weighting import IMTLL, CoVWeighting, StaticWeighting, UncertaintyWeighting
from accel_weighting.integrations.trl import WeightedDPOTrainer

LOSSES = ["sigmoid", "sft"]
NUMBERS = 20

# To try another method, add a row. Methods that need gradients cannot be used: TRL adds the losses up by itself.
METHODS = {
    "static": StaticWeighting({"sigmoid": 1.0, "sft": 1.0}),
    "cov": CoVWeighting(total="tasks"),
    "uncertainty": UncertaintyWeighting(start="balanced"),
    "imtl-l": IMTLL(start="balanced"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="cov", help="weighting method (default: cov)")
    parser.add_argument(
        "--compare",
        type=listed(str, METHODS),
        metavar="A,B,…",
        help="train several methods one after the other, from the same seed with the same budget, instead of --method",
    )
    add_training_arguments(parser, samples="pairs", steps=200, batch_size=32, lr=3e-3)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of the model, the wrong answers and the order of samples (default: 0)",
    )
    parser.add_argument(
        "--save_every", type=int, default=100, help="optimizer steps between two checkpoints (default: 100)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoints in --output_dir, if there are any"
    )
    add_output_arguments(parser, "preferences")
    return parser.parse_args()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word and number."""
    words = ["[PAD]", "[UNK]", "[EOS]", "plus", "is", *map(str, range(2 * NUMBERS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", padding_side="left"
    )


def make_model(words: int) -> LlamaForCausalLM:
    """A Llama of two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
        )
    )


def make_pairs(seed: int) -> tuple[Dataset, Dataset]:
    """All sums of two numbers below `NUMBERS`, each with the answer and a wrong one near it; a fifth for the test."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for a in range(NUMBERS):
        for b in range(NUMBERS):
            wrong = a + b
            while wrong == a + b:
                wrong = int(torch.randint(max(a + b - 3, 0), min(a + b + 4, 2 * NUMBERS), (), generator=generator))
            rows.append({"prompt": f"{a} plus {b} is", "chosen": f" {a + b}", "rejected": f" {wrong}"})
    order = torch.randperm(len(rows), generator=generator).tolist()
    test, train = order[: len(rows) // 5], order[len(rows) // 5 :]
    return Dataset.from_list([rows[i] for i in train]), Dataset.from_list([rows[i] for i in test])


@torch.no_grad()
def share_of_right_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Dataset) -> float:
    """The share of sums whose answer is the likeliest next token."""
    model.eval()
    prompts = tokenizer(list(pairs["prompt"]), padding=True, return_tensors="pt", return_token_type_ids=False)
    likeliest = model(**prompts.to(model.device)).logits[:, -1].argmax(-1)
    answers = [tokenizer.convert_tokens_to_ids(answer.strip()) for answer in pairs["chosen"]]
    return (likeliest.cpu() == torch.tensor(answers)).float().mean().item()


def train(args: argparse.Namespace, method: str) -> tuple[dict[str, Any], WeightedDPOTrainer]:
    """Makes one run; returns its metrics, final weights and history, and the trainer."""
    folder = args.output_dir / method
    set_seed(args.seed)
    tokenizer, (train_set, test_set) = make_tokenizer(), make_pairs(args.seed)
    model = make_model(len(tokenizer))
    trainer = WeightedDPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=DPOConfig(
            str(folder),
            loss_type=LOSSES,
            use_cpu=args.cpu,
            bf16=False,  # this and the next are on by default, for large models
            activation_checkpointing=False,
            ddp_find_unused_parameters=False,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            gradient_accumulation_steps=args.accumulation,
            max_steps=args.steps,
            learning_rate=args.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
            logging_steps=20,
            save_steps=args.save_every,
            save_total_limit=1,
            seed=args.seed,
            report_to="none",
        ),
        train_dataset=train_set,
        eval_dataset=test_set,
        processing_class=tokenizer,
        weighting=METHODS[method],
    )
    check_processes(trainer.accelerator)
    last = get_last_checkpoint(str(folder)) if args.resume and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    found = trainer.evaluate()
    right = share_of_right_answers(trainer.accelerator.unwrap_model(trainer.model), tokenizer, test_set)
    trainer.accelerator.print(trainer.weighter.describe())
    run = {
        "processes": trainer.accelerator.num_processes,
        "metrics": {"right": right, "preferred": found["eval_rewards/accuracies"]},
        "weights": trainer.weighter.weights,
        "history": trainer.weighter.history,
    }
    return run, trainer


def main() -> None:
    args = parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    runs = {}
    for name in args.compare or [args.method]:
        runs[name], trainer = train(args, name)
    accelerator = trainer.accelerator
    rows = [["method", "sums that are right", "right answer preferred", *(f"weight of {loss}" for loss in LOSSES)]]
    for name, run in runs.items():
        scores = [f"{run['metrics'][metric]:.3f}" for metric in ("right", "preferred")]
        rows.append([name, *scores, *(f"{run['weights'][loss]:.3f}" for loss in LOSSES)])
    accelerator.print(table(rows))
    if accelerator.is_main_process:
        write_results(args.output_dir, "preferences", args, runs)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
