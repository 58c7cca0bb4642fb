from __future__ import annotations

import dataclasses
import io
import itertools
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.digits import DigitsSource
from data_tools.pack import pack
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.data.loader import Batch, TrainingLoader
from diffmoe_dist.errors import UserError

NUM_SAMPLES = 100
GLOBAL_BATCH = 8


class _FewDigits(DigitsSource):
    def __len__(self) -> int:
        return NUM_SAMPLES


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    out = tmp_path_factory.mktemp("packed")
    pack(_FewDigits(), out, samples_per_shard=30, seed=0)
    return ShardIndex.open(out)


def _steps(
    index: ShardIndex, first: int, last: int, *, ranks: int, micro: int = 2, workers: int = 0, flip: bool = True
) -> list[list[list[Batch]]]:
    """What optimizer steps `first` .. `last` - 1 read, as [step][micro-step][rank]."""
    accumulation = GLOBAL_BATCH // (micro * ranks)
    of_rank = []
    for rank in range(ranks):
        loader = TrainingLoader(
            index,
            seed=5,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro,
            rank=rank,
            world_size=ranks,
            images_seen=first * GLOBAL_BATCH,
            flip=flip,
            num_workers=workers,
        )
        of_rank.append([next(loader) for _ in range((last - first) * accumulation)])
        loader.close()
    micro_steps = [list(batches) for batches in zip(*of_rank, strict=True)]
    return [micro_steps[start : start + accumulation] for start in range(0, len(micro_steps), accumulation)]


def _samples(steps: list[list[list[Batch]]]) -> list[tuple[int, int, Batch]]:
    """(epoch, sample id, batch of one) in the order of the stream."""
    found = []
    for batch in itertools.chain.from_iterable(itertools.chain.from_iterable(steps)):
        for row in range(len(batch.labels)):
            one = Batch(*(getattr(batch, field.name)[row : row + 1] for field in dataclasses.fields(batch)))
            found.append((int(one.epochs), int(one.sample_ids), one))
    return found


def _assert_same(left: Batch, right: Batch) -> None:
    for field in dataclasses.fields(Batch):
        assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "ranks_after"), [(1, 2), (2, 4), (4, 1), (2, 1)])
def test_each_sample_comes_once_an_epoch_across_a_resume_on_other_ranks(
    index: ShardIndex, ranks: int, ranks_after: int, workers: int
) -> None:
    steps = _steps(index, 0, 6, ranks=ranks, workers=workers)
    steps += _steps(index, 6, 25, ranks=ranks_after, workers=workers)  # 25 steps of 8 are two epochs of 100
    visits = Counter((epoch, sample) for epoch, sample, _ in _samples(steps))
    assert visits == Counter(itertools.product(range(2), range(NUM_SAMPLES)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (4, 2), (2, 1), (1, 1)])
def test_the_stream_of_samples_is_the_same_for_every_split(
    index: ShardIndex, ranks: int, micro: int, workers: int
) -> None:
    expected = _samples(_steps(index, 0, 15, ranks=1, micro=8))
    found = _samples(_steps(index, 0, 15, ranks=ranks, micro=micro, workers=workers))
    assert [name[:2] for name in found] == [name[:2] for name in expected]


def test_what_is_drawn_for_a_sample_depends_on_nothing_but_sample_and_epoch(index: ShardIndex) -> None:
    expected = _samples(_steps(index, 0, 25, ranks=1, micro=8))
    found = _samples(_steps(index, 0, 9, ranks=4, micro=1, workers=2))
    found += _samples(_steps(index, 9, 25, ranks=2, micro=2))
    for (_, _, left), (_, _, right) in zip(expected, found, strict=True):
        _assert_same(left, right)


def test_every_epoch_draws_anew(index: ShardIndex) -> None:
    by_name = {(epoch, sample): one for epoch, sample, one in _samples(_steps(index, 0, 25, ranks=1, micro=8))}
    for sample in range(NUM_SAMPLES):
        first, second = by_name[0, sample], by_name[1, sample]
        assert torch.equal(first.labels, second.labels)
        assert not torch.equal(first.noise, second.noise)
        assert first.time_uniform != second.time_uniform and first.drop_uniform != second.drop_uniform


def test_a_batch_holds_the_packed_images_and_labels(index: ShardIndex) -> None:
    for _, sample, one in _samples(_steps(index, 0, 12, ranks=1, flip=False)):
        payloads = index.read(sample)
        gray = np.asarray(Image.open(io.BytesIO(payloads["png"]))).astype(np.float64)
        np.testing.assert_allclose(one.images[0, 0].numpy(), gray / 127.5 - 1, atol=1e-6)
        assert int(one.labels) == int(payloads["cls"])


def test_a_flip_mirrors_about_half_of_the_images_and_moves_no_other_draw(index: ShardIndex) -> None:
    plain, flipped = (_samples(_steps(index, 0, 25, ranks=1, micro=8, flip=flip)) for flip in (False, True))
    mirrored = 0
    for (_, _, left), (_, _, right) in zip(plain, flipped, strict=True):
        mirrored += not torch.equal(left.images, right.images)
        assert torch.equal(right.images, left.images) or torch.equal(right.images, left.images.flip(-1))
        _assert_same(left, dataclasses.replace(right, images=left.images))
    assert 70 <= mirrored <= 130


def test_a_batch_has_the_promised_shapes_types_and_ranges(index: ShardIndex) -> None:
    batch = _steps(index, 0, 1, ranks=1, micro=8)[0][0][0].to("cpu")
    assert batch.images.shape == batch.noise.shape == (8, 1, 8, 8)
    assert batch.images.dtype == batch.noise.dtype == torch.float32
    assert batch.images.min() >= -1 and batch.images.max() <= 1
    assert batch.time_uniform.dtype == batch.drop_uniform.dtype == torch.float64
    assert ((batch.time_uniform > 0) & (batch.time_uniform < 1)).all()
    assert batch.labels.dtype == batch.sample_ids.dtype == batch.epochs.dtype == torch.int64


def test_noise_is_standard_normal(index: ShardIndex) -> None:
    noise = torch.cat([one.noise for _, _, one in _samples(_steps(index, 0, 25, ranks=1, micro=8))])
    assert abs(noise.mean()) < 0.04 and abs(noise.std() - 1) < 0.03  # 12,800 numbers: 4 and 5 standard errors


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_leaves_the_global_generator_and_no_process_behind(index: ShardIndex, workers: int) -> None:
    before, children = torch.get_rng_state(), set(multiprocessing.active_children())
    loader = TrainingLoader(
        index,
        seed=0,
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        images_seen=0,
        flip=False,
        num_workers=workers,
    )
    next(loader)
    assert len(set(multiprocessing.active_children()) - children) == workers
    loader.close()
    loader.close()
    assert set(multiprocessing.active_children()) == children
    assert torch.equal(torch.get_rng_state(), before)
    assert next(loader, None) is None


def test_a_batch_size_that_does_not_divide_is_refused_at_once(index: ShardIndex) -> None:
    with pytest.raises(UserError, match="train.global_batch_size=8"):
        TrainingLoader(
            index,
            seed=0,
            global_batch_size=8,
            micro_batch_size=3,
            rank=0,
            world_size=1,
            images_seen=0,
            flip=False,
            num_workers=0,
        )


def _png(mode: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 128 if mode == "L" else (255, 0, 51)).save(file, format="PNG")
    return file.getvalue()


class _OneSample:
    """A source of one sample, whatever it holds."""

    name = "one"
    class_names: Sequence[str] = ("a", "b")
    image_size = 8

    def __init__(self, payloads: dict[str, bytes], channels: int = 1) -> None:
        self.payloads, self.channels = payloads, channels
        self.fields: Sequence[str] = tuple(payloads)

    def __len__(self) -> int:
        return 1

    def read(self, item: int) -> dict[str, bytes]:
        return self.payloads


def _only_batch(out: Path, source: _OneSample, workers: int = 0) -> Batch:
    pack(source, out, samples_per_shard=1, seed=0)
    loader = TrainingLoader(
        ShardIndex.open(out),
        seed=0,
        global_batch_size=1,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        images_seen=0,
        flip=False,
        num_workers=workers,
    )
    try:
        return next(loader)
    finally:
        loader.close()


@pytest.mark.parametrize(
    ("png", "cls", "problem"),
    [
        (_png("L", (8, 9)), b"0", "image is 8x9 pixels, the index says 8x8"),
        (_png("L", (8, 8))[:-30], b"0", "png does not decode"),
        (b"not an image", b"0", "png does not decode"),
        (_png("L", (8, 8)), b"2", "label 2 is outside 0..1"),
        (_png("L", (8, 8)), b"-1", "label -1 is outside 0..1"),
        (_png("L", (8, 8)), b"cat", "label b'cat' is not a number"),
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


@pytest.mark.parametrize("fields", [("txt", "cls"), ("png", "txt")])
def test_shards_without_images_or_labels_are_refused(tmp_path: Path, fields: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="data.shards=.* lack an image .* or a label"):
        _only_batch(tmp_path, _OneSample(dict.fromkeys(fields, b"0")))
