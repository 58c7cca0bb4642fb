"""The commands as a user meets them: in processes of their own, under each launcher."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.commands import ENV, run, start
from tests.machine import ROOT, free_port, needs_mpirun

pytestmark = pytest.mark.slow

PYTHONPATH = os.environ.get("PYTHONPATH", "")
STEPS = 3


LAUNCHERS = {
    "python": (sys.executable, "-m"),
    "deepspeed": ("deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module"),
    "torchrun": ("torchrun", "--nproc-per-node", "2", "--master-port", "PORT", "-m"),
    "mpirun": ("mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=needs_mpirun if name == "mpirun" else ()) for name in LAUNCHERS]
)
def test_training_runs_and_ends_cleanly_under(launcher: str, runs: Path, digits: Path) -> None:
    command = [part.replace("PORT", str(free_port())) for part in LAUNCHERS[launcher]]
    ended = run(
        *command, "diffmoe_dist.train", "--config", "configs/debug/global_pool.yaml", f"data.shards={digits}",
        f"run_dir={runs / launcher}", f"train.steps={STEPS}", "device=cpu", "log.every=1", "sample.every=3",
        "sample.num=4", "sample.steps=2", "log.figures_every=2", f"parallel.expert={1 if launcher == 'python' else 2}",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    losses = [json.loads(line)["loss"] for line in (runs / launcher / "metrics.jsonl").read_text().splitlines()]
    expected = json.loads((ROOT / "tests/golden/global_pool.json").read_text())[:STEPS]
    # Another machine's matrix products round differently; three steps do not make much of it.
    assert losses == pytest.approx(expected, abs=1e-5)


def test_the_run_folder_holds_what_the_contract_says(runs: Path) -> None:
    run_dir = runs / "python"
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(line) == {
        "step", "images_seen", "ranks", "loss", "loss_diffusion", "loss_capacity", "grad_norm", "lr",
        "images_per_second", "step_seconds", "capacity", "expert_load_max", "expert_load_min", "bad_samples",
        "peak_memory_bytes", "skipped_steps", "failed_checkpoints", "failed_log_writes", "seconds_data",
        "seconds_forward", "seconds_backward", "seconds_all_to_all", "seconds_optimizer", "seconds_checkpoint",
        "gate_entropy", "dead_experts", "predictor_capacity", "predictor_agreement", "predictor_load_max",
        "predictor_load_min", *(f"capacity_at_noise_{noise}" for noise in (0.1, 0.3, 0.5, 0.7, 0.9)),
        *(f"expert_load_max_at_noise_{noise}" for noise in (0.1, 0.3, 0.5, 0.7, 0.9)),
    }  # fmt: skip
    assert (line["step"], line["images_seen"], line["capacity"]) == (STEPS, STEPS * 32, 1.0)
    loads = json.loads((run_dir / "expert_load.jsonl").read_text().splitlines()[-1])
    assert loads == {"step": STEPS, "capacity": [1.0, 1.0], "load": [[1.0] * 8] * 2}
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {
        "samples", "moe/capacity_over_steps", "moe/capacity_by_class", "moe/expert_load", "moe/experts_and_steps",
        "moe/experts_and_classes", "moe/count_and_threshold",
    }  # fmt: skip
    # Capacity and load are constant in training, and nothing has failed.
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"loss", "perf", "moe", "optim"}
    assert not {"moe/capacity", "moe/expert_load_max"} & set(events.Tags()["scalars"])
    assert {"moe/load_by_predictor/block_1", "moe/gates/block_3"} <= set(events.Tags()["histograms"])
    texts = {tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in ("config", "command")}
    assert b"router: global_pool" in texts["config"] and b"-m diffmoe_dist.train --config" in texts["command"]
    assert (run_dir / "config.yaml").is_file()
    assert f"step {STEPS}/{STEPS}" in (run_dir / "logs/rank-0.log").read_text()
    assert (run_dir / f"checkpoints/step-{STEPS:08d}/state.json").is_file()
    assert Image.open(run_dir / f"samples/step-{STEPS:08d}.png").size[0] > 64


def test_sampling_gives_the_same_images_on_one_process_and_on_two(runs: Path, tmp_path: Path) -> None:
    options = (
        "--checkpoint", runs / "python", "--steps", "3", "--batch-size", "2", "--cfg-scale", "2", "--device", "cpu",
    )  # fmt: skip
    one = tmp_path / "one"
    ended = run(sys.executable, "-m", "diffmoe_dist.sample", *options, "--out", one, "--num", "7")
    assert ended.returncode == 0, ended.stderr
    ours, record = np.load(one / "samples.npz"), json.loads((one / "sampling.json").read_text())
    assert ours["arr_0"].shape == (7, 8, 8, 1) and ours["arr_0"].dtype == np.uint8
    assert ours["arr_1"].tolist() == list(range(7))
    assert record["images_per_second"] > 0 and record["num"] == 7
    assert Image.open(one / "grid.png").size[0] == 3 * 68
    for launcher in ("torchrun", "deepspeed"):  # which take --num for an abbreviation of their own options
        command = [part.replace("PORT", str(free_port())) for part in LAUNCHERS[launcher]]
        two = tmp_path / launcher
        ended = run(*command, "diffmoe_dist.sample", *options, "--out", two, "--num-images", "7")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert np.array_equal(ours["arr_0"], np.load(two / "samples.npz")["arr_0"])
        assert record["capacity"] == pytest.approx(json.loads((two / "sampling.json").read_text())["capacity"])


def test_the_report_says_where_its_pages_are(runs: Path) -> None:
    ended = run(
        sys.executable, "-m", "diffmoe_dist.report", "--run", runs / "python", "--images", "10", "--device", "cpu"
    )
    assert ended.returncode == 0, ended.stderr
    assert Image.open(runs / "python/loss.png").size[0] > 500
    page = ended.stdout.splitlines()[-1].removeprefix("report:").strip()
    assert page == str(runs / "python/report.html")
    assert Path(page).read_text().startswith("<!doctype html>")


def test_an_interval_search_tells_the_capacity_and_the_score_at_each_threshold(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "taste.py").write_text("def darkness(images):\n    return 255 - images.mean()\n")
    command = (
        sys.executable, "-m", "diffmoe_dist.interval_search", "--checkpoint", runs / "python", "--thresholds",
        "0.999,0.5,0", "--num", "6", "--steps", "2", "--device", "cpu", "--out", tmp_path / "search",
    )  # fmt: skip
    ended = run(*command, "--score", "taste:darkness", env={**ENV, "PYTHONPATH": f"{tmp_path}:{PYTHONPATH}"})
    assert ended.returncode == 0, ended.stderr
    points = json.loads((tmp_path / "search/interval_search.json").read_text())
    assert [point["threshold"] for point in points] == [0.999, 0.5, 0.0]
    # No predicted score exceeds the first threshold in this young model, and all exceed the last: 8 experts a token.
    assert points[0]["capacity"] == 0.0 and points[2]["capacity"] == 8.0
    images = np.load(tmp_path / "search/threshold-0.5/samples.npz")["arr_0"]
    assert points[1]["score"] == pytest.approx(255 - images.mean())
    assert "best score at C <= 1:" in ended.stdout and "0.999" in ended.stdout
    assert Image.open(tmp_path / "search/interval_search.png").size[0] > 500

    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert "no --score was given: the images were not judged" in again.stdout
    assert "threshold-0.5 has these 6 images already" in again.stderr


def test_the_parts_of_a_step_are_timed(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "torchrun/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        parts = {name: line[f"seconds_{name}"] for name in ("data", "forward", "backward", "optimizer", "all_to_all")}
        assert all(seconds > 0 for seconds in parts.values())
        assert parts["all_to_all"] < parts["forward"] + parts["backward"], "it is a share of them"
        assert sum(parts.values()) - parts["all_to_all"] < line["step_seconds"]
    alone = json.loads((runs / "python/metrics.jsonl").read_text().splitlines()[-1])
    assert alone["seconds_all_to_all"] == 0


def test_a_trace_of_chosen_steps_is_written_and_deterministic_changes_no_loss(tmp_path: Path, digits: Path) -> None:
    command = start(
        "diffmoe_dist.train", "--config", "configs/debug/global_pool.yaml", f"data.shards={digits}", "train.steps=4",
        f"run_dir={tmp_path}/run", "log.every=1", "profile.steps=[2,3]", "deterministic=true", folder=tmp_path,
    )[0]  # fmt: skip
    assert command.wait() == 0, command.stderr
    with gzip.open(tmp_path / "run/profile/steps-2-3-rank-0.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::baddbmm" in names
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(json.loads((ROOT / "tests/golden/global_pool.json").read_text())[:4], abs=1e-5)


def test_a_dry_run_builds_a_rank_of_64_without_memory_and_leaves_nothing_behind(tmp_path: Path, digits: Path) -> None:
    command = start(
        "diffmoe_dist.train", "--config", "configs/debug/global_pool.yaml", f"data.shards={digits}", "model.size=XL",
        "model.depth=null", "model.hidden_size=null", "model.num_heads=null", "moe.num_experts=16", "parallel.expert=8",
        "train.global_batch_size=2048", "train.micro_batch_size=16", f"run_dir={tmp_path}/run", "precision=bf16",
        "--dry-run", "--world-size", "64", folder=tmp_path,
    )[0]  # fmt: skip
    assert command.wait() == 0, command.stderr
    report = dict(line.split(": ", 1) for line in command.stdout.splitlines())
    # 14 layers of 16 experts, each 2 x 4 x 1152^2 + 5 x 1152 parameters; a rank holds 2 of the 16.
    expert = 8 * 1152**2 + 5 * 1152
    total, held = (float(part.split(" M")[0].replace(",", "")) for part in report["model"].split("parameters,"))
    assert total - held == pytest.approx(14 * 14 * expert / 1e6, abs=0.02)
    assert "8 groups of 8 ranks hold them, 2 a layer and rank" in report["experts"]
    assert "16 images x 64 ranks x 2 micro-steps; 1024 images or 16384 tokens compete together" in report["batch"]
    assert f"weights {2 * held / 1e3:.3g} GB" in report["memory"]
    dense = held - 14 * 2 * expert / 1e6
    partition = dense / 64 + 14 * 2 * expert / 1e6 / 8
    assert f"fp32 master weights {4 * partition:.3g} MB, AdamW moments {8 * partition:.3g} MB" in report["memory"]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_where_a_run_would_go_on(runs: Path, digits: Path, tmp_path: Path) -> None:
    command = start(
        "diffmoe_dist.train", "--config", "configs/debug/global_pool.yaml", f"data.shards={digits}",
        f"run_dir={runs}/python", "--dry-run", "--world-size", "8", "parallel.expert=8", "optim.warmup_steps=2",
        folder=tmp_path,
    )[0]  # fmt: skip
    assert command.wait() == 0, command.stderr
    assert f"step {STEPS}, from {runs}/python/checkpoints/step-{STEPS:08d}" in command.stdout
    lines = command.stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("lr:"))
    assert lines[first].endswith("from step 2 on") and "####" in lines[first + 1] and lines[first + 7].endswith("100")


TRAIN = ("diffmoe_dist.train", "--config", "configs/debug/global_pool.yaml", "data.shards=DIGITS")
SAMPLE = ("diffmoe_dist.sample", "--checkpoint", "RUNS/python", "--out", "RUNS/out")
PACK = ("data_tools.__main__", "pack")
BAD = {
    "unknown key": ((*TRAIN, "optim.lrr=1"), "unknown setting optim.lrr=1; did you mean optim.lr?"),
    "no such config": (("diffmoe_dist.train", "--config", "nowhere.yaml"), "--config nowhere.yaml: no such file"),
    "no config": (("diffmoe_dist.train",), "the following arguments are required: --config"),
    "not an override": ((*TRAIN, "steps"), "override 'steps': expected key=value"),
    "not YAML": (("diffmoe_dist.train", "--config", "README.md"), "--config README.md"),
    "wrong type": ((*TRAIN, "train.steps=many"), "train.steps=many: give a whole number"),
    "no such router": ((*TRAIN, "moe.router=global"), "moe.router=global is not a router; did you mean global_pool?"),
    "a setting of another router": ((*TRAIN, "moe.shared=1"), "moe.shared"),
    "no such precision": ((*TRAIN, "precision=fp8"), "precision=fp8 is none of the choices"),
    "heads over width": ((*TRAIN, "model.num_heads=3"), "model.hidden_size=64 is not divisible by model.num_heads=3"),
    "patches over size": ((*TRAIN, "model.patch_size=3"), "model.input_size=8 is not divisible by model.patch_size=3"),
    "negative learning rate": ((*TRAIN, "optim.lr=-1"), "optim.lr=-1.0 must be above 0 and finite"),
    "no steps": ((*TRAIN, "train.steps=0"), "train.steps=0 must be at least 1"),
    "no checkpoint kept": ((*TRAIN, "checkpoint.keep=0"), "checkpoint.keep=0 must be at least 1"),
    "kept between checkpoints": (
        (*TRAIN, "checkpoint.keep_every=70"),
        "checkpoint.keep_every=70 is not a multiple of checkpoint.every=50",
    ),
    "negative time": ((*TRAIN, "train.hang_timeout=-1"), "train.hang_timeout=-1.0 must be 0 (no limit) or more"),
    "trace backwards": ((*TRAIN, "profile.steps=[5,3]"), "must be first and last step"),
    "snapshot of a CPU": (
        (*TRAIN, "profile.memory_snapshot=true", "device=cpu"),
        "profile.memory_snapshot=true has no effect on device=cpu",
    ),
    "layers over ranks": ((*TRAIN, "parallel.tensor=2"), "parallel.tensor=2 does not divide the 1 ranks"),
    "layers over more ranks than heads": (
        (*TRAIN, "parallel.tensor=64"),
        "parallel.tensor=64 does not divide model.num_heads=",
    ),
    "compiled layers over ranks": (
        (*TRAIN, "parallel.tensor=2", "train.compile=true"),
        "train.compile=true compiles no layer that parallel.tensor=2 cuts",
    ),
    "experts over ranks": ((*TRAIN, "parallel.expert=3"), "parallel.expert=3 does not divide moe.num_experts=8"),
    "ranks over experts": ((*TRAIN, "parallel.expert=8"), "parallel.expert=8 does not divide the 1 ranks"),
    "batch": ((*TRAIN, "train.micro_batch_size=5"), "train.global_batch_size=32 is not a multiple of"),
    "world of a dry run": (
        (*TRAIN, "--dry-run", "--world-size", "3"),
        "train.global_batch_size=32 does not divide over 3 ranks",
    ),
    "nobody in a dry run": ((*TRAIN, "--dry-run", "--world-size", "0"), "--world-size 0: choose at least 1"),
    "world of a true run": ((*TRAIN, "--world-size", "2"), "--world-size 2 has no effect without --dry-run"),
    "no index": ((*TRAIN, "data.shards=/nowhere"), "data.shards=/nowhere"),
    "no index in a dry run": ((*TRAIN, "data.shards=/nowhere", "--dry-run"), "data.shards=/nowhere"),
    "other images": ((*TRAIN, "model.input_size=16"), "model.input_size=16, but data.shards"),
    "no CUDA": ((*TRAIN, "device=cuda"), "device=cuda, but this machine has no usable CUDA device"),
    "other checkpoint": ((*TRAIN, "run_dir=RUNS/python", "model.depth=2"), "is of another model with model.depth=4"),
    "other seed": ((*TRAIN, "run_dir=RUNS/python", "seed=1"), "was trained with seed=0"),
    "other pool": (
        (*TRAIN, "run_dir=RUNS/python", "train.micro_batch_size=16"),
        "one token pool of this launch has 16 samples",
    ),
    "one block": ((*TRAIN, "model.depth=1"), "model.depth=1: experts are in every second block"),
    "run_dir is a file": ((*TRAIN, "run_dir=README.md"), "run_dir=README.md: cannot be written"),
    "out is a file": (
        ("diffmoe_dist.sample", "--checkpoint", "RUNS/python", "--out", "README.md", "--num", "1"),
        "--out README.md: cannot be written",
    ),
    "no checkpoint": (
        ("diffmoe_dist.sample", "--checkpoint", "/nowhere", "--out", "RUNS/out", "--num", "1"),
        "no complete checkpoint there",
    ),
    "no images": ((*SAMPLE, "--num", "0"), "--num 0: choose at least 1"),
    "half an image": ((*SAMPLE, "--num", "0.5"), "argument --num/--num-images: invalid int value: '0.5'"),
    "no sampler": ((*SAMPLE, "--num", "1", "--sampler", "magic"), "argument --sampler: invalid choice: 'magic'"),
    "negative seed": ((*SAMPLE, "--num", "1", "--seed", "-1"), "--seed -1: choose one from 0"),
    "other objective": (
        (*SAMPLE, "--num", "1", "--sampler", "ddim"),
        "--sampler ddim is not for a model with objective.name=flow; choose euler",
    ),
    "threshold of one": (
        (
            "diffmoe_dist.interval_search",
            "--checkpoint",
            "RUNS/python",
            "--thresholds",
            "0.5,1",
            "--out",
            "RUNS/search",
        ),
        "--thresholds 1: predicted scores are between 0 and 1; choose 0 or more and below 1",
    ),
    "no such score": (
        (
            "diffmoe_dist.interval_search",
            "--checkpoint",
            "RUNS/python",
            "--thresholds",
            "0.5",
            "--out",
            "RUNS/search",
            "--score",
            "json:fid",
        ),
        "--score json:fid: json has no callable 'fid'; give module:callable",
    ),
    "classes": (
        ("diffmoe_dist.sample", "--checkpoint", "RUNS/python", "--out", "RUNS/out", "--num", "1", "--classes", "1,,2"),
        "--classes 1,,2: expected numbers or names with commas between them",
    ),
    "experts of samples": (
        ("diffmoe_dist.sample", "--checkpoint", "RUNS/python", "--out", "RUNS/out", "--num", "100", "--expert", "2"),
        "--expert 2 must divide the 1 ranks and moe.num_experts=8",
    ),
    "figures of no experts": (
        ("diffmoe_dist.train", "--config", "configs/debug/dense.yaml", "data.shards=DIGITS", "log.figures_every=10"),
        "log.figures_every=10 has no effect with moe.router=dense",
    ),
    "no run": (("diffmoe_dist.report", "--run", "/nowhere"), "--run /nowhere"),
    "no source": ((*PACK, "nowhere", "RUNS/pack"), "SOURCE=nowhere"),
    "no command": (("data_tools.__main__",), "arguments are required: COMMAND"),
    "packed elsewhere": ((*PACK, "digits", "README.md"), "README.md"),
    "empty shards": ((*PACK, "digits", "RUNS/pack", "--samples-per-shard", "0"), "0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_users_mistake_is_one_line_and_exit_code_2(case: str, runs: Path, digits: Path, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    module, *filled = (part.replace("DIGITS", str(digits)).replace("RUNS", str(runs)) for part in arguments)
    ended = start(module, *filled, folder=tmp_path)[0]
    assert ended.wait() == 2, ended.stderr
    assert ended.stdout == ""
    assert sum("is given twice" not in line for line in ended.stderr.splitlines()) == 1, ended.stderr
    assert message in ended.stderr


@pytest.mark.parametrize("case", ["unknown key", "other checkpoint", "no images", "no run", "no source"])
def test_a_users_mistake_is_the_same_from_a_shell(case: str, runs: Path, digits: Path) -> None:
    arguments, message = BAD[case]
    filled = [part.replace("DIGITS", str(digits)).replace("RUNS", str(runs)) for part in arguments]
    ended = run(sys.executable, "-m", *filled)
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1), ended.stderr
    assert message in ended.stderr
