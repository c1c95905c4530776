#!/bin/bash
# Trains on two machines of four GPUs each. In the repository's folder: sbatch docs/train_slurm.sh [options of train.py]
#
# A process that dies is started again with the others. A job that is preempted or comes near its end gets SIGTERM:
# train.py saves and leaves. Submitted again (Slurm does so itself after a preemption) it goes on, because of --resume.
#SBATCH --job-name=lamm-vit
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32
#SBATCH --time=24:00:00 --requeue --signal=TERM@120 --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max_restarts=3 \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:29500" \
    train.py --resume "$@"
