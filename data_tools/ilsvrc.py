"""Sources: ILSVRC2012 (ImageNet-1k) from the archives as they are distributed, without extracting them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_tools.source import IMAGE, BadItemError, Strings, label_payload, read_file
from data_tools.tars import Member, TarFile
from diffmoe_dist.errors import UserError

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_SECONDS_TO_READ = 600  # a small file, by a process that imports scipy first
_PRINT_META = """
import io, json, sys
from scipy.io import loadmat  # comes with scikit-learn
synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
leaves = [one for one in synsets if int(one["num_children"]) == 0]
words = "words" in synsets.dtype.names
rows = [(int(one["ILSVRC2012_ID"]), str(one["WNID"]), str(one["words"]) if words else "") for one in leaves]
sys.stdout.write(json.dumps(rows))
"""
WNID = re.compile(r"n\d{8}")
_TABLES = ("meta.mat", "synsets.txt")


class IlsvrcSource:
    """Images in one tar, each with its class. A label is the rank of the WordNet id by name, as everywhere else."""

    channels = 3
    image_size = None

    def __init__(
        self,
        name: str,
        tar: TarFile,
        members: list[Member],
        labels: np.ndarray,
        wnids: Sequence[str],
        words: Mapping[str, str],
    ) -> None:
        self.name, self._tar, self.class_names = name, tar, wnids
        self.class_words = words  # for people, by the names of the classes
        self._names = Strings(member.name for member in members)
        self._places = np.array([(member.offset, member.size) for member in members], dtype=np.int64)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._names)

    def item_name(self, item: int) -> str:
        return self._names[item]

    def part(self, items: np.ndarray) -> IlsvrcSource:
        part = copy.copy(self)
        part._names, part._places, part.labels = self._names.take(items), self._places[items], self.labels[items]
        part.class_names, part.class_words = (), {}
        return part

    def read(self, item: int) -> dict[str, bytes]:
        offset, size = self._places[item].tolist()
        return {IMAGE: self._tar.read(offset, size), "cls": label_payload(self.labels[item])}


def train_source(path: Path, devkit: Path | None = None) -> IlsvrcSource:
    """ILSVRC2012_img_train.tar: a tar of one `<wnid>.tar` for each class. Only headers are read for the listing.

    The devkit has the words for the classes, if they are wanted.
    """
    tar = TarFile(path)
    classes = sorted(tar.members(), key=lambda member: member.name)
    strange = [member.name for member in classes if not member.name.endswith(".tar")]
    if strange or not classes:
        raise UserError(f"SOURCE={path}: not a tar of one tar for each class ({', '.join(strange[:1]) or 'empty'})")
    members, labels = [], []
    for label, of_class in enumerate(classes):
        found = list(tar.members(of_class.offset, of_class.size))
        members += found
        labels += [label] * len(found)
    wnids = [Path(member.name).stem for member in classes]
    words = {} if devkit is None else {wnid: words for wnid, words in _classes_of_id(devkit).values()}
    return IlsvrcSource("ilsvrc-train", tar, members, np.array(labels, dtype=np.int64), wnids, words)


def validation_source(path: Path, devkit: Path | None) -> IlsvrcSource:
    """ILSVRC2012_img_val.tar, and the devkit (folder or .tar.gz), which has the ground truth and the table of classes.

    Line i of the ground truth is the ILSVRC2012_ID of image i by name. That number is not the rank of the WordNet id:
    the devkit's table leads from one to the other.
    """
    if devkit is None:
        raise UserError(
            "--devkit is not set; the labels of the validation images need it: ILSVRC2012_devkit_t12[.tar.gz]"
        )
    tar = TarFile(path)
    members = sorted(tar.members(), key=lambda member: member.name)
    ids = _ground_truth(devkit)
    if len(ids) != len(members):
        raise UserError(
            f"--devkit={devkit}: {len(ids)} ground truths for {len(members)} images of {path}; restore both"
        )
    classes = _classes_of_id(devkit)
    wnid_of = {number: wnid for number, (wnid, _) in classes.items()}
    used = Counter(ids)
    counts = set(used.values())
    if set(used) != set(wnid_of) or len(counts) != 1:
        raise UserError(
            f"--devkit={devkit}: the ground truth has {len(used)} classes of {min(counts)} to {max(counts)} images, "
            f"the table {len(wnid_of)}; every class of the table must come equally often, so one of the two is wrong"
        )
    wnids = sorted(wnid_of.values())
    rank = {wnid: label for label, wnid in enumerate(wnids)}
    labels = np.array([rank[wnid_of[ilsvrc_id]] for ilsvrc_id in ids], dtype=np.int64)
    return IlsvrcSource("ilsvrc-val", tar, members, labels, wnids, dict(classes.values()))


def _ground_truth(devkit: Path) -> list[int]:
    text = _devkit_file(devkit, _GROUND_TRUTH)
    if text is None:
        raise UserError(f"--devkit={devkit}: holds no {_GROUND_TRUTH}; name ILSVRC2012_devkit_t12 or its .tar.gz")
    try:
        return [int(line) for line in text.split()]
    except ValueError as error:
        raise UserError(f"--devkit={devkit}: {_GROUND_TRUTH} is damaged ({error}); restore it") from None


def _classes_of_id(devkit: Path) -> dict[int, tuple[str, str]]:
    """ILSVRC2012_ID to WordNet id and words of the classes that have images, by meta.mat or lines `ID WNID words`."""
    for name in _TABLES:
        content = _devkit_file(devkit, name)
        if content is not None:
            break
    else:
        raise UserError(f"--devkit={devkit}: holds neither {' nor '.join(_TABLES)}; name ILSVRC2012_devkit_t12")
    try:
        rows = _read_meta(content) if name == "meta.mat" else _read_synsets(content)
    except (IndexError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"--devkit={devkit}: {name} is not a table of classes ({error}); restore it, or give {_TABLES[1]} "
            "with lines `ILSVRC2012_ID WNID`"
        ) from error
    for column in list(zip(*rows, strict=True))[:2]:
        (value, times), *_ = Counter(column).most_common(1)
        if times > 1:
            raise UserError(f"--devkit={devkit}: {name} has {value} in {times} rows; restore it")
    if strange := [wnid for _, wnid, _ in rows if not WNID.fullmatch(wnid)]:
        raise UserError(f"--devkit={devkit}: {name} has {strange[0]!r} for a WordNet id (n01440764); restore it")
    return {number: (wnid, words) for number, wnid, words in rows}


def _read_meta(content: bytes) -> list[tuple[int, str, str]]:
    # In a process of its own: on some damaged files scipy does not raise, it crashes.
    program = [sys.executable, "-c", _PRINT_META]
    done = subprocess.run(program, input=content, capture_output=True, timeout=_SECONDS_TO_READ, check=False)
    if done.returncode:
        raise ValueError(next(reversed(done.stderr.decode(errors="replace").splitlines()), "scipy crashes on it"))
    return [(number, wnid, words) for number, wnid, words in json.loads(done.stdout)]


def _read_synsets(content: bytes) -> list[tuple[int, str, str]]:
    rows = [line.split(maxsplit=2) for line in content.decode().splitlines() if line.strip()]
    return [(int(row[0]), row[1], " ".join(row[2:])) for row in rows]


def _devkit_file(devkit: Path, name: str) -> bytes | None:
    """A file of the devkit, wherever in it."""
    try:
        if devkit.is_dir():
            found = sorted(devkit.rglob(name))
            return read_file(found[0]) if found else None
        if devkit.exists() and not devkit.is_file():
            raise BadItemError("not a regular file")
        with tarfile.open(devkit) as tar:
            members = [member for member in tar if member.isreg() and Path(member.name).name == name]
            file = tar.extractfile(members[0]) if members else None
            return file.read() if file else None
    except (BadItemError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"--devkit={devkit}: cannot be read ({error}); name the devkit's folder or .tar.gz") from error
