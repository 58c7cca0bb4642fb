"""The Inception network of FID, in plain torch: the TensorFlow graph of 2015-12-05 that published FIDs are made with.

It is not torchvision's Inception v3: 1008 classes, average pools that leave the padding out of the mean, a maximum pool
in the last block, TensorFlow's resize of old. The names of its tensors are those of the published ports, pytorch-fid's
`pt_inception-2015-12-05-6726825d.pth` and torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; the weights
come from a local file.

Shape legend: N images, C channels, H = W image size, F features, K classes.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.errors import UserError
from diffmoe_dist.files import refuse_irregular

INPUT_SIZE = 299
POOLED_FEATURES, SPATIAL_CHANNELS, CLASSES = 2048, 7, 1008
PUBLISHED_SHA256 = "6726825d"  # how the digest of the published file begins, and what its name ends with
_WANTED = "give pytorch-fid's or torch-fidelity's file of inception-2015-12-05"


class InceptionOutput(NamedTuple):
    pooled: Tensor  # (N, 2048), what FID, precision and recall are computed on
    spatial: Tensor  # (N, 2023): 17 x 17 places of 7 channels, for sFID
    logits: Tensor  # (N, 1008), without the last layer's bias, as ADM's evaluator has them for the Inception score


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def along(inputs: int, outputs: int, width: int) -> Convolution:
    """A convolution over `width` neighbours in a row, the size kept."""
    return Convolution(inputs, outputs, (1, width), padding=(0, width // 2))


def across(inputs: int, outputs: int, width: int) -> Convolution:
    """A convolution over `width` neighbours in a column, the size kept."""
    return Convolution(inputs, outputs, (width, 1), padding=(width // 2, 0))


def average_pool(x: Tensor) -> Tensor:
    """3 x 3 means, the size kept; TensorFlow does not count the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Block(nn.Module):
    """Branches of convolutions, their outputs side by side."""

    def chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(name)(x)
        return x


class BlockA(Block):
    """35 x 35 in, 35 x 35 out."""

    def __init__(self, inputs: int, pool_outputs: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1 = Convolution(inputs, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pool_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [
                self.branch1x1(x),
                self.chain(x, "branch5x5_1", "branch5x5_2"),
                self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                self.branch_pool(average_pool(x)),
            ],
            dim=1,
        )


class BlockB(Block):
    """35 x 35 in, 17 x 17 out."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(Block):
    """17 x 17 in, 17 x 17 out."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 192, 1)
        self.branch7x7_1 = Convolution(inputs, inner, 1)
        self.branch7x7_2 = along(inner, inner, 7)
        self.branch7x7_3 = across(inner, 192, 7)
        self.branch7x7dbl_1 = Convolution(inputs, inner, 1)
        self.branch7x7dbl_2 = across(inner, inner, 7)
        self.branch7x7dbl_3 = along(inner, inner, 7)
        self.branch7x7dbl_4 = across(inner, inner, 7)
        self.branch7x7dbl_5 = along(inner, 192, 7)
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [
                self.branch1x1(x),
                self.chain(x, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                self.chain(x, *(f"branch7x7dbl_{place}" for place in range(1, 6))),
                self.branch_pool(average_pool(x)),
            ],
            dim=1,
        )


class BlockD(Block):
    """17 x 17 in, 8 x 8 out."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inputs, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = along(192, 192, 7)
        self.branch7x7x3_3 = across(192, 192, 7)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        single = self.chain(x, "branch3x3_1", "branch3x3_2")
        double = self.chain(x, *(f"branch7x7x3_{place}" for place in range(1, 5)))
        return torch.cat([single, double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(Block):
    """8 x 8 in, 8 x 8 out; the last one of the network takes maxima where the others take means."""

    def __init__(self, inputs: int, last: bool) -> None:
        super().__init__()
        self.last = last
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a = along(384, 384, 3)
        self.branch3x3_2b = across(384, 384, 3)
        self.branch3x3dbl_1 = Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = along(384, 384, 3)
        self.branch3x3dbl_3b = across(384, 384, 3)
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else average_pool(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            dim=1,
        )


class Inception(nn.Module):
    """Images (N, 3, H, W) uint8 of any size to features; use it in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool_outputs=32)
        self.Mixed_5c = BlockA(256, pool_outputs=64)
        self.Mixed_5d = BlockA(288, pool_outputs=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, inner=128)
        self.Mixed_6c = BlockC(768, inner=160)
        self.Mixed_6d = BlockC(768, inner=160)
        self.Mixed_6e = BlockC(768, inner=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, last=False)
        self.Mixed_7c = BlockE(2048, last=True)
        self.fc = nn.Linear(POOLED_FEATURES, CLASSES)

    def forward(self, images: Tensor) -> InceptionOutput:
        assert images.dtype == torch.uint8, "the network was published for 8-bit images"
        return self.of_inputs(resize_as_tensorflow(images.float(), INPUT_SIZE))

    def of_inputs(self, images: Tensor) -> InceptionOutput:
        """Of images that are resized: (N, 3, 299, 299) fp32, from 0 to 255."""
        x = (images - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6c(self.Mixed_6b(x))
        # mixed_6/conv of the TensorFlow graph, whose channels come last: the first seven of each place
        spatial = self.Mixed_6d.branch1x1(x).permute(0, 2, 3, 1)[..., :SPATIAL_CHANNELS].flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pooled = x.mean(dim=(2, 3))
        return InceptionOutput(pooled, spatial, pooled @ self.fc.weight.T)


def resize_as_tensorflow(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) fp32 to (N, C, size, size), bilinear as TensorFlow 1 did it without align_corners.

    Pixel i of the output lies at i * H / size of the input: the corners are aligned on one side, the centres nowhere.
    """
    return _resize_axis(_resize_axis(images, 3, size), 2, size)


def _resize_axis(images: Tensor, axis: int, size: int) -> Tensor:
    old = images.shape[axis]
    scale = torch.tensor(old, dtype=torch.float32) / size  # TensorFlow computes the places in fp32
    place = (torch.arange(size) * scale).to(images.device)
    low = place.long()
    high = (low + 1).clamp(max=old - 1)
    fraction = (place - low).view(-1, *[1] * (images.ndim - 1 - axis))
    before = images.index_select(axis, low)
    return before + (images.index_select(axis, high) - before) * fraction


def load_inception(path: str | Path, named: str | None = None) -> Inception:
    """The network with the weights of a local file, in eval mode on the CPU.

    Args:
        named: how the user named the file, for messages; None: `--inception FILE`.

    Raises:
        UserError: the file is not there, cannot be read as tensors alone, or holds other tensors than the network's.
    """
    named = named or f"--inception {path}"
    weights = _read_weights(path, named)
    with torch.device("meta"):
        model = Inception()
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():
        if name not in weights:
            raise UserError(f"{named}: the tensor {name} is missing; {_WANTED}")
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{named}: {name} has shape {list(weights[name].shape)}, not {list(tensor.shape)}; {_WANTED}"
            )
    unknown = sorted(weights.keys() - wanted.keys())
    if unknown:
        raise UserError(f"{named}: the tensor {unknown[0]} is none of this network; {_WANTED}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None  # still without storage, and of no use in eval mode
    return model.eval().requires_grad_(False)


def _read_weights(path: str | Path, named: str) -> dict[str, Tensor]:
    """The tensors of a file that torch.save has written, without the counters of batches that some ports add."""
    try:
        weights = torch.load(refuse_irregular(Path(path)), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror}); {_WANTED}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{named}: not a file of tensors ({problem}); {_WANTED}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{named}: not a state dict, tensors by name; {_WANTED}")
    return {str(name): value for name, value in weights.items() if not str(name).endswith("num_batches_tracked")}
