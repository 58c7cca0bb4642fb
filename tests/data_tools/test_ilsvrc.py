"""ILSVRC2012's archives in their real nesting and naming, smaller."""

from __future__ import annotations

import io
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_tools.ilsvrc import train_source, validation_source
from data_tools.pack import PackSettings, pack
from data_tools.sources import SourceOptions, guess_format, open_source
from data_tools.tars import TarDamageError
from diffmoe_dist.data.class_names import names_of_data
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from tests.data_tools.messy import encoded, picture

# The devkit numbers the classes in an order of its own: ILSVRC2012_ID 1 is not the first WordNet id.
WNID_OF_ID = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n03085013", 5: "n01443537"}
LABEL_OF = {"n01440764": 0, "n01443537": 1, "n02100735": 2, "n02119789": 3, "n03085013": 4}
IMAGES_PER_CLASS = 4


def _image(wnid: str, number: int) -> bytes:
    """A small picture that is unlike any other."""
    return encoded(picture(24 + number, 20 + LABEL_OF[wnid], seed=10 * LABEL_OF[wnid] + number))


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return file.getvalue()


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of tars, the classes in no order."""
    path = tmp_path_factory.mktemp("train") / "ILSVRC2012_img_train.tar"
    classes = {
        f"{wnid}.tar": _tar({f"{wnid}_{100 - n}.JPEG": _image(wnid, n) for n in range(IMAGES_PER_CLASS)})
        for wnid in WNID_OF_ID.values()
    }
    path.write_bytes(_tar(classes))
    return path


def _make_devkit(folder: Path, truth: list[int], table: str = "meta.mat") -> Path:
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{one}\n" for one in truth))
    rows = [(number, wnid, "words", "gloss", 0) for number, wnid in WNID_OF_ID.items()]
    rows += [(6, "n00001740", "entity", "has children and no images", 2), (7, "n00001930", "thing", "too", 5)]
    if table == "meta.mat":
        import scipy.io

        kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
        scipy.io.savemat(data / table, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    else:
        (data / table).write_text("".join(f"{number} {wnid} {words}\n" for number, wnid, words, _, _ in rows[:5]))
    return data.parent


TRUTH = [number for number in WNID_OF_ID for _ in range(IMAGES_PER_CLASS)]
random.Random(0).shuffle(TRUTH)


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flat tar, its members in no order."""
    path = tmp_path_factory.mktemp("val") / "ILSVRC2012_img_val.tar"
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(TRUTH))]
    members = {name: _image(WNID_OF_ID[TRUTH[n]], TRUTH[:n].count(TRUTH[n])) for n, name in enumerate(names)}
    shuffled = random.Random(1).sample(names, len(names))
    path.write_bytes(_tar({name: members[name] for name in shuffled}))
    return path


def _label_of_bytes() -> dict[bytes, int]:
    return {_image(wnid, number): label for wnid, label in LABEL_OF.items() for number in range(IMAGES_PER_CLASS)}


def test_the_train_tar_is_read_in_place_with_the_rank_of_the_wordnet_id_as_label(train: Path, tmp_path: Path) -> None:
    assert guess_format(train) == "ilsvrc-train"
    source = open_source(str(train), None, SourceOptions())
    assert source.labels is not None and np.bincount(source.labels).tolist() == [IMAGES_PER_CLASS] * 5
    packed = pack(source, tmp_path / "out", PackSettings(samples_per_shard=7))
    index = ShardIndex.open(tmp_path / "out")
    assert (packed.num_samples, packed.num_bad, index.class_names) == (20, 0, sorted(LABEL_OF))
    samples = [index.read(sample) for sample in range(20)]
    assert {sample["jpg"]: int(sample["cls"]) for sample in samples} == _label_of_bytes()
    assert [path.name for path in train.parent.iterdir()] == [train.name]  # nothing was extracted


@pytest.mark.parametrize("table", ["meta.mat", "synsets.txt"])
def test_validation_labels_equal_the_rank_of_the_wordnet_id(validation: Path, tmp_path: Path, table: str) -> None:
    devkit = _make_devkit(tmp_path, TRUTH, table)
    assert guess_format(validation) == "ilsvrc-val"
    pack(
        open_source(str(validation), None, SourceOptions(devkit=devkit)),
        tmp_path / "out",
        PackSettings(samples_per_shard=7),
    )
    index = ShardIndex.open(tmp_path / "out")
    samples = [index.read(sample) for sample in range(index.num_samples)]
    assert {sample["jpg"]: int(sample["cls"]) for sample in samples} == _label_of_bytes()
    assert index.class_names == sorted(LABEL_OF)


def test_train_and_validation_agree_on_every_class(train: Path, validation: Path, tmp_path: Path) -> None:
    first, second = train_source(train), validation_source(validation, _make_devkit(tmp_path, TRUTH))
    assert list(first.class_names) == list(second.class_names)
    of_train = {first.read(item)["image"]: first.read(item)["cls"] for item in range(len(first))}
    assert of_train == {second.read(item)["image"]: second.read(item)["cls"] for item in range(len(second))}


def test_the_devkit_may_stay_in_its_archive(validation: Path, tmp_path: Path) -> None:
    devkit = _make_devkit(tmp_path, TRUTH)
    with tarfile.open(tmp_path / "devkit.tar.gz", "w:gz") as tar:
        tar.add(devkit, arcname=devkit.name)
    packed = validation_source(validation, tmp_path / "devkit.tar.gz")
    np.testing.assert_array_equal(packed.labels, validation_source(validation, devkit).labels)


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        (TRUTH[:-1], "19 ground truths for 20 images"),
        ([1, *TRUTH[1:]] if TRUTH[0] != 1 else [2, *TRUTH[1:]], "one of the two is wrong"),
        ([{1: 6}.get(one, one) for one in TRUTH], "one of the two is wrong"),
        (["x", *TRUTH[1:]], "is damaged"),
    ],
)
def test_a_ground_truth_that_does_not_fit_is_refused(
    validation: Path, tmp_path: Path, truth: list[int], said: str
) -> None:
    with pytest.raises(UserError, match=f"--devkit=.*{said}"):
        validation_source(validation, _make_devkit(tmp_path, truth))


def test_a_devkit_that_is_cut_or_a_pipe_is_refused(validation: Path, tmp_path: Path) -> None:
    devkit = _make_devkit(tmp_path, TRUTH)
    archive = tmp_path / "devkit.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(devkit, arcname=devkit.name)
    archive.write_bytes(archive.read_bytes()[:-300])
    os.mkfifo(tmp_path / "pipe.tar.gz")
    for path in (archive, tmp_path / "pipe.tar.gz"):
        with pytest.raises(UserError, match="--devkit=.*cannot be read"):
            validation_source(validation, path)


def test_hidden_tars_in_the_train_tar_are_no_classes(train: Path, tmp_path: Path) -> None:
    with tarfile.open(train) as old:
        members = {member.name: old.extractfile(member) for member in old}
        contents = {name: file.read() for name, file in members.items() if file is not None}
    path = tmp_path / "train.tar"
    path.write_bytes(_tar({hidden: b"Mac OS X" for hidden in [f"._{name}" for name in contents]} | contents))
    assert guess_format(path) == "ilsvrc-train" and list(train_source(path).class_names) == sorted(LABEL_OF)


@pytest.mark.parametrize("table", ["meta.mat", "synsets.txt"])
def test_a_table_of_classes_that_is_damaged_anywhere_is_refused_or_read_in_the_same_form(
    validation: Path, tmp_path: Path, table: str
) -> None:
    devkit = _make_devkit(tmp_path, TRUTH, table)
    path = devkit / "data" / table
    whole, labels = path.read_bytes(), validation_source(validation, devkit).labels
    chance, refused, trials = random.Random(0), 0, 6 if table == "meta.mat" else 100
    for _ in range(trials):
        content = bytearray(whole)
        if chance.random() < 0.2:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        try:
            found = validation_source(validation, devkit).labels
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"--devkit={devkit}: ")
        else:
            assert found is not None and len(found) == len(labels)
    assert refused > trials // 5


@pytest.mark.parametrize("row", ["1 n02119789", "6 n02119789", "1 n09999999"])
def test_a_class_that_stands_twice_in_the_table_is_refused(validation: Path, tmp_path: Path, row: str) -> None:
    devkit = _make_devkit(tmp_path, TRUTH, "synsets.txt")
    with (devkit / "data/synsets.txt").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(UserError, match="synsets.txt has (1|n02119789) in 2 rows"):
        validation_source(validation, devkit)


def test_a_missing_devkit_is_refused(validation: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--devkit is not set"):
        validation_source(validation, None)
    with pytest.raises(UserError, match="--devkit=.*holds no ILSVRC2012_validation_ground_truth.txt"):
        validation_source(validation, tmp_path)
    with pytest.raises(UserError, match="--devkit=.*cannot be read"):
        validation_source(validation, tmp_path / "nowhere.tar.gz")


@pytest.mark.parametrize("damage", ["cut", "cut between members", "zeroed header", "zeroed inner header"])
def test_a_damaged_train_tar_is_named_before_anything_is_packed(train: Path, tmp_path: Path, damage: str) -> None:
    content = bytearray(train.read_bytes())
    second = train_source(train)._tar  # where the second class begins
    start = sorted(member.offset for member in second.members())[1]
    if damage == "cut":
        content = content[:-11_000]
    elif damage == "cut between members":
        content = content[: start - 512]
    elif damage == "zeroed header":
        content[start - 512 : start] = bytes(512)
    else:
        content[start : start + 512] = bytes(512)
    damaged = tmp_path / "ILSVRC2012_img_train.tar"
    damaged.write_bytes(content)
    with pytest.raises(TarDamageError, match=r"ILSVRC2012_img_train.tar: damaged near byte \d+"):
        train_source(damaged)


WORDS = "".join(f"{wnid} some fish, a fish\n" for wnid in sorted(LABEL_OF))


def _make_kaggle(root: Path) -> Path:
    """Kaggle's archive as it lies extracted."""
    images = root / "ILSVRC/Data/CLS-LOC"
    (images / "val").mkdir(parents=True)
    for wnid in WNID_OF_ID.values():
        (images / "train" / wnid).mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            (images / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(_image(wnid, number))
    rows, counts = [], dict.fromkeys(LABEL_OF, 0)
    for number, one in enumerate(TRUTH, start=1):
        wnid = WNID_OF_ID[one]
        name = f"ILSVRC2012_val_{number:08d}"
        (images / "val" / f"{name}.JPEG").write_bytes(_image(wnid, counts[wnid]))
        counts[wnid] += 1
        rows.append(f"{name},{' '.join([f'{wnid} 1 2 30 40'] * (1 + number % 2))} \n")
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    (root / "LOC_synset_mapping.txt").write_text(WORDS)
    (root / "LOC_train_solution.csv").write_text("ImageId,PredictionString\n")
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_kaggles_layout_gives_the_images_and_labels_of_the_archives(tmp_path: Path, split: str) -> None:
    root = _make_kaggle(tmp_path / "in")
    assert guess_format(root) == "kaggle-imagenet"
    source = open_source(str(root), None, SourceOptions(split=split))
    assert source.labels is not None and np.bincount(source.labels).tolist() == [IMAGES_PER_CLASS] * len(LABEL_OF)
    pack(source, tmp_path / "out", PackSettings(samples_per_shard=7))
    index = ShardIndex.open(tmp_path / "out")
    samples = [index.read(sample) for sample in range(index.num_samples)]
    assert {sample["jpg"]: int(sample["cls"]) for sample in samples} == _label_of_bytes()
    assert index.class_names == sorted(LABEL_OF)
    shown = names_of_data(index.class_names, index.folder).shown
    assert shown == [f"some fish ({wnid})" for wnid in sorted(LABEL_OF)]


@pytest.mark.parametrize(
    ("split", "name", "old", "new", "said"),
    [
        (None, "", "", "", "--split=None: .* train and val; name one"),
        ("test", "", "", "", "--split=test: .* train and val; name one"),
        ("val", "LOC_val_solution.csv", "ImageId", "id", "does not begin with ImageId,PredictionString"),
        ("val", "LOC_val_solution.csv", "val_00000002,", "val_00000021,", "differ .20 and 20, .*val_00000002 in one"),
        ("val", "LOC_val_solution.csv", " 1 2 30 40", " 1 2 30", "is no image with boxes of one known class"),
        ("val", "LOC_val_solution.csv", "n01440764", "n09999999", "is no image with boxes of one known class"),
        ("val", "LOC_synset_mapping.txt", "n01440764", "tench", "'tench' for a WordNet id"),
        ("train", "LOC_synset_mapping.txt", "n01440764", "n01443537", "a class twice"),
        ("train", "LOC_synset_mapping.txt", "n01440764", "n01440765", "folders and rows of .* differ .5 and 5, n0144"),
    ],
)
def test_a_kaggle_layout_whose_tables_do_not_fit_is_refused(
    tmp_path: Path, split: str | None, name: str, old: str, new: str, said: str
) -> None:
    root = _make_kaggle(tmp_path / "in")
    if name:
        path = root / name
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=said):
        open_source(str(root), None, SourceOptions(split=split))
    (root / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(UserError, match=r"LOC_synset_mapping.txt: no such file; it comes with|--split"):
        open_source(str(root), None, SourceOptions(split=split))
