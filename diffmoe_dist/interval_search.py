"""Search a constant threshold: `python -m diffmoe_dist.interval_search --checkpoint RUN --thresholds ... --out DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.own_code import import_score
from diffmoe_dist.sampling.settings import add_sampling_options, settings_from

DESCRIPTION = """\
Sample the same images at several constant thresholds (moe.inference=constant, one threshold for all experts and layers)
and print and plot the measured capacity C at each: DiffMoE's interval search. Writes interval_search.json,
interval_search.png and a folder of samples for each threshold.

  python -m diffmoe_dist.interval_search --checkpoint runs/demo --thresholds 0.9,0.7,0.5,0.4,0.3 --out search --num 100

What the images are worth is for --score to say: module:callable, which is given the uint8 images (N, H, W, C) and
returns a number, lower is better. Without it there is no score, only C. --num is 1000 by default. The search runs under
any launcher, and goes on where it was interrupted.
"""
DEFAULT_NUM = 1000


def main() -> None:
    parser = CommandParser(prog="diffmoe_dist.interval_search", description=DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run folder (its newest) or a step folder")
    add("--thresholds", required=True, metavar="A,B,...", help="each from 0 to below 1")
    add("--out", required=True, type=Path, metavar="DIR", help="where everything goes")
    add_sampling_options(parser, leave_out=("recalibrate",))  # a constant takes the place of the thresholds
    add("--score", metavar="MODULE:CALLABLE", help="uint8 images (N, H, W, C) to a number, lower is better")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    thresholds = read_thresholds(arguments.thresholds)
    settings = settings_from(arguments, arguments.checkpoint, num=DEFAULT_NUM)
    settings.check()
    for override in settings.overrides:
        if override.startswith("moe.") and not override.startswith("moe.router="):
            raise UserError(f"{override} has no effect: the search sets moe.inference and its threshold; leave it out")

    from diffmoe_dist.logs import set_up_logging
    from diffmoe_dist.parallel.topology import choose_device, start_process_group, stop_process_group
    from diffmoe_dist.sampling.threshold_search import (
        best_point,
        format_table,
        search_thresholds,
        with_scores,
        write_points,
    )

    score = None if arguments.score is None else import_score(arguments.score)
    device = choose_device(arguments.device, detect_launch())
    launch = start_process_group(device)
    set_up_logging(None, launch.rank)
    points = search_thresholds(settings, thresholds, arguments.out, device, launch)
    stop_process_group()
    if launch.rank == 0:
        points = points if score is None else with_scores(points, arguments.out, score)
        figure = write_points(points, arguments.out)
        sys.stdout.write(format_table(points))
        best = best_point(points)
        what = "largest C" if score is None else "best score"
        found = "none of these" if best is None else f"threshold {best.threshold:g}"
        sys.stdout.write(f"{what} at C <= 1:  {found}\n")
        if score is None:
            sys.stdout.write("no --score was given: the images were not judged\n")
        sys.stdout.write(f"figure:          {figure}\n")


def read_thresholds(text: str) -> list[float]:
    """'0.9,0.5' to [0.9, 0.5]."""
    try:
        thresholds = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--thresholds {text}: expected numbers with commas between them, such as 0.9,0.5") from None
    for threshold in thresholds:
        if not 0 <= threshold < 1:
            raise UserError(
                f"--thresholds {threshold:g}: predicted scores are between 0 and 1; choose 0 or more and below 1"
            )
    return thresholds


if __name__ == "__main__":
    run_command(main)
