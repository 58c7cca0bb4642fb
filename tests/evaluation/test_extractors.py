"""Extractors other than the Inception network, and that a program's file runs no code of its author's."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import open_extractor
from tests.evaluation.colours import Colours, colours

CPU = torch.device("cpu")
HERE = "tests.evaluation.colours"
MODEL = "models/model.json"
INPUTS = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
Records = dict[str, bytes]


def images(num: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Colours]:
    torch.manual_seed(0)
    model = Colours().eval()
    path = tmp_path_factory.mktemp("program") / "colours.pt2"
    any_number = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(model, (images(2),), dynamic_shapes=any_number), path)
    return path, model


def read(path: Path) -> Records:
    with PT2ArchiveReader(str(path)) as archive:
        return {name: archive.read_bytes(name) for name in archive.get_file_names()}


def write(path: Path, records: Records) -> Path:
    with PT2ArchiveWriter(str(path)) as archive:
        for name, content in records.items():
            if not name.startswith((".data", "archive_", "byteorder")):
                archive.write_bytes(name, content)
    return path


def test_a_function_of_the_users_own_gives_the_features() -> None:
    extractor = open_extractor(None, f"{HERE}:colours", CPU)
    grey = images(3, channels=1)
    assert torch.equal(extractor(images(3)).pooled_NF, colours(images(3)))
    assert torch.equal(extractor(grey).pooled_NF, colours(grey.repeat(1, 3, 1, 1))), (
        "grey images have three equal channels"
    )
    assert extractor.identity == f"{HERE}:colours" and not extractor.is_inception


def test_a_torch_export_program_gives_the_features_for_any_number_of_images(program: tuple[Path, Colours]) -> None:
    path, model = program
    extractor = open_extractor(None, str(path), CPU)
    for num in (1, 2, 7):
        assert torch.equal(extractor(images(num)).pooled_NF, model(images(num)))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled_inputs(records: Records, marker: Path) -> None:
    buffer = io.BytesIO()
    torch.save(((Bomb(marker),), {}), buffer)
    records[INPUTS] = buffer.getvalue()


def pickled_weight(records: Records, marker: Path) -> None:
    config = json.loads(records[WEIGHTS])
    entry = config["config"]["scale"]
    entry["use_pickle"] = True
    buffer = io.BytesIO()
    torch.save(Bomb(marker), buffer)
    records[f"data/weights/{entry['path_name']}"] = buffer.getvalue()
    records[WEIGHTS] = json.dumps(config).encode()


def pickled_constant(records: Records, marker: Path) -> None:
    records["data/constants/model_constants_config.json"] = json.dumps(
        {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    ).encode()
    records["data/constants/opaque_obj_0"] = pickle.dumps(Bomb(marker))


def in_model(old: str, new: Callable[[Path], str]) -> Callable[[Records, Path], None]:
    """Replace what matches a pattern in the program's description."""

    def change(records: Records, marker: Path) -> None:
        text, replaced = re.subn(old, lambda match: new(marker), records[MODEL].decode())
        assert replaced
        records[MODEL] = text.encode()

    return change


def touch(marker: Path) -> str:
    return f"__import__('pathlib').Path('{marker}').touch()"


MUL = "torch.ops.aten.mul.Tensor"
ATTACKS = {
    "example inputs that are a pickle": pickled_inputs,
    "a weight that is a pickle": pickled_weight,
    "a constant that is a pickle": pickled_constant,
    "a size that is Python": in_model(r"Symbol\('s\d+'[^)]*\)", touch),
    "an argument name that is Python": in_model('"name": "images"', lambda path: f'"name": "images={touch(path)}"'),
    "an operator that is none": in_model(MUL, lambda path: "torch.ops.load_library"),
    "an operator that is a method": in_model(MUL, lambda path: "torch.ops.aten.__init__.x"),
    "an operator that opens files": in_model(MUL, lambda path: "torch.ops.aten.from_file.default"),
    "a structure that imports modules": in_model("builtins.tuple", lambda path: "antigravity.x"),
    "a compiled library": lambda records, marker: records.update({"data/aotinductor/model/x.so": b"\x7fELF"}),
    "a nested graph": in_model('"as_int": 255', lambda path: '"as_graph": {}'),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_program_with_more_than_operators_on_tensors_is_refused_and_runs_nothing(
    program: tuple[Path, Colours], tmp_path: Path, attack: str
) -> None:
    records, marker = read(program[0]), tmp_path / "exploded"
    ATTACKS[attack](records, marker)
    path = write(tmp_path / "attack.pt2", records)
    with pytest.raises(UserError, match=f"--features {path}: not a torch.export program that can be used: ") as caught:
        open_extractor(None, str(path), CPU)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack", ["example inputs that are a pickle", "a weight that is a pickle", "a size that is Python"]
)
def test_torch_itself_would_have_run_it(program: tuple[Path, Colours], tmp_path: Path, attack: str) -> None:
    records, marker = read(program[0]), tmp_path / "exploded"
    ATTACKS[attack](records, marker)
    path = write(tmp_path / "attack.pt2", records)
    try:
        torch.export.load(path)
    except Exception as error:
        assert not isinstance(error, UserError)
    assert marker.exists()


def test_guards_which_are_python_source_are_left_out(program: tuple[Path, Colours], tmp_path: Path) -> None:
    records, marker = read(program[0]), tmp_path / "exploded"
    model = json.loads(records[MODEL])
    model["guards_code"] = [f"{touch(marker)} is None"]
    records[MODEL] = json.dumps(model).encode()
    extractor = open_extractor(None, str(write(tmp_path / "guarded.pt2", records)), CPU)
    assert torch.equal(extractor(images(3)).pooled_NF, program[1](images(3)))
    assert not marker.exists()


BAD = {
    "nowhere.pt2": "nowhere.pt2: not a torch.export program that can be used: No such file",
    "README.md": "README.md: neither a file NAME.pt2 nor a module:callable",
    "nowhere:f": "nowhere:f: there is no module nowhere",
    f"{HERE}:nothing": f"{HERE} has no callable .nothing.",
    f"{HERE}:too_many_axes": "it returned \\[2, 3, 8, 8\\] for 2 images; return \\(N, F\\)",
    f"{HERE}:broken": "features that are not finite",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=BAD[name]):
        open_extractor(None, name, CPU)(images(2))


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every entry of a parsed JSON value, at any depth: the keys and numbers that lead to it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*place, key)
        yield from places(entry, (*place, key))


def test_a_program_that_is_damaged_anywhere_is_refused_in_one_line_or_still_a_program(
    program: tuple[Path, Colours], tmp_path: Path
) -> None:
    records, chance = read(program[0]), random.Random(0)
    edits = [(name, b"[" * 100_000 + b"]" * 100_000) for name in records if name.endswith(".json")]
    for name in [name for name, _ in edits for _ in range(30)]:
        value = json.loads(records[name])
        *way, last = chance.choice(list(places(value)))
        reduce(lambda parent, key: parent[key], way, value)[last] = chance.choice([None, [], {}, "x", 10**30, -1, 1.5])
        edits.append((name, json.dumps(value).encode()))
    refused = 0
    for name, content in edits:
        path = write(tmp_path / "edited.pt2", {**records, name: content})
        try:
            open_extractor(None, str(path), CPU)(images(3))
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"--features {path}: ") and "\n" not in str(error)
    assert refused > len(edits) // 2


def test_a_program_tells_which_images_it_cannot_take(program: tuple[Path, Colours], tmp_path: Path) -> None:
    extractor = open_extractor(None, str(program[0]), CPU)
    with pytest.raises(
        UserError, match=r"the program cannot take torch.uint8 \[2, 3, 16, 16\]: .*; export it for uint8"
    ):
        extractor(images(2, size=16))
    (tmp_path / "text.pt2").write_text("a program")
    with pytest.raises(UserError, match="text.pt2: not a torch.export program that can be used"):
        open_extractor(None, str(tmp_path / "text.pt2"), CPU)


@pytest.mark.parametrize(("inception", "features"), [(None, None), ("a.pth", "b.pt2")])
def test_one_extractor_is_named_and_no_more(inception: str | None, features: str | None) -> None:
    with pytest.raises(UserError, match="one of them"):
        open_extractor(inception, features, CPU)
