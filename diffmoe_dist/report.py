"""Write a page about a run, or about several: `python -m diffmoe_dist.report --run RUN_DIR ... [--samples DIR ...]`."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import make_writable
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.sampling.settings import OVERRIDABLE, add_sampling_options, refuse_sampling_options, settings_from

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

With several runs the page is OUT/comparison.html: their losses, scores and capacity against steps, images, FLOPs and
device-hours, results, samples of one noise side by side, and the settings that differ; the numbers stand beside it as
CSV files. A folder of runs, and a pattern in quotes, are the runs in them.

  python -m diffmoe_dist.report --run runs/dense runs/global_pool --out comparison
  python -m diffmoe_dist.report --run 'runs/*-seed?' --images 0
  python -m diffmoe_dist.report --run runs --samples samples/dense samples/global_pool

--samples then are finished folders of diffmoe_dist.sample or diffmoe_dist.evaluate: the images and scores that the page
shows.
"""
# They decide what a job writes, or into which batches it divides; a page has one.
_UNUSED = ("num", "batch_size", "expert", "decoder", "geneval", "png")
_IMAGES_OF_ONE, _IMAGES_OF_EACH = 40, 10


def main() -> None:
    arguments = _parse()
    runs = find_runs(arguments.run)
    _check(arguments, runs)
    if len(runs) > 1:
        _compare(arguments, runs)
    else:
        _report(arguments, runs[0])


def _report(arguments: argparse.Namespace, run_dir: Path) -> None:
    num = _IMAGES_OF_ONE if arguments.images is None else arguments.images
    settings = None if arguments.samples else settings_from(arguments, str(run_dir), num)
    if settings:
        settings.check()

    from diffmoe_dist.parallel.topology import choose_device
    from diffmoe_dist.report_page.loss_curve import draw_loss_curve
    from diffmoe_dist.report_page.page import write_report
    from diffmoe_dist.report_page.samples import FinishedSamples

    asked = settings or FinishedSamples.open(arguments.samples[0], num, arguments.encoder, arguments.tokenizer)
    loss_curve = draw_loss_curve(run_dir)
    page = write_report(run_dir, asked, choose_device(arguments.device, detect_launch()))
    sys.stdout.write(f"loss curve:     {loss_curve}\n")
    sys.stdout.write(f"TensorBoard:    python -m diffmoe_dist.board {run_dir}\n")
    sys.stdout.write(f"report:         {page}\n")


def _compare(arguments: argparse.Namespace, runs: list[Path]) -> None:
    num = _IMAGES_OF_EACH if arguments.images is None else arguments.images
    settings = settings_from(arguments, str(runs[0]), num) if num and not arguments.samples else None
    if settings:
        settings.check()

    from diffmoe_dist.parallel.topology import choose_device
    from diffmoe_dist.report_page.comparison_page import write_comparison
    from diffmoe_dist.report_page.run_history import read_history
    from diffmoe_dist.report_page.scored_samples import read_scored_samples

    histories = [read_history(run) for run in runs]
    finished = [read_scored_samples(folder, runs) for folder in arguments.samples]
    out = arguments.out or Path("comparison")
    make_writable(out, f"--out {out}")
    page = write_comparison(histories, out, settings, finished, choose_device(arguments.device, detect_launch()))
    sys.stdout.write(f"runs:           {', '.join(map(str, runs))}\n")
    sys.stdout.write(f"comparison:     {page}\n")


def find_runs(given: Sequence[str]) -> list[Path]:
    """The run folders that are meant: folders of runs, folders of several ones, patterns; each once.

    Raises:
        UserError: a pattern fits no run.
    """
    found: list[Path] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            below = [path] if _is_run(path) else sorted(child for child in path.iterdir() if _is_run(child))
        else:
            below = sorted(path for path in map(Path, glob.glob(text)) if _is_run(path))
        if not below and glob.has_magic(text):
            raise UserError(f"--run {text}: fits no training run; give the folder of one")
        found += below or [path]  # which is complained of when it is read
    return list({path.resolve(): path for path in found}.values())


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file()


def _parse() -> argparse.Namespace:
    parser = CommandParser(prog="diffmoe_dist.report", description=DESCRIPTION)
    parser.add_argument("--run", required=True, nargs="+", metavar="DIR", help="folders of training runs")
    parser.add_argument(
        "--samples", nargs="+", type=Path, default=[], metavar="DIR", help="folders of diffmoe_dist.sample, of the runs"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for a comparison (default: comparison)")
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        help=f"how many to sample (default {_IMAGES_OF_ONE}; of each of several runs {_IMAGES_OF_EACH}, 0: none)",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    group = parser.add_argument_group("how to sample; beside --samples only --encoder and --tokenizer")
    add_sampling_options(group, leave_out=_UNUSED)
    arguments = parser.parse_args()
    for given in (arguments.run, arguments.samples):  # settings that follow a list of folders
        settings = [str(word) for word in given if str(word).partition("=")[0] in OVERRIDABLE]
        arguments.overrides += settings
        given[:] = [word for word in given if str(word) not in settings]
    return arguments


def _check(arguments: argparse.Namespace, runs: Sequence[Path]) -> None:
    several, images, samples = len(runs) > 1, arguments.images, arguments.samples
    if images is not None and images < (0 if several else 1):
        raise UserError(f"--images {images}: choose at least {0 if several else 1}")
    if arguments.out and not several:
        raise UserError(
            f"--out {arguments.out} has no effect with one run, whose page is {runs[0]}/report.html; leave it out"
        )
    if len(samples) > 1 and not several:
        raise UserError(f"--samples {samples[1]}: the page of one run shows one folder of samples; leave it out")
    if several and samples and images is not None:
        raise UserError(f"--images {images} has no effect with --samples and several runs; leave it out")
    if several and images == 0:
        refuse_sampling_options(arguments, "--images 0")
    if samples:
        allowed = () if several else ("encoder", "tokenizer")
        refuse_sampling_options(arguments, f"--samples {samples[0]}", allowed=allowed)
        if arguments.tokenizer and not arguments.encoder:
            raise UserError(f"--tokenizer {arguments.tokenizer} has no effect without --encoder; remove it")


def run() -> NoReturn:
    """`diffmoe-report`."""
    run_command(main)


if __name__ == "__main__":
    run()
