"""Sample images from a model: `python -m diffmoe_dist.sample --checkpoint RUN_OR_STEP_DIR --out DIR --num N`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.sampling.settings import add_sampling_options, settings_from

DESCRIPTION = """\
Sample images with the averaged weights of a run, or those of a folder that diffmoe_dist.convert has written. Writes
grid.png, samples.npz (arr_0: uint8 NHWC, arr_1: labels) and sampling.json (the settings, the measured expert capacity,
NFE, images per second).

  python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 100 --cfg-scale 2
  torchrun --nproc-per-node 8 -m diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num-images 50000
  deepspeed --num_gpus 8 --module diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num-images 50000

  python -m diffmoe_dist.sample --checkpoint runs/t2i --out samples/t2i --prompts FILE --encoder models/t5 --cfg-scale 4

(--num and --num-images are the same; these launchers take --num for an abbreviation of an option of their own, unless
a lone -- stands before the module.)

A job that was interrupted goes on when the same command is given again, on any number of processes: blocks of
--batch-size images are kept as they are sampled. With other settings or weights a folder is refused.

An image depends on the weights, the seed, its number and its label alone if the model was configured with
moe.inference=threshold. With count, constant or static the images of one block of --batch-size compete for the
experts, so a block is what is reproduced; on any number of processes. Another rule than the run's can be given:

  python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/static --num 100 moe.inference=static

A model that is conditioned on captions takes --prompts: a .txt file with one a line, a .jsonl file with a "prompt" in
each line (GenEval's evaluation_metadata.jsonl), or the .npz of `python -m data_tools encode-prompts`; and the --encoder
that its captions were encoded with. The images take the prompts in turn, and prompts.jsonl says which one each has. The
noise of an image belongs to its prompt: it does not change with the order of the prompts, or with others in the file.

A run that has reached its last step has the capacity thresholds of its averaged weights. For earlier checkpoints and
other averages --recalibrate finds them: the measured capacity then comes closer to the one trained for. It reads
data.shards of the run, or those given.
"""


def main() -> None:
    arguments = build_parser().parse_args()
    settings = settings_from(arguments, arguments.checkpoint)
    settings.check()

    from diffmoe_dist.logs import set_up_logging
    from diffmoe_dist.parallel.topology import choose_device, start_process_group, stop_process_group
    from diffmoe_dist.sampling.job import sample_to_folder

    device = choose_device(arguments.device, detect_launch())
    launch = start_process_group(device)
    set_up_logging(None, launch.rank)
    sample_to_folder(settings, arguments.out, device, launch)
    stop_process_group()
    if launch.rank == 0:
        sys.stdout.write(f"image grid:     {Path(arguments.out) / 'grid.png'}\n")


def build_parser() -> CommandParser:
    parser = CommandParser(prog="diffmoe_dist.sample", description=DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, step or weights folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the images go")
    add_sampling_options(parser)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def run() -> NoReturn:
    """`diffmoe-sample`."""
    run_command(main)


if __name__ == "__main__":
    run()
