#!/usr/bin/env bash
# Train a model of size L on ImageNet 256x256. From the root of the clone:
#
#   sbatch slurm/train_l.sh [key=value ...]
#
# Edit the settings of this file and nothing else. docs/cluster.md says what comes back by itself, and when.
#SBATCH --job-name=diffmoe-l
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8    # one process for each GPU
#SBATCH --gpus-per-node=8      # of the node, not of a task: the processes of a node copy from GPU to GPU
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --signal=B:USR1@300    # seconds before the limit: more than a step and a checkpoint take
#SBATCH --requeue
#SBATCH --open-mode=append     # a requeued job goes on in its log
set -euo pipefail

# The environment of the submission wins over these.
PYTHON=${PYTHON:-.venv/bin/python} # or one in a container, such as: apptainer exec --nv diffmoe.sif python
CONFIG=${CONFIG:-configs/imagenet256/global_pool_l.yaml}
SHARDS=${SHARDS:-shards/imagenet256}
LATENTS=${LATENTS-shards/imagenet256-latents} # made from them with encode-latents; empty: a model of pixels
RUN_DIR=${RUN_DIR:-runs/imagenet256/global_pool_l} # on a disk that all nodes share
DEVICE=${DEVICE:-cuda}
INTERFACE=${INTERFACE:-}         # the network between the nodes, such as ib0; empty: left to the libraries
LOCAL_SCRATCH=${LOCAL_SCRATCH:-} # a folder on each node's own disk, to copy the shards to; empty: read them where they are

# shellcheck source=slurm/common.sh
source slurm/common.sh
train "$@"
