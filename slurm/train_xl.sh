#!/usr/bin/env bash
# Train a model of size XL on ImageNet 256x256. From the root of the clone:
#
#   sbatch slurm/train_xl.sh [key=value ...]
#
# Settings of the job stand here, those of the run in train.sh, those of the cluster in site.sh. The number of nodes is
# the planner's: docs/cluster.md.
#SBATCH --job-name=diffmoe-xl
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

# shellcheck source=slurm/train.sh
source slurm/train.sh xl "$@"
