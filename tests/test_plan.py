"""The planner as a user meets it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from diffmoe_dist.errors import UserError
from diffmoe_dist.plan import main
from tests.commands import start
from tests.machine import ROOT

CONFIG = str(ROOT / "configs/imagenet256/global_pool_l.yaml")
SMALL = str(ROOT / "configs/imagenet256/global_pool_s.yaml")


def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    main()
    return capsys.readouterr().out


def test_a_plan_as_json_has_the_unit_in_each_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan(
        monkeypatch, capsys, "--config", CONFIG, "parallel.expert=8", "--nodes", "2", "--gpus-per-node", "8",
        "precision=bf16", "--accelerator", "H200-141", "--json",
    )  # fmt: skip
    found = json.loads(text)
    assert found["parameters"]["total_millions"] == 1981.96
    assert found["parameters"]["activated_millions"] == 471.09
    assert found["macs_per_image"]["linear_giga"] == pytest.approx(80.80, abs=0.005)
    assert (found["settings"]["ranks"], found["settings"]["accelerator"]) == (16, "H200-141")
    # 372.4 M dense parameters, and the experts over 8 ranks: 201.4 M, in bf16.
    assert found["memory_per_gpu"]["held_bytes"]["weights"] == pytest.approx(2 * 571.55e6, rel=1e-4)
    tokens = next(t for t in found["wire_per_gpu_and_step"]["transfers"] if t["name"] == "tokens to experts and back")
    # 16 images of 256 tokens, one visit each, 1024 bf16 numbers, there and back, in each of 12 layers.
    assert tokens["payload_bytes"] == 16 * 256 * 1024 * 2 * 2 * 12
    assert tokens["across_nodes_bytes"] == 0
    step = found["step"]
    assert step["seconds"] == pytest.approx(sum(step["parts_seconds"].values()))
    assert step["bound_by"] in ("compute", "wire", "memory", "host")


def test_a_plan_as_text_says_what_is_exact_and_what_is_an_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan(monkeypatch, capsys, "--config", CONFIG, "--nodes", "1", "--gpus-per-node", "8", "--capacity", "0.95")
    lines = [line.split() for line in text.splitlines()]
    assert ["total", "1981.96", "the", "frozen", "position", "table", "included"] in lines
    assert next(line for line in lines if line[:2] == ["activated,", "eq."])[3] == "454.56"
    for word in ("exact", "estimate", "GiB", "MB", "ms", "ASSUMPTIONS"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", ["dense_s", "prototype_b", "expert_choice_xl", "load_balanced_l"])
def test_every_family_can_be_planned_without_data(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / f"configs/imagenet256/{name}.yaml")
    assert "STEP" in plan(monkeypatch, capsys, "--config", config, "--nodes", "1", "--gpus-per-node", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "1", "--gpus-per-node", "3"), "train.global_batch_size=256 does not divide over 3 ranks"),
        (("--nodes", "0", "--gpus-per-node", "8"), "--nodes 0: must be at least 1"),
        (("--nodes", "1", "--gpus-per-node", "8", "--accelerator", "TPU"), "--accelerator TPU: choose from A100-80,"),
        (("--nodes", "1", "--gpus-per-node", "8", "--capacity", "-1"), "--capacity -1.0: must be 0 or more"),
        (("--nodes", "1", "--gpus-per-node", "8", "moe.router=dense"), "has no effect with moe.router=dense"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    ended = start("diffmoe_dist.plan", "--config", CONFIG, *arguments, folder=tmp_path)[0]
    assert ended.wait() == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_dense_models_that_equal_a_mixture_of_experts_are_settings_that_the_training_command_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--config", SMALL, "--nodes", "1", "--gpus-per-node", "8", "--capacity", "0.5", "--dense")
    text = plan(monkeypatch, capsys, *arguments)
    found = json.loads(plan(monkeypatch, capsys, *arguments, "--json"))
    macs = found["macs_per_image"]
    wanted = {
        "activated parameters": ("parameters_millions", found["parameters"]["activated_millions"]),
        "arithmetic": ("macs_giga", macs["linear_giga"] + macs["attention_products_giga"]),
    }
    models = found["dense_models"]
    assert [list(model["settings"])[-1] for model in models] == ["model.mlp_ratio", "model.num_heads"] * 2
    for model in models:
        key, number = wanted[model["equal"]]
        # A width must divide by its heads, a ratio by nothing.
        assert model[key] == pytest.approx(number, rel=2e-4 if "model.mlp_ratio" in model["settings"] else 0.02)
        assert f"{model['parameters_millions']:.2f} M, {model['macs_giga']:.2f} GMAC" in text
        settings = [f"{name}={'null' if value is None else value}" for name, value in model["settings"].items()]
        dense = str(ROOT / "configs/imagenet256/dense_s.yaml")
        alone = json.loads(
            plan(monkeypatch, capsys, "--config", dense, *settings, "--nodes", "1", "--gpus-per-node", "8", "--json")
        )
        assert alone["parameters"]["total_millions"] == model["parameters_millions"]
        assert alone["macs_per_image"]["linear_giga"] <= model["macs_giga"]
    assert max(map(len, text.splitlines())) <= 120


def test_a_sweep_prints_the_command_of_the_fastest_plan_and_as_json_all_plans(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--config", SMALL, "--nodes", "2", "--gpus-per-node", "4", "--sweep", "parallel.tensor=1")
    text = plan(monkeypatch, capsys, *arguments)
    found = json.loads(plan(monkeypatch, capsys, *arguments, "--json"))
    assert found["plans"] == sorted(found["plans"], key=lambda row: -row["images_per_second"])
    fastest = next(row for row in found["plans"] if row["precision"] == "fp32")
    assert found["best"] == fastest
    command = text.splitlines()[-1]
    assert "parallel.tensor=1" in command, "what was given belongs to the command"
    assert command.endswith(" ".join(["parallel.tensor=1", *fastest["overrides"]]))
    assert f"--nproc-per-node {fastest['ranks'] // fastest['nodes']}" in command
    for title in ("MOST IMAGES A SECOND", "FEWEST GPU-HOURS", "OTHER PRECISIONS"):
        assert title in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--days", "3"), "--days 3.0 has no effect without --sweep; add it"),
        (("--sweep", "--days", "0"), "--days 0.0: must be more than 0"),
        (("--sweep", "--days", "0.001"), "--days 0.001: the fastest plan takes"),
        (("--sweep", "--capacity", "1"), "--capacity 1.0 has no effect with --sweep"),
        (("--sweep", "--dense"), "--dense has no effect with --sweep"),
    ],
)
def test_a_sweep_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan(monkeypatch, capsys, "--config", SMALL, "--nodes", "1", "--gpus-per-node", "8", *arguments)
