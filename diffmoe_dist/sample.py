"""Draw images from a trained model: `python -m diffmoe_dist.sample --checkpoint RUN_OR_STEP_DIR --out DIR --num N`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffmoe_dist.errors import CommandParser, run_command
from diffmoe_dist.launch import detect_launch

DESCRIPTION = """\
Draw images with the averaged weights of a run, or those of a folder that diffmoe_dist.convert has written. Writes
grid.png, samples.npz (arr_0: uint8 NHWC, arr_1: labels) and sampling.json (the settings, the measured expert capacity,
images per second). Labels go through the classes in turn.

  python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 100 --cfg-scale 2
  torchrun --nproc-per-node 8 -m -- diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 50000
  deepspeed --num_gpus 8 --module -- diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 50000

(The lone -- keeps these launchers from taking --num for an abbreviation of an option of their own.)

An image depends on the weights, the seed, its number and its label alone if the model was configured with
moe.inference=threshold. With count, constant or static the images of one block of --batch-size compete for the
experts, so a block is what is reproduced; on any number of processes. Another rule than the run's can be given:

  python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/static --num 100 moe.inference=static

Thresholds follow the weights in training; --recalibrate finds those of the averaged weights, so that the measured
capacity comes closer to the one trained for. It reads data.shards of the run, or those given.
"""


def main() -> None:
    parser = CommandParser(prog="diffmoe_dist.sample", description=DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, step or weights folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    parser.add_argument("--num", required=True, type=int, help="how many images")
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (default 50)")
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance scale, 1: none (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument(
        "--sampler",
        choices=["euler", "ddpm", "ddim"],
        help="euler for objective.name=flow (its default); ddpm (its default) or ddim for objective.name=ddpm",
    )
    parser.add_argument("--batch-size", type=int, default=100, help="images drawn together (default 100)")
    parser.add_argument(
        "--decoder", metavar="DIR", help="the autoencoder of a model of latents (default: the run's sample.decoder)"
    )
    parser.add_argument(
        "--recalibrate", type=int, default=0, metavar="BATCHES",
        help="first find the capacity thresholds of the averaged weights on this many batches of training data",
    )  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="another moe.inference, moe.constant_threshold or data.shards",
    )
    arguments = parser.parse_args()

    from diffmoe_dist.evaluation.generate import SamplingSettings, sample_to_folder
    from diffmoe_dist.parallel.topology import choose_device, start_process_group, stop_process_group

    settings = SamplingSettings(
        checkpoint=arguments.checkpoint,
        num=arguments.num,
        steps=arguments.steps,
        cfg_scale=arguments.cfg_scale,
        seed=arguments.seed,
        sampler=arguments.sampler,
        batch_size=arguments.batch_size,
        decoder=arguments.decoder,
        overrides=tuple(arguments.overrides),
        recalibrate=arguments.recalibrate,
    )
    settings.check()
    device = choose_device(arguments.device, detect_launch())
    launch = start_process_group(device)
    sample_to_folder(settings, arguments.out, device, launch.rank, launch.world_size)
    stop_process_group()
    if launch.rank == 0:
        sys.stdout.write(f"picture grid:   {Path(arguments.out) / 'grid.png'}\n")


if __name__ == "__main__":
    run_command(main)
