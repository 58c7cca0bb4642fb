"""Every benchmark that has no test of its own beside what it measures runs at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import planned
from benchmarks.collectives import counted
from benchmarks.measuring import in_turn, peak_bytes, ratio, spread
from benchmarks.page import TABLES, with_tables
from benchmarks.train_step import config_for, make_model
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import initialize
from diffmoe_dist.parallel.topology import all_gather
from tests.distributed import run_ranks

ROOT = Path(__file__).parent.parent


def _run(benchmark: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run_for_json(benchmark: str, file: Path, *arguments: str) -> dict[str, Any]:
    _run(benchmark, *arguments, "--json", str(file))
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["benchmark"] == benchmark
    assert set(found) >= {"date", "commit", "machine", "torch", "threads", "rows"}
    return found


@pytest.mark.slow
def test_the_whole_step_is_measured_of_four_models(tmp_path: Path) -> None:
    models = ["dense", "ours", "published", "deepspeed"]
    arguments = ("--device", "cpu", "--sizes", "tiny", "--tokens", "64", "--rounds", "2")
    found = _run_for_json("train_step", tmp_path / "step.json", *arguments)
    assert [row["model"] for row in found["rows"]] == models
    for row in found["rows"]:
        assert len(row["process_seconds"]) == len(row["wall_seconds"]) == 2
        assert 0 < row["peak_bytes"] < row["step_peak_bytes"] * 10
    assert found["rows"][0]["process_over_first"] == 1


def test_the_layer_is_measured_against_dense_ones(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--sizes", "64x256x4", "--repeats", "2")
    rows = _run_for_json("moe_layer", tmp_path / "layer.json", *arguments)["rows"]
    assert [row["layer"] for row in rows] == ["moe", "ratio 4", "widened"]
    assert rows[2]["moe_over_this"]["flops"] == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_scaling_shows_each_collective_with_the_bytes_that_the_planner_says(tmp_path: Path) -> None:
    arguments = ("--size", "tiny", "--tokens", "64", "--ranks", "1", "2", "--rounds", "1")
    rows = _run_for_json("scaling", tmp_path / "scaling.json", *arguments)["rows"]
    assert [(row["scaling"], row["ranks"], row["tokens"]) for row in rows] == [
        ("strong", 1, 64), ("strong", 2, 64), ("weak", 1, 64), ("weak", 2, 128),
    ]  # fmt: skip
    assert rows[0]["collectives"] == []
    of_two_ranks = rows[1]["collectives"]
    assert {row["kind"] for row in of_two_ranks} >= {"all-gather", "all-to-all"}
    for row in of_two_ranks:  # the planner leaves out single numbers
        assert row["payload"] == pytest.approx(row["planned_payload"], abs=64)


def test_collectives_are_counted_whoever_calls_them_and_under_whatever_name() -> None:
    for counts in run_ranks(2, _collectives_of_a_rank):
        assert counts == {
            ("all-reduce", 2): (1, 12), ("all-gather", 2): (1, 16), ("all-to-all", 2): (1, 32), ("broadcast", 2): (1, 4)
        }  # fmt: skip


def _collectives_of_a_rank(rank: int, world_size: int) -> dict[tuple[str, int], tuple[int, int]]:
    alone = dist.new_group([0]), dist.new_group([1])
    with counted() as counts:
        work = dist.all_reduce(torch.ones(3), async_op=True)
        assert work is not None
        work.wait()
        all_gather(torch.empty(4), torch.ones(2))
        dist.all_to_all_single(torch.empty(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        dist.broadcast(torch.ones(1), 0)
        dist.all_reduce(torch.ones(3), group=alone[rank])
    dist.all_reduce(torch.ones(3))
    assert all(count.seconds > 0 for count in counts.values())
    return {case: (count.calls, count.payload) for case, count in counts.items()}


@pytest.mark.slow
def test_sampling_is_measured_under_three_rules() -> None:
    shown = _run("sampling", "--device", "cpu", "--size", "64x2x4", "--batch", "1", "--steps", "1", "--rounds", "1")
    assert all(rule in shown for rule in ("threshold", "count", "static"))


@pytest.mark.slow
def test_what_a_gpu_does_is_compared_with_the_plan_in_one_table(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--accelerator", "H100-80", "--precision", "fp32", "--sizes", "tiny")
    small = ("--images", "4", "--rounds", "1", "--models", "ours", "ours,nonsense=1", "--out", str(tmp_path))
    with pytest.raises(AssertionError):  # a part that fails ends the command with 1, and no other part
        _run("gpu", *arguments, *small)
    found, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert [row["part"] for row in found["rows"]] == [
        *["machine"] * 2, *["layer"] * 2, "step", "MFU", "memory, held", "memory, peak", *["sampling"] * 2
    ]  # fmt: skip
    assert all(row["measured"] > 0 and row["predicted"] > 0 for row in found["rows"])
    held = next(row for row in found["rows"] if row["part"] == "memory, held")
    assert abs(held["off"]) < 0.1  # also on a CPU, for it is exact
    assert "| step | tiny, ours |" in page and "predictions are off by more than 10%" in page
    assert len(found["left_out"]) == 1 and "Left out: step tiny ours,nonsense=1: UserError: " in page


@pytest.mark.parametrize("size", ["tiny", "S", "B"])
def test_the_dense_model_has_the_parameters_that_a_token_of_ours_activates(size: str) -> None:
    ours, dense = (account(config_for(name, size, 1024, "cpu", "fp32")) for name in ("ours", "dense"))
    # The hidden width is a multiple of 8.
    assert dense.activated() == pytest.approx(ours.activated(), rel=5e-3)
    assert sum(dense.macs().values()) == pytest.approx(sum(ours.macs().values()), rel=0.02)


def test_settings_may_follow_the_name_of_a_model() -> None:
    config = config_for("ours,parallel.zero_stage=2,seed=7", "tiny", 64, "cpu", "fp32")
    assert (config.parallel.zero_stage, config.seed) == (2, 7)


def test_the_published_layer_restated_computes_what_ours_does() -> None:
    torch.manual_seed(0)
    config = config_for("ours", "tiny", 64, "cpu", "fp32")
    ours, published = make_model("ours", config).train(), make_model("published", config).train()
    initialize(ours, 0)
    layer: Any = ours.moe_layers[0]
    other: Any = published.moe_layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    weights = dict(layer.named_parameters())
    other.router.weight = weights["router.gate_weight"]
    other.predictor = layer.router.capacity_predictor
    for expert, mlp in enumerate(other.mlps):
        mlp.fc1.weight.data, mlp.fc1.bias.data = weights["experts.w1"][expert].T, weights["experts.b1"][expert]
        mlp.fc2.weight.data, mlp.fc2.bias.data = weights["experts.w2"][expert].T, weights["experts.b2"][expert]
    x, null = torch.randn(4, 16, 64), torch.zeros(4, dtype=torch.bool)
    other._move_thresholds = lambda *_: None  # which is a collective
    (y, routing), (y_other, routing_other) = layer(x, null), other(x, null)
    torch.testing.assert_close(y_other, y)
    torch.testing.assert_close(routing_other.losses["capacity"], routing.losses["capacity"])
    assert torch.equal(routing_other.stats.tokens_per_expert, routing.stats.tokens_per_expert)


def test_results_are_written_between_their_markers_and_the_text_stays() -> None:
    head = {"date": "2026-11-26", "commit": "abc", "machine": "M", "torch": "2", "threads": 1}
    collective = {"kind": "all-gather", "group": 2, "calls": 1, "payload": 2e6, "planned_payload": 2e6, "seconds": 0.1}
    row = {"scaling": "weak", "model": "ours", "ranks": 2, "tokens": 64, "wall": 1.0, "process": 2.0}
    results = [{"benchmark": "scaling", **head, "rows": [{**row, "collectives": [collective]}]}]
    page = "text\n<!-- scaling -->\nold\n<!-- /scaling -->\nmore\n<!-- collectives -->\n<!-- /collectives -->\nend\n"
    written = with_tables(page, results)
    assert with_tables(written, results) == written
    assert written.startswith("text\n<!-- scaling -->\n\n2026-11-26, commit abc, M, torch 2, 1 thread.\n\n| scaling |")
    assert "| weak | ours | 2 | 64 | 1.000 | 1.00 | 1.000 |\n\n<!-- /scaling -->\nmore\n" in written
    assert "| 2.000 MB | 2.000 MB | 1.000 MB | 100.0 |" in written
    assert "old" not in written
    with pytest.raises(ValueError, match="no <!-- scaling --> in the page"):
        with_tables("text", results)


def test_make_bench_finds_a_place_on_the_page_for_every_result() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    assert all(f"<!-- {name} -->\n" in page and f"<!-- /{name} -->\n" in page for name in TABLES)


def test_steps_take_turns_and_ratios_are_those_of_a_round() -> None:
    order: list[str] = []
    seconds = iter([9.0, 9.0, 1.0, 2.0, 10.0, 20.0])  # a machine that slows down

    def step(name: str) -> float:
        order.append(name)
        return next(seconds)

    returned = in_turn({"a": lambda: step("a"), "b": lambda: step("b")}, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert returned == {"a": [1.0, 10.0], "b": [2.0, 20.0]}
    assert ratio(returned["b"], returned["a"]) == 2
    assert spread([1.0, 1.0, 1.0]) == 0
    assert spread([1.0, 2.0, 3.0]) == pytest.approx(0.25)


def test_the_peak_of_a_step_is_what_is_live_at_one_moment() -> None:
    def step() -> None:
        for _ in range(3):
            a = torch.ones(1000, 1000)
            b = a + 1
            del a, b

    assert peak_bytes(step, torch.device("cpu")) == pytest.approx(2 * 4e6, rel=0.01)


@pytest.mark.parametrize("name", planned.PAGES)
def test_a_page_shows_what_the_planner_says_now(name: str) -> None:
    """Else: python -m benchmarks.planned"""
    page = (ROOT / name).read_text()
    assert planned.with_plans(page) == page


@pytest.mark.parametrize("name", planned.SCRIPTS)
def test_a_training_script_has_the_nodes_that_the_planner_chooses(name: str) -> None:
    script = (ROOT / name).read_text()
    assert planned.with_nodes(script, planned.SCRIPTS[name]) == script
