"""The Inception network against an independent statement of it, written down from the TensorFlow graph.

With the published weights (DIFFMOE_INCEPTION), ADM's reference VIRTUAL_imagenet256_labeled.npz (DIFFMOE_REFERENCE) and
ADM's samples admnet_guided_upsampled_imagenet256.npz (DIFFMOE_SAMPLES) the scores are compared with the published ones.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.inception import (
    PUBLISHED_SHA256,
    Inception,
    average_pool,
    load_inception,
    resize_as_tensorflow,
)
from diffmoe_dist.files import file_sha256
from tests.machine import ROOT

SEVEN = ((1, 7), (7, 1))


def block_a(inputs: int, pool: int) -> list[tuple[Any, ...]]:
    return [
        (inputs, 64, 1), (inputs, 48, 1), (48, 64, 5), (inputs, 64, 1), (64, 96, 3), (96, 96, 3), (inputs, pool, 1),
    ]  # fmt: skip


def block_c(inner: int) -> list[tuple[Any, ...]]:
    factors = [(inner, inner, SEVEN[0]), (inner, 192, SEVEN[1])]
    double = [(inner, inner, SEVEN[1]), (inner, inner, SEVEN[0]), (inner, inner, SEVEN[1]), (inner, 192, SEVEN[0])]
    return [(768, 192, 1), (768, inner, 1), *factors, (768, inner, 1), *double, (768, 192, 1)]


def block_e(inputs: int) -> list[tuple[Any, ...]]:
    ends = [(384, 384, (1, 3)), (384, 384, (3, 1))]
    head = [(inputs, 320, 1), (inputs, 384, 1), (inputs, 448, 1), (448, 384, 3), (inputs, 192, 1)]
    return [*head, *ends, *ends]


# Module: channels and size of its output, and its convolutions (inputs, outputs, kernel)
STATEMENT = {
    "Conv2d_1a_3x3": (32, 149, [(3, 32, 3)]),
    "Conv2d_2a_3x3": (32, 147, [(32, 32, 3)]),
    "Conv2d_2b_3x3": (64, 147, [(32, 64, 3)]),
    "Conv2d_3b_1x1": (80, 73, [(64, 80, 1)]),
    "Conv2d_4a_3x3": (192, 71, [(80, 192, 3)]),
    "Mixed_5b": (256, 35, block_a(192, 32)),
    "Mixed_5c": (288, 35, block_a(256, 64)),
    "Mixed_5d": (288, 35, block_a(288, 64)),
    "Mixed_6a": (768, 17, [(288, 384, 3), (288, 64, 1), (64, 96, 3), (96, 96, 3)]),
    "Mixed_6b": (768, 17, block_c(128)),
    "Mixed_6c": (768, 17, block_c(160)),
    "Mixed_6d": (768, 17, block_c(160)),
    "Mixed_6e": (768, 17, block_c(192)),
    "Mixed_7a": (
        1280, 8,
        [(768, 192, 1), (192, 320, 3), (768, 192, 1), (192, 192, SEVEN[0]), (192, 192, SEVEN[1]), (192, 192, 3)],
    ),
    "Mixed_7b": (2048, 8, block_e(1280)),
    "Mixed_7c": (2048, 8, block_e(2048)),
}  # fmt: skip
# Inception v3 without its auxiliary head has 23,834,568 parameters with 1000 classes; this one has 1008.
PARAMETERS = 23_834_568 + 8 * (2048 + 1)


@pytest.fixture(scope="module")
def model() -> Inception:
    torch.manual_seed(0)
    model = Inception().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # torch's own start would shrink the signal to nothing
    return model


@pytest.fixture(scope="module")
def seen(model: Inception) -> dict[str, Tensor]:
    """Inputs (`name<`) and outputs of every module on two images, and the network's three answers."""
    values: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values[f"{name}<"], values[name] = inputs[0].clone(), output.clone()

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    output = model(images)
    for hook in hooks:
        hook.remove()
    return {**values, **output._asdict()}


@pytest.mark.parametrize("name", STATEMENT)
def test_a_block_has_the_shape_and_the_convolutions_of_the_published_graph(
    model: Inception, seen: dict[str, Tensor], name: str
) -> None:
    channels, size, convolutions = STATEMENT[name]
    assert seen[name].shape == (2, channels, size, size)
    block = model.get_submodule(name)
    found = Counter(tuple(module.weight.shape) for module in block.modules() if isinstance(module, nn.Conv2d))
    kernels = [(i, o, (k, k) if isinstance(k, int) else k) for i, o, k in convolutions]
    assert found == Counter((o, i, *k) for i, o, k in kernels)
    # a weight for each tap, and scale and shift of the batch norm; no biases
    expected = sum(i * o * math.prod(k) + 2 * o for i, o, k in kernels)
    assert sum(parameter.numel() for parameter in block.parameters()) == expected
    assert all(module.eps == 0.001 for module in block.modules() if isinstance(module, nn.BatchNorm2d))


def test_the_network_has_as_many_parameters_as_the_published_one(model: Inception) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    assert set(STATEMENT) | {"fc"} == {name for name, _ in model.named_children()}


def test_blocks_join_their_branches_in_the_published_order(seen: dict[str, Tensor]) -> None:
    orders: dict[str, list[str | None]] = {
        "Mixed_5b": ["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"],
        "Mixed_6a": ["branch3x3", "branch3x3dbl_3", None],
        "Mixed_6b": ["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"],
        "Mixed_7a": ["branch3x3_2", "branch7x7x3_4", None],
        "Mixed_7c": [
            "branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool",
        ],
    }  # fmt: skip
    for block, branches in orders.items():
        pooled = nn.functional.max_pool2d(seen[f"{block}<"], 3, stride=2)
        parts = [pooled if branch is None else seen[f"{block}.{branch}"] for branch in branches]
        assert torch.equal(seen[block], torch.cat(parts, dim=1)), block


def test_rows_and_columns_take_turns_as_published(model: Inception) -> None:
    row, column = (1, 7), (7, 1)
    orders: dict[str, dict[Any, tuple[int, int]]] = {
        "Mixed_6e.branch7x7": {2: row, 3: column},
        "Mixed_6e.branch7x7dbl": {2: column, 3: row, 4: column, 5: row},
        "Mixed_7a.branch7x7x3": {2: row, 3: column},
        "Mixed_7c.branch3x3": {"2a": (1, 3), "2b": (3, 1)},
        "Mixed_7c.branch3x3dbl": {"3a": (1, 3), "3b": (3, 1)},
    }
    for branch, kernels in orders.items():
        for place, kernel in kernels.items():
            assert model.get_submodule(f"{branch}_{place}.conv").kernel_size == kernel, (branch, place)


def test_average_pools_leave_the_padding_out_and_the_last_block_takes_maxima(seen: dict[str, Tensor]) -> None:
    assert torch.equal(average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    corner = average_pool(torch.arange(9.0).view(1, 1, 3, 3))[0, 0, 0, 0]
    assert corner == (0 + 1 + 3 + 4) / 4
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"):
        assert torch.equal(seen[f"{block}.branch_pool<"], average_pool(seen[f"{block}<"])), block
    x = seen["Mixed_7c<"]
    around = nn.functional.pad(x, (1, 1, 1, 1), value=-math.inf)
    assert torch.equal(seen["Mixed_7c.branch_pool<"][0, 0, 2, 5], around[0, 0, 2:5, 5:8].max())
    assert torch.equal(seen["Mixed_7c.branch_pool<"], nn.functional.max_pool2d(x, 3, stride=1, padding=1))


def test_the_spatial_features_are_seven_channels_of_each_place_channels_last(seen: dict[str, Tensor]) -> None:
    assert seen["spatial"].shape == (2, 17 * 17 * 7)
    for image, row, column, channel in ((0, 0, 0, 0), (1, 3, 16, 6), (0, 16, 2, 5)):
        expected = seen["Mixed_6d.branch1x1"][image, channel, row, column]
        assert seen["spatial"][image, (row * 17 + column) * 7 + channel] == expected


def test_pooled_features_are_means_over_places_and_logits_leave_the_bias_out(
    model: Inception, seen: dict[str, Tensor]
) -> None:
    torch.testing.assert_close(seen["pooled"], seen["Mixed_7c"].mean(dim=(2, 3)))
    assert seen["pooled"].std() > 0.01, "there is something to compare"
    assert model.fc.bias.abs().max() > 0
    expected = torch.einsum("nf,kf->nk", seen["pooled"].double(), model.fc.weight.double())
    torch.testing.assert_close(seen["logits"].double(), expected, atol=1e-5, rtol=1e-5)


def test_images_enter_as_tensorflow_scales_them(seen: dict[str, Tensor]) -> None:
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen["Conv2d_1a_3x3<"], (resize_as_tensorflow(images.float(), 299) - 128) * 0.0078125)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 11), (32, 32, 299), (9, 9, 9), (13, 6, 4), (1, 2, 5)])
def test_the_resize_is_tensorflows_of_old(height: int, width: int, size: int) -> None:
    image = torch.rand(1, 2, height, width, generator=torch.Generator().manual_seed(1)) * 255
    expected = torch.empty(1, 2, size, size)
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            above = image[..., top, left] * (1 - dx) + image[..., top, right] * dx
            below = image[..., bottom, left] * (1 - dx) + image[..., bottom, right] * dx
            expected[..., row, column] = above * (1 - dy) + below * dy
    # Places are fp32: their fraction is good to 299 * 6e-8, times 255.
    torch.testing.assert_close(resize_as_tensorflow(image, size), expected, atol=1e-2, rtol=0)
    if height == width == size:
        assert torch.equal(resize_as_tensorflow(image, size), image)


def test_a_file_gives_the_network_that_was_saved(model: Inception, tmp_path: Path, seen: dict[str, Tensor]) -> None:
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for leave_out in (set(), counters):  # the ports differ in these
        path = tmp_path / f"{len(leave_out)}.pth"
        torch.save({name: value for name, value in model.state_dict().items() if name not in leave_out}, path)
        assert torch.equal(load_inception(path)(images).pooled, seen["pooled"])


def test_a_file_of_other_tensors_is_refused_by_the_name_of_one(model: Inception, tmp_path: Path) -> None:
    weights = model.state_dict()
    name = "Mixed_6c.branch7x7_2.conv.weight"
    cases = {
        rf"the tensor {name} is missing": {key: value for key, value in weights.items() if key != name},
        rf"{name} has shape \[160, 160, 7, 1\], not \[160, 160, 1, 7\]": {
            **weights, name: weights[name].transpose(2, 3),
        },
        r"fc\.weight has shape \[1000, 2048\], not \[1008, 2048\]": {**weights, "fc.weight": torch.zeros(1000, 2048)},
        r"the tensor AuxLogits\.fc\.bias is none of this network": {**weights, "AuxLogits.fc.bias": torch.zeros(1)},
        "not a state dict": [torch.zeros(1)],
    }  # fmt: skip
    for number, (message, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=f"--inception {path}: .*{message}"):
            load_inception(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_that_is_no_file_of_tensors_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    torch.save({"fc.weight": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": Bomb(tmp_path / "exploded")}, protocol=2))
    (tmp_path / "text.pth").write_text("weights")
    for name in ("bomb", "plain", "text"):
        with pytest.raises(UserError, match="not a file of tensors"):
            load_inception(tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="cannot be read"):
        load_inception(tmp_path / "nowhere.pth")
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "exploded").exists(), "it would have"


@pytest.mark.skipif(
    "DIFFMOE_INCEPTION" not in os.environ, reason="DIFFMOE_INCEPTION names no file of published weights"
)
def test_the_published_weights_load() -> None:
    path = Path(os.environ["DIFFMOE_INCEPTION"])
    assert file_sha256(path).startswith(PUBLISHED_SHA256)
    output = load_inception(path)(torch.full((1, 3, 64, 64), 128, dtype=torch.uint8))
    assert output.pooled.min() >= 0 and output.pooled.isfinite().all()


FILES = ("DIFFMOE_INCEPTION", "DIFFMOE_REFERENCE", "DIFFMOE_SAMPLES")


@pytest.mark.skipif(
    not set(FILES) <= set(os.environ), reason=f"{', '.join(FILES)} do not name weights, reference and samples"
)
def test_adms_samples_have_the_published_scores(tmp_path: Path) -> None:
    """Of ADM-G, upsampled, by the TensorFlow evaluator; the 60,000 images take hours without a GPU."""
    weights, reference, samples = (os.environ[name] for name in FILES)
    command = [sys.executable, "-m", "diffmoe_dist.evaluate", "--samples", samples, "--reference", reference]
    options = ["--inception", weights, "--out", str(tmp_path / "scores.json")]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    # TensorFlow takes distances between features in fp16, which moves precision and recall.
    published = {"fid": (3.9426, 0.01), "sfid": (6.1404, 0.01), "inception_score": (215.84, 0.5)}
    published |= {"precision": (0.8265, 0.005), "recall": (0.5309, 0.005)}
    for name, (value, tolerance) in published.items():
        assert scores[f"{name}_50k"] == pytest.approx(value, abs=tolerance), name
