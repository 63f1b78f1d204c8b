#!/bin/bash
#SBATCH --job-name=muse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # torchrun starts the processes of a node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300         # five minutes before the end, to this script
#SBATCH --open-mode=append          # one log, however often it is requeued
#SBATCH --output=slurm-%j.log
#
# Train on Slurm: sbatch launch/slurm.sh -m launch.train --config configs/1b.toml
# Options of sbatch before the script's name replace those above: sbatch --nodes=4 launch/slurm.sh ...
#
# On preemption and before the time is up every rank saves and ends; the job is put into the queue again and goes on at
# the very token. It is not requeued after an error, nor when it is done.
set -u
: "${OMP_NUM_THREADS:=1}" "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=240}"  # seconds for ranks to save; 30 otherwise
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # with --max-restarts every start needs a store of its own, as in torchrun.sh
export OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCH_DISABLE_SHARE_RDZV_TCP_STORE

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # two jobs may share a node

told=
trap 'told=yes; [ -z "${step:-}" ] || kill -TERM "$step"' TERM

# --kill-on-bad-exit: a node whose torchrun fails ends the others. srun hands SIGTERM on to every torchrun.
# --cpus-per-task: since Slurm 22.05 srun does not take the job's, and all ranks of a node would share one core.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" "$@" &
step=$!
wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait` early
    wait "$step"
    status=$?
done

if [ -n "$told" ]; then
    echo "told to stop (status $status): back into the queue" >&2
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
