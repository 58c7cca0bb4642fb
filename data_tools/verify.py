"""Is a folder of shards what its index says? `quick` looks at sizes and ends, `full` at every byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_tools.parallel import SERIAL, Workers
from data_tools.tars import TarDamageError, TarFile
from diffmoe_dist.data.format import ABSENT, INDEX_NAME, LABEL_FIELD
from diffmoe_dist.data.images import ImageError, decode_image
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.data.labels import label_in_payload
from diffmoe_dist.files import file_sha256

_MAX_PROBLEMS = 20  # of one shard that are named


@dataclass(frozen=True)
class Verified:
    """What was found. `problems` is empty where all is well; each names the shard and, where it has one, the key."""

    num_samples: int
    num_shards: int
    problems: list[str]


@dataclass(frozen=True)
class _Job:
    index: ShardIndex
    shard: int
    full: bool


def verify(
    index: ShardIndex,
    *,
    full: bool,
    workers: Workers = SERIAL,
    on_shard: Callable[[int], None] = lambda num_samples: None,
) -> Verified:
    """Check the files beside an opened index, and all shards. Damage that lets no index open is found by opening it.

    `quick` reads the first and the last sample of each shard. `full` compares every shard's SHA-256, finds every member
    in the tar where the index has it, under the sample's key, and none else, decodes every image and reads every label.
    """
    problems = _check_other_files(index)
    jobs = (_Job(index, shard, full) for shard in range(len(index.shards)))
    found: dict[int, list[str]] = {}
    for shard, of_shard in workers.run(_verify_shard, jobs):
        found[shard] = of_shard
        on_shard(index.shards[shard].num_samples)
    problems += [problem for shard in sorted(found) for problem in found[shard]]
    return Verified(index.num_samples, len(index.shards), problems)


def _check_other_files(index: ShardIndex) -> list[str]:
    """The files that opening an index leaves alone."""
    text = index.text
    files = [index.meta.quarantine, *([text.null, text.null_pooled] if text is not None else [])]
    problems = []
    for file in files:
        if file is None:
            continue
        path = index.folder / file.name
        try:
            if file_sha256(path) != file.sha256:
                problems.append(f"{path}: not the one that {INDEX_NAME} records")
        except FileNotFoundError:
            problems.append(f"{path}: missing")
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
    return problems


def _verify_shard(job: _Job) -> tuple[int, list[str]]:
    samples = job.index.samples_of(job.shard)
    chosen = samples if job.full else sorted({*samples[:1], *samples[-1:]})
    problems = _check_file(job) if job.full else []
    for sample_id in chosen:
        try:
            _check_sample(job.index, sample_id)
        except CorruptShardError as error:
            problems.append(str(error))
    job.index.close()
    more = len(problems) - _MAX_PROBLEMS
    return job.shard, [*problems[:_MAX_PROBLEMS], *([f"... and {more} more in this shard"] if more > 0 else [])]


def _check_file(job: _Job) -> list[str]:
    """The shard's hash, and its members by name and place."""
    index, shard = job.index, job.index.shards[job.shard]
    path = index.folder / shard.name
    problems = (
        [] if file_sha256(path) == shard.sha256 else [f"{path}: SHA-256 is not the one that {INDEX_NAME} records"]
    )
    try:
        members = {(member.offset, member.size): member.name for member in TarFile(path).members()}
    except TarDamageError as error:
        return [*problems, str(error)]
    for sample_id in index.samples_of(job.shard):
        key = index.key(sample_id)
        for field, offset, size, _ in index.entries(sample_id):
            name = members.pop((offset, size), None) if size != ABSENT else f"{key}.{field}"
            if name is None or name.lower() != f"{key}.{field}".lower():
                found = "is not in the tar" if name is None else f"is {name} in the tar"
                problems.append(f"{path}, key {key}: {field} {found}")
    if index.meta.packing is not None:  # tars of another origin may hold more than is used
        problems += [f"{path}: member {name} is not in the index" for name in members.values()]
    return problems


def _check_sample(index: ShardIndex, sample_id: int) -> None:
    """Raises CorruptShardError for a sample that cannot be trained on."""
    payloads = index.read(sample_id)
    if index.channels is not None:
        images = [field for field in payloads if field in index.image_fields]
        if len(images) != 1:
            raise index.corrupt(sample_id, f"{len(images)} images, not one")
        try:
            size = decode_image(payloads[images[0]], index.channels).size
        except ImageError as error:
            raise index.corrupt(sample_id, f"{images[0]}: {error}") from error
        if index.image_size is not None and size != (index.image_size, index.image_size):
            raise index.corrupt(sample_id, f"{size[0]}x{size[1]} pixels, the index says {index.image_size}")
    if LABEL_FIELD in index.fields:
        try:
            label_in_payload(payloads.get(LABEL_FIELD, b""), index.num_classes - 1)
        except ValueError:
            label = payloads.get(LABEL_FIELD, b"")[:20]
            raise index.corrupt(sample_id, f"label {label!r} is not a number below {index.num_classes}") from None
