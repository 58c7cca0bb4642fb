#!/usr/bin/env bash
# Draw images from a trained model, on all GPUs of the job. From the root of the clone:
#
#   sbatch slurm/sample.sh [--cfg-scale 1.5 --steps 250 ...]
#
# Settings stand here and, for the cluster, in site.sh. A job that was preempted, or that is submitted again, draws what
# is missing; with other options it needs another OUT.
#SBATCH --job-name=diffmoe-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8    # one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
##SBATCH --partition=gpu
##SBATCH --account=project
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The environment of the submission wins over these.
CHECKPOINT=${CHECKPOINT:-runs/imagenet256/global_pool_xl} # a run (its newest) or a step folder
OUT=${OUT:-samples/imagenet256/global_pool_xl}            # on a disk that all nodes share
NUM=${NUM:-50000}
DEVICE=${DEVICE:-cuda}

# shellcheck source=slurm/common.sh
source slurm/common.sh
connect
launch "${interpreter[@]}" -m diffmoe_dist.sample --checkpoint "$CHECKPOINT" --out "$OUT" --num "$NUM" \
    --device "$DEVICE" "$@"
[[ -e $OUT/sampling.json ]] # srun may return 0 although a node died
say "done: $(grep -Eo '"(precision|tf32)": *[^,}]+' "$OUT/sampling.json" | tr '\n' ' ')"
