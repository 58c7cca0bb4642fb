"""What turns images into features: FID's Inception network, a DINOv2 or CLIP of a local folder, or a function.

What the Frechet distance of the features is called follows: FID, clean-FID, FD-DINOv2, CLIP-FD.

Shape legend: N images, C channels, H = W image size, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffmoe_dist.data.encoding import load_in_fp32, model_sha256, one_line
from diffmoe_dist.data.model_folder import check_model_folder
from diffmoe_dist.data.text_encoder import without_loading_bar
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.inception import INPUT_SIZE, PUBLISHED_SHA256, load_inception
from diffmoe_dist.files import file_sha256
from diffmoe_dist.own_code import import_callable

DINOV2_SIZE, DINOV2_PATCH = 224, 14
_IMAGENET_MEAN, _IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHOICES = "--inception FILE.pth or --features FOLDER|module:callable, one of them"


@dataclass(frozen=True)
class Features:
    pooled_NF: Tensor  # for the Frechet distance, precision and recall
    spatial_NF: Tensor | None = None  # for sFID
    classes_NK: Tensor | None = None  # probabilities, for the Inception score


@dataclass(frozen=True)
class Extractor:
    """Features of images, computed on `device`."""

    named: str  # how the user named it, for messages: `--features FOLDER`
    identity: str  # recorded with reference statistics: those of another extractor cannot be compared
    device: torch.device
    distance: str  # the name of the Frechet distance of its features: fid, clean_fid, fd_dinov2, clip_fd or ...
    function: Callable[[Tensor], Features]  # of images (N, 3, H, W): uint8, or what `resize` gives
    resize: Callable[[Tensor], Tensor] | None = None  # one image (3, H, W) uint8 to its input; None: all have one size

    @torch.no_grad()
    def __call__(self, images: Tensor | Sequence[Tensor]) -> Features:
        """Of images (C, H, W) uint8 with one channel or three, wherever they are.

        Raises:
            UserError: they are of several sizes and must have one, or the features are none.
        """
        of_three = [image.expand(3, -1, -1) for image in images]
        if self.resize is not None:
            with ThreadPoolExecutor() as threads:  # Pillow resizes without Python's lock
                of_three = list(threads.map(self.resize, of_three))
        self.check_one_size({image.shape[1:] for image in of_three})
        features = self.function(torch.stack(of_three).to(self.device))
        x_NF = features.pooled_NF
        if not isinstance(x_NF, Tensor) or x_NF.ndim != 2 or len(x_NF) != len(images):
            found = list(x_NF.shape) if isinstance(x_NF, Tensor) else type(x_NF).__name__
            raise UserError(f"{self.named}: it returned {found} for {len(images)} images; return (N, F)")
        if not x_NF.isfinite().all():
            raise UserError(f"{self.named}: it returned features that are not finite")
        return features

    def check_one_size(self, sizes: set[torch.Size]) -> None:
        """Raises UserError: there are several (H, W)."""
        if len(sizes) > 1:
            (height, width), (other_height, other_width) = sorted(sizes)[:2]
            raise UserError(
                f"{self.named}: images of several sizes ({height} x {width} and {other_height} x {other_width}) have "
                "no such score; give images of one size"
            )


def open_extractor(inception: str | None, features: str | None, device: torch.device, clean: bool = False) -> Extractor:
    """The extractor that the options --inception FILE.pth or --features FOLDER|module:callable name.

    Args:
        clean: the Inception network sees images as clean-fid resizes them.

    Raises:
        UserError: not exactly one is given, or what it names cannot be used.
    """
    if (inception is None) == (features is None):
        raise UserError(f"give {_CHOICES}")
    if inception is not None:
        return open_clean_inception(inception, device) if clean else open_inception(inception, device)
    assert features is not None
    return open_features(features, device)


def open_inception(path: str, device: torch.device, named: str | None = None) -> Extractor:
    """FID's Inception network with the weights of a file; images enter as in ADM's evaluator.

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

    return Extractor(named, f"inception {file_sha256(Path(path))}", device, "fid", function)


def open_clean_inception(path: str, device: torch.device) -> Extractor:
    """The same network; images enter as clean-fid resizes them. Raises UserError: it cannot be used."""
    named = f"--inception {path}"
    model = load_inception(path, named).to(device)
    identity = f"clean-fid 0.1.35 inception {file_sha256(Path(path))}"

    def function(inputs: Tensor) -> Features:
        return Features(model.of_inputs(inputs).pooled)

    return Extractor(named, identity, device, "clean_fid", function, resize_as_clean_fid)


def resize_as_clean_fid(image: Tensor) -> Tensor:
    """(3, H, W) uint8 to (3, 299, 299) fp32, unrounded: Pillow's bicubic of each channel, clipped to [0, 255]."""
    size = (INPUT_SIZE, INPUT_SIZE)
    channels = [Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC) for channel in image.float().numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel).clip(0, 255) for channel in channels]))


def open_features(features: str, device: torch.device, named: str | None = None) -> Extractor:
    """The extractor in the local folder of a DINOv2 or a CLIP, or module:callable.

    Args:
        named: how the user named it, for messages; None: `--features FOLDER`.

    Raises:
        UserError: it cannot be used.
    """
    named = named or f"--features {features}"
    if Path(features).is_dir():
        return _open_folder(Path(features), device, named)
    if ":" in features and not features.endswith((".pt", ".pth", ".pt2", ".py")):
        return _import_function(features, device, named)
    raise UserError(f"{named}: neither the local folder of a DINOv2 or CLIP nor a module:callable; give one of them")


def describe(extractor: Extractor) -> str:
    """For a reader: which network with which weights."""
    if extractor.distance in ("fd_dinov2", "clip_fd"):
        return f"{extractor.named}: {extractor.identity}"
    if extractor.distance == "frechet_distance":
        return extractor.identity
    digest = extractor.identity.split()[-1][: len(PUBLISHED_SHA256)]
    network = "Inception of 2015-12-05"
    if extractor.distance == "clean_fid":
        network += " on images resized as by clean-fid"
    if digest == PUBLISHED_SHA256:
        return f"{network}, the published weights ({digest})"
    return f"{network}, weights from another file ({digest}) than the published {PUBLISHED_SHA256}"


def _open_folder(folder: Path, device: torch.device, named: str) -> Extractor:
    kind = check_model_folder(folder, named, "a DINOv2 or a CLIP", ("dinov2", "clip", "clip_vision_model"))
    digest = model_sha256(folder, "config.json", "preprocessor_config.json", "*.safetensors")
    identity = f"{kind.partition('_')[0]} {digest}"  # whatever the folder is called
    if kind == "dinov2":
        return Extractor(named, identity, device, "fd_dinov2", _open_dinov2(folder, device, named), resize_as_dgm_eval)
    function, resize = _open_clip(folder, device, named)
    return Extractor(named, identity, device, "clip_fd", function, resize)


def _open_dinov2(folder: Path, device: torch.device, named: str) -> Callable[[Tensor], Features]:
    """The class token after the last norm, as Stein et al. (2023) take it (arXiv 2306.04675)."""
    from transformers import Dinov2Model

    with without_loading_bar():
        architecture: Any = Dinov2Model
        model = load_in_fp32(architecture, folder, named, dtype=torch.float32).to(device)
    if model.config.patch_size != DINOV2_PATCH:
        raise UserError(f"{named}: has patches of {model.config.patch_size} pixels, not {DINOV2_PATCH}; fetch it again")
    table = model.embeddings.position_embeddings
    table.data = position_table_as_published(table, DINOV2_SIZE // DINOV2_PATCH)

    def function(images: Tensor) -> Features:
        mean, deviation = (images.new_tensor(of, dtype=torch.float32) for of in (_IMAGENET_MEAN, _IMAGENET_DEVIATION))
        x = (images.float() / 255 - mean[:, None, None]) / deviation[:, None, None]
        return Features(model(pixel_values=x).last_hidden_state[:, 0])

    return function


def position_table_as_published(table: Tensor, size: int) -> Tensor:
    """A DINOv2's position table (1, 1 + M * M, D) for size * size patches, (1, 1 + size * size, D).

    The published model resizes by (size + 0.1) / M; transformers resizes by size / M.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    scale = (size + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def resize_as_dgm_eval(image: Tensor) -> Tensor:
    """(3, H, W) uint8 to (3, 224, 224) uint8: Pillow's bicubic, whatever the ratio of the sides."""
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (DINOV2_SIZE, DINOV2_SIZE), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _open_clip(
    folder: Path, device: torch.device, named: str
) -> tuple[Callable[[Tensor], Features], Callable[[Tensor], Tensor]]:
    """CLIP's image embedding before it is normalised, as clean-fid takes it; and what prepares an image."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    with without_loading_bar():
        architecture: Any = CLIPVisionModelWithProjection
        model = load_in_fp32(architecture, folder, named, dtype=torch.float32).to(device)
    try:
        processor = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files make it fail in any way
        raise UserError(f"{named}: does not load ({one_line(error)}); fetch the folder again") from error

    def resize(image: Tensor) -> Tensor:
        prepared = processor([image.numpy()], input_data_format="channels_first", return_tensors="pt")
        return prepared["pixel_values"][0]

    return lambda inputs: Features(model(pixel_values=inputs).image_embeds), resize


def _import_function(name: str, device: torch.device, named: str) -> Extractor:
    """The user's own code: what it raises is shown as it is."""
    found: Any = import_callable(name, named)
    if isinstance(found, torch.nn.Module):
        found = found.to(device).eval()
    return Extractor(named, name, device, "frechet_distance", lambda images: Features(found(images)))
