"""Command line of the shard tool: `python -m data_tools pack SOURCE OUT`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from data_tools.digits import DigitsSource
from data_tools.pack import Source, pack
from diffmoe_dist.errors import CommandParser, UserError, run_command

_SECONDS_BETWEEN_LINES = 5.0

_PACK_HELP = """\
Pack labelled images into WebDataset shards for training.

SOURCE is the data to pack:
  digits   scikit-learn's 1,797 handwritten digits, 8x8, gray; nothing is downloaded

OUT becomes a folder that the trainer takes as data.shards:
  SOURCE-000000.tar ...   plain WebDataset tars: KEY.png and KEY.cls side by side
  offsets.npy             where each payload lies, its size and its CRC-32
  index.json              counts, classes, image size, SHA-256 sums; written last

All samples are permuted before they are cut into shards, because a loader that reads
a window of shards cannot undo an order by class. The same arguments give the same
bytes, so an interrupted command is simply run again."""

_PACK_EXAMPLE = """\
example:
  python -m data_tools pack digits data/digits
  python -m diffmoe_dist.train --config FILE data.shards=data/digits"""


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m data_tools", description="Prepare data for training.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    pack_parser = commands.add_parser(
        "pack",
        help="pack labelled images into WebDataset shards",
        description=_PACK_HELP,
        epilog=_PACK_EXAMPLE,
    )
    pack_parser.add_argument("source", metavar="SOURCE", help="the data to pack: digits")
    pack_parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; new, empty, or the same pack")
    pack_parser.add_argument(
        "--samples-per-shard", type=int, default=512, metavar="N", help="samples in a tar (default: %(default)s)"
    )
    pack_parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the permutation (default: %(default)s)"
    )
    return parser


def _open_source(name: str) -> Source:
    if name == "digits":
        return DigitsSource()
    raise UserError(f"SOURCE={name}: not a source; use digits")


@contextmanager
def _progress(num_samples: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; else a line every few seconds, and none for a short run."""
    if sys.stderr.isatty():
        with tqdm(total=num_samples, unit=" samples", desc="pack") as bar:
            yield bar.update
        return
    done, begin = 0, time.monotonic()
    next_line = begin + _SECONDS_BETWEEN_LINES

    def advance(samples: int) -> None:
        nonlocal done, next_line
        done, now = done + samples, time.monotonic()
        if now >= next_line:
            rate = done / (now - begin)
            left = (num_samples - done) / rate
            sys.stderr.write(f"pack: {done}/{num_samples} samples, {rate:.0f}/s, {left:.0f} s left\n")
            next_line = now + _SECONDS_BETWEEN_LINES

    yield advance


def main() -> None:
    arguments = _parser().parse_args()
    source = _open_source(arguments.source)
    with _progress(len(source)) as advance:
        packed = pack(
            source,
            arguments.out,
            samples_per_shard=arguments.samples_per_shard,
            seed=arguments.seed,
            on_shard=advance,
        )
    sys.stdout.write(
        f"packed {packed.num_samples} samples into {packed.num_shards} shards, {packed.num_bytes} bytes: "
        f"data.shards={arguments.out}\n"
    )


if __name__ == "__main__":
    run_command(main)
