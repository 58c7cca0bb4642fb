"""What turns images into features: FID's Inception network, a torch.export program, or a function of the user's own.

Shape legend: N images, C channels, H = W image size, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_dist.command import import_callable
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.inception import PUBLISHED_SHA256, load_inception
from diffmoe_dist.files import file_sha256


@dataclass(frozen=True)
class Features:
    pooled_NF: Tensor  # for the Frechet distance, precision and recall
    spatial_NF: Tensor | None = None  # for sFID
    classes_NK: Tensor | None = None  # probabilities, for the Inception score


@dataclass(frozen=True)
class Extractor:
    """Features of images (N, 3, H, W) uint8 on `device`."""

    named: str  # how the user named it, for messages: `--features FILE`
    identity: str  # recorded with reference statistics: those of another extractor cannot be compared
    device: torch.device
    is_inception: bool
    function: Callable[[Tensor], Features]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Of images (N, C, H, W) uint8 with one channel or three, wherever they are."""
        features = self.function(images.to(self.device).expand(-1, 3, -1, -1))
        x_NF = features.pooled_NF
        if not isinstance(x_NF, Tensor) or x_NF.ndim != 2 or len(x_NF) != len(images):
            found = list(x_NF.shape) if isinstance(x_NF, Tensor) else type(x_NF).__name__
            raise UserError(f"{self.named}: it returned {found} for {len(images)} images; return (N, F)")
        if not x_NF.isfinite().all():
            raise UserError(f"{self.named}: it returned features that are not finite")
        return features


def open_extractor(inception: str | None, features: str | None, device: torch.device) -> Extractor:
    """The extractor that the options --inception FILE.pth or --features FILE.pt2|module:callable name.

    Raises:
        UserError: not exactly one is given, or what it names cannot be used.
    """
    if (inception is None) == (features is None):
        raise UserError("give --inception FILE.pth or --features FILE.pt2|module:callable, one of them")
    if inception is not None:
        return open_inception(inception, device)
    assert features is not None
    return open_features(features, device)


def open_inception(path: str, device: torch.device, named: str | None = None) -> Extractor:
    """FID's Inception network with the weights of a file.

    Args:
        named: how the user named the file, for messages; None: `--inception FILE`.

    Raises:
        UserError: it cannot be used.
    """
    named = named or f"--inception {path}"
    model = load_inception(path, named).to(device)

    def function(images: Tensor) -> Features:
        output = model(images)
        return Features(output.pooled, output.spatial, output.logits.softmax(dim=1))

    return Extractor(named, f"inception {file_sha256(Path(path))}", device, is_inception=True, function=function)


def open_features(features: str, device: torch.device, named: str | None = None) -> Extractor:
    """The extractor FILE.pt2 or module:callable.

    Args:
        named: how the user named it, for messages; None: `--features FILE`.

    Raises:
        UserError: it cannot be used.
    """
    named = named or f"--features {features}"
    if features.endswith(".pt2"):
        return _open_program(features, device, named)
    if ":" in features and not features.endswith((".pt", ".pth", ".py")):
        return _import_function(features, device, named)
    raise UserError(f"{named}: neither a file NAME.pt2 nor a module:callable")


def describe(extractor: Extractor) -> str:
    """For a reader: which network with which weights."""
    if not extractor.is_inception:
        return extractor.identity
    digest = extractor.identity.split()[1][: len(PUBLISHED_SHA256)]
    if digest == PUBLISHED_SHA256:
        return f"Inception of 2015-12-05, the published weights ({digest})"
    return f"Inception of 2015-12-05, weights from another file ({digest}) than the published {PUBLISHED_SHA256}"


def _open_program(path: str, device: torch.device, named: str) -> Extractor:
    from diffmoe_dist.evaluation.exported import load_program  # torch.export takes a second to import

    try:
        program = load_program(Path(path), device)
    except Exception as error:  # torch.export fails in any way on a damaged file
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{named}: not a torch.export program that can be used: {reason}") from None

    def function(images: Tensor) -> Features:
        try:
            return Features(program(images))
        except Exception as error:  # of operators on tensors, in any way
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"{named}: the program cannot take {images.dtype} {list(images.shape)}: {reason}; "
                "export it for uint8 (N, 3, H, W) with any N"
            ) from error

    return Extractor(named, f"program {file_sha256(Path(path))}", device, is_inception=False, function=function)


def _import_function(name: str, device: torch.device, named: str) -> Extractor:
    """The user's own code: what it raises is shown as it is."""
    found: Any = import_callable(name, named)
    if isinstance(found, torch.nn.Module):
        found = found.to(device).eval()
    return Extractor(named, name, device, is_inception=False, function=lambda images: Features(found(images)))
