from __future__ import annotations

import dataclasses
import io
import itertools
import multiprocessing
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.loader import repeat_first_sample
from data_tools.digits import DigitsSource
from data_tools.pack import PackSettings, pack
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.images import crop_image
from diffmoe_dist.data.index import CorruptShardError
from diffmoe_dist.data.loader import TrainingDataset, TrainingLoader
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.errors import UserError
from tests.data.folders import png, random_images, write_folder

NUM_SAMPLES = 100
GLOBAL_BATCH = 8


class _FewDigits(DigitsSource):
    def __len__(self) -> int:
        return NUM_SAMPLES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    out = tmp_path_factory.mktemp("packed")
    pack(_FewDigits(), out, PackSettings(samples_per_shard=30))
    return TrainingData((DataSet.open(out),), 8)


def _steps(
    data: TrainingData, first: int, last: int, *, ranks: int, micro: int = 2, workers: int = 0, flip: bool = True
) -> list[list[list[Batch]]]:
    """What optimizer steps `first` .. `last` - 1 read, as [step][micro-step][rank]."""
    accumulation = GLOBAL_BATCH // (micro * ranks)
    of_rank = []
    for rank in range(ranks):
        split = BatchSplit(GLOBAL_BATCH, micro, rank, ranks)
        loader = TrainingLoader(data, split, seed=5, images_seen=first * GLOBAL_BATCH, flip=flip, num_workers=workers)
        try:
            of_rank.append([next(loader) for _ in range((last - first) * accumulation)])
        finally:
            loader.close()
    micro_steps = [list(batches) for batches in zip(*of_rank, strict=True)]
    return [micro_steps[start : start + accumulation] for start in range(0, len(micro_steps), accumulation)]


def _samples(steps: list[list[list[Batch]]]) -> list[tuple[int, int, Batch]]:
    """(epoch, sample id, batch of one) in the order of the stream."""
    found = []
    for batch in itertools.chain.from_iterable(itertools.chain.from_iterable(steps)):
        for row in range(len(batch.labels)):
            one = batch._map(lambda tensor, row=row: tensor[row : row + 1])  # type: ignore[misc]
            found.append((int(one.epochs), int(one.sample_ids), one))
    return found


def _assert_same(left: Batch, right: Batch) -> None:
    for name, value in vars(left).items():
        assert not isinstance(value, Tensor) or torch.equal(value, getattr(right, name)), name


@pytest.fixture(scope="module", params=["uneven shards", "fewer shards than ranks"])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    sizes = {"uneven shards": [1, 0, 55, 7, 3, 0, 34], "fewer shards than ranks": [NUM_SAMPLES]}[request.param]
    folder = tmp_path_factory.mktemp("layout") / "shards"
    return TrainingData((DataSet(write_folder(folder, _colour_samples(NUM_SAMPLES), sizes)),), 8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "ranks_after"), [(1, 1), (1, 2), (2, 4), (4, 1), (2, 1), (4, 4)])
def test_each_sample_comes_once_an_epoch_across_a_resume_on_other_ranks(
    layout: TrainingData, ranks: int, ranks_after: int, workers: int
) -> None:
    data = layout
    steps = _steps(data, 0, 6, ranks=ranks, workers=workers)
    steps += _steps(data, 6, 25, ranks=ranks_after, workers=workers)  # 25 steps of 8 are two epochs of 100
    visits = Counter((epoch, sample) for epoch, sample, _ in _samples(steps))
    assert visits == Counter(itertools.product(range(2), range(NUM_SAMPLES)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (4, 2), (2, 1), (1, 1)])
def test_the_stream_of_samples_is_the_same_for_every_split(
    data: TrainingData, ranks: int, micro: int, workers: int
) -> None:
    expected = _samples(_steps(data, 0, 15, ranks=1, micro=8))
    found = _samples(_steps(data, 0, 15, ranks=ranks, micro=micro, workers=workers))
    assert [name[:2] for name in found] == [name[:2] for name in expected]


def test_the_random_numbers_of_a_sample_depend_on_nothing_but_sample_and_epoch(data: TrainingData) -> None:
    expected = _samples(_steps(data, 0, 25, ranks=1, micro=8))
    found = _samples(_steps(data, 0, 9, ranks=4, micro=1, workers=2))
    found += _samples(_steps(data, 9, 25, ranks=2, micro=2))
    for (_, _, left), (_, _, right) in zip(expected, found, strict=True):
        _assert_same(left, right)


def test_every_epoch_draws_anew(data: TrainingData) -> None:
    by_name = {(epoch, sample): one for epoch, sample, one in _samples(_steps(data, 0, 25, ranks=1, micro=8))}
    for sample in range(NUM_SAMPLES):
        first, second = by_name[0, sample], by_name[1, sample]
        assert torch.equal(first.labels, second.labels)
        assert not torch.equal(first.noise, second.noise)
        assert first.time_uniform != second.time_uniform and first.drop_uniform != second.drop_uniform


def test_a_batch_holds_the_packed_images_and_labels(data: TrainingData) -> None:
    for _, sample, one in _samples(_steps(data, 0, 12, ranks=1, flip=False)):
        payloads = data.datasets[0].base.read(sample)
        gray = np.asarray(Image.open(io.BytesIO(payloads["png"]))).astype(np.float64)
        np.testing.assert_allclose(one.images[0, 0].numpy(), gray / 127.5 - 1, atol=1e-6)
        assert int(one.labels) == int(payloads["cls"])


def test_a_flip_mirrors_about_half_of_the_images_and_changes_no_other_number(data: TrainingData) -> None:
    plain, flipped = (_samples(_steps(data, 0, 25, ranks=1, micro=8, flip=flip)) for flip in (False, True))
    mirrored = 0
    for (_, _, left), (_, _, right) in zip(plain, flipped, strict=True):
        mirrored += not torch.equal(left.images, right.images)
        assert torch.equal(right.images, left.images) or torch.equal(right.images, left.images.flip(-1))
        _assert_same(left, dataclasses.replace(right, images=left.images))
    assert 70 <= mirrored <= 130


def test_a_batch_has_the_promised_shapes_types_and_ranges(data: TrainingData) -> None:
    batch = _steps(data, 0, 1, ranks=1, micro=8)[0][0][0].to("cpu")
    assert batch.images.shape == batch.noise.shape == (8, 1, 8, 8)
    assert batch.images.dtype == batch.noise.dtype == torch.float32
    assert batch.images.min() >= -1 and batch.images.max() <= 1
    assert batch.time_uniform.dtype == batch.drop_uniform.dtype == torch.float64
    assert ((batch.time_uniform > 0) & (batch.time_uniform < 1)).all()
    assert batch.labels.dtype == batch.sample_ids.dtype == batch.epochs.dtype == torch.int64


def test_noise_is_standard_normal(data: TrainingData) -> None:
    noise = torch.cat([one.noise for _, _, one in _samples(_steps(data, 0, 25, ranks=1, micro=8))])
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03  # 12,800 numbers: 4 and 5 standard errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_leaves_the_global_generator_and_no_process_behind(data: TrainingData, workers: int) -> None:
    before, children = torch.get_rng_state(), set(multiprocessing.active_children())
    loader = TrainingLoader(data, BatchSplit(8, 8), seed=0, num_workers=workers)
    next(loader)
    assert len(set(multiprocessing.active_children()) - children) == workers
    loader.close()
    loader.close()
    assert set(multiprocessing.active_children()) == children
    assert torch.equal(torch.get_rng_state(), before)
    assert next(loader, None) is None


def _png(mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 128 if mode == "L" else (255, 0, 51)).save(file, format="PNG")
    return file.getvalue()


class _OneSample:
    """A source of one sample, whatever it holds."""

    name = "one"
    class_names: Sequence[str] = ("a", "b")
    image_size: int | None = 8
    labels: np.ndarray | None = None

    def __init__(self, payloads: dict[str, bytes], channels: int = 1) -> None:
        self.payloads, self.channels = payloads, channels

    def __len__(self) -> int:
        return 1

    def item_name(self, item: int) -> str:
        return "the one"

    def part(self, items: np.ndarray) -> _OneSample:
        return self

    def read(self, item: int) -> dict[str, bytes]:
        return self.payloads


def _only_batch(out: Path, source: _OneSample, workers: int = 0) -> Batch:
    pack(source, out, PackSettings(samples_per_shard=1))
    loader = TrainingLoader(TrainingData((DataSet.open(out),), 8), BatchSplit(1, 1), seed=0, num_workers=workers)
    try:
        return next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize(
    ("png", "cls", "problem"),
    [
        (_png("L", (8, 9)), b"0", "image is 8x9 pixels, the index says 8x8"),
        (_png("L", (8, 8))[:-30], b"0", "does not decode"),
        (b"not an image", b"0", "not an image; so it is with 16 samples tried in its place"),
        (_png("L", (8, 8)), b"2", "label 2 is outside 0..1"),
        (_png("L", (8, 8)), b"-1", "label -1 is not a whole number from 0"),
        (_png("L", (8, 8)), b"cat", "label 'cat' is not a number"),
    ],
)
def test_a_sample_that_contradicts_the_index_is_reported_with_shard_and_key(
    tmp_path: Path, png: bytes, cls: bytes, problem: str
) -> None:
    with pytest.raises(CorruptShardError) as caught:
        _only_batch(tmp_path, _OneSample({"png": png, "cls": cls}))
    assert f"{tmp_path / 'one-000000.tar'}, key 000000000: {problem}" in str(caught.value)


def test_a_corrupt_sample_in_a_worker_stops_the_rank_with_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(CorruptShardError, match="one-000000.tar, key 000000000: label 7"):
        _only_batch(tmp_path, _OneSample({"png": _png("L", (8, 8)), "cls": b"7"}), workers=1)


def test_colour_images_have_their_channels_first(tmp_path: Path) -> None:
    batch = _only_batch(tmp_path, _OneSample({"png": _png("RGB", (8, 8)), "cls": b"1"}, channels=3))
    assert batch.images.shape == (1, 3, 8, 8)
    np.testing.assert_allclose(batch.images[0, :, 0, 0].numpy(), [1.0, -1.0, -0.6], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "problem"), [(("txt", "cls"), "lack an image"), (("png", "txt"), "has classes but no cls")]
)
def test_shards_without_images_or_labels_are_refused(tmp_path: Path, fields: tuple[str, str], problem: str) -> None:
    with pytest.raises(UserError, match=f"data.shards=.* {problem}"):
        _only_batch(tmp_path, _OneSample(dict.fromkeys(fields, b"0")))


def _colour_samples(count: int, size: int = 8) -> list[dict[str, bytes]]:
    return [{"png": png(image), "cls": str(i % 2).encode()} for i, image in enumerate(random_images(count, size))]


@pytest.fixture(scope="module")
def with_bad(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """100 samples, of which every tenth does not decode."""
    samples = _colour_samples(NUM_SAMPLES)
    samples[::10] = [{**sample, "png": sample["png"][: len(sample["png"]) // 2]} for sample in samples[::10]]
    index = write_folder(tmp_path_factory.mktemp("bad") / "shards", samples, [NUM_SAMPLES])
    return TrainingData((DataSet(index),), 8)


def test_a_bad_sample_is_replaced_by_the_same_one_in_every_epoch_on_any_rank_and_worker(with_bad: TrainingData) -> None:
    expected = _samples(_steps(with_bad, 0, 25, ranks=1, micro=8))
    found = _samples(_steps(with_bad, 0, 9, ranks=4, micro=1, workers=2)) + _samples(_steps(with_bad, 9, 25, ranks=2))
    for (_, _, left), (_, _, right) in zip(expected, found, strict=True):
        _assert_same(left, right)
    images = np.stack([np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in _colour_samples(NUM_SAMPLES)])
    standing_in: dict[int, set[int]] = {}
    for _, sample, one in expected:
        assert (int(one.bad) > 0) == (sample % 10 == 0)
        seen = np.rint((one.images[0].numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
        matches = [i for i, image in enumerate(images) if (image == seen).all() or (image[:, ::-1] == seen).all()]
        assert len(matches) == 1 and matches[0] % 10 > 0
        assert int(one.labels) == matches[0] % 2  # of the image that is there
        standing_in.setdefault(sample, set()).add(matches[0])
    assert all(len(found) == 1 for found in standing_in.values())
    assert len(set.union(*(found for sample, found in standing_in.items() if sample % 10 == 0))) > 5


def test_bad_samples_are_logged_by_shard_and_key(with_bad: TrainingData, caplog: pytest.LogCaptureFixture) -> None:
    _steps(with_bad, 0, 13, ranks=1, micro=8, workers=2)
    lines = [record.getMessage() for record in caplog.records if "stands in" in record.getMessage()]
    shard = with_bad.datasets[0].base.folder / "test-000000.tar"
    assert f"{shard}, key 000000010: does not decode; another sample stands in" in lines
    assert len(set(lines)) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_stops_the_run_with_shard_and_key(tmp_path: Path, workers: int) -> None:
    index = write_folder(tmp_path / "shards", _colour_samples(8), [8])
    _, offset, size, _ = index.entries(5)[0]
    shard = tmp_path / "shards" / "test-000000.tar"
    content = bytearray(shard.read_bytes())
    content[offset + size // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShardError, match=re.escape(f"{shard}, key 000000005: png is damaged")):
        _steps(TrainingData((DataSet(index),), 8), 0, 1, ranks=1, workers=workers)


def test_images_of_any_size_are_cropped_to_what_the_model_takes(tmp_path: Path) -> None:
    sizes = [8, 12, 16, 40, 64]
    originals = [random_images(1, size)[0][:, : size - size // 8] for size in sizes]
    samples = [{"png": png(image), "cls": b"0"} for image in originals]
    data = TrainingData((DataSet(write_folder(tmp_path / "shards", samples, [2, 3])),), 8)
    for _, sample, one in _samples(_steps(data, 0, 2, ranks=1, flip=False)):
        cropped = np.asarray(crop_image(Image.fromarray(originals[sample]), 8, "adm"))
        np.testing.assert_allclose(one.images[0].numpy(), cropped.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    folder = tmp_path_factory.mktemp("mixture")
    sizes = ([5, 15], [7, 0, 3])  # of the shards; 20 and 10 samples
    datasets = [
        DataSet(write_folder(folder / str(number), _colour_samples(sum(shards)), shards))
        for number, shards in enumerate(sizes)
    ]
    return TrainingData(tuple(datasets), 8, (1.0, 0.6))


def test_a_mixture_is_the_same_stream_for_every_split_and_across_a_resume(mixture: TrainingData) -> None:
    expected = _samples(_steps(mixture, 0, 16, ranks=1, micro=8))
    found = _samples(_steps(mixture, 0, 5, ranks=4, micro=1, workers=2)) + _samples(_steps(mixture, 5, 16, ranks=2))
    for (_, _, left), (_, _, right) in zip(expected, found, strict=True):
        _assert_same(left, right)


def test_each_data_set_of_a_mixture_has_its_share_and_its_own_epochs(mixture: TrainingData) -> None:
    samples = _samples(_steps(mixture, 0, 16, ranks=2))  # 128 samples: 80 and 48 by the weights 1 and 0.6
    visits = Counter((epoch, sample) for epoch, sample, _ in samples)
    first = Counter({name: count for name, count in visits.items() if name[1] < 20})
    second = visits - first
    assert first == Counter(itertools.product(range(4), range(20)))
    assert (second.total(), max(second.values())) == (48, 1)
    assert {name for name in second if name[0] < 4} == set(itertools.product(range(4), range(20, 30)))
    assert len({one.noise.numpy().tobytes() for _, _, one in samples}) == 128  # also where local ids are the same


def test_data_sets_of_different_kinds_are_not_mixed(mixture: TrainingData, tmp_path: Path) -> None:
    other = DataSet(write_folder(tmp_path / "other", _colour_samples(4), [4], class_names=["a", "c"]))
    with pytest.raises(UserError, match=r"data\.mixture: .*other has not the classes of .*; mix data of one kind"):
        TrainingData((mixture.datasets[0], other), 8, (1.0, 1.0))


def test_the_fingerprint_of_a_mixture_tells_its_data_sets_and_weights(mixture: TrainingData) -> None:
    alone = TrainingData(mixture.datasets[:1], 8)
    assert alone.fingerprint == mixture.datasets[0].base.fingerprint
    others = [alone, TrainingData(mixture.datasets, 8, (1.0, 0.5)), TrainingData(mixture.datasets[::-1], 8, (1.0, 0.6))]
    assert len({data.fingerprint for data in [mixture, *others]}) == 4


def test_the_memory_of_a_worker_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    peaks = []
    index = write_folder(tmp_path / "one", _colour_samples(1), [1])
    for count in (10_000, 1_000_000):
        data = TrainingData((DataSet(repeat_first_sample(index, tmp_path / str(count), count)),), 8)
        tracemalloc.start()
        dataset = pickle.loads(pickle.dumps(TrainingDataset(data, 0, False)))  # as a worker gets it
        for start in (0, count // 2, count - 8):
            assert dataset[range(start, start + 8)].images.shape == (8, 3, 8, 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # An order holds 4 bytes for every 64 samples, and sorts 16 for a moment.
    assert peaks[1] - peaks[0] < 500_000
