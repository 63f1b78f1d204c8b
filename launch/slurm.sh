#!/bin/bash
#SBATCH --job-name=muse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # torchrun starts the processes of a node
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300         # five minutes before the end, to this script
#SBATCH --open-mode=append          # one log, however often it is requeued
#SBATCH --output=slurm-%j.log
#
# Train on Slurm: sbatch launch/slurm.sh -m launch.train --config configs/1b.toml
# Options of sbatch before the script's name replace those above: sbatch --nodes=4 launch/slurm.sh ...
#
# On preemption and before the time is up every rank saves and ends; the job is put into the queue again and goes on at
# the very token. It is not requeued after an error, nor when it is done, nor after scancel, at which ranks save, too, nor
# for ever: where every start ends before it has saved anything new, somebody has to look.
set -u
most=100  # times that the job is requeued
if [ "$#" -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
: "${OMP_NUM_THREADS:=1}" "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=240}"  # seconds for ranks to save; 30 otherwise
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # with --max-restarts every start needs a store of its own, as in torchrun.sh
export OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCH_DISABLE_SHARE_RDZV_TCP_STORE

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))  # two jobs may share a node; the system's own ports begin at 32768
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}  # the number of an array's last job stands for all of them

# --kill-on-bad-exit: a node whose torchrun fails ends the others.
# --cpus-per-task: since Slurm 22.05 srun does not take the job's, and all ranks of a node would share one core.
# "gpu": where Slurm does not say how many GPUs a node has, torchrun counts them.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$port" "$@" &
step=$!

# USR1: the time is nearly up. scancel hands SIGTERM on to the ranks; srun, were it given one, would kill them at once, as
# is right where they have not started yet.
again=
trap 'again=yes; scancel --signal=TERM "$job.0" || kill -TERM "$step"' USR1
trap : TERM  # of scancel, which tells the ranks itself: only wait until they have saved

wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do  # a signal ends `wait` early
    wait "$step"
    status=$?
done

# Slurm tells the ranks of a preemption but not this script, and would not requeue a job that ends in time by itself.
if [ -n "$again" ] || scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$most" ]; then
        echo "launch/slurm.sh: told to stop after $most restarts: not requeued. The same sbatch goes on." >&2
        exit 1
    fi
    echo "told to stop (status $status): back into the queue" >&2
    exec scontrol requeue "$job"
fi
exit "$status"
