"""CoV-weighting (Groenendijk et al. 2021): figures that follow from its formulae in closed form.

The paper's experiments (depth and segmentation with up to 32 losses) need data sets and days on GPUs; they are not
repeated here.

    python examples/papers/cov_closed_forms.py
"""

import math

import matplotlib
import numpy as np
import torch
from check import Checks, arguments, save
from torch import Tensor

from accel_weighting import CoVWeighting, Statistics


def weights_over(losses: Tensor, method: CoVWeighting | None = None) -> Tensor:
    """The weights used at every step, `[steps, K]`, for losses `[steps, K]`."""
    method = method or CoVWeighting()
    present = np.ones(losses.shape[1], dtype=bool)
    w, state = method.init([f"loss {k}" for k in range(losses.shape[1])])
    used = []
    for L in losses.double().numpy():
        used.append(w)
        w, state = method.update(state, Statistics(L, present))
    return torch.from_numpy(np.stack(used))


def main() -> None:
    args = arguments(__doc__, seeds=5)
    checks = Checks("CoV-weighting in closed form")

    steps = torch.arange(500, dtype=torch.float64)
    decaying = torch.stack([torch.ones(500, dtype=torch.float64), 0.99**steps], 1)
    w = weights_over(decaying)
    checks.between(
        "a constant loss beside one that falls by 1 % a step: largest |α − 1/2| at steps 0 and 1",
        float((w[:2] - 0.5).abs().max()),
        0,
        1e-15,
    )
    # After two observations the ratios are 1 and 0.99 (standard deviation 0.005, mean 0.995). 1e-8 keeps the constant
    # loss's weight above 0.
    c = math.sqrt(0.005**2 + 1e-8) / 0.995
    expected = 1e-4 / (1e-4 + c)
    checks.between("α of the constant loss at step 2 / its closed form", float(w[2, 0]) / expected, 1 - 1e-9, 1 + 1e-9)
    checks.between("α of the constant loss at step 499: the floor of 1e-8", float(w[-1, 0]), 0, 1e-3)

    shares = []
    for seed in range(args.seeds):
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(5000, 2, generator=g, dtype=torch.float64)
        noisy = (1 + noise * torch.tensor([0.1, 0.3], dtype=torch.float64)).clamp(min=0.01) * torch.tensor([1.0, 50.0])
        shares.append(weights_over(noisy)[-1])
    share = torch.stack(shares)[:, 0]
    checks.between(
        "independent losses with coefficients of variation 0.1 and 0.3: smallest first share",
        float(share.min()),
        0.24,
        0.26,
    )
    checks.between("the same: largest first share (in theory 0.25)", float(share.max()), 0.24, 0.26)

    units = torch.tensor([1e-6, 1e6], dtype=torch.float64)
    moved = (weights_over(noisy) - weights_over(noisy * units)).abs().max()
    checks.between("the same losses in other units: largest change of a weight", float(moved), 0, 1e-12)
    total = (weights_over(noisy, CoVWeighting(total="tasks")) - 2 * weights_over(noisy)).abs().max()
    checks.between("total='tasks' is K times total='one': largest difference", float(total), 0, 1e-14)

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    axes[0].plot(w, label=["constant", "falls by 1 % a step"])
    axes[0].set(title="a constant and a falling loss", xlabel="step", ylabel="α", yscale="log")
    axes[1].plot(weights_over(noisy), label=["variation 0.1", "variation 0.3"])
    axes[1].hlines([0.25, 0.75], 0, 5000, color="0.6", linestyle="--", zorder=0)
    axes[1].set(title="independent noise", xlabel="step", ylabel="α")
    for ax in axes:
        ax.legend(frameon=False)
    save(figure, args.output_dir / "cov_closed_forms.png")
    checks.finish("Reproduced: what the formulae imply. Not rerun: every figure of the paper's own tables.")


if __name__ == "__main__":
    main()
