"""The autoencoders that latents come from: AutoencoderKL of 16 channels, AutoencoderDC; statistics of latents."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.latents import LatentSettings, encode_latents
from data_tools.parallel import Workers
from data_tools.stats import count, describe
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import Autoencoder, LatentReader
from diffmoe_dist.data.loader import TrainingDataset
from diffmoe_dist.data.online import OnlineEncoders
from diffmoe_dist.errors import UserError
from tests.data.folders import png, random_images, write_folder
from tests.data.test_latents import save_autoencoder

SIZE, NUM_SAMPLES = 16, 5


def save_deep_compression(folder: Path, **settings: Any) -> Path:
    """A tiny AutoencoderDC with random weights: 3 x 16 x 16 pixels to 8 x 4 x 4 latents."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    widths = {f"{part}_block_out_channels": (8, 16, 16) for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")}
    scales = {f"{part}_qkv_multiscales": ((), (), (3,)) for part in ("encoder", "decoder")}
    types = {f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")}
    module: Any = AutoencoderDC(
        latent_channels=8, attention_head_dim=8, **widths, **layers, **scales, **types, **settings
    )
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    samples = [{"png": png(image), "cls": b"0"} for image in random_images(NUM_SAMPLES, SIZE)]
    return write_folder(tmp_path_factory.mktemp("base") / "shards", samples, [3, 2], image_size=SIZE)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deep_compression(tmp_path_factory.mktemp("deep") / "vae", scaling_factor=0.41407)


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like those of SD3 and FLUX: no convolutions around the latent, a shift."""
    folder = tmp_path_factory.mktemp("sixteen") / "vae"
    no_convolutions = {"use_quant_conv": False, "use_post_quant_conv": False}
    return save_autoencoder(folder, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **no_convolutions)


def _images(base: ShardIndex) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1], those of the base and their mirror images after them."""
    images = torch.from_numpy(random_images(base.num_samples, SIZE)).permute(0, 3, 1, 2) / 127.5 - 1
    return torch.cat([images, images.flip(-1)])


def _latents(base: ShardIndex, out: Path, vae: Path, parametrisation: str | None = None, **options: Any) -> ShardIndex:
    encode_latents(base, out, LatentSettings(vae, SIZE, parametrisation=parametrisation, batch_size=2), **options)
    return ShardIndex.open(out)


def _trained_on(base: ShardIndex, latents: ShardIndex) -> dict[tuple[int, int], np.ndarray]:
    """What training is given of each sample in two epochs."""
    assert latents.latents is not None
    data = TrainingData((DataSet.open(base.folder, latents.folder),), latents.latents.height)
    batch = TrainingDataset(data, 5, flip=False)[range(2 * NUM_SAMPLES)]
    ids = zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)
    return dict(zip(ids, batch.images.numpy(), strict=True))


def test_the_latents_of_an_autoencoderdc_are_its_own_scaled_without_noise(
    base: ShardIndex, deep: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderDC

    index = _latents(base, tmp_path / "out", deep)
    spec = index.latents
    assert spec is not None and spec.parametrisation == "mean"
    assert (spec.channels, spec.height, spec.views, spec.scale[0], spec.shift[0]) == (
        8, 4, ("plain", "flip"), 0.41407, 0.0,
    )  # fmt: skip
    module: Any = AutoencoderDC.from_pretrained(deep)
    with torch.no_grad():
        expected = module.encode(_images(base)).latent
        decoded = module.decode(expected).sample
    stored = np.stack([LatentReader(index).moments(sample) for sample in range(NUM_SAMPLES)]).swapaxes(0, 1)
    np.testing.assert_allclose(stored.reshape(expected.shape), expected, rtol=2**-10, atol=1e-5)
    for (_, sample_id), image in _trained_on(base, index).items():
        np.testing.assert_allclose(image, 0.41407 * expected[sample_id], rtol=2**-10, atol=1e-5)
    opened = Autoencoder.open(deep, "--decoder", "cpu")
    torch.testing.assert_close(opened.decode(expected * 0.41407), decoded, atol=1e-5, rtol=1e-4)


def test_sixteen_channels_with_a_shift_are_scaled_as_diffusers_pipelines_do(
    base: ShardIndex, sixteen: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    module: Any = AutoencoderKL.from_pretrained(sixteen)
    with torch.no_grad():
        mean = module.encode(_images(base)).latent_dist.mean
        decoded = module.decode(mean).sample
    sampled, means = _latents(base, tmp_path / "a", sixteen), _latents(base, tmp_path / "b", sixteen, "mean")
    assert [LatentReader(index).moments(0).shape for index in (sampled, means)] == [(2, 32, 8, 8), (2, 16, 8, 8)]
    found, noisy = _trained_on(base, means), _trained_on(base, sampled)
    for epoch, sample_id in found:
        expected = (mean[sample_id] - 0.0609) * 1.5305
        np.testing.assert_allclose(found[epoch, sample_id], expected, rtol=2**-9, atol=2e-4)
        assert abs(noisy[0, sample_id] - noisy[1, sample_id]).max() > 0.1
    opened = Autoencoder.open(sixteen, "--decoder", "cpu")
    torch.testing.assert_close(opened.decode((mean - 0.0609) * 1.5305), decoded, atol=1e-5, rtol=1e-4)


def test_latents_encoded_while_training_are_those_of_the_side_folder(
    base: ShardIndex, deep: Path, tmp_path: Path
) -> None:
    stored = _trained_on(base, _latents(base, tmp_path / "out", deep))
    encoders = OnlineEncoders(Autoencoder.open(deep, "data.autoencoder", "cpu"), None, ["fingerprint", None])
    data = TrainingData((DataSet.open(base.folder),), SIZE // 4, encoders=encoders)
    batch = encoders.encode(TrainingDataset(data, 5, flip=False)[range(NUM_SAMPLES)])
    for sample_id, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
        torch.testing.assert_close(image, torch.from_numpy(stored[0, sample_id]), atol=1e-3, rtol=2**-9)


def test_log_variances_of_an_autoencoder_without_and_means_in_a_mixture_with_others_are_refused(
    base: ShardIndex, deep: Path, sixteen: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--parametrisation=mean_logvar: --vae=.* is AutoencoderDC, which has no var"):
        _latents(base, tmp_path / "out", deep, "mean_logvar")
    folders = [_latents(base, tmp_path / name, sixteen, name).folder for name in ("mean", "mean_logvar")]
    with pytest.raises(UserError, match="has not the autoencoder of"):
        TrainingData(tuple(DataSet.open(base.folder, folder) for folder in folders), 8, (0.5, 0.5))
    with pytest.raises(UserError, match="OUT=.*: packed before with other arguments"):
        _latents(base, tmp_path / "mean", sixteen)


def test_statistics_of_latents_are_those_of_sampling_them_without_end(
    base: ShardIndex, sixteen: Path, tmp_path: Path
) -> None:
    index = _latents(base, tmp_path / "out", sixteen)
    found = count(index).latents
    assert found is not None
    reader = LatentReader(index)
    moments = np.stack([reader.moments(sample) for sample in range(NUM_SAMPLES)]).astype(np.float64)
    mean, deviation = moments[:, :, :16], np.exp(moments[:, :, 16:] / 2)
    draws = mean + deviation * np.random.default_rng(0).standard_normal((400, *mean.shape))  # (400, N, V, C, h, w)
    np.testing.assert_allclose(found.mean, mean.mean(axis=(0, 1, 3, 4)), rtol=1e-10)
    np.testing.assert_allclose(found.deviation, draws.std(axis=(0, 1, 2, 4, 5)), rtol=0.01)
    row = describe(index, count(index), index.folder).splitlines()[-16].split()
    scaled = [(found.mean[0] - 0.0609) * 1.5305, found.deviation[0] * 1.5305]
    expected = [0, found.mean[0], found.deviation[0], 0.0609, 1 / 1.5305, *scaled]
    np.testing.assert_allclose([float(value) for value in row], expected, rtol=1e-4)


def test_other_processes_count_the_same_to_the_last_bit(base: ShardIndex, deep: Path, tmp_path: Path) -> None:
    index = _latents(base, tmp_path / "out", deep)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as executor:
        first, second = count(index).latents, count(index, Workers(executor, 2)).latents
    assert first is not None and second is not None and first.count == second.count == 2 * 16 * NUM_SAMPLES
    assert first.total_C.tobytes() + first.squares_C.tobytes() == second.total_C.tobytes() + second.squares_C.tobytes()
