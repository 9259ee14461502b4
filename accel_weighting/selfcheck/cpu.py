"""Accelerate's engines: what each is called, and every one of them on a CPU."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs


def describe_engine(accelerator: Accelerator) -> str:
    """The engine by its usual name."""
    state = accelerator.state.__dict__
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        mesh = getattr(accelerator, "torch_device_mesh", None)
        sizes = "" if mesh is None else f", mesh {dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))}"
        return f"FSDP{state['fsdp_plugin'].fsdp_version}{sizes}"
    return "one process, no engine" if accelerator.distributed_type == DistributedType.NO else "DDP"


def accelerator_on_cpu(timeout: timedelta | None = None, **kwargs: Any) -> Accelerator:
    """An Accelerator on the CPU for whatever engine the launcher chose, also where Accelerate offers none.

    Args:
        timeout: For how long a collective waits for a process that is lost; None: torch's half an hour.
        kwargs: The Accelerator's own.
    """
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu"}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        allow_deepspeed_on_cpu()  # and not cpu=True, which would turn DeepSpeed off
        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", timeout=timeout)], **kwargs)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = os.environ["FSDP_SYNC_MODULE_STATES"] = "false"
        allow_sharding_on_cpu(timeout)
        return Accelerator(**kwargs)
    return Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)], **kwargs)


def allow_deepspeed_on_cpu() -> None:
    """Makes DeepSpeed, imported from here on, work on the CPU over gloo, with nothing to be compiled first."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    import deepspeed

    # Else it compiles a C++ operator first, under a lock that outlives a process that is killed meanwhile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_sharding_on_cpu(timeout: timedelta | None = None) -> None:
    """Opens FSDP and device meshes for the Accelerator that is made next, which Accelerate offers to GPUs only.

    Args:
        timeout: As in :func:`accelerator_on_cpu`.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # FSDP1 tells "cpu" from "cpu:0"
    PartialState(cpu=True, timeout=timeout)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # the one gate; the device stays the CPU
