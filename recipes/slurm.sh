#!/bin/bash
# One run on two nodes of four GPUs, eight processes, under Slurm:
#
#     sbatch recipes/slurm.sh --data_folder data --output_folder runs/eight     # train.py's flags
#
# Submit it from the repository's folder, with its environment activated. All nodes must see that folder, the data and
# --output_folder at the same paths. Other sizes are sbatch's flags: sbatch --nodes=4 --gpus-per-node=8 recipes/slurm.sh
#SBATCH --job-name=captions
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # torchrun, which starts a process for each GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue                   # after a preemption, or where a node failed, Slurm starts this script again
#SBATCH --signal=B:USR1@120         # to this shell, so many seconds before --time is up
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -eu

# Out of time: requeued, which sends train.py SIGTERM. It saves, and the script resumes from there (--checkpoint auto).
trap 'scontrol requeue "$SLURM_JOB_ID" || true' USR1

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1     # lets processes that torchrun restarts find each other
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
port=$((10000 + SLURM_JOB_ID % 20000))          # another one for each job, as two may have the same head node

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="${nodes[0]}:$port" \
    train.py --checkpoint auto "$@" &
wait $! || wait $!      # the first is interrupted by USR1
