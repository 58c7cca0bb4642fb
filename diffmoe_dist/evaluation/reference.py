"""What samples are compared with: the statistics of a data set, and some of its images for precision and recall.

Or a folder of its images, all of them.

The file is ADM's `VIRTUAL_imagenet256_labeled.npz` and others of its layout: `mu`, `sigma` of the pooled features and
`mu_s`, `sigma_s` of the spatial ones over the whole data set, and `arr_0`, 10,000 of its images. Files made here also
say which extractor the statistics are of; ADM's are of the Inception network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffmoe_dist.data.encoding import one_line
from diffmoe_dist.data.randomness import Stream, permutation
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import Extractor
from diffmoe_dist.evaluation.image_sources import FolderImages, NpzImages, ShardImages
from diffmoe_dist.evaluation.metrics import Statistics
from diffmoe_dist.files import refuse_irregular, write_npz

REFERENCE_IMAGES = 10_000  # for precision and recall, as ADM


@dataclass(frozen=True)
class Reference:
    path: Path
    named: str  # how the user named it, for messages
    pooled: Statistics | None  # None: to be computed from the images, as ADM's evaluator does
    spatial: Statistics | None
    images: NpzImages | FolderImages | None
    has_manifold: bool = True  # whether its images are for precision and recall too


def read_reference(path: Path, extractor: Extractor, named: str | None = None) -> Reference:
    """Read a reference file, or a folder of images: all of a data set, for a distance alone.

    Args:
        named: how the user named it, for messages; None: `--reference FILE`.

    Raises:
        UserError: it is no such file, or its statistics are of another extractor.
    """
    named = named or f"--reference {path}"
    if path.is_dir():
        return Reference(path, named, None, None, FolderImages(path, named), has_manifold=False)
    try:
        with np.load(refuse_irregular(path), allow_pickle=False) as file:
            names = set(file.files)
            arrays = {name: file[name] for name in sorted(names & {"mu", "sigma", "mu_s", "sigma_s", "extractor"})}
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror or error}); give an npz file") from None
    except Exception as error:  # encrypted, cut, of unknown compression, of a header of 10^12 entries ...
        raise UserError(f"{named}: not an npz file of numbers ({one_line(error)})") from None
    images = NpzImages(path, named) if "arr_0" in names else None
    if "mu" not in arrays:
        if images is None:
            raise UserError(f"{named}: it has neither statistics (mu, sigma) nor images (arr_0)")
        return Reference(path, named, None, None, images)
    _check_extractor(named, arrays, extractor)
    spatial = _statistics(named, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None
    return Reference(path, named, _statistics(named, arrays, "mu", "sigma"), spatial, images)


def write_reference(
    path: Path, pooled: Statistics, spatial: Statistics | None, shards: ShardImages, extractor: Extractor
) -> None:
    """Write a reference file: the statistics, and 10,000 images (or all) chosen by a fixed permutation."""
    chosen = np.sort(permutation(shards.num_images, 0, Stream.PACKING, epoch=1)[:REFERENCE_IMAGES])
    images = np.stack([shards.image(int(sample_id)).transpose(1, 2, 0) for sample_id in chosen])
    arrays = {"mu": pooled.mean_F, "sigma": pooled.covariance_FF}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean_F, "sigma_s": spatial.covariance_FF}
    numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
    write_npz(path, **numbers, extractor=np.array(extractor.identity), arr_0=images)


def _check_extractor(named: str, arrays: dict[str, np.ndarray], extractor: Extractor) -> None:
    recorded = str(arrays["extractor"]) if "extractor" in arrays else None
    same = recorded == extractor.identity if recorded else extractor.distance == "fid"
    if not same:
        raise UserError(
            f"{named}: its statistics are of {recorded or 'the Inception network'}, not of "
            f"{extractor.identity}; make one of this extractor with --make-reference"
        )


def _statistics(named: str, arrays: dict[str, np.ndarray], mean: str, covariance: str) -> Statistics:
    mu, sigma = arrays[mean], arrays.get(covariance)
    if mu.ndim != 1 or sigma is None or sigma.shape != (len(mu), len(mu)):
        found = "is missing" if sigma is None else f"is {list(sigma.shape)}"
        raise UserError(f"{named}: {mean} is {list(mu.shape)} and {covariance} {found}; they do not fit")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{named}: {mean} or {covariance} holds numbers that are not finite; make it again")
    return Statistics(_double(mu), _double(sigma))


def _double(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.float64))
