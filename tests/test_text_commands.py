"""Text to image through the commands, with everything that a run samples for itself."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmoe_dist import load_model
from tests.commands import start
from tests.engine.captions import save_captioned

SIZES = [
    "model.input_size=8", "model.patch_size=2", "model.depth=2", "model.hidden_size=32", "model.text_hidden_size=16",
    "model.text_max_length=16", "model.text_pooled_size=16", "train.global_batch_size=16",
]  # fmt: skip


def diffmoe(command: str, *arguments: str, ranks: int = 1, code: int = 0) -> str:
    """Run a command to its end, on so many ranks; what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        started = start(f"diffmoe_dist.{command}", *arguments, folder=Path(folder), ranks=ranks)
        codes = [one.wait(300) for one in started]
        output = "".join(one.stdout + one.stderr for one in started)
    assert codes == [code] * ranks, output
    return output


def places(folder: Path) -> list[str]:
    return [f"run_dir={folder / 'run'}", f"data.shards={folder / 'shards'}", f"data.text={folder / 'text'}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = save_captioned(tmp_path_factory.mktemp("text-commands"))
    save_captioned(out / "held-out", images=12)
    rng = np.random.default_rng(0)
    x = rng.random((50, 12))
    extractor = np.array("tests.evaluation.colours:colours")
    np.savez(out / "colours.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), extractor=extractor)
    (out / "prompts.txt").write_text("a red square\na circle\n")
    (out / "prompts.jsonl").write_text('{"tag": "colors", "prompt": "a red square"}\n{"tag": "x", "prompt": "a"}\n')
    diffmoe(
        "train", "--config", "configs/t2i/debug.yaml", *places(out), *SIZES,
        "device=cpu", "parallel.expert=2", "train.steps=4", "log.every=1", "sample.every=2", "sample.num=16",
        "sample.steps=2", "log.figures_every=4", f"validation.shards={out / 'held-out/shards'}",
        f"validation.text={out / 'held-out/text'}", "validation.every=2", "validation.images=12", "fid.every=4",
        "fid.num=6", "fid.features=tests.evaluation.colours:colours", f"fid.reference={out / 'colours.npz'}",
        ranks=2,
    )  # fmt: skip
    return out


def test_a_run_validates_scores_and_samples_from_captions(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [("loss_val" in line, "frechet_distance_6" in line) for line in lines] == [
        (False, False), (True, False), (False, False), (True, True),
    ]  # fmt: skip
    assert (folder / "run/samples/step-00000004.png").is_file()
    events = EventAccumulator(str(folder / "run/tensorboard")).Reload()
    assert {"moe/capacity_by_caption", "moe/experts_and_captions"} <= set(events.Tags()["images"])


def test_a_dry_run_builds_a_text_model(folder: Path) -> None:
    output = diffmoe("train", "--config", "configs/t2i/debug.yaml", *places(folder), *SIZES, "--dry-run")
    assert "from " in output and "step 4" in output


def test_images_of_prompts_are_sampled_scored_and_written_for_geneval(folder: Path) -> None:
    common = ["--checkpoint", str(folder / "run"), "--encoder", str(folder / "encoder"), "--device", "cpu"]
    options = ["--prompts", str(folder / "prompts.jsonl"), "--num", "4", "--cfg-scale", "2", "--steps", "2"]
    diffmoe("sample", *common, *options, "--out", str(folder / "sampled"), "--geneval", "--recalibrate", "1")
    assert len(list((folder / "sampled/geneval/00001/samples").glob("*.png"))) == 2
    output = diffmoe(
        "evaluate", "--samples", str(folder / "run"), "--prompts", str(folder / "prompts.txt"), "--num", "12",
        "--encoder", str(folder / "encoder"), "--steps", "2", "--reference", str(folder / "colours.npz"),
        "--features", "tests.evaluation.colours:colours", "--out", str(folder / "scored/scores.json"),
        "--device", "cpu",
    )  # fmt: skip
    assert "num_prompts" in output and "labels" not in output
    output = diffmoe(
        "interval_search", *common, "--prompts", str(folder / "prompts.txt"), "--num", "4", "--steps", "2",
        "--thresholds", "0.5", "--out", str(folder / "search"),
    )  # fmt: skip
    assert "0.5" in output


def test_an_encoder_that_is_not_the_models_ends_in_one_line(folder: Path) -> None:
    other = save_captioned(folder / "other", images=6, kind="t5") / "encoder"
    output = diffmoe(
        "sample", "--checkpoint", str(folder / "run"), "--encoder", str(other), "--prompt", "a", "--out",
        str(folder / "refused"), "--device", "cpu", code=2,
    )  # fmt: skip
    assert "is not the encoder that the model was trained with" in output.splitlines()[-1] and "Traceback" not in output


def test_the_report_of_a_text_run_names_captions(folder: Path) -> None:
    diffmoe("report", "--run", str(folder / "run"), "--images", "9", "--device", "cpu")
    page = (folder / "run/report.html").read_text()
    assert "Capacity by caption" in page and "0: a " in page and "classes" not in page.partition("config.yaml")[0]


def test_a_report_samples_from_prompts_of_its_own(folder: Path) -> None:
    report = ["report", "--run", str(folder / "run"), "--images", "2", "--steps", "2", "--device", "cpu"]
    diffmoe(*report, "--prompt", "a red square", "--encoder", str(folder / "encoder"))
    page = (folder / "run/report.html").read_text()
    assert "Capacity by prompt" in page and "0: a red square; 0: a red square" in page
    assert "--classes 1: this model is conditioned on captions" in diffmoe(*report, "--classes", "1", code=2)


def test_a_text_model_is_converted_and_read_back(folder: Path) -> None:
    diffmoe("convert", "--to", "safetensors", "--checkpoint", str(folder / "run"), "--out", str(folder / "weights"))
    ours, theirs = (load_model(folder / name).state_dict() for name in ("run", "weights"))
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_dense_text_model_becomes_a_mixture_of_experts_that_trains_on(folder: Path) -> None:
    dense = [*places(folder)[1:], *SIZES, "device=cpu", "train.steps=1", "moe.router=dense"]
    without = [f"moe.{name}=null" for name in ("num_experts", "capacity", "pool", "inference")]
    config = ["--config", "configs/t2i/debug.yaml"]
    diffmoe("train", *config, *dense, *without, f"run_dir={folder / 'dense'}", "sample.every=0")
    diffmoe("convert", "--to", "safetensors", "--checkpoint", str(folder / "dense"), "--out", str(folder / "dense-w"))
    upcycle = ["--from", "dit", str(folder / "dense-w/model.safetensors"), *config, "--upcycle"]
    diffmoe("convert", *upcycle, "--out", str(folder / "upcycled"), *SIZES)
    diffmoe(
        "train", *config, *places(folder)[1:], *SIZES, f"run_dir={folder / 'on'}", "train.steps=1", "device=cpu",
        "sample.every=0", f"train.initial_weights={folder / 'upcycled'}",
    )  # fmt: skip
    output = diffmoe(
        "convert", "--from", "dit", str(folder / "colours.npz"), *config, "--out", str(folder / "x"), code=2
    )
    assert "model.text_encoder_sha256 is not set" in output


def test_a_report_samples_from_the_prompts_of_samples(folder: Path) -> None:
    common = ["--checkpoint", str(folder / "run"), "--encoder", str(folder / "encoder"), "--device", "cpu"]
    options = ["--prompts", str(folder / "prompts.txt"), "--num", "4", "--cfg-scale", "2", "--steps", "2"]
    diffmoe("sample", *common, *options, "--negative-prompt", "a square", "--out", str(folder / "of-prompts"))
    report = ["--run", str(folder / "run"), "--samples", str(folder / "of-prompts"), "--device", "cpu"]
    diffmoe("report", *report, "--encoder", str(folder / "encoder"))
    page = (folder / "run/report.html").read_text()
    assert "Capacity by prompt" in page and "0: a red square; 1: a circle; 0: a red square; 1: a circle" in page
