"""Everything about the price on a GPU in one report: launches, stream time, bandwidth, precision, memory, waiting.

Run it on a machine with one CUDA device, from the repository's root, with the extra `test`:

    python examples/gpu_report.py                          # 10 min: all but the benchmarks
    python examples/gpu_report.py --benchmarks             # and BERT-base, and a trunk of a billion parameters
    python examples/gpu_report.py --parts products memory  # some of it

Without a CUDA device it says so, and measures on the CPU what can be measured there, with small sizes. Prints Markdown.
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import accel_weighting
from accel_weighting import IMTLG, CoVWeighting, GradNorm, Method, Weighter, measure

ROOT = Path(__file__).parents[1]
BILLION = "--width 2048 --layers 20 --length 512 --batch_size 4 --optimizer sgd --rounds 10"
BENCHMARKS = {
    "BERT-base, pooled": "--width 768 --layers 12 --length 128 --batch_size 32 --groups peers --peers --rounds 20",
    "BERT-base, tokens": "--width 768 --layers 12 --length 128 --batch_size 32 --groups large --rounds 20",
    "a billion parameters, pooled": f"{BILLION} --groups peers --peers",
    "a billion parameters, tokens": f"{BILLION} --groups weights --tokens --tasks 4,16",
}


def table(head: list[str], rows: list[list[Any]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) + " |")
    print()


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """The least of many: of the stream on a GPU, of the thread on a CPU."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.thread_time()
            run()
            times.append(time.thread_time() - begun)
    return min(times)


def launches(run: Callable[[], Any]) -> tuple[dict[str, int], float]:
    """Kernels and copies by kind, and microseconds of the stream; of the second run."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    counts: dict[str, int] = {"kernels": 0, "to the device": 0, "to the host": 0, "on the device": 0}
    spent = 0.0
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        spent += event.device_time
        name = event.name
        kind = "to the device" if "HtoD" in name else "to the host" if "DtoH" in name else "on the device"
        counts[kind if name.startswith(("Memcpy", "Memset")) else "kernels"] += 1
    return counts, spent


class Net(nn.Module):
    """A trunk of two layers and one small head per task, on their mean or on every token."""

    def __init__(self, K: int, width: int, pooled: bool):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.heads = nn.ModuleList(nn.Linear(width, 8) for _ in range(K))
        self.pooled = pooled

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """One per task, in float32."""
        z = self.trunk(x)
        z = z.mean(1) if self.pooled else z
        return {f"task {k}": (head(z).float() - 1).square().mean() for k, head in enumerate(self.heads)}


def step_of(method: Method | None, K: int, x: Tensor, pooled: bool, **options: Any) -> Callable[[], Any]:
    """A training step, with a plain sum where there is no method."""
    torch.manual_seed(0)
    net = Net(K, x.shape[-1], pooled).to(x.device)
    heads = {f"task {k}": head for k, head in enumerate(net.heads)}
    weighter = None if method is None else Weighter(method, list(heads), heads=heads, **options)
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, foreach=True)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            losses = net.losses(x)
        total = sum(1.0 * loss for loss in losses.values()) if weighter is None else weighter.combine(losses)
        total.backward()
        if weighter is not None:
            weighter.step()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- the parts -------------------------------------------------------------------------------------------------------


def steps(device: torch.device) -> None:
    """What a step with a small z launches beyond a plain one."""
    print("## A step, small z (bf16 autocast)\n")
    x = torch.randn(16, 32, 768, device=device)
    methods = {"GradNorm": GradNorm(), "CoV": CoVWeighting(), "IMTL-G": IMTLG()}
    if device.type != "cuda":
        print("Launches and stream time need a CUDA device; here is the processor's time.\n")
        plain = seconds(step_of(None, 4, x, True), device)
        rows = [[name, 1e6 * (seconds(step_of(m, 4, x, True), device) - plain)] for name, m in methods.items()]
        return table(["method, K = 4", "µs added"], rows)
    rows = []
    for K in (4, 32):
        plain, plain_time = launches(step_of(None, K, x, True))
        for name, method in methods.items():
            own, own_time = launches(step_of(method, K, x, True))
            rows.append([name, K, *(own[kind] - plain[kind] for kind in own), own_time - plain_time])
    return table(["method", "K", "kernels, +", "copies up, +", "down, +", "on the device, +", "stream, + µs"], rows)


def products(device: torch.device) -> None:
    """The sum and the inner products of a large z beside what memory's bandwidth allows."""
    print("## Sum and inner products of a large z\n")
    on_gpu = device.type == "cuda"
    n = 8 * 2048 * 4096 if on_gpu else 1 << 20
    source, target = torch.empty(2, 1 << (28 if on_gpu else 24), device=device)
    bandwidth = 2 * source.numel() * 4 / seconds(lambda a=target, b=source: a.copy_(b), device)
    print(f"A copy moves {bandwidth / 1e9:.0f} GB/s. The bound: every gradient is read once, and the sum is written.\n")
    del source, target
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for K in (4, 8, 16):
            gradients = [torch.randn(n, device=device).to(dtype) for _ in range(K)]
            bound = (K + 1) * n * dtype.itemsize / bandwidth
            both = seconds(lambda g=gradients: products_and_sum(g), device, 10)
            apart = [lambda g=gradients: measure.gram([g]), lambda g=gradients: measure.weighted_sum(g)]
            with patched(measure, "_kernels", lambda: None):
                by_torch = sum(seconds(run, device, 10) for run in apart)
            total = seconds(apart[1], device, 10)
            norms = seconds(lambda g=gradients: [measure.square(x) for x in g], device, 10)
            number = sum(launches(lambda g=gradients: products_and_sum(g))[0].values()) if on_gpu else "–"
            times = [1e3 * x for x in (bound, both, by_torch, total, norms)]
            rows.append([str(dtype)[6:], K, *times, both / bound, norms / bound, number])
            del gradients
    head = ["", "K", "bound, ms", "products and sum, ms", "without Triton, ms", "sum alone, ms", "norms, ms"]
    table([*head, "products and sum / bound", "norms / bound", "launches of the products and sum"], rows)
    print("Promised: (products and sum) / bound at most 3.\n")


def products_and_sum(gradients: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """As in a backward."""
    with torch.no_grad():
        rows = measure.Gathered(gradients)
        return measure.gram([rows], with_sums=True), measure.weighted_sum(rows)


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def precision(device: torch.device) -> None:
    """Inner products beside those in float64, with TF32 allowed."""
    print("## Precision of inner products (relative to the norms)\n")
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, size in ((10_000, 1.0), (1 << 22, 1.0), (1 << 22, 1e-22), (1 << 22, 1e18)):
            if dtype == torch.float16 and size != 1:
                continue
            common = torch.randn(n, device=device)
            g = [((common + torch.randn(n, device=device)) * size).to(dtype) for _ in range(3)]
            exact = torch.stack([x.double() for x in g])
            exact = exact @ exact.T
            lengths = exact.diagonal().sqrt()
            error = ((measure.gram([g]) - exact).abs() / torch.outer(lengths, lengths)).max().item()
            norms = torch.stack([measure.square(x) for x in g]).sqrt()
            rows.append([str(dtype)[6:], n, size, error, ((norms - lengths).abs() / lengths).max().item()])
    torch.set_float32_matmul_precision(allowed)
    table(["", "entries", "size", "inner products", "norms"], rows)
    print("Promised: 1e-6 in float32, 1e-5 in half precision, whether or not TF32 is allowed.\n")


def memory(device: torch.device) -> None:
    """What a step takes beyond a plain one, in units of |z|."""
    print("## Memory beyond a plain step, in units of |z|\n")
    if device.type != "cuda":
        print("It is read from the CUDA allocator. On a CPU: python examples/benchmark.py --cpu --groups large\n")
        return
    x = torch.randn(8, 2048, 1024, device=device)
    rows = []
    for K in (4, 8, 16):

        def peak(method: Method | None, K: int = K, **options: Any) -> int:
            step = step_of(method, K, x, False, **options)
            step()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            return torch.cuda.max_memory_allocated() - before

        plain, z = peak(None), x.numel() * 2
        found = [peak(GradNorm()), peak(CoVWeighting()), peak(GradNorm(), cosines=True), peak(IMTLG())]
        rows.append([K, z / 2**20, *((own - plain) / z for own in found), K - 1 + 2**25 / z])
    table(["K", "z, MB", "GradNorm", "CoV", "GradNorm, cosines", "IMTL-G", "allowed to the last two"], rows)


def waiting(device: torch.device) -> None:
    """Whether torch's own alarm sees the one wait of a step."""
    print("## Waiting\n")
    if device.type != "cuda":
        print("Needs a CUDA device.\n")
        return
    x = torch.randn(16, 32, 768, device=device)
    step = step_of(GradNorm(), 4, x, True)
    for _ in range(3):
        step()
    event = torch.cuda.Event()
    seen = {}
    try:
        for what, run in {"a step": step, "Event.synchronize": lambda: (event.record(), event.synchronize())}.items():
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
                seen[what] = "not seen"
            except RuntimeError as error:
                seen[what] = f"seen: {str(error).splitlines()[0]}"
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    table(["what", "by set_sync_debug_mode"], [list(pair) for pair in seen.items()])


def tests(device: torch.device) -> None:
    """tests/gpu in full: NCCL on one rank, FSDP2, a real loss scaler, inductor."""
    print("## tests/gpu\n")
    if device.type != "cuda":
        print("Skipped: every one of them needs a CUDA device.\n")
        return
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "--show-capture=no", "tests/gpu"], cwd=ROOT, check=False
    )


PARTS = {part.__name__: part for part in (steps, products, precision, memory, waiting, tests)}


def benchmarks(device: torch.device) -> None:
    """Whole steps of real trunks in bf16, beside other libraries where they are installed."""
    print("## Whole steps\n")
    for name, options in BENCHMARKS.items():
        command = [sys.executable, "examples/benchmark.py", *options.split(), "--mixed_precision", "bf16"]
        print(f"### {name}\n\n`{' '.join(['python', *command[1:]])}`\n", flush=True)
        if device.type == "cuda":
            subprocess.run(command, cwd=ROOT, check=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="which (default: all)")
    parser.add_argument("--benchmarks", action="store_true", help="whole steps of large trunks too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("# Price on a GPU\n")
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}", end="; ")
    else:
        print("**Here is no CUDA device**: what follows is of this machine's CPU, and says nothing of a GPU.\n")
        torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, accel_weighting {accel_weighting.__version__}"
    print(f"{versions}, Python {platform.python_version()}\n")
    for name in args.parts:
        PARTS[name](device)
    if args.benchmarks:
        benchmarks(device)


if __name__ == "__main__":
    main()
