"""A sentence transformer of random weights and hand-made words, its data, and training in the library's own trainer."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

WORDS = ("red", "blue", "green", "round", "square", "big", "small", "old", "new", "fast", "slow", "warm", "cold")


def make_model(*, layers: int = 2, seed: int = 0) -> Any:
    """Float64, without dropout, of 8 features; the same on every process."""
    from safetensors.torch import save_file
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = {name: value.contiguous() for name, value in BertModel(config).state_dict().items()}
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})  # save_pretrained: on the main process
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(8)], device="cpu").to(torch.float64)


def make_tokenizer() -> Any:
    """One token per word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )


def sentences(rows: int, seed: int) -> list[str]:
    """Two to six words each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (rows,), generator=generator).tolist()
    drawn = [torch.randint(len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(WORDS[i] for i in row) for row in drawn]


def scored(rows: int = 64, seed: int = 1) -> Any:
    """Pairs with a similarity."""
    from datasets import Dataset

    scores = torch.rand(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = {"first": sentences(rows, seed + 10), "second": sentences(rows, seed + 20)}
    return Dataset.from_dict({**pairs, "score": scores})


def paired(rows: int = 96, seed: int = 2, columns: int = 2) -> Any:
    """Anchors, positives, and negatives where there are three columns."""
    from datasets import Dataset

    names = ("anchor", "positive", "negative")[:columns]
    return Dataset.from_dict({name: sentences(rows, seed + 10 * (i + 1)) for i, name in enumerate(names)})
