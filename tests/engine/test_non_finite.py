"""A loss or gradient that is not finite changes no weight, and the run says where it began."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_dist.data.batch import Batch
from diffmoe_dist.engine.sharded_state import EMA, EXP_AVG, MASTER
from diffmoe_dist.engine.trainer import Trainer
from tests.distributed import run_ranks
from tests.engine.runs import curve, make_trainer, metrics, tiny_config, whole_state

BAD_STEP, BAD_RANK = 3, 1
EP2 = {"parallel": {"expert": 2}}
BF16 = {"precision": "bf16", "parallel": {"expert": 2, "zero_stage": 2}}


class OtherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.full_like(grad, ctx.value), None


GRADIENTS = {"gradient": torch.inf, "huge": 1e25}


def poison(trainer: Trainer, kind: str) -> None:
    """Spoil the step BAD_STEP of this rank: an input, gradients on the way back, or the loss and no gradient."""

    def bad() -> bool:
        return trainer.progress.step + 1 == BAD_STEP

    def with_bad_noise(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if bad():
                batch.noise[0, 0, 0, 0] = torch.nan
            yield batch

    if kind == "noise":
        trainer.batches = with_bad_noise(trainer.batches)  # type: ignore[assignment]
    elif kind in GRADIENTS:
        attention, value = trainer.model.get_submodule("blocks.0.attn"), GRADIENTS[kind]
        attention.register_forward_hook(lambda m, args, out: OtherGradient.apply(out, value) if bad() else out)
    elif kind == "loss":
        original = trainer._losses

        def losses(batch: Batch, model: Any) -> Any:
            values, stats = original(batch, model)
            return ({**values, "loss": values["loss"] + torch.inf} if bad() else values), stats

        trainer._losses = losses  # type: ignore[method-assign]


def train_poisoned(rank: int, world_size: int, shards: Path, jobs: list[tuple[Path, str, dict[str, Any]]]) -> list[str]:
    """Returns for each job what it raised, or an empty string."""
    raised = []
    for run_dir, kind, settings in jobs:
        common = {"train": {"steps": 6}, "checkpoint": {"every": 1, "keep": 9}}
        trainer = make_trainer(rank, world_size, tiny_config(run_dir, shards, common, settings))
        if rank == BAD_RANK:
            poison(trainer, kind)
        try:
            trainer.train()
            raised.append("")
        except FloatingPointError as error:
            raised.append(str(error))
        trainer.close()
    return raised


SKIP = {"train": {"steps": 6, "skip_non_finite": True}}
STOPPED = {"noise": EP2, "gradient": EP2, "huge": EP2, "loss": EP2, "loss-bf16": BF16, "gradient-bf16": BF16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("non-finite")


@pytest.fixture(scope="module")
def raised(root: Path, digits: Path) -> dict[str, list[str]]:
    """What the runs raised on each rank."""
    jobs = [(root / name, name.split("-")[0], settings) for name, settings in STOPPED.items()]
    jobs += [(root / "sound", "", EP2), (root / "sound-bf16", "", BF16)]
    jobs += [(root / f"skipped-{kind}", kind, {**EP2, **SKIP}) for kind in ("gradient", "loss")]
    ranks = run_ranks(2, train_poisoned, digits, jobs)
    return {run_dir.name: [rank[number] for rank in ranks] for number, (run_dir, _, _) in enumerate(jobs)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("noise", "step 3: loss, loss_diffusion.* not finite, first in the output of x_embedder.* on rank 1"),
        ("gradient", "step 3: grad_norm not finite, first in the gradient of blocks.0.attn.proj.* on rank 1"),
        (
            "huge",
            r"step 3: grad_norm not finite, first in the gradient of blocks\.0\.attn\.proj.* on rank 1, finite but too",
        ),
        ("loss", "step 3: loss.* not finite, first in the output of the loss on rank 1"),
        ("gradient-bf16", "step 3: grad_norm not finite, first in the gradient of blocks.0.attn.proj.* on rank 1"),
    ],
)
def test_the_run_stops_on_every_rank_and_names_step_layer_and_rank(
    raised: dict[str, list[str]], root: Path, name: str, message: str
) -> None:
    assert raised[name][0] == raised[name][1]
    assert re.match(message, raised[name][0]), raised[name][0]
    kept = json.loads((root / name / "non_finite/step-00000003.json").read_text())
    ids = [i for rank in kept["micro_steps_of_rank"] for micro_step in rank for i in micro_step["sample_ids"]]
    assert len(set(ids)) == 16, "the samples of the global batch"
    assert raised["sound"] == ["", ""]


@pytest.mark.parametrize("name", STOPPED)
def test_no_weight_has_changed_and_the_last_sound_state_is_saved(
    raised: dict[str, list[str]], root: Path, digits: Path, name: str
) -> None:
    sound = root / ("sound-bf16" if name.endswith("bf16") else "sound")
    assert sorted(path.name for path in (root / name / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    for kind in (MASTER, EXP_AVG, EMA):
        ours, expected = whole_state(root / name, digits, kind, 2), whole_state(sound, digits, kind, 2)
        for key, value in expected.items():
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", ["skipped-gradient", "skipped-loss"])
def test_told_to_skip_a_run_leaves_the_update_out_and_counts_it(
    raised: dict[str, list[str]], root: Path, digits: Path, name: str
) -> None:
    assert raised[name] == ["", ""]
    assert [line["step"] for line in metrics(root / name)] == [1, 2, 4, 5, 6]
    assert [line["skipped_steps"] for line in metrics(root / name)] == [0, 0, 1, 1, 1]
    before, after = (whole_state(root / name, digits, MASTER, step) for step in (2, 3))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(*(whole_state(root / name, digits, MASTER, step)["x_embedder.proj.bias"] for step in (3, 4)))


def test_a_resume_after_a_skipped_step_is_on_the_curve_bit_for_bit(
    raised: dict[str, list[str]], root: Path, digits: Path
) -> None:
    resumed = root / "resumed"
    shutil.copytree(root / "skipped-gradient", resumed)
    for step in (5, 6):
        shutil.rmtree(resumed / f"checkpoints/step-{step:08d}")
    run_ranks(2, train_poisoned, digits, [(resumed, "", {**EP2, **SKIP})])
    for key in ("loss", "grad_norm"):
        assert curve(resumed, key) == curve(root / "skipped-gradient", key)
