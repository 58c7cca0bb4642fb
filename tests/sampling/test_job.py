"""Many images into a folder: the same on any ranks, after any interruption, and what is counted on the way."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.digits import DigitsSource
from data_tools.pack import PackSettings, pack
from diffmoe_dist.config import load_config
from diffmoe_dist.engine.conversion import export_checkpoint
from diffmoe_dist.engine.weights import find_model, read_model, write_weights
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.moe import MoELayer
from diffmoe_dist.sampling.conditions import open_conditions
from diffmoe_dist.sampling.job import (
    describe_job,
    sample_to_folder,
)
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.distributed import RankError, run_ranks
from tests.machine import ROOT, TIME_LIMIT, free_port

CPU = torch.device("cpu")


def settings_for(run: Path, **changes: Any) -> SamplingSettings:
    plain = SamplingSettings(str(run), num=7, steps=3, cfg_scale=1.0, seed=0, sampler=None, batch_size=3)
    return replace(plain, **changes)


def run_jobs(rank: int, ranks: int, jobs: list[tuple[SamplingSettings, Path]]) -> None:
    for settings, out in jobs:
        sample_to_folder(settings, out, CPU, Launch(rank, ranks, rank, "environment"))


def test_a_block_of_the_count_rule_is_the_same_on_any_ranks_with_experts_sharded_or_not(
    trained: Path, tmp_path: Path
) -> None:
    settings = settings_for(trained, num=12, overrides=("moe.inference=count",), cfg_scale=2.0)
    static = replace(settings, overrides=("moe.inference=static",))
    alone = [(settings, tmp_path / "one"), (static, tmp_path / "static-one")]
    run_ranks(1, run_jobs, [*alone, (replace(settings, batch_size=4), tmp_path / "other-blocks")])
    both = [(settings, tmp_path / "two"), (replace(settings, expert=2), tmp_path / "sharded")]
    run_ranks(2, run_jobs, [*both, (replace(static, expert=2), tmp_path / "static-sharded")])

    def images(name: str) -> np.ndarray:
        return np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int)

    assert (abs(images("two") - images("one")) <= 1).all()  # a grey value may round the other way
    assert (abs(images("sharded") - images("one")) <= 1).all()
    assert (abs(images("static-sharded") - images("static-one")) <= 1).all()
    assert (abs(images("other-blocks") - images("one")) > 3).any(), "images of a block compete"
    record = json.loads((tmp_path / "one/sampling.json").read_text())
    assert record["reproducible_unit"] == "block of batch_size images"


@pytest.mark.slow
def test_an_interrupted_job_of_a_thousand_images_gives_the_same_npz_when_it_is_run_again(
    trained: Path, tmp_path: Path
) -> None:
    settings = settings_for(trained, num=1000, steps=4, batch_size=16, labels="random")
    run_ranks(1, run_jobs, [(settings, tmp_path / "whole")])
    out = tmp_path / "torn"
    command = [
        sys.executable, "-m", "diffmoe_dist.sample", "--checkpoint", trained, "--out", out, "--num", "1000",
        "--steps", "4", "--batch-size", "16", "--labels", "random", "--device", "cpu",
    ]  # fmt: skip
    killed = subprocess.Popen([str(part) for part in command], cwd=ROOT, stderr=subprocess.DEVNULL)
    while killed.poll() is None and len(list(out.glob("blocks/block-*.npz"))) < 5:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, "it was killed before it was through"
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("blocks/block-*.npz")}
    assert 5 <= len(kept) < 63 and not (out / "samples.npz").exists()

    run_ranks(2, interrupted_then_resumed, settings, out, kept)

    whole, torn = np.load(tmp_path / "whole/samples.npz"), np.load(out / "samples.npz")
    assert torn["arr_0"].shape == (1000, 8, 8, 1)
    assert torn["arr_0"].tobytes() == whole["arr_0"].tobytes()
    assert torn["arr_1"].tolist() == whole["arr_1"].tolist()
    assert {path.name for path in out.iterdir()} == {"samples.npz", "grid.png", "sampling.json", "lock"}


def interrupted_then_resumed(
    rank: int, ranks: int, settings: SamplingSettings, out: Path, kept: dict[str, int]
) -> None:
    from diffmoe_dist.sampling import blocks

    written: list[str] = []
    write = blocks.write_block
    blocks.write_block = lambda path, block: (written.append(path.name), write(path, block))  # type: ignore
    sample_to_folder(settings, out, CPU, Launch(rank, ranks, rank, "environment"))
    assert written and not set(written) & set(kept), "only what is missing is sampled"


@pytest.mark.slow
def test_a_finished_folder_is_left_as_it_is_and_other_settings_or_weights_are_refused(
    trained: Path, tmp_path: Path
) -> None:
    settings = settings_for(trained)
    run_ranks(1, run_jobs, [(settings, tmp_path)])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    run_ranks(1, run_jobs, [(settings, tmp_path)])

    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    run_ranks(1, refused, settings, tmp_path)
    (tmp_path / "blocks").mkdir()
    (tmp_path / "sampling.json").rename(tmp_path / "blocks/job.json")  # as if it were under way
    run_ranks(1, refused, settings, tmp_path)


def refused(rank: int, ranks: int, settings: SamplingSettings, out: Path) -> None:
    for change, message in (
        ({"steps": 4}, r"its images have steps 3, not 4; give --steps 3, or another --out"),
        ({"seed": 1}, r"its images have seed 0, not 1; leave out --seed, or give another --out"),
        ({"cfg_scale": 2.0}, r"have cfg_scale 1\.0, not 2\.0; give --cfg-scale 1\.0, or another --out"),
        ({"classes": (1, 2)}, r"have classes all, not \[1, 2\]; leave out --classes, or give another --out"),
        (
            {"overrides": ("moe.inference=count",)},
            r"have inference threshold, not count; give moe.inference=threshold, or another --out",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run_jobs(rank, ranks, [(replace(settings, **change), out)])
    record = out / ("sampling.json" if (out / "sampling.json").exists() else "blocks/job.json")
    text = record.read_text()
    record.write_text(text.replace('"weights": "', '"weights": "0'))
    with pytest.raises(UserError, match=r"are of other weights than .* now has"):
        run_jobs(rank, ranks, [(settings, out)])
    record.write_text(text)


def test_a_folder_whose_thresholds_were_found_on_other_data_is_refused(trained: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    pack(DigitsSource(), other, PackSettings(seed=1))
    settings = settings_for(trained, recalibrate=1)
    run_ranks(1, recalibrated_on, settings, replace(settings, overrides=(f"data.shards={other}",)), out)


def recalibrated_on(rank: int, ranks: int, own: SamplingSettings, other: SamplingSettings, out: Path) -> None:
    finished, begun = out / "sampling.json", out / "blocks/job.json"
    run_jobs(rank, ranks, [(own, out), (own, out)])
    text = finished.read_text()
    of_older = re.sub(r'.*"recalibrated_on".*\n', "", text)
    with pytest.raises(
        UserError, match=r"found by --recalibrate 1 on other data .*; give those data, or another --out"
    ):
        run_jobs(rank, ranks, [(other, out)])
    finished.write_text(of_older)
    run_jobs(rank, ranks, [(own, out)])  # nothing is added to it
    finished.unlink()
    begun.parent.mkdir()
    for record, message in ((text, "on other data"), (of_older, "on data that an older version did not record; give")):
        begun.write_text(record)
        with pytest.raises(UserError, match=message):
            run_jobs(rank, ranks, [(other, out)])


def count_by_hand(rank: int, ranks: int, jobs: list[tuple[SamplingSettings, Path]]) -> list[tuple[int, int]]:
    """Of each job the assignments and the tokens of every mixture-of-experts layer in every pass."""
    counted = []
    assignments = tokens = 0

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal assignments, tokens
        if isinstance(module, MoELayer):
            pairs = set(zip(output[1].token_index.tolist(), output[1].expert_index.tolist(), strict=True))
            assignments += len(pairs)
            tokens += inputs[0].shape[0] * inputs[0].shape[1]

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    for job in jobs:
        assignments = tokens = 0
        run_jobs(rank, ranks, [job])
        counted.append((assignments, tokens))
    handle.remove()
    return counted


def test_the_measured_capacity_is_the_one_counted_by_brute_force(trained: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"cfg_scale": 2.0, "cfg_interval": (0.3, 1.0), "one_pass": True},
        {"overrides": ("moe.inference=count",), "sampler": "heun"},
    ]
    jobs = [(settings_for(trained, **change), tmp_path / str(place)) for place, change in enumerate(changes)]

    (counted,) = run_ranks(1, count_by_hand, jobs)

    for (assignments, tokens), (settings, out) in zip(counted, jobs, strict=True):
        record = json.loads((out / "sampling.json").read_text())
        # Capacities of a pass are fp32.
        assert record["capacity"] == pytest.approx(assignments / tokens, rel=1e-6)
        assert 0.3 < record["capacity"] < 3 and record["capacity"] != 1.0
        assert record["nfe"] == record["evaluations"] == (6 if settings.sampler == "heun" else 3)


def test_a_measured_capacity_is_told_beside_the_one_trained_for_with_a_remedy_where_they_differ(
    trained: Path, tmp_path: Path
) -> None:
    export_checkpoint(trained, tmp_path / "exported")
    constant = ("moe.inference=constant", "moe.constant_threshold=0.0")
    changes: list[dict[str, Any]] = [
        {"overrides": ("moe.inference=static",)},
        {"overrides": constant},
        {"recalibrate": 1},
        {"ema_decay": 0.9},
        {"checkpoint": str(tmp_path / "exported")},
        {},
    ]
    jobs = [(settings_for(trained, **change), tmp_path / str(place)) for place, change in enumerate(changes)]
    (told,) = run_ranks(1, what_is_told, jobs)
    static = "moe.inference=static takes as many tokens as training did"
    expected = [
        r"INFO measured capacity C=1\.000, trained for C=1$",
        r"WARNING measured capacity C=4\.000, trained for C=1, 300 % apart; moe\.constant_threshold=0\.0 sets it; .*",
        rf"WARNING measured capacity C=1\.1.*, trained for C=1, 1. % apart; {static}$",
        rf"WARNING measured .* apart; {static}$",
        rf"WARNING measured .* apart; --recalibrate 8 finds the thresholds of these weights, {static}$",
        rf"WARNING measured .* apart; {static}$",
    ]
    assert len(told) == len(expected) and all(map(re.match, expected, told)), told


def what_is_told(rank: int, ranks: int, jobs: list[tuple[SamplingSettings, Path]]) -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("diffmoe_dist").addHandler(handler)
    logging.getLogger("diffmoe_dist").setLevel(logging.INFO)
    run_jobs(rank, ranks, jobs)
    return [line for line in told if "measured capacity" in line]


def test_an_adaptive_job_records_its_nfe_and_tolerances(trained: Path, tmp_path: Path) -> None:
    run_ranks(1, run_jobs, [(settings_for(trained, sampler="dopri5", steps=None), tmp_path)])

    record = json.loads((tmp_path / "sampling.json").read_text())
    assert record["nfe"] > 8 and record["steps"] is None
    assert (record["rtol"], record["atol"]) == (1e-3, 1e-6)
    assert record["reproducible_unit"] == "block of batch_size images"


def test_the_png_folder_holds_the_images_of_the_npz(trained: Path, tmp_path: Path) -> None:
    settings = settings_for(trained, classes=(4, 2))
    run_ranks(1, run_jobs, [(settings, tmp_path), (replace(settings, png=True), tmp_path)])

    file = np.load(tmp_path / "samples.npz")
    assert file["arr_1"].tolist() == [4, 2, 4, 2, 4, 2, 4]
    files = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in files] == [f"{number:06d}.png" for number in range(7)]
    for path, image in zip(files, file["arr_0"], strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image[..., 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg_channels": 3}, r"--cfg-channels has no effect without guidance"),
        ({"cfg_interval": (0.1, 0.2)}, r"--cfg-interval has no effect without guidance"),
        ({"one_pass": True}, r"--one-pass has no effect without guidance"),
        ({"steps": 0}, r"--steps 0: choose at least 1"),
        (
            {"sampler": "dopri8", "steps": None, "time_shift": 2.0},
            r"--time-shift 2 has no effect with --sampler dopri8",
        ),
        (
            {"sampler": "explicit_adams", "time_shift": 3.0},
            r"--time-shift 3: --sampler explicit_adams is for equal steps; give --time-shift 1, or another",
        ),
        ({"cfg_scale": 2.0, "cfg_channels": 3}, r"--cfg-channels 3: this model has 1; use --cfg-channels all"),
        ({"cfg_scale": 2.0, "cfg_interval": (0.2, 400.0)}, r"--cfg-interval 0\.2 400: the times .*flow are 0 to 1"),
        ({"cfg_scale": 2.0, "cfg_interval": (0.8, 0.2)}, r"--cfg-interval 0\.8 0\.2: .* lower one first"),
        ({"classes": (1, 10)}, r"--classes 10: this model knows the classes 0 to 9"),
        (
            {"expert": 2},
            r"--expert 2: ranks that hold the experts together sample blocks of one size; make --num 7 a multiple",
        ),
        (
            {"expert": 2, "sampler": "dopri5", "steps": None},
            r"--expert 2: .* dopri5 chooses its own; use euler or heun",
        ),
        ({"expert": 2, "sampler": "implicit_adams"}, r"--expert 2: .* implicit_adams chooses its own"),
    ],
)
def test_a_setting_that_would_be_ignored_or_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, trained: Path
) -> None:
    settings = settings_for(trained, **changes)

    with pytest.raises(UserError, match=message):
        settings.check()
        config = load_config(trained / "config.yaml")
        describe_job(settings, config, weights="", conditions=open_conditions(settings, config, CPU))


@pytest.fixture
def diverged(trained: Path, tmp_path: Path) -> Path:
    """Weights that are finite, of a model whose predictions are not."""
    model, config = read_model(find_model(trained), CPU)
    for parameter in model.final_layer.parameters():
        parameter.fill_(3e38)
    write_weights(tmp_path / "diverged", model.state_dict(), config, {})
    return tmp_path / "diverged"


@pytest.mark.parametrize("options", [("--steps", "3"), ("--sampler", "dopri5")])
def test_images_that_are_not_finite_are_counted_and_end_the_job_on_every_rank(
    diverged: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "diffmoe_dist.sample", "--checkpoint", diverged, "--out", tmp_path / "out", "--num-images", "7",
        *options, "--batch-size", "3", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 1
    assert "error: sampling: 6 images are not finite, first image 0 at function evaluation 1; nothing" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == ["blocks", "job.json", "lock"]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5"])
def test_every_sampler_says_where_images_stop_being_finite(diverged: Path, tmp_path: Path, sampler: str) -> None:
    settings = settings_for(diverged, sampler=sampler, steps=None)
    with pytest.raises(RankError, match="images are not finite, first image 0 at function evaluation 1"):
        run_ranks(1, run_jobs, [(settings, tmp_path / "out")])


def test_two_jobs_do_not_sample_into_one_folder_at_a_time(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from diffmoe_dist.files import lock_file; from pathlib import Path;"
         "lock_file(Path(sys.argv[1])); print(); sys.stdin.read()", out / "lock"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(RankError, match="another job is sampling into it; wait for its end, or give another --out"):
            run_ranks(1, run_jobs, [(settings_for(trained), out)])
    finally:
        holder.communicate(b"")
    run_ranks(1, run_jobs, [(settings_for(trained), out)])
    assert (out / "samples.npz").is_file()


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_damaged_description_of_a_job_is_one_line(trained: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(
        RankError, match="UserError: .*sampling.json is damaged: it describes no job; remove its folder"
    ):
        run_ranks(1, run_jobs, [(settings_for(trained), tmp_path)])
