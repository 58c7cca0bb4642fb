"""Edits of a checkpoint and of a folder of weights, under sums that are right again: refused in one line, or read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffmoe_dist import load_model
from diffmoe_dist.engine.checkpoint import find_checkpoint, write_sums
from diffmoe_dist.engine.conversion import export_checkpoint
from diffmoe_dist.engine.progress import read_progress, read_sums
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from tests.distributed import run_ranks
from tests.engine.runs import train_all

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=3).map(repr),
    st.sampled_from([0, -1, 1, 10**7, 2**63, 10**30, 1e308, "1", "nan", "${seed}", "${oc.env:HOME}", "???", [], {}]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
EDITS = st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "remove", "add"]), st.text(max_size=5), ODD)
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("edited") / "run"
    run_ranks(1, train_all, digits, [(run_dir, {"train": {"steps": 1}})])
    return find_checkpoint(run_dir)


@pytest.fixture(scope="module")
def weights(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edited") / "weights"
    export_checkpoint(checkpoint, folder)
    return folder


def edited(content: Any, edit: tuple[int, str, str, Any]) -> Any:
    """The content with one of its entries, at any depth, replaced or removed, or with another beside it."""
    number, action, key, value = edit
    places = list(_places(content))
    owner, name = places[number % len(places)]
    if action == "replace":
        owner[name] = value
    elif action == "remove":
        del owner[name]
    elif isinstance(owner, dict):
        owner[key] = value
    else:
        owner.append(value)
    return content


def _places(content: Any) -> Any:
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for name, value in entries:
        yield content, name
        if isinstance(value, dict | list):
            yield from _places(value)


def opens_or_refuses(folder: Path, action: Callable[[Path], Any]) -> None:
    try:
        action(folder)
    except UserError as error:
        assert str(error)


def open_checkpoint(folder: Path) -> None:
    write_sums(folder, {name: file_sha256(folder / name) for name in read_sums(folder)})
    progress = read_progress(folder)
    assert progress.step == 1 and isinstance(progress.data_fingerprint, str)
    load_model(folder)


@pytest.mark.parametrize("name", ["state.json", "config.yaml"])
def test_no_edit_of_a_checkpoint_ends_in_a_traceback(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    whole = path.read_text()
    read, write = (json.loads, json.dumps) if name == "state.json" else (yaml.safe_load, yaml.safe_dump)

    @FUZZ
    @given(EDITS)
    def edit(of: tuple[int, str, str, Any]) -> None:
        path.write_text(write(edited(read(whole), of)))
        opens_or_refuses(checkpoint, open_checkpoint)

    try:
        edit()
    finally:
        path.write_text(whole)
        open_checkpoint(checkpoint)


def test_no_edit_of_the_settings_of_weights_ends_in_a_traceback(weights: Path) -> None:
    path = weights / "config.json"
    whole = path.read_text()

    @FUZZ
    @given(EDITS)
    def edit(of: tuple[int, str, str, Any]) -> None:
        path.write_text(json.dumps(edited(json.loads(whole), of)))
        opens_or_refuses(weights, load_model)

    try:
        edit()
    finally:
        path.write_text(whole)
        load_model(weights)


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "SHA256SUMS", ".metadata", "weights/config.json"])
def test_no_bytes_in_the_place_of_a_file_end_in_a_traceback(checkpoint: Path, weights: Path, name: str) -> None:
    folder = weights if name.startswith("weights") else checkpoint
    path = folder / Path(name).name
    whole = path.read_bytes()

    @settings(FUZZ, max_examples=15)
    @given(st.binary(max_size=40) | st.sampled_from([b"[" * 100_000, b"{" * 100_000, b"", whole[:-9], whole[9:]]))
    def replace(content: bytes) -> None:
        path.write_bytes(content)
        if name != "SHA256SUMS" and folder == checkpoint:
            opens_or_refuses(folder, open_checkpoint)
        else:
            opens_or_refuses(folder, load_model)

    sums = read_sums(checkpoint)
    try:
        replace()
    finally:
        path.write_bytes(whole)
        write_sums(checkpoint, sums)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("step", "1"), ("step", 1.0), ("step", True), ("step", 7), ("step", -1), ("images_seen", None), ("seed", -1),
        ("data_fingerprint", 12), ("data_fingerprint", ""), ("pool_samples", 0), ("micro_steps", [1]), ("skipped", 2),
        ("seed", 2**63), ("asked", {}), ("asked", "none"), ("asked", 4),
    ],
)  # fmt: skip
def test_a_progress_of_another_type_or_range_is_named(checkpoint: Path, entry: str, value: Any) -> None:
    path = checkpoint / "state.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(whole), entry: value}))
        with pytest.raises(UserError, match=rf"state\.json says .*{entry}"):
            read_progress(checkpoint)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("edit", ["depth: 1000", "hidden_size: 65536", "num_experts: 1000000000", "depth: 10000000"])
def test_sizes_in_a_checkpoints_settings_are_compared_with_what_is_stored_before_there_is_memory_for_them(
    checkpoint: Path, edit: str
) -> None:
    path = checkpoint / "config.yaml"
    whole = path.read_text()
    key = edit.split(":")[0]
    try:
        lines = [line.replace(line.strip(), edit) if line.strip().startswith(f"{key}:") else line
                 for line in whole.splitlines()]  # fmt: skip
        path.write_text("\n".join(lines))
        with pytest.raises(UserError):
            open_checkpoint(checkpoint)
    finally:
        path.write_text(whole)
        open_checkpoint(checkpoint)
