#!/usr/bin/env bash
# Encode the images, the captions or a sampler's prompts with a pretrained model, on all GPUs of the job. From the root
# of the clone:
#
#   BASE=shards/imagenet256 sbatch slurm/encode.sh latents --vae models/sd-vae-ft-mse
#   BASE=shards/coco sbatch slurm/encode.sh text --encoder models/clip-vit-large-patch14
#   BASE=prompts.txt sbatch slurm/encode.sh prompts --encoder models/clip-vit-large-patch14
#
# The other arguments are those of `python -m data_tools encode-...`. Submitted again, or started again after a
# preemption, the job goes on with the shards that are missing or damaged. Settings stand here and in site.sh.
#SBATCH --job-name=diffmoe-encode
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

# shellcheck source=slurm/common.sh
source slurm/common.sh

# The environment of the submission wins over these.
DEVICE=${DEVICE:-cuda}
case ${1:-} in
    latents | text)
        BASE=${BASE:-shards/imagenet256} # on a disk that all nodes share, like OUT
        OUT=${OUT:-$BASE-$1}
        ;;
    prompts)
        BASE=${BASE:-prompts.txt}
        OUT=${OUT:-${BASE%.*}.npz}
        ;;
    *) refuse "KIND=${1:-}: choose latents, text or prompts" ;;
esac

say "encode-$1 on $((SLURM_NNODES * SLURM_NTASKS_PER_NODE)) processes ($DEVICE), computed in fp32 without TF32, stored in fp16: $OUT"
on_all_ranks "encode-$1" "$BASE" "$OUT" --device "$DEVICE" "${@:2}"
