"""Samples that do not count in the statistics: `weighter.branch(z, mask)`."""

import re

import pytest
import torch
from torch import Tensor, nn

from accel_weighting import GradNorm, RotoGrad, Weighter

TASKS = ["near", "far"]


def losses_of(aliases: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"near": aliases["near"].square().mean(), "far": (2 + (3 * aliases["far"]).sin()).mean()}


def gradients_by_hand(z: Tensor) -> list[Tensor]:
    losses = losses_of(dict.fromkeys(TASKS, z))
    return [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses.values()]


def made(shape: list[int]) -> Tensor:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape, dtype=torch.float64)) * 1


@pytest.mark.parametrize(
    ("shape", "counted", "features"),
    [
        ([5, 3], [5], -1),
        ([5, 4, 3], [5, 4], -1),
        ([5, 4, 4], [5, 4], -1),
        ([5, 3, 4, 6], [5, 4, 6], 1),
        ([5, 4, 6, 3], [5, 4, 6], -1),
        ([5, 3, 4, 6, 2], [5, 4, 6, 2], 1),
        ([5, 4, 4, 4], [5, 1, 4, 4], 1),
        ([5, 4, 4, 4], [5, 4, 4, 1], -1),
    ],
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")  # torch's
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_samples_outside_of_the_mask_are_not_in_the_statistics(shape, counted, features, compiled):
    weighter, mask = Weighter(GradNorm(), TASKS), torch.arange(torch.Size(counted).numel()).reshape(counted) % 3 > 0

    def forward(z: Tensor) -> dict[str, Tensor]:
        return losses_of(weighter.branch(z, mask))

    weighter.backward((torch.compile(forward, backend="aot_eager") if compiled else forward)(made(shape)))
    over_features = mask if mask.ndim == len(shape) else mask.unsqueeze(features)
    G = torch.stack([(g * over_features).flatten() for g in gradients_by_hand(made(shape))])
    torch.testing.assert_close(torch.tensor(weighter.statistics.gram), G @ G.T, rtol=1e-12, atol=0)
    assert not over_features.all()  # or the mask would not be in the figures


def test_a_method_that_knows_the_features_reads_the_mask_by_them():
    z, mask = made([5, 4, 4, 4]), torch.arange(5 * 16).reshape(5, 4, 4) % 3 > 0
    weighter = Weighter(RotoGrad(dim=1), TASKS)
    weighter.backward(losses_of(weighter.branch(z, mask)))
    G = torch.stack([(g * mask[:, None]).flatten() for g in gradients_by_hand(z)])
    torch.testing.assert_close(torch.tensor(weighter.statistics.norms), G.norm(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "counted"),
    [([4, 6, 3], [4, 5]), ([4, 4, 3], [4]), ([4, 6, 3], [4, 6, 3]), ([4, 6, 3], [6, 4]), ([4, 3, 5, 6], [4, 5])],
)
def test_a_mask_of_another_shape_is_refused_in_the_forward(shape, counted):
    weighter = Weighter(GradNorm(), TASKS)
    with pytest.raises(ValueError, match=re.escape(f"`mask` has shape {counted}, and z has shape {shape}.")):
        weighter.branch(made(shape), torch.ones(counted))


def test_a_mask_that_fits_in_two_ways_is_refused():
    weighter = Weighter(GradNorm(), TASKS)
    with pytest.raises(ValueError, match=r"cannot be told.*`mask.unsqueeze\(1\)` for maps of channels"):
        weighter.branch(made([5, 4, 4, 4]), torch.ones(5, 4, 4))


def test_several_tensors_share_a_mask():
    z, mask = [made([5, 3]), made([5, 2])], torch.tensor([1, 1, 0, 1, 0])
    weighter = Weighter(GradNorm(), TASKS)
    aliases = weighter.branch(z, mask)
    weighter.backward({task: sum(x.square().mean() for x in aliases[task]) for task in TASKS})
    squares = sum((2 * x / x.numel() * mask[:, None]).square().sum() for x in z)
    assert weighter.statistics.norms == pytest.approx([squares.sqrt().item()] * 2, rel=1e-12)
    with pytest.raises(ValueError, match=r"`mask` has shape \[5\], and z has shape \[4, 2\]"):
        weighter.branch([z[0], z[1][:4]], mask)
