#!/usr/bin/env bash
# Pack a data set into shards, check every byte of them and describe them, on all nodes of the job. From the root of
# the clone:
#
#   SOURCE=/data/ILSVRC2012_img_train.tar OUT=shards/imagenet256 sbatch slurm/prepare_shards.sh --crop adm --size 256
#
# The arguments are those of `python -m data_tools pack`. Submitted again, or started again after a preemption, the job
# goes on with the shards that are missing or damaged. Settings stand here and, for the cluster, in site.sh.
#SBATCH --job-name=diffmoe-shards
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=16   # one process for each core
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
##SBATCH --partition=cpu
##SBATCH --account=project
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# The environment of the submission wins over these.
SOURCE=${SOURCE:-data/ILSVRC2012_img_train.tar} # on a disk that all nodes share, like OUT
OUT=${OUT:-shards/imagenet}

# shellcheck source=slurm/common.sh
source slurm/common.sh
if [[ -n ${VAE:-} ]]; then refuse "VAE=$VAE: latents are encoded on GPUs; sbatch slurm/encode.sh latents --vae $VAE"; fi

python_once -m data_tools plan "$SOURCE" "$@"
on_all_ranks pack "$SOURCE" "$OUT" "$@"
on_all_ranks verify "$OUT" --full
python_once -m data_tools stats "$OUT" --picture "$OUT.png"
