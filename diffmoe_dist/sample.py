"""Draw images from a trained model: `python -m diffmoe_dist.sample --checkpoint RUN_OR_STEP_DIR --out DIR --num N`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch

DESCRIPTION = """\
Draw images with the averaged weights of a run, or those of a folder that diffmoe_dist.convert has written. Writes
grid.png, samples.npz (arr_0: uint8 NHWC, arr_1: labels) and sampling.json (the settings, the measured expert capacity,
images per second).

  python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 100 --cfg-scale 2
  torchrun --nproc-per-node 8 -m -- diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 50000
  deepspeed --num_gpus 8 --module -- diffmoe_dist.sample --checkpoint runs/demo --out samples/demo --num 50000

  python -m diffmoe_dist.sample --checkpoint runs/t2i --out samples/t2i --prompts FILE --encoder models/t5 --cfg-scale 4

(The lone -- keeps these launchers from taking --num for an abbreviation of an option of their own.)

A job that was interrupted goes on when the same command is given again, on any number of processes: blocks of
--batch-size images are kept as they are drawn. With other settings or weights a folder is refused.

An image depends on the weights, the seed, its number and its label alone if the model was configured with
moe.inference=threshold. With count, constant or static the images of one block of --batch-size compete for the
experts, so a block is what is reproduced; on any number of processes. Another rule than the run's can be given:

  python -m diffmoe_dist.sample --checkpoint runs/demo --out samples/static --num 100 moe.inference=static

A model that is told captions takes --prompts: a .txt file with one a line, a .jsonl file with a "prompt" in each line
(GenEval's evaluation_metadata.jsonl), or the .npz of `python -m data_tools encode-prompts`; and the --encoder that its
captions were encoded with. Prompts are drawn from in turn, and prompts.jsonl says from which each image is. The noise
of an image belongs to its prompt: it does not change with the order of the prompts, or with others in the file.

Thresholds follow the weights in training; --recalibrate finds those of the averaged weights, so that the measured
capacity comes closer to the one trained for. It reads data.shards of the run, or those given.
"""


def main() -> None:
    arguments = build_parser().parse_args()

    from diffmoe_dist.logs import set_up_logging
    from diffmoe_dist.parallel.topology import choose_device, start_process_group, stop_process_group
    from diffmoe_dist.sampling.job import SamplingSettings, sample_to_folder

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
        cfg_channels=None if arguments.cfg_channels == "all" else int(arguments.cfg_channels),
        cfg_interval=None if arguments.cfg_interval is None else tuple(arguments.cfg_interval),
        one_pass=arguments.one_pass,
        labels=arguments.labels,
        classes=None if arguments.classes is None else read_classes(arguments.classes),
        expert=arguments.expert,
        png=arguments.png,
        prompts=arguments.prompts,
        prompt=arguments.prompt,
        negative_prompt=arguments.negative_prompt,
        encoder=arguments.encoder,
        tokenizer=arguments.tokenizer,
        geneval=arguments.geneval,
    )
    settings.check()
    device = choose_device(arguments.device, detect_launch())
    launch = start_process_group(device)
    set_up_logging(None, launch.rank)
    sample_to_folder(settings, arguments.out, device, launch)
    stop_process_group()
    if launch.rank == 0:
        sys.stdout.write(f"picture grid:   {Path(arguments.out) / 'grid.png'}\n")


def build_parser() -> CommandParser:
    parser = CommandParser(prog="diffmoe_dist.sample", description=DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run, step or weights folder")
    add("--out", required=True, metavar="DIR", help="where the pictures go")
    add("--num", type=int, help="how many images (default with prompts: one of each)")
    add("--steps", type=int, help="sampler steps (default 50; dopri5 chooses its own)")
    add("--seed", type=int, default=0, help="of the noise and of random labels (default 0)")
    add(
        "--sampler",
        choices=["euler", "heun", "dopri5", "ddpm", "ddim", "dpm-solver++"],
        help="for objective.name=flow: euler (its default), heun (two evaluations a step), dopri5 (adaptive, images "
        "of a batch share their steps); for ddpm: ddpm (its default), ddim, dpm-solver++",
    )
    add("--cfg-scale", type=float, default=1.0, help="guidance scale, 1: none (default)")
    add(
        "--cfg-channels",
        choices=["all", "3"],
        default="all",
        help="which are guided (default all; 3: as published DiT)",
    )
    add("--cfg-interval", type=float, nargs=2, metavar=("LO", "HI"), help="guide at these times of the objective only")
    add(
        "--one-pass",
        action="store_true",
        help="guide with conditional and null tokens in one batch, and so in one pool",
    )
    add("--labels", choices=["balanced", "random"], help="the classes in turn (default) or drawn")
    add("--classes", metavar="A,B,...", help="only these classes")
    add("--batch-size", type=int, default=100, help="images drawn together, a block (default 100)")
    add("--decoder", metavar="DIR", help="the autoencoder of a model of latents (default: the run's sample.decoder)")
    add(
        "--recalibrate", type=int, default=0, metavar="BATCHES",
        help="first find the capacity thresholds of the averaged weights on this many batches of training data",
    )  # fmt: skip
    add("--prompts", metavar="FILE", help="for a model that is told captions: .txt, .jsonl, or encoded .npz")
    add("--prompt", metavar="TEXT", help="or one prompt")
    add("--negative-prompt", metavar="TEXT", help="what guidance moves away from (default: the empty caption)")
    add("--encoder", metavar="DIR", help="local folder of the text encoder that the model was trained with")
    add("--tokenizer", metavar="DIR", help="and of its tokenizer, where it lies elsewhere")
    add("--geneval", action="store_true", help="also write the images into OUT/geneval as GenEval reads them")
    add("--expert", type=int, default=1, metavar="RANKS", help="ranks that share one set of experts (default 1: none)")
    add("--png", action="store_true", help="also write every image as png/NUMBER.png")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add(
        "overrides", nargs="*", metavar="key=value",
        help="another moe.inference or moe.constant_threshold; other data.shards, data.latents, data.text, ...",
    )  # fmt: skip
    return parser


def read_classes(text: str) -> tuple[int, ...]:
    """'1,2,3' to (1, 2, 3)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--classes {text}: expected numbers with commas between them, such as 1,2,3") from None


def run() -> NoReturn:
    """`diffmoe-sample`."""
    run_command(main)


if __name__ == "__main__":
    run()
