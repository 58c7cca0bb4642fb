"""The page about several runs, of folders as runs leave them; `test_report.py` has the images of trained ones."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffmoe_dist.config import build_config, save_config
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.accounting import account
from diffmoe_dist.report import find_runs, main
from diffmoe_dist.report_page.comparison import (
    Comparison,
    column_letter,
    comparable,
    compare,
    differing_settings,
    distinct_names,
    made_otherwise,
    over_seeds,
    results,
)
from diffmoe_dist.report_page.comparison_charts import COLOURS, Style, spread_apart
from diffmoe_dist.report_page.comparison_images import images_section
from diffmoe_dist.report_page.comparison_page import write_comparison
from diffmoe_dist.report_page.figures import image_uri
from diffmoe_dist.report_page.run_history import Curve, read_history
from diffmoe_dist.report_page.scored_samples import found_scores, is_score, read_scored_samples
from tests.engine.runs import TINY
from tests.report_page.browser import CHROMIUM, open_in_browser

CPU = torch.device("cpu")
DENSE = {"moe": {"router": "dense", "num_experts": None}}


def write_run(folder: Path, *layers: dict[str, Any], steps: int = 40, level: float = 1.0, **line: Any) -> Path:
    """A run's folder as training leaves it, without checkpoints: a line at every second step."""
    folder.mkdir(parents=True)
    config = build_config(TINY, {"run_dir": str(folder), "data": {"shards": "s"}}, *layers)
    save_config(config, folder / "config.yaml")
    lines = [logged(step, level, **line) for step in range(2, steps + 1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if steps == config.train.steps:
        (folder / "DONE").write_text("{}")
    return folder


def logged(step: int, level: float = 1.0, **values: Any) -> dict[str, Any]:
    loss = level * (0.3 + math.exp(-step / 15)) * (1 + 0.05 * math.sin(step))
    line = {"step": step, "images_seen": 16 * step, "ranks": 2, "loss": loss, "loss_diffusion": loss}
    line |= {"images_per_second": 32.0, "step_seconds": 0.5, "capacity": 1.0, "grad_norm": 1.0}
    if step % 10 == 0:
        line |= {"loss_val": 1.1 * loss, "fid_1k": 100 * loss}
    return {**line, **values}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of a model, a dense one that has not ended, and one of another objective."""
    runs = tmp_path_factory.mktemp("runs")
    to_40 = {"train": {"steps": 40}}
    return [
        write_run(runs / "pool-0", to_40),
        write_run(runs / "pool-1", to_40, {"seed": 1}, level=1.02),
        write_run(runs / "dense", DENSE, {"optim": {"lr": 3e-4}}, steps=30, level=1.1, capacity=None),
        write_run(runs / "ddpm", to_40, {"objective": {"name": "ddpm", "time_distribution": None, "time_scale": None}}),
    ]


@pytest.fixture(scope="module")
def comparison(folders: list[Path]) -> Comparison:
    return compare([read_history(folder) for folder in folders], [])


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    return write_comparison([read_history(folder) for folder in folders], out, None, [], CPU)


def test_steps_images_arithmetic_and_hours_are_those_of_the_steps_so_far(folders: list[Path]) -> None:
    history = read_history(folders[0])
    counts = account(history.config)

    axes = history.axes

    assert axes["step"] is not None and axes["step"][-1] == 40
    assert axes["training_flops"] is not None and axes["device_hours"] is not None
    assert axes["training_flops"][-1] == pytest.approx(40 * 16 * counts.training_flops(1.0))
    assert axes["device_hours"][-1] == pytest.approx(40 * 0.5 * 2 / 3600)
    assert history.place(np.array([21.0]), "images_seen") == pytest.approx([21 * 16])
    more = read_history(write_run(folders[0].parent.parent / "more", steps=40, capacity=1.5))
    assert more.axes["training_flops"] is not None
    assert more.axes["training_flops"][-1] > axes["training_flops"][-1], "the capacity that was measured counts"


def test_a_line_counts_with_the_ranks_it_ran_on_and_the_newest_attempt_of_a_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "resumed", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (18, 20, 22, 24):
            file.write(json.dumps(logged(step, level=2.0, ranks=4)) + "\n")
        file.write('{"step": 26, "images')  # being written

    history = read_history(folder)

    assert [line["step"] for line in history.lines] == list(range(2, 25, 2))
    assert history.curve("loss").at(18) == logged(18, 2.0)["loss"]
    assert history.axes["device_hours"] is not None
    assert history.axes["device_hours"][-1] == pytest.approx((16 * 2 + 8 * 4) * 0.5 / 3600)
    (row,) = [row for row in results(compare([history], [])) if row.quantity == "ranks"]
    assert row.shown == ["2, then 4"]


def test_a_run_of_an_older_version_has_the_ranks_of_its_log_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "ranks"}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    assert read_history(folder).axes["device_hours"] is None
    (folder / "logs").mkdir()
    for rank in range(3):
        (folder / "logs" / f"rank-{rank}.log").touch()

    history = read_history(folder)

    assert history.ranks_are_guessed and history.axes["device_hours"] is not None
    assert history.axes["device_hours"][-1] == pytest.approx(40 * 0.5 * 3 / 3600)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: no such file"),
        ("metrics.jsonl", b"", "metrics.jsonl: no step is logged yet"),
        ("metrics.jsonl", b'{"step": 2', "metrics.jsonl: no step is logged yet"),
        ("metrics.jsonl", b'{"step": 2}\n', "metrics.jsonl: line 1 is damaged"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl: line 1 is damaged"),
        ("metrics.jsonl", b"[]\n", "metrics.jsonl: line 1 is damaged"),
        ("config.yaml", None, "config.yaml: no such file"),
        ("config.yaml", b"model: {depht: 3}", "config.yaml: unknown setting"),
    ],
)
def test_a_missing_or_damaged_file_is_one_line_with_its_path(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = write_run(tmp_path / "run") / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'run'}/{message}")):
        read_history(tmp_path / "run")


def test_runs_are_folders_of_runs_patterns_and_each_once(folders: list[Path], tmp_path: Path) -> None:
    runs = folders[0].parent
    everything = sorted(folders)
    assert find_runs([str(runs)]) == everything
    assert find_runs([f"{runs}/pool-?", str(folders[0]), f"{runs}/pool-0/"]) == folders[:2]
    assert find_runs([str(tmp_path)]) == [tmp_path], "its missing files are told when it is read"
    with pytest.raises(UserError, match=r"--run nowhere\*: fits no training run"):
        find_runs(["nowhere*"])


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    paths = [Path("/x/a/seed-0"), Path("/x/b/seed-0"), Path("/y/b/seed-0"), Path("/x/dense")]
    assert distinct_names(paths) == ["a/seed-0", "x/b/seed-0", "y/b/seed-0", "dense"]


def test_seeds_are_a_group_with_one_letter_and_a_mean(comparison: Comparison) -> None:
    assert [run.letter for run in comparison.runs] == ["A1", "A2", "B", "C"]
    (of_loss,) = [values for row, values in over_seeds(comparison, results(comparison)) if row.about == "Training loss"]
    at_30 = [comparison.smooth(run, "loss_diffusion").at(30) or 0.0 for run in comparison.runs[:2]]
    assert of_loss[0] == f"{np.mean(at_30):.4g} ± {np.std(at_30, ddof=1):.2g} (2)"
    assert [column_letter(number) for number in (0, 25, 26, 701)] == ["A", "Z", "AA", "ZZ"]


def test_only_settings_that_differ_are_shown_as_they_are_written(comparison: Comparison, tmp_path: Path) -> None:
    rows = differing_settings(comparison.runs[:3])
    assert rows["seed"] == ["0", "1", "0"]
    assert rows["optim.lr"] == ["0.001", "0.001", "0.0003"]
    assert rows["moe.num_experts"] == ["4", "4", "-"]
    assert "moe.pool" not in rows, "at its default where it is"
    assert not {"run_dir", "model.depth", "data.shards"} & rows.keys()
    changed = write_run(tmp_path / "changed", {"optim": {"lr": 5e-4}})
    text = (changed / "config.yaml").read_text().replace("lr: 0.0005", "lr: 0.001")
    (changed / "config-until-step-00000010.yaml").write_text(text)
    twice = compare([read_history(changed), comparison.runs[0].history], [])
    assert differing_settings(twice.runs)["optim.lr"] == ["0.001 until step 10, then 0.0005", "0.001"]


def test_losses_of_other_objectives_or_data_do_not_share_a_chart(comparison: Comparison, page: Path) -> None:
    kinds = comparable(comparison.runs, "loss_diffusion")
    assert [[run.letter for run in kind] for kind in kinds] == [["A1", "A2", "B"], ["C"]]
    text = page.read_text()
    assert "The losses of these runs do not compare" in text and "objective.name flow, ddpm" in text
    shown = [row for row in results(comparison) if "loss" in row.about]
    assert not any(row.best for row in shown), "none is the best of losses that do not compare"
    seeds = compare([run.history for run in comparison.runs[:2]], [])
    assert not any(row.best for row in results(seeds) if "loss" in row.about), "of other noise"
    (fid,) = [row for row in results(comparison) if row.about == "fid_1k" and row.best]
    assert (fid.quantity, fid.best) == ("at step 30", "min")


def test_scores_in_training_that_were_made_in_other_ways_have_no_best(comparison: Comparison, tmp_path: Path) -> None:
    guided = read_history(write_run(tmp_path / "guided", {"sample": {"cfg_scale": 2.0}}))
    compared = compare([comparison.runs[0].history, guided], [])
    assert made_otherwise(compared.runs, "fid_1k") == "sample.cfg_scale 1.0, 2.0"
    assert {row.about for row in results(compared) if row.best} == {"Training loss", "Validation loss"}
    assert made_otherwise(comparison.runs, "fid_1k") == ""


def test_what_the_predictor_and_the_experts_do_is_in_the_results(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "predictor_capacity": 0.9,
        "dead_experts": 2,
        "capacity_at_noise_0.1": 1.2,
        "expert_load_max": 3.0,
    }
    compared = compare([read_history(write_run(tmp_path / "run", **values))], [])
    assert [(row.quantity, row.shown) for row in results(compared) if row.about == "Experts"] == [
        ("C in training", ["1"]), ("C of the predictor", ["0.9"]), ("C at noise 0.1", ["1.2"]), ("dead experts", ["2"]),
    ]  # fmt: skip


def test_a_smoothed_value_is_the_mean_over_the_steps_before(comparison: Comparison) -> None:
    curve = Curve(np.array([2.0, 4, 6, 20]), np.array([1.0, 2, 6, 5]))
    assert curve.smoothed(4).values_N.tolist() == [1, 1.5, 4, 5]
    assert curve.at(5) == 2 and curve.at(1) is None
    assert comparison.window == 2


def test_the_page_is_complete_in_itself_and_its_numbers_lie_beside_it(page: Path, comparison: Comparison) -> None:
    text = page.read_text()
    without_images = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"<script|https?:|\bsrc=|@import|url\(", without_images)
    assert re.findall(r'href="([^"]*)"', without_images) == ["data:,", "curves.csv", "results.csv", "settings.csv"]
    assert text.count("by-device_hours") == 3 and "Not at their last step yet: B" in text
    with (page.parent / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    (row,) = [r for r in rows if (r["run"], r["quantity"], r["step"]) == ("A2", "fid_1k", "30")]
    history = comparison.runs[1].history
    assert row["name"] == "pool-1" and float(row["value"]) == history.curve("fid_1k").at(30)
    assert float(row["images_seen"]) == 480 and float(row["device_hours"]) == pytest.approx(30 / 3600)
    with (page.parent / "results.csv").open() as file:
        of_quantity = {row["quantity"]: row for row in csv.DictReader(file)}
    flops = of_quantity["Size and cost: training FLOPs"]
    assert 0 < float(flops["dense"]) < float(flops["pool-0"])
    with (page.parent / "settings.csv").open() as file:
        assert {"optim.lr", "objective.name"} <= {row["setting"] for row in csv.DictReader(file)}


def test_scores_of_finished_samples_stand_at_the_step_of_their_checkpoint(folders: list[Path], tmp_path: Path) -> None:
    sampling = {
        "checkpoint": str(folders[0] / "checkpoints/step-00000020"),
        "sampler": "heun",
        "steps": 125,
        "cfg_scale": 1.5,
    }
    scores = {"scores": {"fid_50k": 9.5, "precision_50k": 0.6}, "sampling": sampling}
    (tmp_path / "scores.json").write_text(json.dumps(scores))

    found = read_scored_samples(tmp_path, folders)
    compared = compare([read_history(folder) for folder in folders], found_scores([found]))

    name = "fid_50k (heun, 125 steps, CFG 1.5)"
    curve = compared.curve(compared.runs[0], name)
    assert (curve.steps_N.tolist(), curve.values_N.tolist()) == ([20], [9.5])
    assert name in compared.measured() and not len(compared.curve(compared.runs[1], name))
    with pytest.raises(UserError, match="of checkpoint .*step-00000020, which is of none of these runs"):
        read_scored_samples(tmp_path, folders[1:])
    with pytest.raises(UserError, match="no sampling.json or scores.json there"):
        read_scored_samples(tmp_path / "nowhere", folders)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(UserError, match=r"sampling\.json: damaged"):
        read_scored_samples(tmp_path, folders)
    assert [is_score(name) for name in ("fid_2k", "fd_dinov2_50k", "loss_val_t0", "step", "expert_load_max")] == [
        True, True, False, False, False,
    ]  # fmt: skip


Way = tuple[int, int, dict[str, Any]]  # which run, the step, what is not as usual


def names_of_scores(folders: list[Path], tmp_path: Path, *ways: Way) -> list[str]:
    """What the scores of folders of samples are called, behind `euler, 50 steps`."""
    finished = []
    for number, (run, step, changes) in enumerate(ways):
        folder = tmp_path / f"way-{number}"
        folder.mkdir(exist_ok=True)
        usual = {"sampler": "euler", "steps": 50, "inference": "threshold", "recalibrate": 0, "precision": "fp32"}
        sampling = {**usual, "checkpoint": str(folders[run] / f"checkpoints/step-{step:08d}"), **changes}
        (folder / "scores.json").write_text(json.dumps({"scores": {"fid_1k": float(number)}, "sampling": sampling}))
        finished.append(read_scored_samples(folder, folders))
    compared = compare([read_history(folder) for folder in folders], found_scores(finished))
    for score, (run, step, _) in zip(compared.scores, ways, strict=True):
        assert compared.curve(compared.runs[run], score.name).at(step) == score.value
    return [score.name.removeprefix("fid_1k (euler, 50 steps").removesuffix(")") for score in compared.scores]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"inference": "constant", "constant_threshold": 0.3}, "inference constant, constant_threshold 0.3"),
        ({"recalibrate": 8, "recalibrated_on": "f" * 64}, "recalibrate 8, recalibrated_on ffffffffffff... df0790"),
        ({"ema_decay": 0.99}, "ema_decay 0.99"),
        ({"ema_length": 0.1}, "ema_length 0.1"),
        ({"time_shift": 3.0}, "time_shift 3.0"),
        ({"cfg_channels": 3, "one_pass": True}, "one_pass, cfg_channels 3"),
        ({"precision": "bf16", "tf32": True}, "precision bf16, tf32"),
        ({"labels": "random", "classes": [1, 2]}, "labels random, classes [1, 2]"),
        ({"negative_prompt": "blurred", "prompts": "abc"}, "negative_prompt blurred, prompts abc"),
    ],
)
def test_scores_of_samples_that_were_made_in_two_ways_have_two_names(
    changes: dict[str, Any], told: str, folders: list[Path], tmp_path: Path
) -> None:
    one, other = names_of_scores(folders, tmp_path, (0, 20, {}), (0, 20, changes))
    assert one != other
    assert [part for part in other.split(", ") if part not in one.split(", ")] == told.split(", ")
    alike = names_of_scores(folders, tmp_path, (0, 20, changes), (0, 40, changes), (1, 20, changes))
    assert alike == ["", "", ""], "what is the same in all goes without saying"


def test_runs_compare_under_rules_of_their_own_and_with_other_classes_do_not(
    folders: list[Path], tmp_path: Path
) -> None:
    dense: Way = (2, 20, {"inference": None})
    recalibrated = {"recalibrate": 8, "precision": "bf16"}
    assert names_of_scores(folders, tmp_path, dense, (0, 20, recalibrated)) == ["", ""]
    assert names_of_scores(folders, tmp_path, dense, (0, 20, {"classes": [1]})) == ["", ", classes [1]"]
    found = names_of_scores(folders, tmp_path, dense, (0, 20, {}), (0, 20, {"recalibrate": 8}))
    assert found == ["", "", ", recalibrate 8"]


def test_two_folders_of_samples_with_one_score_of_one_step_are_refused(folders: list[Path], tmp_path: Path) -> None:
    both = rf"--samples {tmp_path}/way-0 {tmp_path}/way-1: both have fid_1k \(euler, 50 steps\) of .*pool-0 at step 20;"
    with pytest.raises(UserError, match=f"^{both} leave one out$"):
        names_of_scores(folders, tmp_path, (0, 20, {"seed": 0}), (0, 20, {"seed": 1}))


def test_images_of_finished_samples_are_shown_as_they_are(
    comparison: Comparison, folders: list[Path], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 1), dtype=np.uint8)
    for number in (0, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        checkpoint = str(folders[number] / "checkpoints/step-00000020")
        job = {"checkpoint": checkpoint, "sampler": "heun", "seed": number, "capacity": 0.9}
        (folder / "sampling.json").write_text(json.dumps(job))
        np.savez(folder / "samples.npz", arr_0=images[number], arr_1=np.array([4, 2, 4]))
    finished = [read_scored_samples(tmp_path / str(number), folders) for number in (0, 1)]

    text, rows = images_section(comparison.runs, None, finished, CPU)

    shown = re.findall(r'<img src="([^"]*)" alt="(class \d), (A\d)">', text)
    assert [(label, letter) for _, label, letter in shown] == [
        (f"class {label}", letter) for label in (4, 2, 4) for letter in ("A1", "A2")
    ]
    assert [uri for uri, _, letter in shown if letter == "A2"] == [image_uri(image) for image in images[1]]
    assert "They start from other noise: another seed" in text and "No checkpoint or samples yet: B, C." in text
    assert rows[0].values == [0.9, 0.9, None, None]
    (tmp_path / "1" / "samples.npz").write_bytes(b"no npz")
    with pytest.raises(UserError, match=r"1/samples\.npz: not an npz file"):
        images_section(comparison.runs, None, finished, CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "-1"), "--images -1: choose at least 0"),
        (("--images", "0", "--steps", "7"), "--steps 7 has no effect with --images 0; leave it out"),
        (("--samples", "S", "--steps", "7"), "--steps 7 has no effect with --samples S; leave it out"),
        (("--samples", "S", "moe.inference=count"), "moe.inference=count has no effect with --samples S; leave it out"),
        (("--samples", "S", "--images", "5"), "--images 5 has no effect with --samples and several runs; leave it out"),
    ],
)
def test_options_without_effect_on_several_runs_are_refused(
    options: tuple[str, ...], message: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--run", *map(str, folders), *options])
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        main()


def test_options_of_several_runs_are_refused_with_one(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in ((("--out", "O"), "--out O has no"), (("--samples", "S", "T"), "--samples T: the page of")):
        monkeypatch.setattr(sys, "argv", ["report", "--run", str(folders[0]), *options])
        with pytest.raises(UserError, match=message):
            main()


def test_lines_are_told_apart_without_colours_and_colours_can_be_read_on_white() -> None:
    styles = [Style.of(group) for group in range(12)]
    assert len({(style.colour, style.dash) for style in styles}) == 12
    assert all(a.dash != b.dash and a.marker != b.marker for a, b in pairwise(styles))
    for colour in COLOURS:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 3, f"{colour}: WCAG 2.2, 1.4.11"
    heights = spread_apart([(1.0, 0.5), (1.0, 0.51), (1.0, 0.52), (0.3, 0.5)])
    assert np.diff(sorted(heights[:3])).min() > 0.07 and heights[3] == 0.5
    low = spread_apart([(1.0, 0.02), (1.0, 0.03), (1.0, 0.02)])
    assert min(low) > 0.03 and np.diff(sorted(low)).min() > 0.07


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: chromium)")
def test_a_browser_shows_one_axis_at_a_time_and_nothing_wider_than_a_telephone(page: Path, tmp_path: Path) -> None:
    """Pages in frames have the width of the frame: a browser's own window is never as narrow."""
    frames = "".join(f'<iframe src="{page.as_uri()}" style="width:{w}px;height:900px"></iframe>' for w in (360, 1280))
    (tmp_path / "frames.html").write_text(f"<html><head><title></title></head><body>{frames}</body></html>")
    script = """onload = () => { document.title = 'found ' + [...document.querySelectorAll('iframe')].map(frame => {
      const d = frame.contentDocument, shown = () => [...d.querySelectorAll('.on')].filter(e => e.offsetWidth).length
      const before = shown(), wide = d.documentElement.scrollWidth
      d.getElementById('by-training_flops').click()
      const last = [...d.querySelectorAll('.on-training_flops')].filter(e => e.offsetWidth).length
      const faulty = [...d.images].filter(i => i.naturalWidth < 100).length
      return [wide, before, shown(), last, faulty].join(' ') }).join(' | ') }"""

    document, log = open_in_browser(tmp_path / "frames.html", script, tmp_path, "--allow-file-access-from-files")

    found = re.search(r"<title>found ([0-9 |]+)</title>", document)
    assert found is not None, log
    charts = page.read_text().count('class="on on-step"')
    for width, numbers in zip((360, 1280), found[1].split(" | "), strict=True):
        wide, before, after, of_axis, faulty = map(int, numbers.split())
        assert wide <= width and before == after == of_axis == charts and faulty == 0
    assert "CONSOLE" not in log
