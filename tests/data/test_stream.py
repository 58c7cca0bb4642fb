from __future__ import annotations

import logging
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.index import CorruptShardError
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.data.stream import StreamedData, StreamLoader
from diffmoe_dist.errors import UserError
from tests.data.folders import png, random_images, write_folder

NUM_SAMPLES = 24
SIZES = [5, 9, 1, 7, 2]
URLS = "test-{000000..000004}.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream") / "shards"
    samples = [{"png": png(image), "cls": b"1"} for image in random_images(NUM_SAMPLES, 8)]
    write_folder(folder, samples, SIZES)
    return folder


def _data(url: str, allow_pipe: bool = False) -> StreamedData:
    return StreamedData.open(url, allow_pipe=allow_pipe, channels=3, image_size=8, num_classes=2)


def _batches(data: StreamedData, count: int, *, rank: int = 0, ranks: int = 1, workers: int = 0) -> list[Batch]:
    loader = StreamLoader(data, BatchSplit(4 * ranks, 4, rank, ranks), seed=1, flip=True, num_workers=workers)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def _visits(batches: list[Batch], before_pass: int) -> Counter[int]:
    """How often each sample came in the passes before this one."""
    named = [(int(e), int(i)) for batch in batches for e, i in zip(batch.epochs, batch.sample_ids, strict=True)]
    return Counter(sample for number, sample in named if number < before_pass)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_has_every_sample_at_least_once_on_any_number_of_ranks_and_workers(
    shards: Path, ranks: int, workers: int
) -> None:
    data = _data(f"{shards}/{URLS}")
    visits: Counter[int] = Counter()
    for rank in range(ranks):  # every rank has as many batches as are asked for; 12 are more than a pass of all samples
        visits += _visits(_batches(data, 12, rank=rank, ranks=ranks, workers=workers), before_pass=1)
    assert len(visits) == NUM_SAMPLES
    if ranks * max(workers, 1) <= len(SIZES):  # no shard is read by two
        assert set(visits.values()) == {1}


def test_passes_have_different_orders_and_noise(shards: Path) -> None:
    batches = _batches(_data(f"{shards}/{URLS}"), 2 * NUM_SAMPLES // 4)
    order = [int(sample) for batch in batches for sample in batch.sample_ids]
    assert order[:NUM_SAMPLES] != order[NUM_SAMPLES:] and set(order[:NUM_SAMPLES]) == set(order[NUM_SAMPLES:])
    noise = torch.cat([batch.noise for batch in batches])
    assert len({row.numpy().tobytes() for row in noise}) == 2 * NUM_SAMPLES


def test_shards_are_read_from_the_output_of_a_command_that_is_allowed(shards: Path) -> None:
    command = f"pipe:cat {shards}/test-000001.tar"
    (batch,) = _batches(_data(command, allow_pipe=True), 1)
    assert batch.images.shape == (4, 3, 8, 8) and batch.labels.tolist() == [1] * 4


@pytest.mark.parametrize("url", ["pipe:touch {0}/ran", " pipe:touch {0}/ran", "a.tar::pipe:touch {0}/ran"])
def test_a_command_is_refused_and_not_run_unless_it_is_allowed(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs a command; set data.allow_pipe=true if you trust it"):
        _data(url.format(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    pickle = b"cposix\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode()
    samples = [{"png": png(image), "cls": b"1", "pkl": pickle, "pyd": pickle} for image in random_images(4, 8)]
    write_folder(tmp_path / "shards", samples, [4])
    _batches(_data(f"{tmp_path}/shards/test-000000.tar"), 2)
    assert not (tmp_path / "ran").exists()


def test_a_bad_sample_is_passed_over_and_counted(tmp_path: Path) -> None:
    samples = [{"png": png(image), "cls": b"1"} for image in random_images(8, 8)]
    samples[3] = {"png": b"not an image", "cls": b"0"}
    write_folder(tmp_path / "shards", samples, [8])
    batches = _batches(_data(f"{tmp_path}/shards/test-000000.tar"), 14)  # eight passes of seven good samples
    assert sum(int(batch.bad.sum()) for batch in batches) in (7, 8)
    assert all((batch.labels == 1).all() for batch in batches)


def test_a_label_that_the_model_does_not_have_stops_the_run_with_shard_and_key(tmp_path: Path) -> None:
    write_folder(tmp_path / "shards", [{"png": png(random_images(1, 8)[0]), "cls": b"7"}], [1])
    url = f"{tmp_path}/shards/test-000000.tar"
    with pytest.raises(CorruptShardError, match=f"{url}, key 000000000: label 7 is outside 0..1"):
        _batches(_data(url), 1)


def _damage(path: Path, damage: str) -> None:
    """Five of nine samples are before it; the fifth might not be whole."""
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[10].offset
    if damage == "cut between samples":
        del content[middle:]
    elif damage == "cut in a sample":
        del content[middle + 540 :]
    elif damage == "cut in a header":
        del content[middle + 100 :]
    elif damage == "zeroed header":
        content[middle : middle + 512] = bytes(512)
    elif damage == "damaged header":
        content[middle + 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage", ["cut between samples", "cut in a sample", "cut in a header", "zeroed header", "damaged header"]
)
def test_a_damaged_shard_gives_its_first_half_and_is_named_and_counted_in_every_pass(
    shards: Path, tmp_path: Path, damage: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "shards"))
    _damage(folder / "test-000001.tar", damage)
    with caplog.at_level(logging.WARNING, "diffmoe_dist.data"):
        batches = _batches(_data(f"{folder}/{URLS}"), 3 * 20 // 4, workers=workers)
    visits = _visits(batches, before_pass=2)
    assert set(visits.values()) == {2} and len(visits) == NUM_SAMPLES - (4 if damage == "cut in a sample" else 5)
    assert sum(int(batch.bad.sum()) for batch in batches) == 1 + int(batches[-1].epochs.max())
    assert "the rest of a shard is lost" in caplog.text
    if not workers:  # a worker process logs to the same file
        assert f"{folder}/test-000001.tar: damaged after sample 0000000" in caplog.text


def test_two_tars_in_one_file_are_a_damaged_shard(shards: Path, tmp_path: Path) -> None:
    joined = tmp_path / "t.tar"
    joined.write_bytes((shards / "test-000000.tar").read_bytes() + (shards / "test-000001.tar").read_bytes())
    batches = _batches(_data(str(joined)), 5)
    assert sum(int(batch.bad.sum()) for batch in batches) == 1 + int(batches[-1].epochs.max()) > 3


def test_a_shard_that_is_no_tar_is_named_and_counted(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"<html>404 Not Found</html>")
    batches = _batches(_data(f"{tmp_path}/t.tar::{shards}/test-000000.tar"), 5)
    assert sum(int(batch.bad.sum()) for batch in batches) == 4
    with pytest.raises(CorruptShardError, match="no sample in the shards of this worker"):
        _batches(_data(f"{tmp_path}/t.tar"), 1)


def test_compressed_shards_and_those_of_macos_are_read(shards: Path, tmp_path: Path) -> None:
    with tarfile.open(shards / "test-000000.tar") as old, tarfile.open(tmp_path / "t.tar.gz", "w:gz") as new:
        for member in old:
            hidden = tarfile.TarInfo(f"d/._{member.name}")
            new.addfile(hidden)
            content = old.extractfile(member)
            member.name = f"d/{member.name}"
            new.addfile(member, content)
    batches = _batches(_data(str(tmp_path / "t.tar.gz")), 5)
    assert all((batch.labels == 1).all() and not batch.bad.any() for batch in batches)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{0}/gone.tar", "no such file; name a tar"),
        ("file:{0}/gone.tar", "no such file; name a tar"),
        ("{0}", "a folder; a stream is of tars"),
        ("{0}/test-00000{{0..7}}.tar", "test-000005.tar: no such file"),
        ("s4://bucket/a.tar", "no way to open s4:; name a path or one of pipe, http"),
        ("__default__:a.tar", "no such file|no way to open"),
        ("", "a folder"),
        ("{0}/a-{{0..", "not a path or URL, nor a list of them"),
        ("${{NOT_SET}}/a.tar", "not a path or URL, nor a list of them"),
        ("{0}/a\0.tar", "no such file"),
        ("http://[/a.tar", "not a path or URL, nor a list of them|no way"),
    ],
)
def test_shards_that_cannot_be_opened_are_one_line(shards: Path, url: str, said: str) -> None:
    with pytest.raises(UserError, match=f"data.shards=.*({said})"):
        _data(url.format(shards))


def test_a_shard_that_is_gone_since_the_start_ends_the_run_by_name(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes((shards / "test-000000.tar").read_bytes())
    data = _data(str(tmp_path / "t.tar"))
    (tmp_path / "t.tar").unlink()
    with pytest.raises(CorruptShardError, match="t.tar: cannot be read"):
        _batches(data, 1)
    with pytest.raises(CorruptShardError, match="false: cannot be read|no sample in the shards"):
        _batches(_data("pipe:false", allow_pipe=True), 1)


class _Server(SimpleHTTPRequestHandler):
    """Of a path under /cut the first half, although the header promises all; under /unsaid without that promise."""

    def log_message(self, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        kind, _, name = self.path.rpartition("/")
        path = Path(self.directory) / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        if kind != "/unsaid":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if kind else content)


@pytest.mark.parametrize(("scheme", "program"), [("https", "curl"), ("scp", "curl"), ("gs", "gsutil")])
def test_a_url_whose_program_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, scheme: str, program: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=f"data.shards={scheme}://host/a.tar: {scheme}: is read with {program}, which"):
        _data(f"{scheme}://host/a.tar")


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(shards))) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads over HTTP with curl, which is not installed")
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_are_read_over_http_and_one_that_breaks_off_is_counted_and_told(
    server: str, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    batches = _batches(_data(f"{server}/{URLS}"), NUM_SAMPLES // 4, workers=workers)
    assert set(_visits(batches, 1).values()) == {1} and not any(batch.bad.any() for batch in batches)
    for kind in ("cut", "unsaid"):
        urls = f"{server}/test-000000.tar::{server}/{kind}/test-000001.tar"
        batches = _batches(_data(urls), 10, workers=workers)
        assert 5 < len(_visits(batches, 2)) < 5 + 9, "the samples before the break are read"
        assert sum(int(batch.bad.sum()) for batch in batches) == 1 + int(batches[-1].epochs.max())
        assert "the rest of a shard is lost" in caplog.text
        if not workers:  # a worker process logs to the same file
            assert f"{server}/{kind}/test-000001.tar: damaged after sample 0000000" in caplog.text
    with pytest.raises(CorruptShardError, match="gone.tar: cannot be read"):
        _batches(_data(f"{server}/gone.tar"), 1, workers=workers)


def test_shards_without_samples_end_the_run_and_do_not_hang_it(tmp_path: Path) -> None:
    samples = [{"png": b"x", "cls": b"0"}]
    write_folder(tmp_path / "shards", samples, [0, 1])
    with pytest.raises(CorruptShardError, match="no sample in the shards of this worker"):
        _batches(_data(f"{tmp_path}/shards/test-000000.tar"), 1)
    with pytest.raises(CorruptShardError, match="100 samples in a row give no image"):
        _batches(_data(f"{tmp_path}/shards/test-000001.tar"), 1)
