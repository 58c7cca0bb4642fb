"""Write a page about a run: `python -m diffmoe_dist.report --run RUN_DIR [--samples DIR]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch

DESCRIPTION = """\
Write RUN_DIR/report.html, one page that needs nothing beside itself: the training curves, pictures, and where the
experts work: capacity over sampling steps and layers, over the picture and by class, what each expert likes. Also
draws the losses and the gradient norm into RUN_DIR/loss.png, and says where to look further.

  python -m diffmoe_dist.report --run runs/demo
  python -m diffmoe_dist.report --run runs/demo --samples samples/demo

Some images are drawn for it: with the settings of --samples, else with 50 steps and no guidance. A model that is told
captions draws from the first ones of its training data; with --samples and their --encoder from the samples' prompts.
"""


def main() -> None:
    parser = CommandParser(prog="diffmoe_dist.report", description=DESCRIPTION)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the folder of a training run")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="a folder of diffmoe_dist.sample, of this run")
    parser.add_argument("--encoder", metavar="DIR", help="the text encoder of samples that were drawn from prompts")
    parser.add_argument("--tokenizer", metavar="DIR", help="and its tokenizer, where it lies elsewhere")
    parser.add_argument("--images", type=int, default=40, help="how many are drawn for the page (default 40)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    if arguments.encoder and not arguments.samples:
        raise UserError(f"--encoder {arguments.encoder} has no effect without --samples; remove it")
    if arguments.tokenizer and not arguments.encoder:
        raise UserError(f"--tokenizer {arguments.tokenizer} has no effect without --encoder; remove it")
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images}: choose at least 1")

    from diffmoe_dist.parallel.topology import choose_device
    from diffmoe_dist.report_page.loss_curve import draw_loss_curve
    from diffmoe_dist.report_page.page import write_report

    picture = draw_loss_curve(arguments.run)
    device = choose_device(arguments.device, detect_launch())
    page = write_report(
        arguments.run, arguments.samples, arguments.images, device, arguments.encoder, arguments.tokenizer
    )
    sys.stdout.write(f"loss curve:     {picture}\n")
    sys.stdout.write(f"TensorBoard:    tensorboard --logdir {arguments.run / 'tensorboard'}\n")
    sys.stdout.write(f"report:         {page}\n")


def run() -> NoReturn:
    """`diffmoe-report`."""
    run_command(main)


if __name__ == "__main__":
    run()
