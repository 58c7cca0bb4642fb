"""Command line of the shard tool: `python -m data_tools COMMAND ...`."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_args

from tqdm import tqdm

from data_tools.folder import PackedFolder
from data_tools.index_tars import index_tars
from data_tools.pack import PackSettings, held_out_folder, pack, pack_and_hold_out
from data_tools.pack_plan import plan_pack
from data_tools.parallel import Workers, make_workers
from data_tools.source import Source
from data_tools.sources import FORMATS, SourceOptions, open_source
from data_tools.stats import count, describe, image_grid
from data_tools.stored_images import ImageRules
from data_tools.table import Columns
from data_tools.verify import verify
from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.data.format import QUARANTINE_NAME
from diffmoe_dist.data.images import Crop
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import format_bytes

_SECONDS_BETWEEN_LINES = 5.0
_THUMBNAIL = 96  # pixels
_MAX_REASONS = 3

_SOURCES_HELP = """\
SOURCE is the data to read; --source-format names its kind where the name does not tell:
  digits        scikit-learn's 1,797 handwritten digits, 8x8, gray; nothing is downloaded
  shapes        2,880 images of squares, triangles and crosses, 16x16, with captions; nothing is downloaded
  image-folder  a folder with a subfolder of images for each class, or of images alone
  ilsvrc-train  ILSVRC2012_img_train.tar, read in place
  ilsvrc-val    ILSVRC2012_img_val.tar, with --devkit
  kaggle-imagenet  ImageNet as Kaggle has it, extracted (the folder of ILSVRC and LOC_*), with --split train or val
  coco          captions_*.json, with --images where the images lie elsewhere than COCO puts them
  pairs         a folder with NAME.txt beside each image
  table         .csv, .tsv, .jsonl or .parquet: paths with captions or labels
  hf-parquet    Hugging Face Parquet files with the images inside
  webdataset    tars of any origin, as img2dataset writes them
  idx           *-images-idx3-ubyte[.gz] of MNIST and Fashion-MNIST, with the labels' file beside it"""

_PACK_HELP = f"""\
Pack images, with labels or captions, into WebDataset shards for training.

{_SOURCES_HELP}

OUT becomes a folder that the trainer takes as data.shards:
  SOURCE-000000.tar ...   plain WebDataset tars: KEY.jpg, KEY.cls, KEY.txt, KEY.json side by side
  offsets.npy, keys.npy   where each payload lies, its size and its CRC-32; the key of each sample
  quarantine.jsonl        the items that were left out, with the reason
  index.json              counts, classes, image size, SHA-256 sums; written last

Every image is decoded completely. Its file is stored as it is, unless it is resized or turned: then without loss.
All items are permuted before they are cut into shards, because a loader that reads a window of shards cannot undo an
order by class. The same arguments give the same bytes for any number of workers; an interrupted command is simply run
again and goes on with the shards that are missing or damaged."""

_PACK_EXAMPLE = """\
examples:
  python -m data_tools pack digits shards/digits
  python -m data_tools pack ILSVRC2012_img_train.tar shards/imagenet256 --crop adm --size 256 --workers 16
  mpirun -n 64 python -m mpi4py -m data_tools pack annotations/captions_train2017.json shards/coco
  python -m diffmoe_dist.train --config FILE data.shards=shards/digits"""


_LATENTS_HELP = (
    "run an autoencoder over the images of a folder",
    """\
Encode every image, and its mirror image, with a diffusers AutoencoderKL or AutoencoderDC in fp32.

OUT becomes a side folder of BASE that the trainer takes as data.latents: in fp16, unscaled, the mean and the log
variance of each latent; training samples from them anew in every epoch. An AutoencoderDC has means alone. OUT has the
samples of BASE in the same order. The index records the autoencoder's fingerprint, scale and shift, the crop and the
size. An interrupted command is simply run again. On several GPUs: an MPI rank for each.""",
    """\
examples:
  python -m data_tools encode-latents shards/imagenet shards/imagenet-latents --vae models/sd-vae-ft-ema --size 256
  mpirun -n 8 python -m mpi4py -m data_tools encode-latents BASE OUT --vae DIR --device cuda
  python -m diffmoe_dist.train --config FILE data.shards=BASE data.latents=OUT""",
)

_TEXT_HELP = (
    "run a text encoder over the captions of a folder",
    """\
Encode all captions of every image with a text encoder from transformers, in fp32: CLIP, T5, another encoder or a causal
model. A .json file in the place of its folder names a layer, or several encoders whose tokens follow each other.

OUT becomes a side folder of BASE: in fp16 the encoder's last layer for the tokens of each caption, without padding,
CLIP's pooled vector, and once the empty caption. An interrupted command is simply run again.""",
    """\
example:
  python -m data_tools encode-text shards/coco shards/coco-t5 --encoder models/t5-v1_1-xxl --device cuda""",
)

_PROMPTS_HELP = (
    "run a text encoder over the prompts of a sampler",
    """\
Encode prompts with a text encoder, as encode-text does captions, but each alone.

PROMPTS is .txt, a prompt a line, or .jsonl, a line an object with the string `prompt`, which is kept whole. OUT becomes
one file that the sampler takes as --prompts, and then needs no encoder: the same images, bit for bit on one kind of
device. With the prompts it holds what guidance moves away from: the empty caption, or the negative prompt.""",
    """\
examples:
  python -m data_tools encode-prompts prompts.txt prompts.npz --encoder models/t5-v1_1-xxl --device cuda
  python -m diffmoe_dist.sample --checkpoint runs/t2i --out samples/t2i --prompts prompts.npz""",
)

_RANDOM_ENCODER_HELP = (
    "a small text encoder with random weights, to try things out",
    """\
Write a CLIP text encoder of two layers, hidden size 64, whose weights are random numbers and whose tokens are the words
in the captions of BASE. It tells captions apart and knows no meanings: to try out text-to-image training where no
pretrained encoder is at hand.""",
    """\
example:
  python -m data_tools pack shapes shards/shapes
  python -m data_tools random-encoder shards/shapes models/random-clip
  python -m data_tools encode-text shards/shapes shards/shapes-text --encoder models/random-clip --max-length 10""",
)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m data_tools", description="Prepare data for training.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = _command(commands, "plan", _plan, "what a pack would be: counts, classes, sizes, time; writes nothing")
    add("source", metavar="SOURCE", help="the data to read; see pack --help")
    _add_pack_options(add)
    _add_max_bad(add)
    add = _command(commands, "pack", _pack, "pack images into WebDataset shards", _PACK_HELP, _PACK_EXAMPLE)
    add("source", metavar="SOURCE", help="the data to pack")
    add("out", metavar="OUT", type=Path, help="the folder to write; new, empty, or the same pack")
    _add_pack_options(add)
    _add_max_bad(add)
    add = _command(commands, "index", _index, "give foreign WebDataset tars an index; they stay as they are")
    add("folder", metavar="FOLDER", type=Path, help="a folder of uncompressed .tar files; the index is written there")
    _add_max_bad(add)
    add = _command(commands, "verify", _verify, "check a folder of shards against its index")
    add("folder", metavar="FOLDER", type=Path, help="a folder with an index")
    add("--quick", dest="full", action="store_false", help="sizes, and two samples of each shard")
    add("--full", dest="full", action="store_true", default=True, help="every byte and every image (the default)")
    add = _command(commands, "stats", _stats, "counts, classes, sizes, captions, mean and deviation of latents")
    add("folder", metavar="FOLDER", type=Path, help="a folder with an index")
    add("--picture", metavar="FILE", type=Path, help="also write a grid of 64 random samples to this PNG")
    add = _command(commands, "encode-latents", _encode_latents, *_LATENTS_HELP)
    add("base", metavar="BASE", type=Path, help="the folder with the images")
    add("out", metavar="OUT", type=Path, help="the folder to write; new, empty, or the same latents")
    add("--vae", type=Path, required=True, metavar="DIR", help="local folder of a diffusers autoencoder, KL or DC")
    add("--size", type=int, metavar="PIXELS", help="side of the square that is encoded (default: the images')")
    add("--crop", choices=("adm", "center"), default="adm", help="of images of another size (default: %(default)s)")
    add(
        "--parametrisation", choices=("mean_logvar", "mean"),
        help="what is stored of a latent; mean: it alone, which training then does not sample around (default: "
        "mean_logvar of an AutoencoderKL, mean of an AutoencoderDC)",
    )  # fmt: skip
    add("--no-flip", dest="flip", action="store_false", help="leave out the mirror images; halves the folder")
    _add_batch_size(add, 16)
    _add_device(add)
    _add_max_bad(add)
    add = _command(commands, "encode-text", _encode_text, *_TEXT_HELP)
    add("base", metavar="BASE", type=Path, help="the folder with the captions")
    add("out", metavar="OUT", type=Path, help="the folder to write; new, empty, or the same captions")
    _add_text_encoder(add)
    _add_batch_size(add, 32)
    _add_device(add)
    add = _command(commands, "encode-prompts", _encode_prompts, *_PROMPTS_HELP)
    add("prompts", metavar="PROMPTS", type=Path, help="the prompts, .txt or .jsonl")
    add("out", metavar="OUT", type=Path, help="the file to write, .npz")
    _add_text_encoder(add)
    add("--negative-prompt", metavar="TEXT", help="what guidance moves away from (default: the empty caption)")
    _add_device(add)
    add = _command(commands, "random-encoder", _random_encoder, *_RANDOM_ENCODER_HELP)
    add("base", metavar="BASE", type=Path, help="the folder with the captions")
    add("out", metavar="OUT", type=Path, help="the folder to write, which must not be there")
    return parser


def _add_text_encoder(add: Callable[..., Any]) -> None:
    add("--encoder", type=Path, required=True, metavar="DIR", help="local folder of a text encoder, or a .json of some")
    add("--tokenizer", type=Path, metavar="DIR", help="local folder of its tokenizer (default: the encoder's)")
    add(
        "--max-length", type=int, metavar="N", help="tokens of a caption at most (default: CLIP 77, T5 120, others 256)"
    )


def _add_batch_size(add: Callable[..., Any], default: int) -> None:
    add("--batch-size", type=int, default=default, metavar="N", help="encoded together (default: %(default)s)")


def _add_device(add: Callable[..., Any]) -> None:
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to encode (default: %(default)s)")


def _command(
    commands: Any, name: str, run: Callable[..., None], summary: str, description: str = "", epilog: str = ""
) -> Callable[..., Any]:
    """Add a command; returns the function that adds its arguments."""
    parser = commands.add_parser(name, help=summary, description=description or summary, epilog=epilog)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes, without MPI (default: %(default)s)"
    )
    return parser.add_argument


def _add_pack_options(add: Callable[..., Any]) -> None:
    add(
        "--source-format", metavar="NAME",
        help=f"one of {', '.join(FORMATS)} (default: by the name), or the import path of a reader of your own, as "
        "my_package.my_reader",
    )  # fmt: skip
    add("--images", type=Path, metavar="DIR", help="coco, table: where the images lie")
    add(
        "--devkit",
        type=Path,
        metavar="PATH",
        help="ilsvrc-val: ILSVRC2012_devkit_t12, the folder or its .tar.gz; ilsvrc-train: the same, for the classes' "
        "names for people",
    )
    add("--max-label", type=int, metavar="N", help="largest label that is not a bad item (default: 1000000)")
    add(
        "--split",
        metavar="NAME",
        help="hf-parquet: which files of a folder, such as train; kaggle-imagenet: train or val",
    )
    for column in ("image", "caption", "label"):
        add(f"--{column}-column", metavar="NAME", help=f"table, hf-parquet: the {column}s (default: the usual names)")
    add(
        "--crop", choices=get_args(Crop), default="none",
        help="adm: centre crop as ADM and DiT do it; center: square of the original, then scaled; keep-ratio: shorter "
        "side scaled to --size; none: files as they are (default)",
    )  # fmt: skip
    add("--size", type=int, metavar="PIXELS", help="side of the square, or shorter side; with --crop")
    add("--encoding", choices=("webp", "png"), default="webp", help="of resized images (default: %(default)s)")
    add("--upright", action="store_true", help="apply the EXIF orientation; not usual for ImageNet")
    add("--samples-per-shard", type=int, default=512, metavar="N", help="items in a tar (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the permutation (default: %(default)s)")
    add("--hold-out", type=int, default=0, metavar="N", help="items that go to OUT-held-out instead, for validation")
    add("--order", choices=("shuffled", "listed"), default="shuffled", help="listed: unpermuted (default: shuffled)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 0")
    return int(text)


def _add_max_bad(add: Callable[..., Any]) -> None:
    add("--max-bad", type=_count, default=100, metavar="N", help="give up at more bad items (default: %(default)s)")


def _open(arguments: argparse.Namespace) -> Source:
    columns = Columns(arguments.image_column, arguments.caption_column, arguments.label_column)
    options = SourceOptions(arguments.images, arguments.devkit, columns, arguments.split, arguments.max_label)
    return open_source(arguments.source, arguments.source_format, options)


def _settings(arguments: argparse.Namespace) -> PackSettings:
    rules = ImageRules(arguments.crop, arguments.size, arguments.encoding, arguments.upright)
    return PackSettings(
        arguments.samples_per_shard, arguments.seed, arguments.order == "shuffled", rules, arguments.hold_out
    )


def _plan(arguments: argparse.Namespace, workers: Workers) -> None:
    settings = _settings(arguments)
    source = _open(arguments)
    plan = plan_pack(source, settings)
    held_out = f" and {settings.hold_out} held out" if settings.hold_out else ""
    lines = [
        f"{source.name}: {plan.num_items} items{held_out}, "
        f"{plan.num_shards} shards of at most {settings.samples_per_shard}",
        f"about {format_bytes(plan.num_bytes)}, {format_bytes(plan.bytes_per_sample)} a sample",
        f"about {_duration(plan.seconds(1))} in one process, {_duration(plan.seconds(16))} in 16 "
        f"({1 / plan.seconds_per_item:.0f} items/s each)",
    ]
    if plan.smallest_class is not None and plan.largest_class is not None:
        (small, few), (large, many) = plan.smallest_class, plan.largest_class
        lines.insert(1, f"{plan.num_classes} classes, from {few} items ({small}) to {many} ({large})")
    lines += [f"bad: {item}: {reason}" for item, reason in plan.bad]
    lines.append(f"sizes and times from {plan.sampled} items, of which {len(plan.bad)} are bad")
    if plan.num_bad > arguments.max_bad:
        lines.append(f"expect about {plan.num_bad} bad items: more than --max-bad={arguments.max_bad} allows")
    sys.stdout.write("\n".join(lines) + "\n")


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _pack(arguments: argparse.Namespace, workers: Workers) -> None:
    settings, out = _settings(arguments), arguments.out
    source = _open(arguments)
    with _progress("pack", len(source)) as advance:
        options: dict[str, Any] = {"max_bad": arguments.max_bad, "workers": workers, "on_shard": advance}
        if not settings.hold_out:
            _tell_packed(pack(source, out, settings, **options), "data", out)
            return
        trained_on, held_out = pack_and_hold_out(source, out, settings, **options)
    _tell_packed(trained_on, "data", out)
    _tell_packed(held_out, "validation", held_out_folder(out))


def _tell_packed(packed: PackedFolder, section: str, out: Path) -> None:
    sys.stdout.write(
        f"packed {packed.num_samples} samples into {packed.num_shards} shards, {packed.num_bytes} bytes: "
        f"{section}.shards={out}\n"
    )
    _tell_bad(packed, out)


def _index(arguments: argparse.Namespace, workers: Workers) -> None:
    with _progress("index", None) as advance:
        packed = index_tars(arguments.folder, max_bad=arguments.max_bad, workers=workers, on_shard=advance)
    sys.stdout.write(
        f"indexed {packed.num_samples} samples in {packed.num_shards} tars: data.shards={arguments.folder}\n"
    )
    _tell_bad(packed, arguments.folder)


def _tell_bad(packed: PackedFolder, folder: Path) -> None:
    if packed.num_bad:
        sys.stdout.write(f"left out {packed.num_bad} bad items ({_reasons(packed)}): {folder / QUARANTINE_NAME}\n")


def _reasons(packed: PackedFolder) -> str:
    """The commonest ones, with their counts."""
    told = [f'{count} "{reason}"' for reason, count in packed.bad_reasons.most_common(_MAX_REASONS)]
    return ", ".join([*told, *(["..."] if len(packed.bad_reasons) > _MAX_REASONS else [])])


def _verify(arguments: argparse.Namespace, workers: Workers) -> None:
    index = ShardIndex.open(arguments.folder, f"FOLDER={arguments.folder}")
    with _progress("verify", index.num_samples) as advance:
        verified = verify(index, full=arguments.full, workers=workers, on_shard=advance)
    for problem in verified.problems:
        sys.stdout.write(f"{problem}\n")
    if verified.problems:
        raise UserError(
            f"FOLDER={arguments.folder}: damaged in {len(verified.problems)} places, named above; "
            "restore the shards, or run the command again that made the folder"
        )
    how = "every byte" if arguments.full else "sizes and two samples of each shard"
    sys.stdout.write(f"{verified.num_samples} samples in {verified.num_shards} shards are whole ({how})\n")


def _stats(arguments: argparse.Namespace, workers: Workers) -> None:
    index = ShardIndex.open(arguments.folder, f"FOLDER={arguments.folder}")
    if arguments.picture is not None and index.channels is None:
        raise UserError(f"--picture={arguments.picture}: {arguments.folder} has no images; leave it out")
    with _progress("stats", index.num_samples) as advance:
        stats = count(index, workers, advance)
    sys.stdout.write(describe(index, stats, arguments.folder))
    if arguments.picture is not None:
        image_grid(index, _THUMBNAIL).save(arguments.picture, format="PNG")


def _encode_latents(arguments: argparse.Namespace, workers: Workers) -> None:
    from data_tools.latents import LatentSettings, encode_latents  # torch takes seconds to import
    from data_tools.side import choose_encoder_device

    base = ShardIndex.open(arguments.base, f"BASE={arguments.base}")
    size = base.image_size if arguments.size is None else arguments.size
    if size is None:
        raise UserError(f"--size: {arguments.base} has images of many sizes; give the side of the square, such as 256")
    device = choose_encoder_device(arguments.device, arguments.workers)
    settings = LatentSettings(
        arguments.vae, size, arguments.crop, arguments.flip, arguments.batch_size, device, arguments.parametrisation
    )
    with _progress("encode-latents", base.num_samples) as advance:
        written = encode_latents(
            base, arguments.out, settings, max_bad=arguments.max_bad, workers=workers, on_shard=advance
        )
    _tell_encoded("latents", written, arguments.out)
    if written.num_bad:
        sys.stdout.write(
            f"{written.num_bad} images have no latent ({_reasons(written)}): {arguments.out / QUARANTINE_NAME}\n"
        )


def _encode_text(arguments: argparse.Namespace, workers: Workers) -> None:
    from data_tools.side import choose_encoder_device
    from data_tools.text import TextSettings, encode_text

    base = ShardIndex.open(arguments.base, f"BASE={arguments.base}")
    device = choose_encoder_device(arguments.device, arguments.workers)
    settings = TextSettings(arguments.encoder, arguments.tokenizer, arguments.max_length, arguments.batch_size, device)
    with _progress("encode-text", base.num_samples) as advance:
        written = encode_text(base, arguments.out, settings, workers=workers, on_shard=advance)
    _tell_encoded("text", written, arguments.out)
    text = ShardIndex.open(arguments.out, f"OUT={arguments.out}").text
    assert text is not None
    sys.stdout.write(
        f"a model of them: model.condition=text model.num_classes=0 model.text_hidden_size={text.hidden_size} "
        f"model.text_max_length={text.max_length} model.text_pooled_size={text.pooled_size}\n"
    )
    if written.num_cut:
        sys.stdout.write(f"{written.num_cut} captions have more tokens than the encoder takes and were cut\n")


def _encode_prompts(arguments: argparse.Namespace, workers: Workers) -> None:
    from data_tools.prompts import write_prompts
    from data_tools.side import choose_encoder_device
    from data_tools.text import TextSettings
    from diffmoe_dist.data.prompts import read_prompts

    prompts = read_prompts(arguments.prompts, "PROMPTS")
    device = choose_encoder_device(arguments.device, arguments.workers)
    settings = TextSettings(arguments.encoder, arguments.tokenizer, arguments.max_length, device=device)
    with _progress("encode-prompts", len(prompts) + 2) as advance:
        write_prompts(prompts, arguments.negative_prompt, arguments.out, settings, workers=workers, on_prompts=advance)
    num_bytes = arguments.out.stat().st_size
    sys.stdout.write(f"encoded {len(prompts)} prompts, {num_bytes} bytes: --prompts {arguments.out}\n")


def _random_encoder(arguments: argparse.Namespace, workers: Workers) -> None:
    from data_tools.random_encoder import write_random_encoder

    if arguments.workers != 1:
        raise UserError(f"--workers={arguments.workers}: random-encoder is one small piece of work; leave it out")
    base = ShardIndex.open(arguments.base, f"BASE={arguments.base}")
    words = write_random_encoder(base, arguments.out)
    sys.stdout.write(f"a random CLIP text encoder that knows {words} words: --encoder {arguments.out}\n")


def _tell_encoded(kind: str, written: PackedFolder, out: Path) -> None:
    sys.stdout.write(
        f"encoded {written.num_samples} samples into {written.num_shards} shards, {written.num_bytes} bytes: "
        f"data.{kind}={out}\n"
    )


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; else a line every few seconds, and none for a short run."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit=" samples", desc=what) as bar:
            yield bar.update
        return
    done, begin = 0, time.monotonic()
    next_line = begin + _SECONDS_BETWEEN_LINES

    def advance(samples: int) -> None:
        nonlocal done, next_line
        done, now = done + samples, time.monotonic()
        if now >= next_line:
            rate = done / (now - begin)
            of_total = "" if total is None else f"/{total}"
            left = "" if total is None or not rate else f", {(total - done) / rate:.0f} s left"
            sys.stderr.write(f"{what}: {done}{of_total} samples, {rate:.0f}/s{left}\n")
            next_line = now + _SECONDS_BETWEEN_LINES

    yield advance


def main() -> None:
    arguments = _parser().parse_args()
    logger = logging.getLogger("data_tools")  # what was found in a source
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)
    with make_workers(arguments.workers) as workers:
        if workers is not None:
            arguments.run(arguments, workers)


def run() -> NoReturn:
    """`diffmoe-data`."""
    run_command(main)


if __name__ == "__main__":
    run()
