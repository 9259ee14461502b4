#!/bin/bash
# Several machines under SLURM: one launcher per machine, which starts one process per GPU.
#   sbatch --nodes 16 launch_configs/slurm_multinode.sh -m accel_weighting.selfcheck
#   sbatch --nodes 16 launch_configs/slurm_multinode.sh examples/multi_digits.py --steps 1000
#   CONFIG=launch_configs/ddp_multinode.yaml sbatch --nodes 2 launch_configs/slurm_multinode.sh train.py
#SBATCH --job-name=accel_weighting
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1 # launchers, not processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00

set -euo pipefail
export CONFIG=${CONFIG:-launch_configs/fsdp2_multinode.yaml}
MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # not in the line of `export`, which would hide a failure
export MAIN_IP
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # so that two jobs on one machine do not collide
export PROCESSES=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-8}))

# In single quotes, because SLURM_NODEID differs between machines.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_IP" --main_process_port "$MAIN_PORT" "$@"' launch "$@"
