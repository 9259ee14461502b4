"""Several losses on one output: an autoencoder of handwritten digits whose losses meet at the reconstruction.

There are no heads: every loss is computed from the same images, so the branch point is the output itself, and
`weighter.branch(output)` returns an alias for every loss, as in EnCodec's balancer (https://arxiv.org/abs/2210.13438).
The losses are absolute errors, structural similarity, edges, and the distance in the latent space of a fixed
classifier.

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/multi_loss.py --cpu

With `--adversarial` a discriminator judges the reconstructions as well. Its losses on real and on reconstructed images
have a weighter of their own, which does not measure the gradients that the autoencoder gets through it.

The default takes a minute on two CPU cores. Prints a table of all losses on test images, and writes `multi_loss.json`,
`multi_loss.png` (weights, losses, norms and cosines) and `multi_loss_digits.png` (reconstructions) to `--output_dir`.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed, tqdm
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
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from accel_weighting import MGDA, CoVWeighting, EqualWeighting, GradientBalancer, GradNorm, Weighter

LOSSES = ("l1", "ssim", "edges", "latent")

# To try another method, add a row. The balancer gives every loss the same share of the gradient at the output.
METHODS = {
    "equal": EqualWeighting(),
    "balancer": GradientBalancer(),
    "gradnorm": GradNorm(alpha=0.0),
    "cov": CoVWeighting(total="tasks"),
    "mgda": MGDA(),
}


class Autoencoder(nn.Module):
    """Compresses 8 × 8 pixels to six numbers and reconstructs them."""

    def __init__(self, width: int = 128, bottleneck: int = 6):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, bottleneck),
        )
        self.decoder = nn.Sequential(
            nn.Linear(bottleneck, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 64),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """shape: [batch, 1, 8, 8] → [batch, 1, 8, 8]."""
        return self.decoder(self.encoder(images)).view_as(images)


class Discriminator(nn.Module):
    """Distinguishes real images from reconstructions; its branch point is before the last layer."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.GELU()
        )
        self.last = nn.Linear(width, 1)
        self.weighter: Weighter | None = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Scores of all images from the alias of each loss; each loss uses the scores of its own images."""
        z = self.trunk(images)
        aliases = self.weighter.branch(z) if self.weighter else {"real": z, "fake": z}
        return {name: self.last(alias).squeeze(-1) for name, alias in aliases.items()}


class Classifier(nn.Module):
    """The hidden layer of a trained digit classifier, fixed: a measure of how similar two digits look."""

    def __init__(self, images: Tensor, digits: Tensor):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # twenty iterations are enough
            fitted = MLPClassifier(32, max_iter=20, random_state=0).fit(images.flatten(1).numpy(), digits.numpy())
        self.register_buffer("weight", torch.tensor(fitted.coefs_[0].T, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(fitted.intercepts_[0], dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """shape: [batch, 1, 8, 8] → [batch, 32]."""
        return F.relu(F.linear(images.flatten(1), self.weight, self.bias))


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Mean over patches of 5 × 5 pixels, one number per image; 1 for equal images."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 5, stride=1)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (above / below).mean((1, 2, 3))


def edges(images: Tensor) -> Tensor:
    """Differences between neighbouring pixels, after Sobel; shape: [batch, 2, 6, 6]."""
    sobel = images.new_tensor([[[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], [[-1, -2, -1], [0, 0, 0], [1, 2, 1]]])
    return F.conv2d(images, sobel.unsqueeze(1) / 4)


def losses_of(outputs: dict[str, Tensor], images: Tensor, classifier: nn.Module) -> dict[str, Tensor]:
    """Computes every loss from its own alias of the output, as a mean over the images."""
    return {
        "l1": F.l1_loss(outputs["l1"], images),
        "ssim": 1 - structural_similarity(outputs["ssim"], images).mean(),
        "edges": F.mse_loss(edges(outputs["edges"]), edges(images)),
        "latent": F.mse_loss(classifier(outputs["latent"]), classifier(images)),
    }


def load_images() -> tuple[Tensor, Tensor, Tensor]:
    """Training images with their digits, and test images."""
    digits = load_digits()  # 1,797 images of 8 × 8 pixels from 0 to 16
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    return images[train], labels[train], images[test]


def draw(images: Tensor, outputs: Tensor, path: Path) -> None:
    """Draws test images above their reconstructions."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(images), figsize=(len(images), 2.2), layout="constrained")
    for row, (name, digits) in zip(axes, (("image", images), ("output", outputs)), strict=True):
        for ax, digit in zip(row, digits, strict=True):
            ax.imshow(digit[0], cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="balancer", help="weighting method (default: balancer)")
    parser.add_argument("--adversarial", action="store_true", help="add a discriminator, with a weighter of its own")
    add_training_arguments(parser, samples="images", steps=1000, batch_size=32, lr=2e-3)
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the models and the order of samples (default: 0)"
    )
    parser.add_argument(
        "--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="precision (default: no)"
    )
    add_checkpoint_arguments(parser)
    add_output_arguments(parser, "multi_loss")
    args = parser.parse_args()
    if args.resume and not args.checkpoint_dir:
        parser.error("--resume needs --checkpoint_dir")
    return args


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    check_processes(accelerator)
    set_seed(args.seed)
    train_images, digits, test_images = load_images()
    classifier = Classifier(train_images, digits).to(accelerator.device)
    model: Any = Autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loader = DataLoader(train_images, args.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    names = [*LOSSES, *(["adversarial"] if args.adversarial else [])]
    weighter = Weighter(METHODS[args.method], names, accelerator=accelerator)
    weighters = {args.method: weighter}
    models = [model]
    if args.adversarial:
        discriminator: Any = Discriminator()
        d_optimizer = torch.optim.AdamW(discriminator.parameters(), lr=args.lr)
        d_weighter = Weighter(GradNorm(alpha=0.0), ["real", "fake"], accelerator=accelerator)
        discriminator.weighter = d_weighter
        discriminator, d_optimizer = accelerator.prepare(discriminator, d_optimizer)
        weighters["discriminator"] = d_weighter
        models.append(discriminator)

    def judge(outputs: Tensor) -> Tensor:
        """Scores that the autoencoder learns from; the discriminator's own parameters get no gradient from them."""
        inner = accelerator.unwrap_model(discriminator).requires_grad_(False)
        scores = inner(outputs)["fake"]
        inner.requires_grad_(True)
        return scores

    def discriminate(images: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        """The discriminator's losses, from one forward over both kinds of images."""
        scores = discriminator(torch.cat([images, outputs]))
        real, fake = scores["real"][: len(images)], scores["fake"][len(images) :]
        return {
            "real": F.binary_cross_entropy_with_logits(real, torch.ones_like(real)),
            "fake": F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)),
        }

    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        resume(accelerator, args.checkpoint_dir, progress)
    start, before = time.perf_counter(), progress.step
    bar = tqdm(total=args.steps, initial=progress.step, mininterval=1)
    while progress.step < args.steps:
        loader.set_epoch(progress.epoch)
        for images in skip_first_batches(loader, progress.batches):
            with accelerator.accumulate(*models):
                output = model(images)
                aliases = weighter.branch(output)
                losses = losses_of(aliases, images, classifier)
                if args.adversarial:
                    score = judge(aliases["adversarial"])
                    losses["adversarial"] = F.binary_cross_entropy_with_logits(score, torch.ones_like(score))
                weighter.backward(losses)
                optimizer.step()
                optimizer.zero_grad()
                if args.adversarial:
                    d_weighter.backward(discriminate(images, output.detach()))
                    d_optimizer.step()
                    d_optimizer.zero_grad()
            progress.batches += 1
            if accelerator.sync_gradients:
                progress.step += 1
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

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # there are few test images, so one process is enough
        with torch.no_grad():
            images = test_images.to(accelerator.device)
            output = accelerator.unwrap_model(model).eval()(images).float()
            losses = losses_of(dict.fromkeys(LOSSES, output), images, classifier)
        result = {name: loss.item() for name, loss in losses.items()}
        result["peak signal to noise"] = -10 * F.mse_loss(output, images).log10().item()
        weights = weighter.weights
        rows = [[name, f"{x:.4f}", f"{weights[name]:.3g}" if name in weights else ""] for name, x in result.items()]
        print(table([["on test images", args.method, "final weight"], *rows]))
        print(f"{args.steps - before} steps in {seconds:.0f} s")
        runs = {
            name: {"weights": w.weights, "history": w.history, "describe": w.describe()}
            for name, w in weighters.items()
        }
        runs[args.method] |= {"processes": accelerator.num_processes, "metrics": result, "seconds": seconds}
        write_results(args.output_dir, "multi_loss", args, runs)
        draw(images[:12].cpu(), output[:12].cpu(), args.output_dir / "multi_loss_digits.png")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
