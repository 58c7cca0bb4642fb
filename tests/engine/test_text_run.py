"""Training on captions: the same promises as with classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.text import TextSettings, encode_text
from diffmoe_dist.config import build_config
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.loader import TrainingDataset, TrainingLoader
from diffmoe_dist.data.open import open_data, with_text_encoder
from diffmoe_dist.data.order import BatchSplit
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine.noising import noisy_inputs
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.condition import TextCondition
from tests.data.folders import png, random_images, write_folder
from tests.distributed import run_ranks
from tests.engine.captions import save_captioned, text_settings
from tests.engine.runs import TINY, curve, metrics, train_one

pytestmark = pytest.mark.slow

PROTOTYPE = {"moe": {"router": "prototype", "inference": None}}
KINDS: dict[str, dict[str, Any]] = {
    "global_pool": {},
    "prototype": PROTOTYPE,
    "token_choice": {"moe": {"router": "token_choice", "inference": None}},
    "expert_choice": {"moe": {"router": "expert_choice", "inference": None}},
    "ddpm": {
        "objective": {"name": "ddpm", "time_distribution": None, "time_scale": None},
        "model": {"learn_sigma": True},
    },
}  # fmt: skip


def train_runs(rank: int, world_size: int, folder: Path, runs: list[tuple[str, dict[str, Any]]]) -> None:
    for name, settings in runs:
        train_one(rank, world_size, build_config(TINY, text_settings(folder, name), settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = save_captioned(tmp_path_factory.mktemp("text-run"))
    ep2: dict[str, Any] = {"parallel": {"expert": 2}}
    runs = [(f"{kind}-2", {**settings, **ep2}) for kind, settings in KINDS.items()]
    run_ranks(2, train_runs, out, [*runs, ("resumed", {**ep2, "train": {"steps": 10}})])
    runs = [(kind, settings) for kind, settings in KINDS.items()]
    run_ranks(1, train_runs, out, [*runs, ("resumed", {})])
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_loss_curve_from_captions_on_any_ranks_with_experts_shared_or_not(
    folder: Path, kind: str
) -> None:
    one = curve(folder / kind)
    assert len(one) == 20 and one[-1] < one[0]
    # fp32 sums in another order
    assert curve(folder / f"{kind}-2") == pytest.approx(one, abs=1e-6, rel=0)


def test_a_run_from_captions_that_is_resumed_on_other_ranks_goes_on_as_if_it_had_not_stopped(folder: Path) -> None:
    assert [line["step"] for line in metrics(folder / "resumed")] == list(range(1, 21))
    assert curve(folder / "resumed") == pytest.approx(curve(folder / "global_pool"), abs=1e-6, rel=0)


def batches(folder: Path, count: int, seed: int = 0) -> list[Batch]:
    data = open_data(build_config(TINY, text_settings(folder, "unused")))
    assert isinstance(data, TrainingData)
    loader = TrainingLoader(data, BatchSplit(30, 30), seed=seed)
    return [next(loader) for _ in range(count)]


def test_a_dropped_caption_becomes_the_stored_empty_caption_and_others_stay(folder: Path) -> None:
    config = build_config(TINY, text_settings(folder, "unused"))
    for batch in batches(folder, 3):
        _, _, y = noisy_inputs(batch, build_objective(config), config)
        assert isinstance(y, TextCondition) and batch.text is not None and batch.null_text is not None
        dropped = batch.drop_uniform < 0.2
        absent = torch.tensor([sample % 4 == 2 for sample in batch.sample_ids.tolist()])  # samples without a caption
        assert dropped.any() and absent.any() and torch.equal(y.null, dropped | absent)
        for name in ("tokens", "mask", "pooled"):
            shown, own, null = (getattr(text, name) for text in (y, batch.text, batch.null_text))
            assert torch.equal(shown[~dropped], own[~dropped])
            assert (shown[y.null] == null).all()


def test_of_several_captions_each_is_drawn_about_as_often_and_a_sample_and_epoch_decide(folder: Path) -> None:
    lengths: dict[int, list[int]] = {}
    for batch in batches(folder, 40):
        assert batch.text is not None
        for sample, mask in zip(batch.sample_ids.tolist(), batch.text.mask, strict=True):
            lengths.setdefault(sample, []).append(int(mask.sum()))
    of_two = torch.tensor([lengths[sample] for sample in lengths if sample % 4 == 0])
    assert of_two.unique().numel() == 2, "one caption is longer than the other"
    share = float((of_two == of_two.max()).double().mean())
    assert abs(share - 0.5) < 0.1  # 320 draws: a standard deviation is 0.028
    assert all(len(set(lengths[sample])) == 1 for sample in lengths if sample % 4 != 0)
    assert torch.equal(batches(folder, 1)[0].text.mask, batches(folder, 1)[0].text.mask)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": {"text_hidden_size": 32}}, r"model\.text_hidden_size=32, but data\.text=.* has 16; set that"),
        (
            {"model": {"text_hidden_size": 32, "text_pooled_size": 0}},
            r"model\.text_hidden_size=32, model\.text_pooled_size=0, but data\.text=.* has 16, 16; set that",
        ),
        ({"model": {"text_max_length": 77}}, r"model\.text_max_length=77, but data\.text=.* has 16; set that"),
        ({"model": {"text_pooled_size": 0}}, r"model\.text_pooled_size=0, but data\.text=.* has 16; set that"),
        (
            {"model": {"text_encoder_sha256": "ab" * 32}},
            r"data\.text=.*: its encoder \(SHA-256 .*\) is not the model's",
        ),
    ],
)
def test_captions_of_another_encoder_than_the_models_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_data(build_config(TINY, text_settings(folder, "unused"), settings))


def test_the_encoders_fingerprint_stands_in_the_runs_settings(folder: Path) -> None:
    config = build_config(TINY, text_settings(folder, "unused"))
    assert config.model.text_encoder_sha256 == ""
    data = open_data(config)
    assert isinstance(data, TrainingData)
    captions = data.datasets[0].text
    assert captions is not None
    assert with_text_encoder(config, data).model.text_encoder_sha256 == captions.spec.encoder_sha256
    assert captions.spec.encoder_sha256 in (folder / "global_pool/config.yaml").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"text": None}}, r"data\.text is not set, but model\.condition=text; make it with"),
        (
            {"data": {"stream": True, "text": None}},
            r"data\.stream=true reads images and classes, but model\.condition=",
        ),
        ({"validation": {"shards": "v", "every": 2}}, r"validation\.text is not set, but model\.condition=text"),
        ({"validation": {"text": "t"}}, r"validation\.text=t has no effect without validation\.shards; remove it"),
    ],
)
def test_a_model_that_is_told_captions_needs_some(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_config(TINY, text_settings(folder, "unused"), settings)


def test_captioned_data_with_and_without_classes_mix(folder: Path, tmp_path: Path) -> None:
    samples = [{"png": png(image), "cls": b"1", "txt": b"a square"} for image in random_images(6, 8)]
    base = write_folder(tmp_path / "shards", samples, [6])
    encode_text(base, tmp_path / "text", TextSettings(folder / "encoder", max_length=16))
    entries = [
        {"shards": str(folder / "shards"), "text": str(folder / "text")},
        {"shards": str(base.folder), "text": str(tmp_path / "text")},
    ]
    settings = {"data": {"shards": None, "text": None, "mixture": entries}}
    data = open_data(build_config(TINY, text_settings(folder, "unused"), settings))
    assert isinstance(data, TrainingData)
    batch = TrainingDataset(data, seed=0, flip=False)[range(36)]
    assert batch.text is not None and len(batch.text) == 36 and int(batch.labels.max()) == 0
    assert {int(sample) // 30 for sample in batch.sample_ids} == {0, 1}
