r"""Sentence embeddings from two data sets with a loss each, in sentence-transformers' trainer with a weighting method.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/finetune_embeddings.py --cpu

The script makes its sentences, a tokenizer and a small transformer of random weights. `pairs` are two sentences about
the same thing (MultipleNegativesRankingLoss); `scores` are two sentences and how alike their opinions are (CoSENTLoss).
A batch comes from one of them, and the method compares the last values of each. With `--together` there are several
losses on one batch instead: the ranking, and a loss that spreads the embeddings.

The default takes about a minute on two CPU cores. Prints a table of metrics on unseen sentences, and writes
`finetune_embeddings.json`, `finetune_embeddings.png` (weights, losses, gradient norms and cosines) and the model to
`--output_dir`.
"""

import argparse
import random
from pathlib import Path

import torch
from common import add_output_arguments, add_training_arguments, check_processes, table, write_results
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, TripletEvaluator
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint

from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, UncertaintyWeighting
from accel_weighting.integrations.sentence_transformers import WeightedSentenceTransformerTrainer

# To try another method, add a row.
METHODS = {
    "equal": EqualWeighting(),
    "gradnorm": GradNorm(lr=0.05),
    "cov": CoVWeighting(),
    "uncertainty": UncertaintyWeighting(),
}
THINGS = {
    "restaurant": ["soup", "waiter", "menu", "kitchen", "dessert", "table"],
    "hotel": ["room", "bed", "lobby", "pillow", "breakfast", "shower"],
    "film": ["actor", "plot", "scene", "ending", "camera", "director"],
    "phone": ["screen", "battery", "button", "charger", "speaker", "cover"],
    "train": ["seat", "window", "carriage", "conductor", "ticket", "platform"],
}
OPINIONS = {
    0: ["dreadful", "horrible", "awful"],
    1: ["poor", "dull", "weak"],
    2: ["ordinary", "average", "plain"],
    3: ["nice", "good", "pleasant"],
    4: ["wonderful", "splendid", "brilliant"],
}
FORMS = [
    "the {thing} was {opinion}",
    "a {opinion} {thing} again",
    "we found the {thing} {opinion}",
    "what a {opinion} {thing}",
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="gradnorm", help="weighting method (default: gradnorm)")
    parser.add_argument(
        "--together", action="store_true", help="several losses on one batch, instead of a data set and a loss each"
    )
    add_training_arguments(parser, samples="rows", steps=200, batch_size=16, lr=1e-3)
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the sentences, the model and their order (default: 0)"
    )
    parser.add_argument(
        "--save_every", type=int, default=100, help="optimizer steps between two checkpoints (default: 100)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in --output_dir, if there is one"
    )
    add_output_arguments(parser, "finetune_embeddings")
    return parser.parse_args()


# ---- data, tokenizer and model ---------------------------------------------------------------------------------------


def sentence(draw: random.Random, topic: str, opinion: int) -> str:
    thing, word = draw.choice(THINGS[topic]), draw.choice(OPINIONS[opinion])
    return draw.choice(FORMS).format(thing=thing, opinion=word)


def make_pairs(rows: int, seed: int) -> Dataset:
    """Two sentences about one topic, and one about another."""
    draw, found = random.Random(seed), {"anchor": [], "positive": [], "negative": []}
    for _ in range(rows):
        topic, other = draw.sample(sorted(THINGS), 2)
        for column, about in (("anchor", topic), ("positive", topic), ("negative", other)):
            found[column].append(sentence(draw, about, draw.randrange(5)))
    return Dataset.from_dict(found)


def make_scores(rows: int, seed: int) -> Dataset:
    """Two sentences about one topic, and how near their opinions are: from 0 to 1."""
    draw, found = random.Random(seed), {"first": [], "second": [], "score": []}
    for _ in range(rows):
        topic, a, b = draw.choice(sorted(THINGS)), draw.randrange(5), draw.randrange(5)
        found["first"].append(sentence(draw, topic, a))
        found["second"].append(sentence(draw, topic, b))
        found["score"].append(1 - abs(a - b) / 4)
    return Dataset.from_dict(found)


def make_encoder(folder: Path) -> None:
    """Saves a transformer with random weights, and a tokenizer that knows the words above."""
    words = {word for form in FORMS for word in form.split() if "{" not in word}
    words |= {word for group in (*THINGS.values(), *OPINIONS.values()) for word in group}
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", *sorted(words)])}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)


class Spread(nn.Module):
    """A loss that is small where the embeddings of a batch point in all directions."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[dict[str, torch.Tensor]], labels: torch.Tensor | None = None) -> torch.Tensor:
        """The squared length of the mean embedding."""
        columns = [F.normalize(self.model(column)["sentence_embedding"], dim=-1) for column in features]
        return torch.cat(columns).mean(0).square().sum()


def main() -> None:
    args = parse_args()
    training = SentenceTransformerTrainingArguments(
        str(args.output_dir),
        use_cpu=args.cpu,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=64,
        gradient_accumulation_steps=args.accumulation,
        max_steps=args.steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",  # so that --resume can go on to more --steps
        seed=args.seed,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=args.save_every,
        save_steps=args.save_every,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(args.seed)
    with training.main_process_first():
        if training.process_index == 0:
            make_encoder(args.output_dir / "encoder")
    encoder = Transformer(str(args.output_dir / "encoder"))
    device = "cpu" if args.cpu else None
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())], device=device)
    rank = MultipleNegativesRankingLoss(model)
    pairs, scores = make_pairs(2000, args.seed), make_scores(2000, args.seed + 1)
    unseen_pairs, unseen_scores = make_pairs(200, args.seed + 2), make_scores(200, args.seed + 3)
    if args.together:
        data, unseen = pairs, unseen_pairs
        losses = {"rank": rank, "spread": Spread(model)}
    else:
        data, unseen = {"pairs": pairs, "scores": scores}, {"pairs": unseen_pairs, "scores": unseen_scores}
        losses = {"pairs": rank, "scores": CoSENTLoss(model)}
    triplets = [list(unseen_pairs[column]) for column in ("anchor", "positive", "negative")]
    alike = [list(unseen_scores[column]) for column in ("first", "second", "score")]
    evaluators = [TripletEvaluator(*triplets, name="topic"), EmbeddingSimilarityEvaluator(*alike, name="opinion")]
    trainer = WeightedSentenceTransformerTrainer(
        model=model,
        args=training,
        train_dataset=data,
        eval_dataset=unseen,
        loss=losses,
        evaluator=evaluators,
        weighting=METHODS[args.method],
    )
    accelerator = trainer.accelerator
    check_processes(accelerator)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.output_dir)) if args.resume else None)
    trainer.save_model(str(args.output_dir / "model"))

    figures = {name: evaluator(model) for name, evaluator in zip(("topic", "opinion"), evaluators, strict=True)}
    result = {
        "topic, accuracy of triplets": figures["topic"]["topic_cosine_accuracy"],
        "opinion, rank correlation": figures["opinion"]["opinion_spearman_cosine"],
    }
    accelerator.print(table([["on unseen sentences", args.method], *([k, f"{v:.3f}"] for k, v in result.items())]))
    accelerator.print(trainer.weighter.describe())
    if accelerator.is_main_process:
        run = {
            "processes": accelerator.num_processes,
            "metrics": result,
            "weights": trainer.weighter.weights,
            "history": trainer.weighter.history,
        }
        write_results(args.output_dir, "finetune_embeddings", args, {args.method: run})
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
