#!/usr/bin/env bash
# Train a model of a size (s, b, l or xl) on ImageNet 256x256. From the root of the clone:
#
#   sbatch [--nodes=N ...] slurm/train.sh SIZE [key=value ...]
#
# train_SIZE.sh do the same, each under the name of its size. Settings of the job and of the run stand here,
# those of the cluster in site.sh. docs/cluster.md says what comes back by itself, and when.
#SBATCH --job-name=diffmoe
#SBATCH --nodes=1
#SBATCH --exclusive            # whole nodes; docs/cluster.md says why not --ntasks-per-node
#SBATCH --gpus-per-node=8      # one process for each; of the node, not of a task: they copy from GPU to GPU
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --signal=B:USR1@300    # seconds before the limit: more than a step and a checkpoint take
#SBATCH --requeue
#SBATCH --open-mode=append     # a requeued job goes on in its log
set -euo pipefail

# shellcheck source=slurm/common.sh
source slurm/common.sh
size=${1:-}
size=${size,,}
if [[ ! $size =~ ^(s|b|l|xl)$ ]]; then refuse "SIZE=$size: choose s, b, l or xl"; fi

# The environment of the submission wins over these.
CONFIG=${CONFIG:-configs/imagenet256/global_pool_$size.yaml}
SHARDS=${SHARDS:-shards/imagenet256}
LATENTS=${LATENTS-shards/imagenet256-latents} # made from them with encode-latents; empty: a model of pixels
RUN_DIR=${RUN_DIR:-runs/imagenet256/global_pool_$size} # on a disk that all nodes share
PRECISION=${PRECISION:-} # bf16_mixed and bf16 are faster (docs/performance.md); empty: as the configuration says, fp32 (with TF32) as published
DEVICE=${DEVICE:-cuda}
LOCAL_SCRATCH=${LOCAL_SCRATCH:-} # a folder on each node's own disk, to copy the shards to; empty: read them in place

train "${@:2}"
