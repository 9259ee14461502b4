"""VQGAN's adaptive weight, on the example's own models: the formula by autograd at the last convolution."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from accel_weighting import ReferenceNorm, Weighter

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS, START = 6, 2


@pytest.fixture(scope="module")
def example() -> Any:
    pytest.importorskip("sklearn", reason="the example's photographs ship inside scikit-learn")
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module("autoencoder_gan")
    finally:
        sys.path.remove(str(EXAMPLES))


class Training:
    """Models, their losses and optimizers, in float64, without Accelerate."""

    def __init__(self, example: Any) -> None:
        torch.manual_seed(0)
        self.example = example
        self.model = example.Autoencoder(width=16, codes=16).double()
        self.discriminator = example.Discriminator(width=8).double()
        self.perceptual = example.Perceptual().double()
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (self.model, self.discriminator)]

    def losses(self, step: int, images: Tensor, fixed: float | None) -> tuple[dict[str, Tensor], Any, Tensor]:
        outputs, extra, _ = self.model(images)
        adversary = self if step >= START else None
        losses = self.example.generator_losses(outputs, images, self.perceptual, adversary, fixed)
        return losses, extra, outputs["reconstruction"]

    def judge(self, outputs: Tensor) -> Tensor:
        return -self.discriminator(outputs).mean()

    def discriminate(self, images: Tensor, output: Tensor) -> Tensor:
        real, fake = self.discriminator(torch.cat([images, output.detach()])).chunk(2)
        return ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2

    def by_hand(self, step: int, images: Tensor, fixed: float | None) -> dict[str, float]:
        """The norm of every loss's gradient at the last convolution's weight, of the whole batch."""
        losses, _, _ = self.losses(step, images, fixed)
        weight = self.model.last.weight
        return {
            name: float(torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()) for name, loss in losses.items()
        }

    def stepped(self, images: Tensor, output: Tensor) -> None:
        generator, critic = self.optimizers
        generator.step()
        for optimizer in self.optimizers:  # the adversarial loss has left gradients in the discriminator
            optimizer.zero_grad()
        self.discriminate(images, output).backward()
        critic.step()
        critic.zero_grad()


@pytest.mark.parametrize("fixed", [None, 0.7], ids=["perceptual weighed", "perceptual a part of the reference"])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_adversarial_weight_is_the_fields_formula(example: Any, parts: int, fixed: float | None) -> None:
    training = Training(example)
    images = example.load_pieces()[0][::200][:8].double()
    tasks = [name for name in example.LOSSES if name != "perceptual" or fixed is None]
    method = ReferenceNorm("reconstruction", ratios={"perceptual": 2.0} if fixed is None else 1.0)
    training.model.weighter = weighter = Weighter(
        method, tasks, model=training.model, shared_layer="last", max_growth=None
    )
    seen: list[float] = []
    for step in range(STEPS):
        norms = training.by_hand(step, images, fixed)
        for i, part in enumerate(images.chunk(parts)):
            losses, extra, _ = training.losses(step, part, fixed)
            (weighter.combine(losses, extra=extra, last=i == parts - 1) / parts).backward()
            weighter.step()
        with torch.no_grad():
            output = training.model(images)[0]["reconstruction"]
        expected = {"reconstruction": 1.0, "adversarial": 1.0}
        if step >= START:
            expected["adversarial"] = norms["reconstruction"] / (norms["adversarial"] + 1e-4)
        if fixed is None:
            expected["perceptual"] = 2 * norms["reconstruction"] / (norms["perceptual"] + 1e-4)
        assert weighter.weights == pytest.approx(expected, rel=1e-10)
        assert weighter.log_values()["loss/commitment"] > 0
        seen.append(weighter.weights["adversarial"])
        training.stepped(images, output)
    assert seen[:START] == [1.0] * START and len(set(seen[START:])) == STEPS - START


def test_the_gradient_is_that_of_the_weighed_losses_and_the_extra_ones(example: Any) -> None:
    """All of the autoencoder's parameters, the codebook included, against one backward by hand."""
    training = Training(example)
    images = example.load_pieces()[0][::200][:4].double()
    losses, extra, _ = training.losses(START, images, None)
    weights = {"reconstruction": 1.0, "perceptual": 3.0, "adversarial": 0.25}
    (sum(weights[name] * loss for name, loss in losses.items()) + sum(extra.values())).backward()
    expected = {name: p.grad.clone() for name, p in training.model.named_parameters()}
    training.model.zero_grad()
    training.model.weighter = weighter = Weighter(
        ReferenceNorm("reconstruction"),
        example.LOSSES,
        model=training.model,
        shared_layer="last",
        initial_weights=weights,
    )
    losses, extra, _ = training.losses(START, images, None)
    weighter.backward(losses, extra=extra)
    assert expected.keys() >= {"codebook.codes", "last.weight", "encoder.0.weight"}
    for name, p in training.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}")
