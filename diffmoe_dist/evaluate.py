"""Score samples: `python -m diffmoe_dist.evaluate --samples FILE.npz|RUN --reference FILE.npz --inception FILE.pth`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.data.images import find_images
from diffmoe_dist.data.model_folder import check_model_folder
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import beside, make_writable, write_json
from diffmoe_dist.launch import detect_launch
from diffmoe_dist.own_code import import_score
from diffmoe_dist.sampling.settings import (
    PROMPTS_NAME,
    add_sampling_options,
    refuse_sampling_options,
    settings_from,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from diffmoe_dist.evaluation.image_sources import FolderImages, NpzImages
    from diffmoe_dist.launch import Launch

DESCRIPTION = """\
FID, sFID, Inception score, precision and recall of samples, as ADM's evaluator computes them; clean-FID, FD-DINOv2 and
CLIP-FD; CLIPScore with prompts.

  python -m diffmoe_dist.evaluate --samples samples/demo/samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception pt_inception-2015-12-05-6726825d.pth
  torchrun --nproc-per-node 8 -m diffmoe_dist.evaluate --samples runs/b --num-images 50000 --steps 250 \\
      --reference VIRTUAL_imagenet256_labeled.npz --inception FILE.pth --out evaluation/b/scores.json
  python -m diffmoe_dist.evaluate --make-reference digits.npz --shards shards/digits --inception FILE.pth
  python -m diffmoe_dist.evaluate --samples samples/b/samples.npz --reference imagenet/val --inception FILE.pth
  python -m diffmoe_dist.evaluate --samples samples/b/samples.npz --reference imagenet/val --features dinov2-large
  python -m diffmoe_dist.evaluate --samples samples/t2i/samples.npz --clip clip-vit-large-patch14

Nothing is downloaded: --inception is pytorch-fid's or torch-fidelity's file of inception-2015-12-05. --features takes
the local folder of a DINOv2 or a CLIP, as transformers writes it, for FD-DINOv2 or CLIP-FD, or any function of yours as
module:callable, images (N, 3, H, W) uint8 to features (N, F), for the Frechet distance of its features; precision and
recall too. --clip takes the folder of a CLIP and scores how well images fit their prompts (prompts.jsonl beside them),
with or without a reference. --score is a metric of your own, module:callable, or a module that has `score`: it is given
all uint8 images (N, H, W, C) and returns a number.

A reference is a file with statistics, images, or both (--make-reference makes one, of one extractor), or a folder of
images of any sizes: that gives the distance alone, and with --inception it is clean-FID, whose resizing is another.
Samples are an npz or a folder of images. With a run or a checkpoint as --samples the images are sampled first, into the
folder of --out, by the options of diffmoe_dist.sample, whose --batch-size is --sampling-batch-size here. The result
says how they were sampled, as far as a sampling.json beside them does. A score of other than 50,000 samples carries
their number.
"""
MODEL_FILES = ("checkpoints", "state.json", "config.json", "config.yaml")  # of a run, a step, a folder of weights
CLIP_FILES = (
    ("*.safetensors",),
    ("tokenizer.json", "vocab.json"),
    ("preprocessor_config.json", "processor_config.json"),
)


def main() -> None:
    arguments = parse()
    check(arguments)

    from diffmoe_dist.parallel.topology import choose_device, start_process_group, stop_process_group

    device = choose_device(arguments.device, detect_launch())
    launch = start_process_group(device)
    if arguments.make_reference:
        text = make_reference_file(arguments, launch, device)
    else:
        text = score_samples(arguments, launch, device)
    stop_process_group()
    if launch.rank == 0:
        sys.stdout.write(text)


def parse() -> argparse.Namespace:
    parser = CommandParser(prog="diffmoe_dist.evaluate", description=DESCRIPTION)
    parser.add_argument("--samples", metavar="FILE|DIR", help="an npz of samples (arr_0), images, a run or a step")
    parser.add_argument("--reference", metavar="FILE|DIR", help="an npz of mu, sigma, mu_s, sigma_s, arr_0; or images")
    parser.add_argument("--inception", metavar="FILE", help="weights of FID's Inception network")
    parser.add_argument("--features", metavar="DIR|module:callable", help="a DINOv2, a CLIP, or a function")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="a CLIP, for CLIPScore with the prompts of the images")
    parser.add_argument("--score", metavar="module:callable", help="a metric of your own: images to a number")
    parser.add_argument(
        "--batch-size",
        dest="scoring_batch_size",
        type=int,
        default=64,
        help="images through a network at once (default 64)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result (default: scores.json beside the npz)")
    parser.add_argument("--make-reference", type=Path, metavar="FILE", help="write one of --shards, score nothing")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="the data set to make a reference of")
    of_run = parser.add_argument_group("for a run or a checkpoint as --samples; see diffmoe_dist.sample")
    add_sampling_options(of_run, batch_size_option="--sampling-batch-size")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that are missing, or have no effect beside others, before torch is imported."""
    folder = Path(arguments.samples or "")
    if arguments.samples and (folder / "samples.npz").is_file():  # its pictures are a grid, and the same again
        raise UserError(f"--samples {folder}: a folder of diffmoe_dist.sample; give {folder / 'samples.npz'}")
    compared = ("reference",) if arguments.clip is None and arguments.score is None else ()
    if arguments.make_reference:
        purpose = "--make-reference"
        _check_given(arguments, purpose, needed=("shards",), useless=("samples", "reference", "clip", "score", "out"))
    elif samples_run(arguments):
        purpose = f"--samples {arguments.samples} (a folder)"
        counted = () if arguments.prompts or arguments.prompt else ("num",)  # else one for each prompt
        _check_given(arguments, purpose, needed=(*compared, *counted, "out"), useless=("shards",))
        settings_from(arguments, arguments.samples).check()
    else:
        kind = "images" if arguments.samples and Path(arguments.samples).is_dir() else "a file"
        purpose = f"--samples {arguments.samples} ({kind})" if arguments.samples else "scoring"
        _check_given(arguments, purpose, needed=("samples", *compared), useless=("shards",))
    if not samples_run(arguments):
        refuse_sampling_options(arguments, purpose)
    _check_extractor(arguments)
    if arguments.clip is not None:
        _check_clip(arguments)
    if arguments.scoring_batch_size < 1:
        raise UserError(f"--batch-size {arguments.scoring_batch_size}: choose at least 1")


def samples_run(arguments: argparse.Namespace) -> bool:
    """Whether the images are to be sampled first, from a run or a checkpoint: from a folder that is not of images."""
    if arguments.make_reference or arguments.samples is None or not Path(arguments.samples).is_dir():
        return False
    return any((Path(arguments.samples) / name).exists() for name in MODEL_FILES) or not any(
        find_images(Path(arguments.samples))
    )


def _check_given(
    arguments: argparse.Namespace, purpose: str, needed: tuple[str, ...], useless: tuple[str, ...]
) -> None:
    for name in needed:
        if getattr(arguments, name) is None:
            raise UserError(f"{_option(name)} is missing: {purpose} needs it; see diffmoe_dist.evaluate --help")
    for name in useless:
        value = getattr(arguments, name)
        if value is not None:
            raise UserError(f"{_option(name)} {value} has no effect with {purpose}; leave it out")


def _check_extractor(arguments: argparse.Namespace) -> None:
    given = [name for name in ("features", "inception") if getattr(arguments, name) is not None]
    if arguments.make_reference or arguments.reference:
        if len(given) != 1:
            raise UserError("give --inception FILE.pth or --features FOLDER|module:callable, one of them")
    elif given:
        value = getattr(arguments, given[0])
        raise UserError(f"{_option(given[0])} {value} has no effect without --reference; leave it out")


def _check_clip(arguments: argparse.Namespace) -> None:
    folder, samples = arguments.clip, Path(arguments.samples)
    check_model_folder(folder, f"--clip {folder}", "a whole CLIP, both of its towers", ("clip",), files=CLIP_FILES)
    if samples.exists() and not samples_run(arguments):
        _prompts_beside(samples)
    elif samples_run(arguments) and not (arguments.prompts or arguments.prompt):
        raise UserError(f"--clip {folder}: scores images and their prompts; give --prompts to sample from")


def make_reference_file(arguments: argparse.Namespace, launch: Launch, device: torch.device) -> str:
    from diffmoe_dist.evaluation.extractors import open_extractor
    from diffmoe_dist.evaluation.image_sources import ShardImages
    from diffmoe_dist.evaluation.scores import make_reference

    extractor = open_extractor(arguments.inception, arguments.features, device)
    path = arguments.make_reference
    _check_writable(path, "--make-reference")
    make_reference(
        path, ShardImages(arguments.shards), extractor,
        batch_size=arguments.scoring_batch_size, rank=launch.rank, ranks=launch.world_size,
    )  # fmt: skip
    return f"reference:      {path}\n"


def score_samples(arguments: argparse.Namespace, launch: Launch, device: torch.device) -> str:
    from diffmoe_dist.evaluation.clip_score import clip_score, open_clip, prompts_of_images
    from diffmoe_dist.evaluation.extractors import open_extractor
    from diffmoe_dist.evaluation.image_sources import open_images
    from diffmoe_dist.evaluation.reference import read_reference
    from diffmoe_dist.evaluation.scores import build_result, count_name, score, table
    from diffmoe_dist.parallel.topology import stop_process_group

    own = None if arguments.score is None else import_score(arguments.score)
    extractor = reference = clip = record = None
    if arguments.reference:
        of_folder = Path(arguments.reference).is_dir()
        extractor = open_extractor(arguments.inception, arguments.features, device, clean=of_folder)
        reference = read_reference(Path(arguments.reference), extractor)
    if arguments.clip:
        clip = open_clip(arguments.clip, device)
    path = Path(arguments.samples)
    out = arguments.out or beside(path, "scores.json")
    _check_writable(out, "--out")
    if samples_run(arguments):
        path = sample_run(arguments, out.parent, launch, device)
    samples = open_images(path)
    if clip:  # before anything is scored
        prompts_file = _prompts_beside(path)
        prompts = prompts_of_images(prompts_file, samples.num_images)
    options = {"batch_size": arguments.scoring_batch_size, "rank": launch.rank, "ranks": launch.world_size}
    scores = {}
    if reference and extractor:
        scores = score(samples, reference, extractor, **options)
    if clip:
        found = clip_score(samples, prompts, clip, **options)
        scores[f"clip_score_{count_name(samples.num_images)}"] = found.score
        record = {"model": clip.name, "sha256": clip.sha256, "prompts": str(prompts_file), "cut": found.cut}
    result = build_result(scores, samples, reference, extractor, record)
    if launch.rank == 0 and (scores or own is None):
        write_json(out, result)
    if own is not None:
        stop_process_group()  # a metric may take longer than ranks wait for each other, or fail
    if own is not None and launch.rank == 0:
        scores[f"{arguments.score}_{count_name(samples.num_images)}"] = _own_score(own, samples, arguments.score)
        write_json(out, result)
    return f"{table(result)}\nresult: {out}\n"


def _own_score(function: Callable[[Any], float], samples: NpzImages | FolderImages, name: str) -> float:
    """What the user's function, in this process alone, makes of all images."""
    import torch

    (images,) = samples.batches(range(samples.num_images), samples.num_images)
    if len({image.shape for image in images}) > 1:
        raise UserError(
            f"--score {name} takes images of one size, but those of {samples.path} have several; resize them"
        )
    return function(torch.stack(list(images)).permute(0, 2, 3, 1).contiguous().numpy())


def sample_run(arguments: argparse.Namespace, folder: Path, launch: Launch, device: torch.device) -> Path:
    """Sample the images of a run into a folder, on all ranks; collective."""
    from diffmoe_dist.sampling.job import sample_to_folder

    settings = settings_from(arguments, arguments.samples)
    sample_to_folder(settings, folder, device, launch)
    return folder / "samples.npz"


def _prompts_beside(samples: Path) -> Path:
    path = beside(samples, PROMPTS_NAME)
    if not path.is_file():
        raise UserError(f"--samples {samples}: no {PROMPTS_NAME} beside it; sample with diffmoe_dist.sample --prompts")
    return path


def _check_writable(path: Path, option: str) -> None:
    make_writable(path.parent, f"the folder of {option} {path}")
    if path.is_dir():
        raise UserError(f"{option} {path}: that is a folder; give the name of a file")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run() -> NoReturn:
    """`diffmoe-evaluate`."""
    run_command(main)


if __name__ == "__main__":
    run()
