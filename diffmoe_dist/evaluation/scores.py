"""Scores of samples against a reference on all ranks: each takes a part of the images, one reduction adds the sums up.

Features themselves travel only for precision and recall, which compare every image with every other.

Shape legend: N images, F features; R reference images, S samples.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import Extractor, describe
from diffmoe_dist.evaluation.image_sources import FolderImages, ImageSource, NpzImages, ShardImages
from diffmoe_dist.evaluation.metrics import (
    NEIGHBOURS,
    ClassSums,
    Moments,
    Statistics,
    count_inside,
    frechet_distance,
    neighbour_radii,
)
from diffmoe_dist.evaluation.reference import Reference, write_reference
from diffmoe_dist.files import beside, read_json_object
from diffmoe_dist.parallel.topology import all_gather

FULL_SAMPLES = 50_000  # what FID-50K and its like are called for
# What scores depend on beside the weights, under the names of sampling.json
SAMPLING_FACTS = (
    "checkpoint", "ema_decay", "ema_length", "sampler", "steps", "time_shift", "cfg_scale", "cfg_channels",
    "cfg_interval", "one_pass", "decoder", "batch_size", "inference", "constant_threshold", "recalibrate", "capacity",
    "capacity_trained_for", "nfe", "parameters", "activated_parameters", "seed", "uint8_rule", "precision", "tf32",
)  # fmt: skip
TOLERANCES = ("rtol", "atol")  # of adaptive samplers
CLASS_FACTS = ("labels", "classes")
PROMPT_FACTS = ("num_prompts", "negative_prompt", "text_encoder_sha256")
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Collected:
    """Of all images on all ranks; `features_NF` are those of this rank's part."""

    pooled: Moments
    spatial: Moments | None
    classes: ClassSums | None
    features_NF: Tensor


def rows_of_rank(num: int, rank: int, ranks: int) -> range:
    """The rows of this rank: consecutive, and as many as others have, give or take one."""
    return range(rank * num // ranks, (rank + 1) * num // ranks)


def collect(
    source: ImageSource, extractor: Extractor, *, batch_size: int, rank: int, ranks: int, what: str, keep: bool
) -> Collected:
    """Pass all images through the extractor; collective.

    Args:
        what: they are, for the progress bar.
        keep: the features too, and not their sums alone.
    """
    one = extractor(next(source.batches(range(1), 1)))  # how wide the features are, also for a rank without images
    pooled = Moments(one.pooled_NF.shape[1], extractor.device)
    spatial = None if one.spatial_NF is None else Moments(one.spatial_NF.shape[1], extractor.device)
    classes = None
    if one.classes_NK is not None:
        classes = ClassSums(source.num_images, one.classes_NK.shape[1], extractor.device)
    kept = [one.pooled_NF[:0].float()]
    sizes: set[torch.Size] = set()
    rows = rows_of_rank(source.num_images, rank, ranks)
    done = rows.start
    hidden = rank != 0 or not sys.stderr.isatty()
    with tqdm(total=len(rows), unit="image", desc=f"{what} (1 of {ranks} ranks)", disable=hidden) as bar:
        for images in source.batches(rows, batch_size):
            if extractor.resize is None:
                sizes.update(image.shape[1:] for image in images)
            features = extractor(images)
            pooled.add(features.pooled_NF)
            if spatial is not None and features.spatial_NF is not None:
                spatial.add(features.spatial_NF)
            if classes is not None and features.classes_NK is not None:
                classes.add(done, features.classes_NK)
            if keep:
                kept.append(features.pooled_NF.float())
            done += len(images)
            bar.update(len(images))
    extractor.check_one_size(all_of(sizes))
    add_up([part.sums for part in (pooled, spatial, classes) if part is not None])
    return Collected(pooled, spatial, classes, torch.cat(kept))


def score(
    samples: ImageSource, reference: Reference, extractor: Extractor, *, batch_size: int, rank: int, ranks: int
) -> dict[str, float]:
    """The scores by name, `fid_50k` for 50,000 samples and `fid_N` for N others; collective.

    With the Inception network: FID, sFID, Inception score. With every extractor: the Frechet distance of its features
    by its name, and precision and recall where the reference is a file that has images.

    Raises:
        UserError: there are too few images, or the reference's statistics are of features of another width.
    """
    for images, named in ((samples, "--samples"), (reference.images, reference.named)):
        if images is not None and images.num_images <= NEIGHBOURS:
            raise UserError(f"{named}: {images.num_images} images are too few; give at least {NEIGHBOURS + 1}")
    options: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "ranks": ranks, "keep": True}
    theirs = None
    if reference.images is not None:
        kept = {**options, "keep": reference.has_manifold}
        theirs = collect(reference.images, extractor, what="reference", **kept)
    ours = collect(samples, extractor, what="samples", **options)
    scores = {}
    compared = [
        (extractor.distance, ours.pooled, reference.pooled, theirs.pooled if theirs else None),
        ("sfid", ours.spatial, reference.spatial, theirs.spatial if theirs else None),
    ]
    for key, moments, stored, of_images in compared:
        if reference.pooled is None and of_images is not None:
            stored = of_images.statistics()
        if moments is not None and stored is not None:
            _check_width(moments, stored, reference)
            scores[key] = distance_on_all_ranks(moments, stored, rank)
    if ours.classes is not None:
        scores["inception_score"] = ours.classes.score()
    if theirs is not None and reference.images is not None and reference.has_manifold:
        features_RF = gather_rows(theirs.features_NF, reference.images.num_images, ranks)
        features_SF = gather_rows(ours.features_NF, samples.num_images, ranks)
        scores["precision"], scores["recall"] = precision_recall(features_RF, features_SF, rank, ranks)
    return {f"{key}_{count_name(samples.num_images)}": value for key, value in scores.items()}


def precision_recall(features_RF: Tensor, features_SF: Tensor, rank: int, ranks: int) -> tuple[float, float]:
    """The part of samples in the references' manifold, and of references in the samples'; collective.

    Every rank has all features and compares its part of the rows with all others.
    """
    # Distances do not change, and what is squared and subtracted in fp32 becomes small.
    centre_F = features_RF.mean(dim=0)
    inside = []
    both = (features_RF - centre_F, features_SF - centre_F)
    radii = [gather_rows(neighbour_radii(x[_slice(x, rank, ranks)], x)[:, None], len(x), ranks)[:, 0] for x in both]
    for points, centres, radii_of_centres in ((both[1], both[0], radii[0]), (both[0], both[1], radii[1])):
        inside.append(count_inside(points[_slice(points, rank, ranks)], centres, radii_of_centres))
    counts = torch.tensor(inside, dtype=torch.float64, device=features_RF.device)
    dist.all_reduce(counts)
    return float(counts[0] / len(features_SF)), float(counts[1] / len(features_RF))


def gather_rows(mine_NF: Tensor, num: int, ranks: int) -> Tensor:
    """All ranks' parts of `num` rows in their order, on every rank; collective."""
    longest = -(-num // ranks)
    padded = mine_NF.new_zeros(longest, mine_NF.shape[1])
    padded[: len(mine_NF)] = mine_NF
    everyone = padded.new_empty(ranks * longest, mine_NF.shape[1])
    all_gather(everyone, padded)
    parts = everyone.split(longest)
    return torch.cat([part[: len(rows_of_rank(num, owner, ranks))] for owner, part in enumerate(parts)])


def all_of(found: set[torch.Size]) -> set[torch.Size]:
    """What any rank has found; collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return set().union(*everyone)


def add_up(sums: Sequence[Tensor]) -> None:
    """Replace each rank's sums by those of all, in one reduction; collective."""
    together = torch.cat(list(sums))
    dist.all_reduce(together)
    for own, of_all in zip(sums, together.split([len(part) for part in sums]), strict=True):
        own.copy_(of_all)


def distance_on_all_ranks(moments: Moments, reference: Statistics, rank: int) -> float:
    """The Frechet distance, which the first rank computes; collective."""
    distance = moments.sums.new_zeros(1)
    if rank == 0:
        distance += frechet_distance(moments.statistics(), reference.to(distance.device))
    dist.broadcast(distance, 0)
    return float(distance)


def count_name(num: int) -> str:
    """How a score names its number of samples: 50k, 1k, 1234."""
    return f"{num // 1000}k" if num % 1000 == 0 else str(num)


def make_reference(
    path: Path, shards: ShardImages, extractor: Extractor, *, batch_size: int, rank: int, ranks: int
) -> None:
    """Write the reference file of a data set; collective."""
    if shards.num_images <= NEIGHBOURS:
        raise UserError(f"--shards {shards.index.folder}: {shards.num_images} images are too few for statistics")
    found = collect(shards, extractor, batch_size=batch_size, rank=rank, ranks=ranks, what="reference", keep=False)
    if rank == 0:
        spatial = None if found.spatial is None else found.spatial.statistics()
        write_reference(path, found.pooled.statistics(), spatial, shards, extractor)


def build_result(
    scores: dict[str, float],
    samples: NpzImages | FolderImages,
    reference: Reference | None,
    extractor: Extractor | None,
    clip: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a reader needs beside the scores to compare them with others.

    Args:
        reference, extractor: None where nothing was compared with a reference.
        clip: which CLIP saw which prompts, where one did.
    """
    recorded = read_sampling_record(samples)
    result: dict[str, Any] = {
        "scores": scores,
        "samples": {"file": str(samples.path), "images": samples.num_images, "size": samples.size},
    }
    if reference is not None and extractor is not None:
        result["reference"] = {
            "file": str(reference.path),
            "statistics": "stored" if reference.pooled is not None else "of its images",
            "images": reference.images.num_images if reference.images is not None else 0,
            "size": reference.images.size if reference.images is not None else None,
        }
        result |= {"extractor": describe(extractor), "neighbours": NEIGHBOURS}
    if clip is not None:
        result["clip"] = clip
    facts = [*SAMPLING_FACTS, *(PROMPT_FACTS if "prompts" in recorded else CLASS_FACTS)]
    facts += [name for name in (*TOLERANCES, "class_names", "recalibrated_on") if name in recorded]
    return {**result, "sampling": {name: recorded.get(name, NOT_RECORDED) for name in facts}}


def read_sampling_record(samples: NpzImages | FolderImages) -> dict[str, Any]:
    """What the sampling.json beside the samples says, if it is about as many images; else nothing."""
    path = beside(samples.path, "sampling.json")
    try:
        record = read_json_object(path)
    except (OSError, ValueError):
        return {}
    return record if record.get("num") == samples.num_images else {}


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    samples, reference, clip = result["samples"], result.get("reference"), result.get("clip")
    num = samples["images"]
    titles = {
        "fid": "FID", "sfid": "sFID", "clean_fid": "clean-FID", "fd_dinov2": "FD-DINOv2", "clip_fd": "CLIP-FD",
        "frechet_distance": "Frechet distance", "inception_score": "Inception score", "precision": "precision",
        "recall": "recall", "clip_score": "CLIPScore",
    }  # fmt: skip
    lines = [("samples", f"{samples['file']}: {num:,} images, {samples['size']}")]
    if reference is not None:
        facts = f"statistics {reference['statistics']}, {reference['images']:,} images"
        lines += [("reference", f"{reference['file']}: {facts}"), ("extractor", result["extractor"])]
    if clip is not None:
        lines += [("CLIP", f"{clip['model']} ({clip['sha256'][:12]})")]
        lines += [("prompts", f"{clip['prompts']}: {clip['cut']:,} longer than CLIP reads, cut")]
    lines += [
        (f"{titles.get(key.rpartition('_')[0], key.rpartition('_')[0])} of {num:,} samples", f"{value:.4f}")
        for key, value in result["scores"].items()
    ]
    lines += [(name, _readable(value)) for name, value in result["sampling"].items()]
    # A mean of each image's own score, as CLIP's, does not shift with the number of images.
    if reference is not None and num != FULL_SAMPLES:
        lines.append(("note", f"scores of {num:,} samples do not compare with those of {FULL_SAMPLES:,}"))
    width = max(len(title) for title, _ in lines)
    return "".join(f"{title:<{width}}  {value}\n" for title, value in lines)


def _readable(value: Any) -> str:
    """A fact for a table: four significant digits, lists without brackets, - for what was not set."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, list):
        return " ".join(map(_readable, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_width(moments: Moments, stored: Statistics, reference: Reference) -> None:
    if len(stored.mean_F) != moments.width:
        raise UserError(
            f"{reference.named}: its statistics are of {len(stored.mean_F)} features, the extractor has "
            f"{moments.width}; make one with --make-reference"
        )


def _slice(x: Tensor, rank: int, ranks: int) -> slice:
    rows = rows_of_rank(len(x), rank, ranks)
    return slice(rows.start, rows.stop)
