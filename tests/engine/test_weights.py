"""Folders of weights: exported from runs, loaded, damaged, and as the beginning of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffmoe_dist import load_model
from diffmoe_dist.config import Config
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.loader import TrainingLoader
from diffmoe_dist.data.open import open_data
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.engine.checkpoint import read_checkpoint_model
from diffmoe_dist.engine.conversion import convert_published, export_checkpoint
from diffmoe_dist.engine.fine_tuning import tensors_anew
from diffmoe_dist.engine.progress import complete_checkpoints
from diffmoe_dist.engine.sharded_state import EMA, MASTER, Fragment
from diffmoe_dist.engine.trainer import THRESHOLD_STEPS
from diffmoe_dist.engine.weights import _read, read_class_names, read_model
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.slices import Columns
from diffmoe_dist.sampling.calibration import recalibrate
from tests.commands import start
from tests.distributed import run_ranks
from tests.engine.runs import curve, tiny_config, train_all
from tests.published import synthetic_state_dict

LEARNED = {"model": {"learn_sigma": True}}  # as published
START = {**LEARNED, "train": {"steps": 5, "initial_weights": "FOLDER"}}
# A learning rate below fp32's resolution: what a checkpoint then holds is where the run began.
STILL = {
    **LEARNED, "train": {"steps": 1, "initial_weights": "FOLDER"}, "optim": {"lr": 1e-30}, "parallel": {"expert": 2},
}  # fmt: skip
BUFFERS = ("threshold", "threshold_updates", "pos_embed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published DiffMoE of the tiny size, converted."""
    place = tmp_path_factory.mktemp("weights")
    state = synthetic_state_dict("diffmoe", "global_pool", depth=2, in_channels=1)
    torch.save(state, place / "published.pt")
    config = tiny_config(place, place, LEARNED)
    convert_published("diffmoe", place / "published.pt", config, place / "converted")
    return place / "converted"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path, folder: Path) -> Path:
    """All runs of this file, each in a folder of its name."""
    root = tmp_path_factory.mktemp("runs")

    def job(name: str, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        return root / name, json.loads(json.dumps(settings).replace("FOLDER", str(folder)))

    run_ranks(1, train_all, digits, [job("alone", START), job("fresh", {**LEARNED, "train": {"steps": 5}})])
    split = {**START, "parallel": {"expert": 2}}
    jobs = [
        job("split", split),
        job("split", {**split, "train": {"steps": 6, "initial_weights": "/gone"}}),
        job("still", STILL),
        job("still_bf16", {**STILL, "precision": "bf16"}),
    ]
    run_ranks(2, train_all, digits, jobs)
    return root


def test_a_run_from_initial_weights_has_one_curve_on_any_ranks(runs: Path) -> None:
    alone = curve(runs / "alone")
    assert curve(runs / "split")[:5] == pytest.approx(alone, abs=1e-6, rel=0)  # fp32 sums in another order
    for name in ("gate_entropy", "predictor_capacity", "predictor_agreement", "dead_experts", "capacity_at_noise_0.5"):
        of_one, of_two = curve(runs / "alone", name), curve(runs / "split", name)
        assert of_two[:5] == pytest.approx(of_one, abs=1e-6), f"{name} is of the global batch"
    assert abs(alone[0] - curve(runs / "fresh")[0]) > 0.1, "the weights are not those of the seed"


@pytest.mark.parametrize("name", ["still", "still_bf16"])
@pytest.mark.parametrize("kind", [MASTER, EMA])
def test_weights_and_average_begin_exactly_at_the_initial_weights(
    runs: Path, folder: Path, name: str, kind: str
) -> None:
    expected = load_file(folder / "model.safetensors")
    checkpoint = complete_checkpoints(runs / name / "checkpoints")[-1]
    model, _ = read_checkpoint_model(checkpoint, "cpu", kind)
    for key, value in model.state_dict().items():
        if not key.endswith(BUFFERS):
            assert float((value - expected[key]).abs().max()) < 1e-20, key
    rounded = expected["blocks.1.mlp.experts.w1"].bfloat16().float()
    assert not torch.equal(rounded, expected["blocks.1.mlp.experts.w1"]), "bf16 weights could not hold these"


def test_thresholds_begin_at_the_initial_ones(runs: Path, folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    model, _ = read_checkpoint_model(complete_checkpoints(runs / "still/checkpoints")[-1], "cpu", MASTER)
    router: Any = model.moe_layers[0].router
    published = expected["blocks.1.mlp.router.threshold"]
    assert int(router.threshold_updates) == int(expected["blocks.1.mlp.router.threshold_updates"]) + 1
    # One step of a moving average with decay 0.95 from there towards a score in [0, 1].
    assert 0 < float((router.threshold - published).abs().max()) < 0.05
    assert torch.equal(model.pos_embed, expected["pos_embed"])


def of_checkpoint(run: Path, step: int, kind: str) -> tuple[DiT, Config]:
    return read_checkpoint_model(run / f"checkpoints/step-{step:08d}", "cpu", kind)


def threshold_of(model: DiT) -> Tensor:
    """(N,) of the only mixture-of-experts layer."""
    return model.moe_layers[0].router.get_buffer("threshold")


def test_a_run_ends_with_the_thresholds_that_its_averaged_weights_have_on_the_next_batches(
    runs: Path, digits: Path
) -> None:
    averaged, config = of_checkpoint(runs / "alone", 5, EMA)
    stored = threshold_of(averaged).clone()
    size = config.train.global_batch_size
    data = open_data(config)
    assert isinstance(data, TrainingData)
    loader = TrainingLoader(data, BatchSplit(size, size), seed=config.seed, images_seen=5 * size)
    recalibrate(averaged, config, [next(loader) for _ in range(THRESHOLD_STEPS)])
    loader.close()
    torch.testing.assert_close(stored, threshold_of(averaged), atol=1e-6, rtol=0)
    on_two_ranks, of_step_6 = (threshold_of(of_checkpoint(runs / "split", step, EMA)[0]) for step in (5, 6))
    torch.testing.assert_close(on_two_ranks, stored, atol=1e-6, rtol=0)  # fp32 sums in another order
    own = threshold_of(of_checkpoint(runs / "alone", 5, MASTER)[0])
    assert not any(torch.allclose(stored, other, atol=1e-4) for other in (own, of_step_6))


def test_a_checkpoint_wins_over_initial_weights_and_the_log_says_so(runs: Path) -> None:
    assert len(curve(runs / "split")) == 6, "the resume went on, and did not look for the folder"
    log = (runs / "split/logs/rank-0.log").read_text()
    assert "started from the weights in" in log
    assert "train.initial_weights=/gone were where this run began; its checkpoint wins" in log


def test_an_exported_run_is_the_run_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    expected = load_model(runs / "split")
    ended = start(
        "diffmoe_dist.convert", "--to", "safetensors", "--checkpoint", runs / "split", "--out", tmp_path / "exported",
        folder=tmp_path,
    )[0]  # fmt: skip
    assert ended.wait() == 0, ended.stderr
    assert "step-00000006 (ema) is now in" in ended.stdout
    got, config = read_model(tmp_path / "exported", "cpu")
    assert not got.training and not any(parameter.requires_grad for parameter in got.parameters())
    assert got.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in got.state_dict().items())
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(4, 1, 8, 8, generator=generator),
        torch.rand(4, generator=generator),
        torch.tensor([0, 3, 9, 10]),
    )
    assert torch.equal(got(*inputs).prediction, expected(*inputs).prediction)
    assert (config.run_dir, config.data.shards, config.train.initial_weights) == ("", "", None)
    assert (config.ema.decay, config.parallel.expert) == (0.9, 2)
    source = json.loads((tmp_path / "exported/config.json").read_text())["source"]
    assert (source["checkpoint"], source["step"], source["images_seen"]) == ("step-00000006", 6, 96)


def test_class_names_travel_from_the_data_by_the_checkpoint_to_an_export_and_older_ones_have_none(
    runs: Path, folder: Path, tmp_path: Path
) -> None:
    digits = [str(digit) for digit in range(10)]
    checkpoint = complete_checkpoints(runs / "split/checkpoints")[-1]
    assert "class_names.json" in (checkpoint / "SHA256SUMS").read_text()
    assert read_class_names(checkpoint).shown == digits
    export_checkpoint(checkpoint, tmp_path / "weights")
    assert load_model(tmp_path / "weights").class_names == digits
    assert load_model(folder).class_names == []
    older = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (older / "class_names.json").unlink()
    sums = (older / "SHA256SUMS").read_text().splitlines(keepends=True)
    (older / "SHA256SUMS").write_text("".join(line for line in sums if "class_names" not in line))
    assert load_model(older).class_names == []


def test_an_export_of_the_own_weights_holds_the_optimizers(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "split", tmp_path / "own", "model")
    checkpoint = complete_checkpoints(runs / "split/checkpoints")[-1]
    own, averaged = (read_checkpoint_model(checkpoint, "cpu", kind)[0].state_dict() for kind in (MASTER, EMA))
    got = load_file(tmp_path / "own/model.safetensors")
    assert all(torch.equal(value, own[name]) for name, value in got.items())
    assert not torch.equal(got["x_embedder.proj.bias"], averaged["x_embedder.proj.bias"])


def test_the_sampler_draws_from_a_folder_of_weights_what_it_draws_from_the_run(runs: Path, tmp_path: Path) -> None:
    export_checkpoint(runs / "split", tmp_path / "exported")
    drawn = []
    for name, checkpoint in {"run": runs / "split", "folder": tmp_path / "exported"}.items():
        ended = start(
            "diffmoe_dist.sample", "--checkpoint", checkpoint, "--out", tmp_path / name, "--num", "3", "--steps", "2",
            "--device", "cpu", folder=tmp_path,
        )[0]  # fmt: skip
        assert ended.wait() == 0, ended.stderr
        drawn.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert np.array_equal(*drawn)


def edit(folder: Path, change: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    change(record)
    (folder / "config.json").write_text(json.dumps(record))


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def put(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    tensors[name] = value


DAMAGE: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing; convert or copy"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing; convert or copy"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not the one of a folder of weights"),
    "another model's config": (
        lambda f: (f / "config.json").write_text('{"model_type": "dit"}'), r"not the one of a folder of weights \(KeyE",
    ),
    "newer": (lambda f: edit(f, lambda r: r.update(version=2)), r"version 2, but this program reads diffmoe-weights"),
    "unknown setting": (
        lambda f: edit(f, lambda r: r["settings"]["moe"].update(top=1)), r"config\.json: .*moe\.top=1",
    ),
    "other settings": (
        lambda f: edit(f, lambda r: r["settings"]["model"].update(num_classes=7)),
        r"y_embedder\.embedding_table\.weight is F32 \[11, 32\], but its settings need F32 \[8, 32\]",
    ),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        r"model\.safetensors is damaged \(.*incomplete",
    ),
    "missing": (
        lambda f: rewrite(f, lambda t: t.pop("blocks.1.mlp.experts.w1")),
        r"blocks\.1\.mlp\.experts\.w1 is none, but its settings need F32 \[4, 32, 128\]",
    ),
    "extra": (lambda f: rewrite(f, lambda t: put(t, "more", torch.ones(2))), r"more has no place in the model"),
    "half precision": (
        lambda f: rewrite(f, lambda t: put(t, "pos_embed", t["pos_embed"].half())), r"pos_embed is F16 \[1, 16, 32\]",
    ),
    "another value": (
        lambda f: rewrite(f, lambda t: t["pos_embed"].add_(1)), r"has SHA-256 .*config\.json records",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    do, message = DAMAGE[damage]
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    do(damaged)
    with pytest.raises(UserError, match=message) as caught:
        load_model(damaged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"expert_mlp_ratio": 2.0}}, r"moe\.expert_mlp_ratio=2\.0, but train\.initial_weights=.*of another"),
        ({"model": {"learn_sigma": False}}, r"model\.learn_sigma=False, but train\.initial_weights"),
        ({"train": {"initial_weights": "/nowhere"}}, r"train\.initial_weights=/nowhere: no folder of weights there"),
    ],
)
def test_initial_weights_of_another_model_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given = {**LEARNED, "train": {"initial_weights": str(folder)}}
    tensors_anew(tiny_config(tmp_path, tmp_path, given))
    with pytest.raises(UserError, match=message):
        tensors_anew(tiny_config(tmp_path, tmp_path, given, change))


def test_initial_weights_that_lack_a_tensor_are_refused(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    rewrite(damaged, lambda tensors: tensors.pop("final_layer.linear.bias"))
    with pytest.raises(UserError, match=r"final_layer\.linear\.bias is none"):
        tensors_anew(tiny_config(tmp_path, tmp_path, {**LEARNED, "train": {"initial_weights": str(damaged)}}))


@pytest.mark.parametrize(("start", "length"), [(0, 24), (0, 1), (5, 1), (6, 12), (5, 8), (23, 1), (11, 13)])
def test_an_interval_of_a_stored_tensor_is_that_of_the_flattened_one(tmp_path: Path, start: int, length: int) -> None:
    whole = torch.arange(24.0).view(4, 3, 2)
    save_file({"w1": whole, "flat": whole.flatten().clone(), "one": torch.tensor(7)}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        for name in ("w1", "flat"):
            wanted = Fragment(name, start, 24, torch.empty(length))
            assert torch.equal(_read(file, name, wanted), whole.flatten()[start : start + length])
        assert _read(file, "one", Fragment("one", 0, 1, torch.empty(1))).tolist() == [7]


@pytest.mark.parametrize(("start", "length"), [(0, 12), (1, 1), (2, 7), (5, 4), (11, 1)])
def test_some_columns_of_a_stored_matrix_are_those_of_the_whole_one(tmp_path: Path, start: int, length: int) -> None:
    whole = torch.arange(24.0).view(4, 6)
    save_file({"w": whole}, tmp_path / "w.safetensors")
    wanted = Fragment("w", start, 24, torch.empty(length), Columns(first=3, count=3, of=6))
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert torch.equal(_read(file, "w", wanted), whole[:, 3:].flatten()[start : start + length])


def test_a_folder_of_weights_has_every_tensor_of_its_model_and_no_other(folder: Path) -> None:
    _, config = read_model(folder, "cpu")
    with torch.device("meta"):
        expected = {name: value.shape for name, value in DiT(config).state_dict().items()}
    assert {name: value.shape for name, value in load_file(folder / "model.safetensors").items()} == expected


def test_opening_a_folder_of_weights_draws_no_random_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a random number was asked for")

    for name in ("rand", "randn"):
        monkeypatch.setattr(torch, name, refuse)
    state = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)
