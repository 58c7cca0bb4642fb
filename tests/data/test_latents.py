from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.folder import PROGRESS_NAME
from data_tools.latents import LatentSettings, encode_latents
from data_tools.parallel import Workers
from data_tools.verify import verify
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.images import crop_image, decode_image
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.data.latents import Autoencoder
from diffmoe_dist.data.loader import TrainingDataset
from diffmoe_dist.data.randomness import Stream, sample_generator
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from tests.data.folders import png, random_images, write_folder

NUM_SAMPLES = 11
SIZE = 16


def save_autoencoder(folder: Path, **settings: Any) -> Path:
    """A tiny one with random weights: 3 x 16 x 16 pixels to 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **{"latent_channels": 4, **settings},
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"), shift_factor=0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    images = random_images(NUM_SAMPLES, 20)  # larger than what is encoded
    samples = [{"png": png(image), "cls": str(number % 2).encode()} for number, image in enumerate(images)]
    return write_folder(tmp_path_factory.mktemp("base") / "shards", samples, [5, 0, 6])


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, base: ShardIndex, vae: Path) -> Path:
    out = tmp_path_factory.mktemp("latents") / "latents"
    encode_latents(base, out, LatentSettings(vae, SIZE, batch_size=4))
    return out


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(latents, tmp_path / "latents"))


def _batch(base: ShardIndex, latents: Path, positions: range, flip: bool = True) -> Batch:
    data = TrainingData((DataSet.open(base.folder, latents),), SIZE // 2)
    return TrainingDataset(data, 5, flip)[positions]


def _files(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def test_latents_are_those_of_encoding_while_training_to_the_rounding_of_fp16(
    base: ShardIndex, latents: Path, vae: Path
) -> None:
    from diffusers import AutoencoderKL

    module = AutoencoderKL.from_pretrained(vae)
    batch = _batch(base, latents, range(2 * NUM_SAMPLES))
    mirrored = 0
    for row, (epoch, sample_id) in enumerate(zip(batch.epochs.tolist(), batch.sample_ids.tolist(), strict=True)):
        generator = sample_generator(5, Stream.TRAINING, epoch, sample_id)
        flip = generator.random(3)[2] < 0.5
        noise = generator.standard_normal((4, 8, 8), dtype=np.float32)
        assert np.array_equal(batch.noise[row], noise)
        eps = torch.from_numpy(generator.standard_normal((4, 8, 8), dtype=np.float32))
        pixels = np.asarray(crop_image(decode_image(base.read(sample_id)["png"], 3), SIZE, "adm"))
        image = torch.from_numpy((pixels[:, ::-1] if flip else pixels).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = module.encode(image).latent_dist
        online = ((posterior.mean + posterior.std * eps) - 0.1) * 0.18215
        # fp16 keeps 11 bits: mean to 2^-11 of itself, std to 2^-12 of the log variance; and what fp32 rounds.
        error = posterior.mean.abs() * 2**-11 + posterior.std * eps.abs() * posterior.logvar.abs() * 2**-12 + 1e-5
        assert ((batch.images[row] - online[0]).abs() <= 0.18215 * error[0]).all()
        mirrored += flip
    assert 5 <= mirrored <= 17


def test_a_latent_is_sampled_anew_in_every_epoch_and_labels_come_from_the_base(base: ShardIndex, latents: Path) -> None:
    batch = _batch(base, latents, range(2 * NUM_SAMPLES), flip=False)
    images = {(int(e), int(i)): image for e, i, image in zip(batch.epochs, batch.sample_ids, batch.images, strict=True)}
    assert len(images) == 2 * NUM_SAMPLES
    assert not any(torch.equal(images[0, number], images[1, number]) for number in range(NUM_SAMPLES))
    assert torch.equal(batch.labels, batch.sample_ids % 2)


def test_the_index_says_what_the_latents_are(base: ShardIndex, latents: Path) -> None:
    index = ShardIndex.open(latents)
    spec = index.latents
    assert spec is not None and index.base is not None
    assert (spec.channels, spec.height, spec.width, spec.views) == (4, 8, 8, ("plain", "flip"))
    assert (spec.scale, spec.shift) == ((0.18215,) * 4, (0.1,) * 4)
    assert (spec.input_range, spec.image_size, spec.crop) == ((-1.0, 1.0), SIZE, "adm")
    assert index.base.fingerprint == base.fingerprint
    assert [index.key(sample) for sample in range(NUM_SAMPLES)] == [base.key(sample) for sample in range(NUM_SAMPLES)]
    assert [shard.num_samples for shard in index.shards] == [5, 0, 6]
    assert not verify(ShardIndex.open(latents), full=True).problems


def test_encoding_again_gives_the_same_bytes_and_writes_only_what_is_missing(
    base: ShardIndex, latents: Path, copy: Path, vae: Path
) -> None:
    (copy / "latents-000002.tar").unlink()
    kept = (copy / "latents-000000.tar").stat().st_mtime_ns
    encode_latents(base, copy, LatentSettings(vae, SIZE, batch_size=4))
    assert _files(copy) == _files(latents)
    assert (copy / "latents-000000.tar").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(base: ShardIndex, latents: Path, vae: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        settings = LatentSettings(vae, SIZE, batch_size=4)
        encode_latents(base, tmp_path / "out", settings, workers=Workers(executor, 1))
    assert _files(tmp_path / "out") == _files(latents)


def test_a_folder_begun_with_another_autoencoder_is_refused(base: ShardIndex, copy: Path, tmp_path: Path) -> None:
    other = save_autoencoder(tmp_path / "other", scaling_factor=0.5)
    with pytest.raises(UserError, match="OUT=.*: packed before with other arguments"):
        encode_latents(base, copy, LatentSettings(other, SIZE, batch_size=4))


def test_an_image_that_cannot_be_encoded_leaves_no_latent_and_another_sample_stands_in(
    vae: Path, tmp_path: Path
) -> None:
    samples = [{"png": png(image), "cls": b"1"} for image in random_images(4, SIZE)]
    samples[1] = {"png": samples[1]["png"][: len(samples[1]["png"]) // 2], "cls": b"0"}
    samples.append({"png": b"not an image", "cls": b"0"})
    base = write_folder(tmp_path / "base", samples, [4, 1])
    out = tmp_path / "latents"
    with pytest.raises(UserError, match="--max-bad=1: 2 bad samples so far, as test-000001.tar, key 000000004"):
        encode_latents(base, out, LatentSettings(vae, SIZE), max_bad=1)
    assert encode_latents(base, out, LatentSettings(vae, SIZE), max_bad=2).num_bad == 2
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(item["key"], item["reason"][:12]) for item in listed] == [
        ("000000001", "does not dec"), ("000000004", "not an image"),
    ]  # fmt: skip
    assert not verify(ShardIndex.open(out), full=True).problems
    batch = _batch(base, out, range(5))
    assert sorted(batch.sample_ids[batch.bad > 0].tolist()) == [1, 4]
    assert batch.labels.tolist() == [1] * 5 and batch.images.isfinite().all()


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    meta = json.loads((folder / "index.json").read_text())
    change(meta)
    (folder / "index.json").write_text(json.dumps(meta))


def test_a_cache_of_mean_and_standard_deviation_is_refused(base: ShardIndex, copy: Path) -> None:
    _edit(copy, lambda meta: meta["latents"].update(parametrisation="mean_std"))
    with pytest.raises(UserError, match="latents are mean_std, this program reads mean_logvar"):
        DataSet.open(base.folder, copy)


def test_latents_of_other_images_are_refused(latents: Path, tmp_path: Path) -> None:
    samples = [{"png": png(image), "cls": b"0"} for image in random_images(NUM_SAMPLES, 20)]
    other = write_folder(tmp_path / "other", samples, [NUM_SAMPLES])
    with pytest.raises(UserError, match="computed from another data set .* than .*other"):
        DataSet.open(other.folder, latents)
    with pytest.raises(UserError, match="not a side folder"):
        DataSet.open(other.folder, other.folder)


def test_latents_are_not_taken_for_text(base: ShardIndex, latents: Path) -> None:
    with pytest.raises(UserError, match=f"data.text={latents}: holds no text; .* encode-text"):
        DataSet.open(base.folder, None, latents)


def test_mirrored_training_needs_mirrored_latents(base: ShardIndex, vae: Path, tmp_path: Path) -> None:
    encode_latents(base, tmp_path / "plain", LatentSettings(vae, SIZE, flip=False))
    assert _batch(base, tmp_path / "plain", range(4), flip=False).images.shape == (4, 4, 8, 8)
    with pytest.raises(UserError, match="data.flip=true, but .*plain holds no mirrored latents"):
        _batch(base, tmp_path / "plain", range(4), flip=True)


def test_a_latent_of_another_shape_is_damage(base: ShardIndex, copy: Path) -> None:
    _edit(copy, lambda meta: meta["latents"].update(height=4, width=16))
    data = TrainingData((DataSet.open(base.folder, copy),), 8)
    with pytest.raises(CorruptShardError, match=r"latent.npy has shape \(2, 8, 8, 8\), the index says \(2, 8, 4, 16\)"):
        TrainingDataset(data, 0, False)[range(1)]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_size": 15}, "--size=15: one latent pixel stands for 2 pixels"),
        ({"vae": Path("nowhere")}, "--vae=nowhere: no config.json that can be read"),
        ({"batch_size": 0}, "--batch-size=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    base: ShardIndex, vae: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        encode_latents(base, tmp_path / "out", LatentSettings(**{"vae": vae, "image_size": SIZE, **change}))
    assert not (tmp_path / "out").exists()


def test_an_autoencoder_with_a_weight_missing_is_refused(vae: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(vae, tmp_path / "broken"))
    weights = load_file(broken / "diffusion_pytorch_model.safetensors")
    weights.pop("decoder.conv_in.weight")
    save_file(weights, broken / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="--vae=.*broken: lacks weights, as decoder.conv_in.weight"):
        Autoencoder.open(broken, "--vae", "cpu")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"layers_per_block": 10**7}, "config.json says layers_per_block 10000000, the weights say"),
        ({"block_out_channels": [10**9]}, "config.json says block_out_channels 1000000000, the weights say"),
        ({"block_out_channels": [10**4] * 10**4}, "config.json says"),
        ({"act_fn": "none"}, "does not load"),
    ],
)
def test_an_autoencoder_of_other_sizes_than_its_weights_is_refused_before_it_is_made(
    vae: Path, tmp_path: Path, edit: dict[str, object], problem: str
) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, **edit}))
    with pytest.raises(UserError, match=f"--vae=.*{problem}"):
        Autoencoder.open(tmp_path / "vae", "--vae", "cpu")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"no"])
def test_an_autoencoder_whose_file_is_cut_or_a_pointer_is_refused(vae: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(vae, tmp_path / "vae")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    weights.write_bytes(content)
    with pytest.raises(UserError, match=rf"--vae=.*{weights.name} is (cut or damaged|a pointer of Git LFS)"):
        Autoencoder.open(tmp_path / "vae", "--vae", "cpu")


def test_decoding_undoes_the_scaling_and_does_not_depend_on_the_chunks(vae: Path) -> None:
    from diffusers import AutoencoderKL

    module, z = AutoencoderKL.from_pretrained(vae), torch.randn(19, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.decode(z).sample
    found = Autoencoder.open(vae, "--decoder", "cpu").decode((z - 0.1) * 0.18215)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_per_channel_means_and_deviations_of_an_autoencoder_are_its_shift_and_scale(tmp_path: Path) -> None:
    folder = save_autoencoder(
        tmp_path / "vae", scaling_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 5.0]
    )
    opened = Autoencoder.open(folder, "--vae", "cpu")
    assert (opened.scale, opened.shift) == ((0.5, 0.25, 0.125, 0.1), (0.0, 1.0, 2.0, 3.0))


def test_a_run_interrupted_between_shards_goes_on(base: ShardIndex, latents: Path, vae: Path, tmp_path: Path) -> None:
    def stop(num_samples: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode_latents(base, out, LatentSettings(vae, SIZE, batch_size=4), on_shard=stop)
    assert (out / PROGRESS_NAME).is_dir() and not (out / "index.json").exists()
    encode_latents(base, out, LatentSettings(vae, SIZE, batch_size=4))
    assert _files(out) == _files(latents)
