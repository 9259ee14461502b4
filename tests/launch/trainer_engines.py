"""A script for torchrun: the Trainer under an engine that its own arguments ask for, on CPUs.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.launch.trainer_engines ENGINE METHOD FOLDER

Ragged rows of two tasks, accumulated; stopped in the middle and gone on with. Writes what it saw to FOLDER/seen.pt.
"""

import os
import sys
from pathlib import Path

import torch

from tests.launch.test_trainer_items import METHODS, TASKS, Two, keep, make, nothing, rows, trainer_of

STEPS, BATCH, ACCUMULATION, ROWS = 6, 1, 3, 12


def arguments(engine):
    """What TrainingArguments take for it."""
    if engine == "fsdp2":
        sharded = {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"], "cpu_ram_efficient_loading": False}
        return {"fsdp": True, "fsdp_config": sharded}
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
        filled_in = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        config = {**dict.fromkeys(filled_in, "auto"), "zero_optimization": zero, "zero_allow_untested_optimizer": True}
        # A clipping of 0 is taken for none given, and ends in clipping at 1.
        more = {"max_grad_norm": 1e9, "accelerator_config": {"use_configured_state": True}}
        return {"deepspeed": config, "use_cpu": False, **more}
    return {}


def deepspeed_on_cpu():
    """Over gloo, where DeepSpeed's own choice on CPUs is none."""
    from accelerate import PartialState

    from accel_weighting.selfcheck.cpu import allow_deepspeed_on_cpu

    allow_deepspeed_on_cpu()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def trainer_for(engine, method, folder, **more):
    from accel_weighting.integrations.trainer import WeightedTrainer
    from accel_weighting.selfcheck.cpu import allow_sharding_on_cpu

    options = {**arguments(engine), "max_steps": STEPS, "optim": "adamw_torch", "learning_rate": 0.01, **more}
    return trainer_of(
        WeightedTrainer,
        make(Two).float(),
        rows(two=True)[:ROWS],
        folder,
        BATCH,
        ACCUMULATION,
        options,
        weighting=METHODS[method],
        heads={task: f"heads.{task}" for task in TASKS},
        first=deepspeed_on_cpu if engine.startswith("zero") else nothing,
        # Accelerate offers FSDP to GPUs only: without this it would silently be DDP.
        then=allow_sharding_on_cpu if engine == "fsdp2" else nothing,
    )


def told(trainer, seen):
    model, state = trainer.model_wrapped, trainer.accelerator.state
    some = next(trainer.model.parameters())
    return {
        "world": trainer.accelerator.num_processes,
        "type": trainer.accelerator.distributed_type.value,
        "class": type(model).__name__,
        "parameter": type(some).__name__ + (" of ZeRO-3" if hasattr(some, "ds_id") else ""),
        "stage": getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", None),
        "seen": torch.stack(seen),
        "evaluated": {task: loss for task, loss in trainer.evaluate().items() if "/" in task},
        "state": trainer.weighter.state_dict(),
    }


def run(engine, method, folder):
    found = []
    for name, resume in (("whole", None), ("again", str(folder / "whole" / "checkpoint-3"))):
        trainer = trainer_for(engine, method, folder / name, save_strategy="steps", save_steps=3)
        seen = []
        keep(trainer, seen)
        trainer.train(resume_from_checkpoint=resume)
        found.append(told(trainer, seen))
    trainer.save_model(str(folder / "handed_out"))
    if trainer.accelerator.is_main_process:
        torch.save(found, folder / "seen.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_TORCH_DEVICE": "cpu"}
    run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    print("done")
