"""Run a function on several real processes and own the verdict: what it returned everywhere, or why it did not.

`run_ranks(fn, world, tmp_path, *args)` starts `world` processes that see each other through gloo, calls `fn(*args)`
in each, and returns the list of what they returned, in rank order. Anything else is a `RanksFailed` that says which
process raised, was killed, or still waits (and at which line). `accelerator_for(engine)` makes, inside such a process,
an `Accelerator` for plain PyTorch, DDP, FSDP1, FSDP2, HSDP or DeepSpeed, as often as one likes: one launch can loop
over many cells.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import logging
import math
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist  # noqa: TID251  a harness for processes has to make them

if TYPE_CHECKING:
    from accelerate import Accelerator

GRACE = 2.0  # seconds that the other processes get to tell their side once one has failed
PATIENCE = 0.5  # seconds that a waiting process gets to write down where it waits
LOG_LINES = 60
PRELOADED = ("torch", "torch._dynamo", "torch.distributed.fsdp", "accelerate", "deepspeed", "transformers")


class RanksFailed(AssertionError):
    """One process at least did not return; the first line of the message is the verdict on every process."""


def run_ranks(fn: Callable[..., Any], world: int, tmp_path: Path | str, *args: Any, timeout: float = 60) -> list[Any]:
    """Call `fn(*args)` on `world` processes and return what each returned, in rank order.

    Args:
        fn: A function of a module (it is pickled by name), run with torch on one thread and with fixed seeds.
        world: Number of processes. With 1 there is no process group, as in a script that was not launched.
        tmp_path: A folder for the rendezvous file and the processes' output; it may be used by many calls.
        timeout: Seconds until every process that still runs is killed. Collectives give up after half of it.

    Raises:
        RanksFailed: If a process raised, died or still waited.
    """
    context = _fork_server()
    folder = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    payload = pickle.dumps((fn, args))  # by value: a tensor must not outlive its process as a shared-memory handle
    processes, connections = [], []
    deadline = time.monotonic() + timeout
    try:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(sender, payload, rank, world, folder, timeout / 2, dict(os.environ))
            )
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        messages = _listen(connections, deadline)
        if all(message is not None and message[0] == "returned" for message in messages):
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        verdict = _verdict(messages, processes)
        if verdict is None:
            return [message[1] for message in messages]
        for process in processes:  # the story of those that wait, before they are killed
            # It may be gone already, and its exit code still on the way here from the fork server.
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
        time.sleep(PATIENCE)
        raise RanksFailed("\n".join([verdict, *_details(messages, folder)]))
    finally:
        for process in processes:
            process.kill()
            process.join()
        for connection in connections:
            connection.close()


@functools.cache
def _fork_server() -> multiprocessing.context.ForkServerContext:
    """All processes are forked from one that has done the imports: they would take each a second, DeepSpeed's two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}):  # DeepSpeed looks when imported
        multiprocessing.forkserver.ensure_running()
    return context


def _listen(connections: list[Connection], deadline: float) -> list[tuple[str, Any] | None]:
    """One message per process; None where a process closed its end, or the time was up, without one."""
    messages: list[tuple[str, Any] | None] = [None] * len(connections)
    open_ends = {connection: rank for rank, connection in enumerate(connections)}
    while open_ends and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(open_ends), left):
            rank = open_ends.pop(connection)
            try:
                messages[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                messages[rank] = None
            if messages[rank] is None or messages[rank][0] == "failed":
                deadline = min(deadline, time.monotonic() + GRACE)
    return messages


def _verdict(messages: list[tuple[str, Any] | None], processes: list[Any]) -> str | None:
    """One line on those that did not return, the first cause first; None if all returned and left in peace."""
    raised, died, waiting, parting, world = [], [], [], [], len(processes)
    for rank, (message, process) in enumerate(zip(messages, processes, strict=True)):
        name = f"process {rank} of {world}"
        if message is not None and message[0] == "failed":
            at, summary, _ = message[1]
            raised.append((at, f"{name} failed: {summary}"))
            continue
        process.join(0.1)  # its end of the pipe closes a moment before it is gone
        end = _end(process.exitcode)
        if message is not None:
            parting += [f"{name} returned, then {end}"] if end != "ended" else []
        elif process.exitcode is None:
            waiting.append(rank)
        else:
            died.append(f"{name} {end} without a result")
    parts = died + [summary for _, summary in sorted(raised)]
    if waiting:
        parts.append(f"processes {waiting} of {world} still waiting")
    return "; ".join(parts or parting) or None


def _end(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "waited"
    if code < 0:
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with exit code {code}" if code else "ended"


def _details(messages: list[tuple[str, Any] | None], folder: Path) -> list[str]:
    """The traceback and the last output of every process."""
    lines = []
    for rank, message in enumerate(messages):
        lines.append(f"--- process {rank} ---")
        if message is not None and message[0] == "failed":
            lines.append(message[1][2])
        log = folder / f"rank{rank}.log"
        if log.exists():
            lines += log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return lines


def _child(
    sender: Connection,
    payload: bytes,
    rank: int,
    world: int,
    folder: Path,
    patience: float,
    environ: dict[str, str],
) -> None:
    """The life of one process: join the others, call the function, send the result, part."""
    log = open(folder / f"rank{rank}.log", "w", buffering=1)  # noqa: SIM115  open until the process ends
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = log, log
    faulthandler.enable(log)
    faulthandler.register(signal.SIGUSR1, log, all_threads=True)
    try:
        _join(rank, world, folder, patience, environ)
        fn, args = pickle.loads(payload)
        result = fn(*args)
        if dist.is_initialized():
            assert dist.get_world_size() == world, f"the function saw {dist.get_world_size()} processes, not {world}"
        sender.send_bytes(pickle.dumps(("returned", result)))
    except BaseException as error:
        summary = "".join(traceback.format_exception_only(error)).strip()
        sender.send_bytes(pickle.dumps(("failed", (time.monotonic(), summary, traceback.format_exc()))))
        os._exit(1)  # no farewell: the others must not wait for this process
    if dist.is_initialized():
        dist.barrier()  # a gloo process that leaves while another is in a collective aborts it
        dist.destroy_process_group()


def _join(rank: int, world: int, folder: Path, patience: float, environ: dict[str, str]) -> None:
    """Set up environment, threads, seeds and the process group, and count who is there."""
    os.environ.clear()
    os.environ.update(environ)  # the fork server was started with an older one
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    if world > 1:
        _announce(rank, world)
        dist.init_process_group(
            "gloo", f"file://{folder}/rendezvous", timedelta(seconds=patience), rank=rank, world_size=world
        )
        present = torch.ones(1)
        dist.all_reduce(present)
        assert present.item() == world, f"{present.item():g} processes are there, not {world}"


def _announce(rank: int, world: int) -> None:
    """Write what a launcher would, which is where Accelerate looks."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


Engine = Literal["plain", "ddp", "fsdp1", "fsdp2", "hsdp", "zero0", "zero1", "zero2", "zero3"]


def accelerator_for(
    engine: Engine,
    *,
    ddp: dict[str, Any] | None = None,
    fsdp: dict[str, Any] | None = None,
    mesh: dict[str, int] | None = None,
    zero: dict[str, Any] | None = None,
    loss_scale: float | None = None,
    **kwargs: Any,
) -> Accelerator:
    """A fresh CPU `Accelerator` for an engine, whatever the one before it in this process was.

    Args:
        engine: `"plain"` is one process without a process group. The others run with any number of processes, one
            included: a group of one process is made then. `"hsdp"` is FSDP2 on a mesh, by default of two replicas.
        ddp: Options for `DistributedDataParallelKwargs`, for example `static_graph`.
        fsdp: More options for `FullyShardedDataParallelPlugin`, for example `transformer_cls_names_to_wrap`.
        mesh: Sizes for `ParallelismConfig`, for example `{"tp_size": 2, "dp_shard_size": 2}`; for FSDP2,
            and for DDP where nothing is sharded.
        zero: More options for DeepSpeed's section `zero_optimization`.
        loss_scale: Where the loss scale of fp16 starts. Accelerate makes no scaler and no autocast for fp16 on a CPU;
            with this both are put in, and behave as they do on a GPU. DeepSpeed has a scaler of its own.
        **kwargs: Passed on to `Accelerator`, for example `gradient_accumulation_steps`.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    forget_accelerators()
    if engine == "plain":
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(f"plain PyTorch is one process, and here are {dist.get_world_size()}")
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    elif not dist.is_initialized():
        _announce(0, 1)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    if engine.startswith("zero"):
        return _deepspeed(int(engine[-1]), zero or {}, loss_scale, **kwargs)
    if engine in ("plain", "ddp") and not mesh:
        handlers = [DistributedDataParallelKwargs(**ddp)] if ddp else []
        accelerator = Accelerator(cpu=True, kwargs_handlers=handlers, **kwargs)
    else:
        if engine == "hsdp" and not mesh:
            mesh = {"dp_replicate_size": 2, "dp_shard_size": dist.get_world_size() // 2}
        accelerator = _gated({"ddp": None, "fsdp1": 1}.get(engine, 2), fsdp or {}, mesh or {}, **kwargs)
    if loss_scale is not None:
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # noqa: TID251  the engine's own

        scaler = ShardedGradScaler if engine == "fsdp1" else torch.amp.GradScaler
        accelerator.scaler = scaler("cpu", init_scale=loss_scale)
        accelerator.native_amp = True
    return accelerator


@contextlib.contextmanager
def warnings_said() -> Iterator[list[str]]:
    """What the library logs meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("accel_weighting").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("accel_weighting").removeHandler(handler)


def forget_accelerators() -> None:
    """This process has made no `Accelerator` yet; an earlier one left its settings in the environment."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]:
        del os.environ[name]


def _gated(version: int | None, options: dict[str, Any], mesh: dict[str, int], **kwargs: Any) -> Accelerator:
    """FSDP (None: without) and meshes, which Accelerate offers to accelerators only."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

    from accel_weighting.selfcheck.cpu import allow_sharding_on_cpu

    allow_sharding_on_cpu()
    options = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "SHARDED_STATE_DICT", **options}
    # Without the original parameters, FSDP1 leaves an optimizer that was made before `prepare` nothing to move.
    options = {"cpu_ram_efficient_loading": False, "use_orig_params": True, **options}
    if mesh:
        kwargs["parallelism_config"] = ParallelismConfig(**mesh)
    plugin = None if version is None else FullyShardedDataParallelPlugin(fsdp_version=version, **options)
    return Accelerator(fsdp_plugin=plugin, **kwargs)


def _deepspeed(stage: int, zero: dict[str, Any], loss_scale: float | None, **kwargs: Any) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    from accel_weighting.selfcheck.cpu import allow_deepspeed_on_cpu

    allow_deepspeed_on_cpu()
    # A clipping of 0 is taken for none given, and ends in clipping at 1.
    steps = kwargs.get("gradient_accumulation_steps", 1)
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=steps, gradient_clipping=1e9)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # no dataloader goes through `prepare`
    plugin.deepspeed_config["zero_optimization"] |= zero
    if loss_scale is not None:
        plugin.deepspeed_config["fp16"] = {"enabled": True, "initial_scale_power": round(math.log2(loss_scale))}
    gloo = InitProcessGroupKwargs(backend="gloo")
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo], **kwargs)
