"""What people write, in a file or on the command line, is taken as they mean it, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmoe_dist.config import Config, build_config, load_config, router_names, save_config
from diffmoe_dist.errors import UserError

LAYERS: tuple[dict[str, Any], ...] = (
    {"run_dir": "r", "data": {"shards": "s"}, "model": {"size": "S"}},
    {"moe": {"router": "global_pool", "num_experts": 8}},
)
fuzz = settings(max_examples=75, deadline=None, derandomize=True)  # the same examples every time


def with_overrides(*overrides: str) -> Config:
    return build_config(*LAYERS, overrides=overrides)


@pytest.mark.parametrize(
    "text",
    ["12345_1", "1234_51", "1e3", "010", "1:30", "yes", "2026-11-25", "a#b", "a #b", "a=b", "[a", "{", "'q'", "-"],
)
def test_the_value_of_a_text_setting_is_taken_as_written(text: str, tmp_path: Path) -> None:
    config = with_overrides(f"run_dir={text}", f"data.shards={text}", f"sample.decoder={text}")
    assert (config.run_dir, config.data.shards, config.sample.decoder) == (text, text, text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text", ["12345_1", "1e3", "010", "1:30", "yes", "2026-11-25", "a#b", "0x10", "1.50"])
def test_a_plain_scalar_of_a_file_is_its_text_where_text_is_meant(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"run_dir: {text}\ndata: {{shards: {text}}}\nmodel: {{size: S}}\n")
    config = load_config(path)
    assert (config.run_dir, config.data.shards) == (text, text)


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = with_overrides("run_dir=~/runs/a", "data.shards=~", "train.initial_weights=~/w")
    assert config.run_dir == "/home/someone/runs/a"
    assert (config.data.shards, config.train.initial_weights) == ("/home/someone", "/home/someone/w")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run_dir=~nobody-of-this-name/x", r"run_dir=~nobody-of-this-name/x: no such home folder; give the whole path"),
        ("seed=010", r"seed=010: give a whole number, such as 8, in decimal digits"),
        ("seed=1_0", r"seed=1_0: give a whole number"),
        ("seed=1:30", r"seed=1:30: give a whole number"),
        ("seed=0x10", r"seed=0x10: give a whole number"),
        ("seed=1.0", r"seed=1\.0: give a whole number"),
        ("seed=true", r"seed=true: give a whole number"),
        (f"seed={'9' * 5000}", r"seed=9+: give a whole number"),
        ("optim.lr=1_0", r"optim\.lr=1_0: give a number, such as 0\.5 or 1e-4"),
        ("optim.lr=1,5", r"optim\.lr=1,5: give a number"),
        ("optim.lr=nan", r"optim\.lr=nan must be above 0 and finite"),
        ("optim.weight_decay=.inf", r"optim\.weight_decay=inf must be 0 \(off\) or more, and finite"),
        ("optim.betas=[0.9, 0.9_9]", r"optim\.betas\[1\]=0\.9_9: give a number"),
        ("sample.cfg_scale=-1", r"sample\.cfg_scale=-1\.0 must be 0 or more, and finite"),
        ("tf32=yes", r"tf32=yes: give true or false"),
        ("optim.lr=[1]", r"optim\.lr=\['1'\]: give a number"),
        ("optim.betas=[[1],2]", r"optim\.betas\[0\]=\['1'\]: give a number"),
        ("optim.betas=['${data}',0.9]", r"optim\.betas\[0\]=\$\{data\}: \$\{ stands for nothing here"),
        ("moe.capacity_schedule=[[1],[2]]", r"moe\.capacity_schedule\[0\]=\['1'\]: give a whole number"),
        ("profile.steps=[{a: 1},2]", r"profile\.steps\[0\]=\{'a': '1'\}: give a whole number"),
        ("moe=[1]", r"moe=\['1'\]: expected settings below it, such as moe\.router"),
        ("model.patch_size=10000000", r"model\.patch_size=10000000 must be from 1 to 4096"),
        ("moe.num_experts=1000000000", r"moe\.num_experts=1000000000 must be from 1 to 16384"),
        ("optim.betas[3]=0.5", r"there is no \[3\]; give the whole list"),
        ("seed[0]=1", r"there is no \[0\]; give the whole list"),
        ("optim..lr=1", r"expected key=value"),
        ("=1", r"expected key=value"),
        ("seed", r"override 'seed': expected key=value, such as optim\.lr=1e-4"),
        ("optim.betas=[0.9", r"not readable as YAML"),
        ("optim.betas=&a [*a, *a]", r"more than 10000 values or 20 levels"),
        ("optim.betas=" + "[" * 5000, r"not readable as YAML"),
        ("optim={lr: 1, lr: 2}", r"lr is given twice"),
        ("optim.eps=!!python/object/apply:os.getcwd []", r"not readable as YAML"),
        ("run_dir=${", r"run_dir=\$\{: \$\{ stands for nothing here; write the value itself"),
        ("run_dir=${seed}", r"run_dir=\$\{seed\}: \$\{ stands for nothing here"),
        ("seed=${train.steps}", r"seed=\$\{train.steps\}: \$\{ stands for nothing here"),
        ("data.mixture[99999999999].shards=a", r"there is no \[99999999999\]; give the whole list"),
        ("train.hang_timeout=1e300", r"train\.hang_timeout=1e\+300 must be 0 \(no limit\) or more, and at most 1"),
        ("train.global_batch_size=999999999999999999", r"global_batch_size=9+ must be from 1 to 16777216"),
        ("data.workers=100000", r"data\.workers=100000 must be from 0 to 1024"),
    ],
)
def test_what_could_be_read_as_something_else_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        with_overrides(override)
    assert "\n" not in str(caught.value)


def test_a_setting_that_is_given_twice_is_told_and_the_last_one_counts(caplog: pytest.LogCaptureFixture) -> None:
    assert with_overrides("seed=1", "tf32=true", "seed=2", "tf32=true").seed == 2
    assert caplog.messages == ["seed is given twice, as 1 and as 2; the last one counts"]


def test_items_of_lists_can_be_overridden() -> None:
    assert with_overrides("optim.betas[1]=0.95").optim.betas == (0.9, 0.95)
    assert with_overrides("optim.betas=[0.5,0.6]", "optim.betas[0]=0.7").optim.betas == (0.7, 0.6)
    mixture = with_overrides(
        "data.shards=", "data.mixture[0].shards=a", "data.mixture[0].weight=2", "data.mixture[1].shards=12_3"
    ).data.mixture
    assert [(entry.shards, entry.weight) for entry in mixture] == [("a", 2.0), ("12_3", 1.0)]


def test_null_and_nothing_unset_what_the_file_gave() -> None:
    layer = {"data": {"latents": "l"}, "train": {"steps": 5}}
    for override in ("data.latents=null", "data.latents="):
        assert build_config(*LAYERS, layer, overrides=[override]).data.latents is None
    assert build_config(*LAYERS, layer, overrides=["train.steps=null"]).train.steps == Config().train.steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null: 3\n", r"unknown setting null=3"),
        ("1: 3\n", r"unknown setting 1=3"),
        ("[a]: 3\n", r"not readable as YAML"),
        ("- a\n", r"expected a mapping of settings at the top level"),
        ("", r"expected a mapping of settings at the top level"),
        ("seed: 1\nseed: 2\n", r"seed is given twice"),
        ("model: {depth: 3, depth: 4}\n", r"depth is given twice"),
        ("a: &a [*a]\n", r"more than 10000 values or 20 levels"),
        ("a: " + "{a: " * 3000 + "}" * 3000, r"not readable as YAML"),
        ("a: \x00\n", r"not readable as YAML"),
        ("seed: 0o17\n", r"seed=0o17: give a whole number"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_a_file_that_is_not_utf8_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="is a folder; give a file in it"):
        load_config(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_setting(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("\ufeffrun_dir: r\ndata: {shards: s}\nmodel: {size: S}\n")
    assert load_config(tmp_path / "config.yaml").run_dir == "r"


KEYS = [
    "run_dir",
    "seed",
    "tf32",
    "precision",
    "model.depth",
    "model.size",
    "model",
    "moe",
    "moe.router",
    "moe.capacity",
    "moe.inference",
    "nothing",
    "[0]",
    "null",
    "moe.capacity_schedule",
    "objective.name",
    "train.micro_batch_size",
    "optim.betas",
    "optim.betas[0]",
    "optim.lr",
    "data.mixture",
    "fid",
    "a[",
    "data.mixture[0].shards",
    "data.mixture[0]",
    "data.shards",
    "profile.steps",
    "score.every",
    "parallel.zero_stage",
    "model.nothing",
    "optim.betas[x]",
]
VALUES = [
    *[
        "null",
        "~",
        "0",
        "-1",
        "1",
        "2",
        "1.5",
        "1e400",
        "nan",
        "inf",
        "true",
        "yes",
        "[]",
        "{}",
        "[1,2]",
        "[2,1]",
        "[a]",
        "012",
        "1_0",
        "1:30",
        "'",
        '"',
        "*a",
        "????",
        "???",
        "S",
        "dense",
    ],
    *["global_pool", "prototype", "ddpm", "flow", "${seed}", "${", "${oc.env:NO_SUCH}", "${run_dir}"],
    *["", "{a: 1}", "{depth: 2}", "&a [*a]", "!!int x", "? a", "- a", "\x00", "\ud800"],
]
OVERRIDES = st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=12))


@fuzz
@given(st.lists(OVERRIDES, min_size=1, max_size=4))
def test_any_overrides_give_a_configuration_or_one_line(overrides: list[tuple[str, str]]) -> None:
    try:
        config = with_overrides(*[f"{key}={value}" for key, value in overrides])
    except UserError as error:
        assert len(str(error)) > 10
    else:
        assert config.moe.router in router_names()
        assert config.train.micro_batch_size >= 0


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(VALUES) | st.text(max_size=8)
NAMES = st.sampled_from(
    [*Config.__dataclass_fields__, "size", "depth", "router", "betas", "mixture", "shards", "name", "x"]
)
TREES = st.recursive(
    SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES | SCALARS.map(str), below, max_size=4)
)


@fuzz
@given(st.dictionaries(NAMES, TREES, max_size=5))
def test_any_settings_of_a_file_give_a_configuration_or_one_line(tree: dict[str, Any]) -> None:
    try:
        build_config(*LAYERS, tree)
    except UserError as error:
        assert len(str(error)) > 10


@fuzz
@given(
    st.text(alphabet=st.sampled_from(list("run_dir: s&*[]{}!|>-#'\"\n\t?,0~%@`<")), max_size=60)
    | st.binary(max_size=40)
)
def test_any_file_gives_a_configuration_or_one_line(content: str | bytes) -> None:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"diffmoe-fuzz-{os.getpid()}.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        load_config(path)
    except UserError as error:
        assert len(str(error)) > 10
    finally:
        path.unlink()


@fuzz
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20))
def test_a_saved_configuration_reads_back_equal_whatever_its_texts(text: str) -> None:
    config = build_config(*LAYERS, {"run_dir": f"x{text}", "data": {"shards": f"x{text}"}})
    if "${" in text:
        return
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"diffmoe-fuzz-{os.getpid()}.yaml"
    save_config(config, path)
    try:
        assert load_config(path) == config
    finally:
        path.unlink()
