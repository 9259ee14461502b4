"""GradNorm's toy (Chen et al. 2018, §4): tasks that differ in nothing but the scale of their targets.

`f_i(x) = σ_i tanh((B + ε_i) x)`, one trunk of four layers, one head per task, α = 0.12. With equal weights the trunk
learns only the task of the largest σ. The paper prints curves and no numbers. It claims, and this script checks, that
the weighted gradient norms approach `Ḡ r_i^α`, that tasks of small scale get large weights, and that the sum of the
tasks' normalised test losses falls.

    python examples/papers/gradnorm_toy.py

The data differs from the paper's: with standard deviations of 10 and 3.5, as given there, tanh saturates and hardly
anything can be learned with any weights. Here `B` and `ε` are a hundredth of that, in the same proportion.
"""

import itertools

import matplotlib
import torch
from check import Checks, arguments, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from accel_weighting import EqualWeighting, GradNorm, Weighter

ALPHA, BATCH, INPUTS, OUTPUTS, WIDTH = 0.12, 100, 250, 100, 100
TWO = (1, 100)
TEN = (48, 3, 54, 16, 9, 30, 52, 26, 47, 81)  # drawn once: the paper only says "a wide normal distribution"


class Net(nn.Module):
    """Three layers with ReLU, the last shared layer W, and a head for each task."""

    def __init__(self, tasks: int):
        super().__init__()
        sizes = [INPUTS, WIDTH, WIDTH, WIDTH]
        self.trunk = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, OUTPUTS)) for _ in range(tasks))

    def forward(self, x: Tensor) -> Tensor:
        """Predictions for all tasks, `[tasks, batch, outputs]`."""
        z = self.last(self.trunk(x))
        return torch.stack([head(z) for head in self.heads])


class Tasks:
    """The functions to learn, and samples of them."""

    def __init__(self, sigma: tuple[int, ...], seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.sigma = torch.tensor(sigma, dtype=torch.float32)[:, None, None]
        common = 0.1 * torch.randn(OUTPUTS, INPUTS, generator=self.generator)
        self.matrices = common + 0.035 * torch.randn(len(sigma), OUTPUTS, INPUTS, generator=self.generator)

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """Inputs of length √250, and the targets of all tasks."""
        u = torch.rand(size, INPUTS, generator=self.generator) * 2 - 1
        x = INPUTS**0.5 * u / u.norm(dim=1, keepdim=True)
        return x, self.sigma * torch.tanh(x @ self.matrices.mT)


def train(method, sigma: tuple[int, ...], steps: int, lr: float, seed: int, at: str = "W") -> dict:
    """Makes one run; returns weights over time, the distance of the norms from their targets, and the test score."""
    tasks = Tasks(sigma, seed)
    test_x, test_y = tasks.sample(2000)
    torch.manual_seed(seed)
    net = Net(len(sigma))
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    names = [f"σ={s}" for s in sigma]
    heads = dict(zip(names, net.heads, strict=True))
    weighter = Weighter(method, names, heads=heads, shared_layer=net.last if at == "W" else None)
    weights, errors, first = [], [], None
    for step in tqdm(
        range(steps), desc=f"{type(method).__name__} at {at}, {len(sigma)} tasks", mininterval=1, leave=False
    ):
        x, y = tasks.sample(BATCH)
        losses = (net(x) - y).square().mean((1, 2))
        w = torch.tensor(list(weighter.weights.values()), dtype=torch.float64)
        weighter.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        seen = weighter.statistics
        first = seen.losses if first is None else first
        if step >= steps - max(1, steps * 3 // 20):
            G, r = w * seen.norms, seen.losses / first
            errors.append(float((G / (G.mean() * (r / r.mean()) ** ALPHA) - 1).abs().mean()))
        weights.append(w)
    with torch.no_grad():
        test = (net(test_x) - test_y).square().mean((1, 2)) / test_y.var(dim=(1, 2))
    weighter.detach()
    return {
        "weights": torch.stack(weights),
        "error": sum(errors) / len(errors),
        "score": float(test.sum()),
        "sum": max(abs(float(w.sum()) - len(sigma)) for w in weights),
    }


def main() -> None:
    args = arguments(__doc__, steps=2000, seeds=1)
    checks = Checks("GradNorm's toy")
    runs = {}
    for seed in range(args.seeds):
        equal = train(EqualWeighting(), TWO, args.steps, 3e-4, seed)
        at_w = train(GradNorm(alpha=ALPHA), TWO, args.steps, 3e-4, seed)
        at_z = train(GradNorm(alpha=ALPHA), TWO, args.steps, 3e-4, seed, at="z")
        runs.setdefault("two tasks", at_w["weights"])
        scores = [f"{run['score']:.3f}" for run in (equal, at_w, at_z)]
        checks.report(f"2 tasks, seed {seed}: Σ test loss / variance, equal, at W, at z", ", ".join(scores))
        for name, run, low, high, error in (("W", at_w, 25, 80, 0.12), ("z", at_z, 80, 160, 0.03)):
            last = run["weights"][-1]
            checks.between(f"2 tasks at {name}, seed {seed}: mean |G_i / (Ḡ r_i^α) − 1|", run["error"], 0, error)
            checks.between(
                f"2 tasks at {name}, seed {seed}: weight of σ=1 / weight of σ=100", float(last[0] / last[1]), low, high
            )
            checks.between(
                f"2 tasks at {name}, seed {seed}: score / score of equal weights",
                run["score"] / equal["score"],
                0,
                0.95,
            )
            checks.between(f"2 tasks at {name}, seed {seed}: |Σw − 2|", run["sum"], 0, 1e-12)
            checks.between(f"2 tasks at {name}, seed {seed}: smallest weight", float(run["weights"].min()), 1e-6, 1)
    if not args.quick:
        ten = train(GradNorm(alpha=ALPHA), TEN, 2 * args.steps, 1e-3, 0)
        equal = train(EqualWeighting(), TEN, 2 * args.steps, 1e-3, 0)
        runs["ten tasks"] = ten["weights"]
        both = torch.stack([ten["weights"][-1].log(), torch.tensor(TEN).double().log()])
        checks.between("10 tasks: correlation of log w and log σ", float(torch.corrcoef(both)[0, 1]), -1, -0.95)
        checks.between("10 tasks: score / score of equal weights", ten["score"] / equal["score"], 0, 1)

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 3.6), layout="constrained", squeeze=False)
    for ax, (name, weights), sigma in zip(axes[0], runs.items(), (TWO, TEN), strict=False):
        for k, s in sorted(enumerate(sigma), key=lambda pair: pair[1]):
            ax.plot(weights[:, k], label=f"σ = {s}")
        ax.set(title=name, xlabel="step", ylabel="weight", yscale="log")
        ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, args.output_dir / "gradnorm_toy.png")
    checks.finish(
        "Reproduced: the equilibrium that GradNorm is defined by, the order of the weights, the lower test losses. "
        "Not reproduced: the paper's curves (no numbers are printed there) and its saturated data."
    )


if __name__ == "__main__":
    main()
