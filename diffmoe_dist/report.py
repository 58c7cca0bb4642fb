"""Write a page about a run: `python -m diffmoe_dist.report --run RUN_DIR [--samples DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.sampling.settings import add_sampling_options, refuse_sampling_options, settings_from

DESCRIPTION = """\
Write RUN_DIR/report.html, one page that needs nothing beside itself: the training curves, samples, and where the
experts work: capacity over sampling steps and layers, over the image and by class, load of each expert. Also plots the
losses and the gradient norm into RUN_DIR/loss.png, and says where to look further.

  python -m diffmoe_dist.report --run runs/demo
  python -m diffmoe_dist.report --run runs/demo --cfg-scale 2 --classes 0,1,2
  python -m diffmoe_dist.report --run runs/demo --samples samples/demo

Some images are sampled for the page, in one batch: by the settings of --samples, else by the options of
diffmoe_dist.sample. Without prompts, a model that is conditioned on captions takes the first ones of its training data;
with --samples it takes the prompts of the samples if their --encoder is given.
"""
# They decide what a job writes, or into which batches it divides; a page has one.
_UNUSED = ("num", "batch_size", "expert", "decoder", "geneval", "png")


def main() -> None:
    arguments = _parse()
    settings = None if arguments.samples else settings_from(arguments, str(arguments.run), arguments.images)
    if settings:
        settings.check()

    from diffmoe_dist.parallel.topology import choose_device
    from diffmoe_dist.report_page.loss_curve import draw_loss_curve
    from diffmoe_dist.report_page.page import write_report
    from diffmoe_dist.report_page.samples import FinishedSamples

    asked = settings or FinishedSamples.open(
        arguments.samples, arguments.images, arguments.encoder, arguments.tokenizer
    )
    loss_curve = draw_loss_curve(arguments.run)
    page = write_report(arguments.run, asked, choose_device(arguments.device, detect_launch()))
    sys.stdout.write(f"loss curve:     {loss_curve}\n")
    sys.stdout.write(f"TensorBoard:    tensorboard --logdir {arguments.run / 'tensorboard'}\n")
    sys.stdout.write(f"report:         {page}\n")


def _parse() -> argparse.Namespace:
    parser = CommandParser(prog="diffmoe_dist.report", description=DESCRIPTION)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the folder of a training run")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="a folder of diffmoe_dist.sample, of this run")
    parser.add_argument("--images", type=int, default=40, metavar="N", help="how many to sample (default 40)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group = parser.add_argument_group("how to sample; beside --samples only --encoder and --tokenizer")
    add_sampling_options(group, leave_out=_UNUSED)
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images}: choose at least 1")
    if arguments.samples:
        refuse_sampling_options(arguments, f"--samples {arguments.samples}", allowed=("encoder", "tokenizer"))
        if arguments.tokenizer and not arguments.encoder:
            raise UserError(f"--tokenizer {arguments.tokenizer} has no effect without --encoder; remove it")
    return arguments


def run() -> NoReturn:
    """`diffmoe-report`."""
    run_command(main)


if __name__ == "__main__":
    run()
