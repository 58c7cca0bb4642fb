"""The public functions of the package: a loaded model, and images from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffmoe_dist
from diffmoe_dist import load_model
from diffmoe_dist.data.class_names import ClassNames
from diffmoe_dist.errors import UserError
from diffmoe_dist.launch import Launch
from diffmoe_dist.library.model import LoadedModel
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.distributed import run_ranks
from tests.machine import ROOT

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "eight"]
OTHERS = [["nought", "nil"], *[[]] * 9]


@pytest.fixture(scope="module")
def model(trained: Path) -> LoadedModel:
    loaded = load_model(trained)
    assert loaded.class_names == [str(digit) for digit in range(10)]  # as the data call them
    return LoadedModel.of(
        loaded, loaded.config, ClassNames.from_json({"class_names": NAMES, "other_class_names": OTHERS})
    )


X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def predict(model: LoadedModel, t: Any, y: Any) -> torch.Tensor:
    return model(X, t, y).prediction


def test_a_time_may_be_one_number_for_all_images_or_one_for_each(model: LoadedModel) -> None:
    expected = predict(model, torch.full((3,), 500.0), torch.tensor([3, 3, 3]))

    for t in (500, 500.0, np.float32(500), torch.tensor(500), torch.tensor([500.0]), torch.full((3,), 500).double()):
        assert torch.equal(predict(model, t, torch.tensor([3, 3, 3])), expected)
    assert torch.equal(predict(model, 500.0, "Nil"), predict(model, 500.0, 0))
    for y in (3, "three", ["three", 3, np.int64(3)], torch.tensor(3), torch.tensor([3, 3, 3], dtype=torch.int32)):
        assert torch.equal(predict(model, 500.0, y), expected)
    assert model.config.objective.time_scale == 1000.0 and model.config.precision == "fp32"


@pytest.mark.parametrize(
    ("x", "t", "y", "message"),
    [
        (X[0], 5, 1, r"x has shape (1, 8, 8); this model takes (N, 1, 8, 8)"),
        (X.repeat(1, 3, 1, 1), 5, 1, r"x has shape (3, 3, 8, 8); this model takes (N, 1, 8, 8)"),
        ((X * 100).to(torch.uint8), 5, 1, r"x is of type torch.uint8; give floating-point numbers"),
        (X.numpy(), 5, 1, r"x is a ndarray; give a tensor (N, 1, 8, 8)"),
        (X.to("meta"), 5, 1, r"x is on meta, the model on cpu; move one of them"),
        (X, "5", 1, r"t is a str; give a number"),
        (X, torch.tensor([1.0, 2.0]), 1, r"t has shape (2,); give one number, or one for each of 3 images"),
        (X, 1500, 1, r"t=1500: the times of this model go from 0 (noise) to 1000 (data); they are objective.time_sc"),
        (X, torch.tensor([1.0, float("nan"), 2.0]), 1, r"t=nan: the times of this model go from 0"),
        (X, -1.0, 1, r"t=-1: the times of this model go from 0"),
        (X, 5, 11, r"y: 11 is no label of this model, which knows the classes 0 to 9, and 10 for none"),
        (X, 5, torch.tensor([0, -1, 2]), r"y: -1 is no label of this model"),
        (X, 5, torch.tensor([0.0, 1.0, 2.0]), r"y is of type torch.float32; labels are whole numbers: y.long()"),
        (X, 5, [0, 1], r"y has shape (2,); give one label, or one for each of 3 images"),
        (X, 5, 1.5, r"y: 1.5 is a float; a label is a whole number, or the name of a class"),
        (X, 5, "sven", r"y: 'sven': this model has no class of that name; the nearest are 'seven'"),
        (X, 5, "eight", r"y: 'eight': several classes are called so: 8 (eight), 9 (eight); give the n"),
    ],
)
def test_what_a_model_does_not_take_is_said_in_words(model: LoadedModel, x: Any, t: Any, y: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        model(x, t, y)


def run_job(rank: int, ranks: int, settings: SamplingSettings, out: Path) -> None:
    sample_to_folder(settings, out, torch.device("cpu"), Launch(rank, ranks, rank, "environment"))


OPTIONS: dict[str, Any] = {"steps": 4, "cfg_scale": 2.0, "cfg_interval": (0.2, 1.0), "seed": 3, "batch_size": 5}


def test_images_from_python_are_those_of_the_command(model: LoadedModel, trained: Path, tmp_path: Path) -> None:
    settings = SamplingSettings(str(trained), num=12, classes=(7, 2), time_shift=2.0, sampler="heun", **OPTIONS)
    run_ranks(1, run_job, settings, tmp_path / "out")
    options = {"num": 12, "sampler": "heun", "time_shift": 2.0, **OPTIONS}

    made = diffmoe_dist.sample(model, ["seven", 2], **options)

    with np.load(tmp_path / "out/samples.npz") as file:
        assert np.array_equal(made.to_uint8(), file["arr_0"]) and made.labels == file["arr_1"].tolist()
    assert made.images.shape == (12, 1, 8, 8) and made.images.dtype == torch.float32 and made.nfe == 8
    assert made.capacity is not None and 0.1 < made.capacity < 4


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([10], {}, r"labels: 10 is no label of this model, which knows the classes 0 to 9"),
        ([None], {}, r"num is missing: how many images to sample, of all classes in turn; or give labels"),
        ([[]], {}, r"labels is empty"),
        ([0], {"prompts": "a cat"}, r"labels and prompts: a model is conditioned on one of them"),
        ([None], {"prompts": "a cat"}, r"prompts has no effect with this model, which is conditioned on classes"),
        ([0], {"encoder": "models/t5"}, r"encoder has no effect with this model"),
        ([0], {"steps": 0}, r"steps 0: choose at least 1"),
        ([0], {"sampler": "ddim"}, r"sampler ddim is not for a model with objective.name=flow; choose euler or"),
        ([0], {"sampler": "magic"}, r"sampler magic is none; choose from euler"),
        ([0], {"cfg_interval": (0, 1)}, r"cfg_interval has no effect without guidance; remove it or set cfg_scale"),
        ([0], {"cfg_scale": 2, "cfg_interval": (0, 9)}, r"cfg_interval 0 9: the times of objective.name=flow are 0"),
        ([0], {"decoder": "models/vae"}, r"decoder=models/vae: this model makes pixels, not latents; remove it"),
    ],
)
def test_an_impossible_option_is_said_in_the_words_of_python(
    model: LoadedModel, arguments: list[Any], options: Any, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        diffmoe_dist.sample(model, *arguments, **options)


def test_only_a_loaded_model_in_eval_mode_is_sampled(model: LoadedModel, trained: Path) -> None:
    with pytest.raises(UserError, match="model is a PosixPath; give what load_model returns"):
        diffmoe_dist.sample(trained, 0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no option 'cfg'; it takes num, steps"):
        diffmoe_dist.sample(model, 0, cfg=2)  # type: ignore[call-arg]
    training = load_model(trained).train()
    with pytest.raises(UserError, match=r"in training mode.*call model.eval\(\)"):
        diffmoe_dist.sample(training, 0)


def test_a_ddpm_says_its_own_times(model: LoadedModel) -> None:
    ddpm = replace(model.config, objective=replace(model.config.objective, name="ddpm"))
    with pytest.raises(UserError, match=re.escape("t=1000: the times of this model are DDPM's steps, 0 (least noise)")):
        LoadedModel.of(model, ddpm)(X, 1000, 0)


def test_sample_is_the_function_also_where_the_command_of_that_name_is_imported() -> None:
    import diffmoe_dist.sample

    program = "import diffmoe_dist.sample as s; import diffmoe_dist; assert s is diffmoe_dist.sample and callable(s)"
    assert callable(diffmoe_dist.sample) and "diffmoe_dist.sample" in sys.modules
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text())
    names: dict[str, Any] = {}

    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "a notebook is kept without its outputs"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)

    assert names["made"].images.shape == (10, 1, 8, 8) and len(names["capacities"]) == 20
    assert "t=2000: the times of this model go from 0 (noise)" in capsys.readouterr().out
