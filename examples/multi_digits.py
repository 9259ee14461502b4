"""Five tasks on pairs of handwritten digits: which of them gets how much of the shared trunk?

A small Vision Transformer sees two real digits side by side and answers five questions, as in the Multi-MNIST experiment
of RotoGrad (https://arxiv.org/abs/2103.02631): the left digit, the right digit, their sum, the parity of their product,
and how many pixels are active. Their losses differ by two orders of magnitude, and so do their gradients.

On two processes of one CPU:

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/multi_digits.py --cpu
    accelerate launch --config_file launch_configs/cpu_2.yaml examples/multi_digits.py --cpu --compare equal,gradnorm,cov

The results (a table on stdout, `multi_digits.png` and `multi_digits.json`) go to `runs/multi_digits`.
"""

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import accelerate
import matplotlib
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed, tqdm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import ViTConfig, ViTModel

import accel_weighting
from accel_weighting import CoVWeighting, EqualWeighting, GradNorm, Weighter

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

# Adding a method is a row here. All of them keep the sum of the weights, so that a learning rate means the same.
METHODS = {
    "equal": EqualWeighting(),
    "gradnorm": GradNorm(alpha=0.5),
    "cov": CoVWeighting(total="tasks"),
}


class Task(NamedTuple):
    """What a task's head answers with, how the answer is trained, and how it is judged."""

    outputs: int
    loss: str
    metric: str


TASKS = {
    "left": Task(10, "cross_entropy", "accuracy"),
    "right": Task(10, "cross_entropy", "accuracy"),
    "sum": Task(1, "mse", "squared error"),
    "parity": Task(1, "binary_cross_entropy", "accuracy"),
    "pixels": Task(1, "mse", "squared error"),
}
COLOURS = dict(zip(TASKS, ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"], strict=True))  # Okabe and Ito's


class DigitPairs(Dataset):
    """Pairs of images drawn with replacement, with the answers of all five tasks."""

    def __init__(self, images: torch.Tensor, digits: torch.Tensor, pairs: int, seed: int):
        left, right = torch.randint(len(images), (2, pairs), generator=torch.Generator().manual_seed(seed))
        pixels = torch.cat([images[left], images[right]], dim=-1) / 16  # shape: [pairs, 8, 16], from 0 to 1
        self.columns = {
            "pixels": pixels.unsqueeze(1),
            "left": digits[left],
            "right": digits[right],
            "sum": (digits[left] + digits[right]).float(),
            "parity": (digits[left] * digits[right] % 2).float(),
            "active": 10 * (pixels > 0.5).float().mean((1, 2)),
        }

    def __len__(self) -> int:
        return len(self.columns["pixels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def load_pairs(seed: int) -> tuple[DigitPairs, DigitPairs]:
    """Pairs to train on and pairs to test on, made of different images."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target)
    train, test = train_test_split(range(len(images)), test_size=0.25, stratify=digits.target, random_state=seed)
    return DigitPairs(images[train], labels[train], 16_384, seed), DigitPairs(images[test], labels[test], 4_096, seed)


class MultiDigitModel(nn.Module):
    """A small Vision Transformer as the shared trunk, and one head per task on its class token."""

    def __init__(self, width: int = 64, layers: int = 4):
        super().__init__()
        config = ViTConfig(
            image_size=(8, 16),
            patch_size=4,
            num_channels=1,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            hidden_dropout_prob=0.0,  # dropout is seeded per process: the weights would depend on how the batch is cut
            attention_probs_dropout_prob=0.0,
        )
        self.trunk = ViTModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, task.outputs))
                for name, task in TASKS.items()
            }
        )

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.trunk(pixels).last_hidden_state[:, 0]  # shape: [batch, width]
        return {name: head(z).squeeze(-1) for name, head in self.heads.items()}
