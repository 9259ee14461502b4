"""A VQ autoencoder with an adversary, on photographs: the adaptive weight of VQGAN, for any number of processes.

The generator has three weighed losses: reconstruction (absolute errors), perceptual (distances in the features of a
network), and, from `--adversarial_start` on, adversarial. `ReferenceNorm` brings the gradients of the last two to a
multiple of the first's, all three at the weight of the decoder's last convolution (`shared_layer=`):

    weight of the adversarial loss = ratio * |d reconstruction / dW| / (|d adversarial / dW| + 0.0001)

as in VQGAN (https://arxiv.org/abs/2012.09841), but of the whole step's batch, however many processes and micro-batches
it is divided among. The losses of the codes, commitment and codebook, are added as they are (`extra=`).

    accelerate launch --config_file launch_configs/cpu_2.yaml examples/autoencoder_gan.py --cpu

The images are pieces of the two photographs that scikit-learn contains, and the perceptual network is a fixed random
one, so that nothing is downloaded; for a real training, put the features of a trained network in its place.

The default takes two to three minutes on two CPU cores. Prints a table of the losses on pieces that were not trained
on, and writes `autoencoder_gan.json`, `autoencoder_gan.png` (weights, losses, gradient norms and cosines) and
`autoencoder_gan_images.png` (images, their reconstructions before and with the adversary, and the weights over the
steps) to `--output_dir`.
"""

import argparse
import time
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
    check_processes,
    micro_batch_size,
    resume,
    save_checkpoint,
    table,
    write_results,
)
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from accel_weighting import ReferenceNorm, Weighter, plot_history

SIZE = 32  # pixels of a piece, in height and width
LOSSES = ["reconstruction", "perceptual", "adversarial"]


def normed(channels: int) -> nn.Sequential:
    """Normalises every image by itself: statistics over the batch would depend on how it is divided."""
    return nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU())


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.layers = nn.Sequential(normed(channels), convolutions[0], normed(channels), convolutions[1])

    def forward(self, x: Tensor) -> Tensor:
        """shape: [batch, channels, height, width], the same out."""
        return x + self.layers(x)


class Codebook(nn.Module):
    """Replaces every vector by the nearest code, by its direction; gradients pass straight through."""

    def __init__(self, codes: int, size: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(codes, size))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The codes in place of `z`, `[batch, size, height, width]`, their indices, and the two losses of the codes."""
        z, codes = F.normalize(z, dim=1), F.normalize(self.codes, dim=1)
        index = torch.einsum("bchw,kc->bkhw", z, codes).argmax(1)
        nearest = codes[index].movedim(-1, 1)
        losses = {"commitment": 0.25 * F.mse_loss(z, nearest.detach()), "codebook": F.mse_loss(nearest, z.detach())}
        return z + (nearest - z).detach(), index, losses


class Autoencoder(nn.Module):
    """Compresses 32 × 32 pixels to 8 × 8 codes, and reconstructs them; the branch point is its last convolution."""

    def __init__(self, width: int = 32, codes: int = 256, size: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            Residual(width),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            Residual(2 * width),
            normed(2 * width),
            nn.Conv2d(2 * width, size, 1),
        )
        self.codebook = Codebook(codes, size)
        self.decoder = nn.Sequential(
            nn.Conv2d(size, 2 * width, 1),
            Residual(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            Residual(width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width // 2, 3, padding=1),
            normed(width // 2),
        )
        self.last = nn.Conv2d(width // 2, 3, 3, padding=1)
        self.weighter: Weighter | None = None

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The reconstruction as each loss sees it, the losses of the codes, and the codes' indices."""
        z, index, extra = self.codebook(self.encoder(images))
        output = self.last(self.decoder(z))
        return self.weighter.branch(output) if self.weighter else dict.fromkeys(LOSSES, output), extra, index


class Discriminator(nn.Module):
    """Judges patches of an image: a number at each of 7 × 7 places; positive for a photograph."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 4, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """shape: [batch, 3, 32, 32] → [batch, 1, 7, 7]."""
        return self.layers(images)


class Perceptual(nn.Module):
    """Distance of two images in the features of a network, as in LPIPS: its weights are random here, and fixed."""

    def __init__(self, width: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(n, width, 3, stride=2, padding=1) for n in (3, width, width))
        for parameter in self.parameters():
            parameter.data.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
        self.requires_grad_(False)

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        """The mean squared distance of normalised features, over places, layers and images."""
        distances, a, b = [], output, images
        for layer in self.layers:
            a, b = F.relu(layer(a)), F.relu(layer(b))
            distances.append((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean())
        return torch.stack(distances).mean()


def load_pieces() -> tuple[Tensor, Tensor]:
    """Pieces of two photographs, from -1 to 1: a strip in the middle of each is for the test, the rest for training."""
    photographs = [torch.tensor(image).movedim(-1, 0) / 127.5 - 1 for image in load_sample_images().images]
    left, right = 8 * SIZE, 12 * SIZE

    def cut(images: list[Tensor], stride: int) -> Tensor:
        pieces = [image.unfold(1, SIZE, stride).unfold(2, SIZE, stride) for image in images]
        return torch.cat([x.movedim(0, 2).flatten(0, 1) for x in pieces]).to(torch.get_default_dtype())

    train = [image[:, :, part] for image in photographs for part in (slice(left), slice(right, None))]
    return cut(train, SIZE // 4), cut([image[:, :, left:right] for image in photographs], SIZE)


class Adversary:
    """The discriminator, with the loss that the autoencoder has from it and its own."""

    def __init__(self, model: Any, accelerator: Accelerator):
        self.model, self.inner = model, accelerator.unwrap_model(model)

    def judge(self, outputs: Tensor) -> Tensor:
        """The autoencoder's loss: the lower, the more its outputs are taken for photographs."""
        self.inner.requires_grad_(False)  # its own parameters get no gradient from this
        loss = -self.inner(outputs).mean()
        self.inner.requires_grad_(True)
        return loss

    def loss(self, images: Tensor, outputs: Tensor) -> Tensor:
        """The discriminator's own loss (hinge), from one forward over both kinds of images."""
        real, fake = self.model(torch.cat([images, outputs.detach()])).chunk(2)
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def generator_losses(
    outputs: dict[str, Tensor],
    images: Tensor,
    perceptual: nn.Module,
    adversary: Adversary | None,
    perceptual_weight: float | None = None,
) -> dict[str, Tensor]:
    """Computes every loss from its own alias of the output; without an adversary that of the adversary is 0.

    A task whose gradient is exactly 0 counts as absent, and keeps its weight. With `perceptual_weight` the perceptual
    loss is a part of the reconstruction.
    """
    output, judged = outputs["reconstruction"], outputs["adversarial"]
    losses = {"reconstruction": F.l1_loss(output, images)}
    if perceptual_weight is None:
        losses["perceptual"] = perceptual(outputs["perceptual"], images)
    else:
        losses["reconstruction"] = losses["reconstruction"] + perceptual_weight * perceptual(output, images)
    losses["adversarial"] = 0 * judged.sum() if adversary is None else adversary.judge(judged)
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, adversary: Adversary, perceptual: nn.Module, images: Tensor) -> dict[str, float]:
    """Losses on images that were not trained on."""
    outputs, extra, index = model(images)
    output = outputs["reconstruction"].to(images.dtype)
    losses = generator_losses(dict.fromkeys(LOSSES, output), images, perceptual, adversary)
    result = {name: loss.item() for name, loss in (losses | extra).items()}
    result["peak signal to noise, dB"] = -10 * (F.mse_loss(output, images) / 4).log10().item()
    sharpness = [(x[..., 1:] - x[..., :-1]).abs().mean() for x in (output, images)]
    result["detail, share of the images'"] = (sharpness[0] / sharpness[1]).item()
    result["codes in use"] = float(index.unique().numel())
    return result


def draw(rows: dict[str, Tensor], history: list[Any], start: int, path: Path) -> None:
    """Draws images above their reconstructions, and the weights over the steps below."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    number = len(next(iter(rows.values())))
    figure = plt.figure(figsize=(number, len(rows) + 3.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[len(rows), 3.2])
    axes = above.subplots(len(rows), number, squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=True):
            ax.imshow((image.float().movedim(0, -1).cpu() / 2 + 0.5).clamp(0, 1))
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize="small")
    ax = below.subplots()
    plot_history(history, ax)
    ax.set_yscale("log")
    ax.axvline(start, color="black", linewidth=0.8, linestyle=":", label="the adversary starts")
    ax.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(LOSSES) + 1, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: 600)")
    parser.add_argument(
        "--adversarial_start",
        type=int,
        default=300,
        help="optimizer step from which there is an adversary (default: 300)",
    )
    parser.add_argument(
        "--adversarial_ratio",
        type=float,
        default=0.5,
        help="size of the adversarial gradient in multiples of the reconstruction's (default: 0.5)",
    )
    parser.add_argument(
        "--perceptual_ratio",
        type=float,
        default=1.0,
        help="size of the perceptual gradient in multiples of the reconstruction's (default: 1)",
    )
    parser.add_argument(
        "--perceptual_weight",
        type=float,
        help="fixed weight of the perceptual loss as a part of the reconstruction, as in VQGAN (default: weighed)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="images per optimizer step, divided among processes and micro-batches (default: 32)",
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per optimizer step (default: 1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of both models' AdamW (default: 0.001)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of the models and the order of samples (default: 0)"
    )
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="precision (default: no)")
    parser.add_argument(
        "--float64",
        action="store_true",
        help="train in float64, so that runs on different numbers of processes can be compared",
    )
    add_checkpoint_arguments(parser)
    add_output_arguments(parser, "autoencoder_gan")
    args = parser.parse_args()
    if args.resume and not args.checkpoint_dir:
        parser.error("--resume needs --checkpoint_dir")
    return args


def make_weighter(args: argparse.Namespace, accelerator: Accelerator, model: Any) -> Weighter:
    """The adaptive weight, at the last convolution of the prepared model."""
    ratios = {"perceptual": args.perceptual_ratio, "adversarial": args.adversarial_ratio}
    names = [name for name in LOSSES if name != "perceptual" or args.perceptual_weight is None]
    method = ReferenceNorm("reconstruction", ratios={name: ratios[name] for name in names if name in ratios})
    weighter = Weighter(
        method,
        names,
        accelerator=accelerator,
        model=model,
        shared_layer="last",
        initial_weights={"adversarial": 0.01},  # until its gradient is seen; then it rises as `max_growth` allows
    )
    accelerator.unwrap_model(model).weighter = weighter
    return weighter


class Training:
    """Two models with an optimizer each, the weighter, and the images: one step of both models at a time."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        images, test_images = load_pieces()
        self.steps_per_epoch = len(images) // args.batch_size  # whole batches only
        images = images[: self.steps_per_epoch * args.batch_size]
        models = Autoencoder(), Discriminator()
        optimizers = [torch.optim.AdamW(model.parameters(), args.lr, betas=(0.5, 0.9)) for model in models]
        loader = DataLoader(images, micro_batch_size(args.batch_size, accelerator, args.accumulation), shuffle=True)
        self.model, discriminator, self.optimizer, self.d_optimizer, self.loader = accelerator.prepare(
            *models, *optimizers, loader
        )
        self.models = self.model, discriminator
        self.inner, self.adversary = accelerator.unwrap_model(self.model), Adversary(discriminator, accelerator)
        self.perceptual = Perceptual().to(accelerator.device)
        self.weighter = make_weighter(args, accelerator, self.model)
        self.test_images = test_images.to(accelerator.device)
        detailed = self.test_images.flatten(1).std(1).argsort(descending=True)
        self.shown = self.test_images[detailed[:40:4]]

    def micro_batch(self, images: Tensor, judged: bool) -> None:
        """One backward of each model; the optimizers step after the last micro-batch of an optimizer step."""
        with self.accelerator.accumulate(*self.models):
            outputs, extra, _ = self.model(images)
            adversary, fixed = self.adversary if judged else None, self.args.perceptual_weight
            losses = generator_losses(outputs, images, self.perceptual, adversary, fixed)
            self.weighter.backward(losses, extra=extra)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if judged:
                self.accelerator.backward(self.adversary.loss(images, outputs["reconstruction"]))
                self.d_optimizer.step()
                self.d_optimizer.zero_grad()

    @torch.no_grad()
    def reconstructed(self) -> Tensor:
        """The test images of the picture, as the autoencoder reconstructs them now."""
        return self.inner(self.shown)[0]["reconstruction"]

    def report(self, seconds: float) -> None:
        """Prints the table and writes the results, on one process: test images are few."""
        result = evaluate(self.inner, self.adversary, self.perceptual, self.test_images)
        weights = self.weighter.weights
        cells = [[name, f"{x:.4g}", f"{weights[name]:.3g}" if name in weights else ""] for name, x in result.items()]
        print(table([["on test images", "", "final weight"], *cells]))
        run = {"processes": self.accelerator.num_processes, "seconds": seconds, "metrics": result, "weights": weights}
        run |= {"history": self.weighter.history, "describe": self.weighter.describe()}
        write_results(self.args.output_dir, "autoencoder_gan", self.args, {"reference norm": run})


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.accumulation,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    check_processes(accelerator)
    torch.set_default_dtype(torch.float64 if args.float64 else torch.float32)
    set_seed(args.seed)
    training, progress = Training(args, accelerator), Progress()
    rows = {"image": training.shown}
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        resume(accelerator, args.checkpoint_dir, progress)
    start, before = time.perf_counter(), progress.step
    bar = tqdm(total=args.steps, initial=progress.step, mininterval=1)
    while progress.step < args.steps:
        epoch, done = divmod(progress.step, training.steps_per_epoch)
        training.loader.set_epoch(epoch)
        for images in skip_first_batches(training.loader, done * args.accumulation):
            if progress.step == args.adversarial_start:
                rows["before the\nadversary"] = training.reconstructed()
            training.micro_batch(images, judged=progress.step >= args.adversarial_start)
            if accelerator.sync_gradients:
                progress.step += 1
                bar.set_postfix(training.weighter.weights, refresh=False)
                bar.update()
                last = progress.step == args.steps
                if args.checkpoint_dir and (last or progress.step % args.save_every == 0):
                    save_checkpoint(accelerator, args.checkpoint_dir, progress.step)
                if last:
                    break
    bar.close()
    seconds = time.perf_counter() - start

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        training.report(seconds)
        print(f"{args.steps - before} steps in {seconds:.0f} s")
        rows["with the\nadversary" if args.steps > args.adversarial_start else "output"] = training.reconstructed()
        history, path = training.weighter.history, args.output_dir / "autoencoder_gan_images.png"
        draw(rows, history, args.adversarial_start, path)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
