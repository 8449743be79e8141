#!/usr/bin/env bash
# Train, quantize and evaluate on a Slurm cluster, from the repository's root. Arguments are settings:
#
#     sbatch launch/slurm.sh PRESET=legal_ttt RUN_ID=c1                                        a node of 8 GPUs
#     sbatch --nodes=2 --time=00:20:00 launch/slurm.sh PRESET=frontier TRAIN_BATCH_TOKENS=1572864   two nodes
#
# Two minutes before the time limit Slurm sends SIGUSR1 to every process of the running step. torchrun ignores it here; training saves a checkpoint and
# leaves, and the job is queued again under its number, where it goes on. The same holds for a job that Slurm requeues after a node's failure.
# Fit the lines below to the cluster (partition, account). Paths must be the same on every node; PYTHON is the interpreter there.
#SBATCH --job-name=golf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

for setting in "RUN_ID=slurm-$SLURM_JOB_ID" RUNS_DIR=runs "$@"; do export "${setting?}"; done
run=$RUNS_DIR/$RUN_ID
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun a node. A signal that is ignored when a process starts stays ignored, until training asks for it.
on_every_node() {
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@"' bash \
    "${PYTHON:-python3}" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 20000))" "$@"
}

export RESUME=1 # the first time there is nothing to go on with, and the run begins
if ! on_every_node train_gpt.py; then
  tail -n 1 "$run/train.log" | grep -q '^stopped by SIGUSR1' || exit 1
  exec scontrol requeue "$SLURM_JOB_ID"
fi
unset RESUME
on_every_node quantize.py "$run"
on_every_node eval_ttt.py "$run" --audit
