"""Runs of which a part does not train: what stays, what is not kept of it, and that the curve is one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffmoe_dist import load_model
from diffmoe_dist.config import for_world
from diffmoe_dist.data.open import open_data
from diffmoe_dist.engine.conversion import export_checkpoint
from diffmoe_dist.engine.fragment_io import load_fragments, read_metadata
from diffmoe_dist.engine.resume import progress_from
from diffmoe_dist.engine.sharded_state import EXP_AVG, MASTER, Fragment
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.freezing import frozen_parameters
from tests.distributed import run_ranks
from tests.engine.runs import curve, empty_model, make_trainer, tiny_config, train_all
from tests.machine import ROOT
from tests.planning.plans import plan_of

FREEZE = ["blocks.*.attn.*", "blocks.*.mlp.experts.w1", "*.capacity_predictor.2.weight", "y_embedder.*"]
SPLIT: dict[str, Any] = {"parallel": {"expert": 2}}
HEAD, NOT_HEAD = "final_layer.*", ["?_embedder.*", "blocks.*"]


def settings(steps: int, freeze: list[str] = FREEZE, **layers: Any) -> dict[str, Any]:
    return {**layers, "train": {"steps": steps, "freeze": freeze}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    root = tmp_path_factory.mktemp("frozen")
    ends: dict[str, Any] = {"ema": {"decays": [0.5], "lengths": [0.05, 0.1]}}
    low: dict[str, Any] = {"precision": "bf16", "parallel": {"expert": 2, "zero_stage": 2}}
    cut = settings(6, ["*.weight", "blocks.0.*"])
    run_ranks(1, train_and_look, digits, [(root / "one", settings(20, **ends)), (root / "cut-one", cut)])
    export_checkpoint(root / "one", root / "weights")
    from_weights = settings(3, ["final_layer.*", "blocks.*.mlp.*"], **low)
    from_weights["train"]["initial_weights"] = str(root / "weights")
    two = [
        ("from-weights", from_weights),
        ("two", settings(20, **ends, **SPLIT)),
        ("half", settings(10, **ends, **SPLIT)),
    ]
    two += [("half", settings(20, **ends, **SPLIT)), ("low", settings(6, **low))]
    two += [("low-half", settings(3, **low)), ("low-half", settings(6, **low))]
    two += [("cut", {**cut, "parallel": {"tensor": 2, "expert": 2}})]
    run_ranks(2, train_all, digits, [(root / name, job) for name, job in two], time_limit=200)
    run_ranks(4, train_all, digits, [(root / "four", settings(10, **ends, **SPLIT))])
    return root


def train_and_look(rank: int, ranks: int, digits: Path, jobs: list[tuple[Path, dict[str, Any]]]) -> None:
    from diffmoe_dist.engine.non_finite import find_origin

    train_all(rank, ranks, digits, jobs)
    trainer = make_trainer(rank, ranks, tiny_config(jobs[0][0], digits, jobs[0][1]))
    batch = next(trainer.batches)
    assert find_origin(trainer.model, [lambda: trainer._loss_again(batch)]) is None, "it looks at what trains alone"
    trainer.close()


def frozen(runs: Path, freeze: list[str] = FREEZE) -> frozenset[str]:
    return frozen_parameters(tiny_config(runs, runs, settings(1, freeze)))


@pytest.mark.parametrize(("name", "alone"), [("two", "one"), ("half", "one"), ("four", "one"), ("cut", "cut-one")])
def test_the_curve_of_a_run_with_frozen_parts_is_one_on_any_ranks(runs: Path, name: str, alone: str) -> None:
    found = curve(runs / name)
    assert found == pytest.approx(curve(runs / alone)[: len(found)], abs=1e-6, rel=0)


def stored(run: Path, step: int) -> dict[str, int]:
    """Elements by name in a checkpoint."""
    metadata = read_metadata(run / "checkpoints" / f"step-{step:08d}").state_dict_metadata
    return {name: value.size.numel() for name, value in metadata.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "step"), [("one", 20), ("four", 10), ("low", 6)])
def test_of_what_is_frozen_a_checkpoint_holds_the_weights_alone_and_once(runs: Path, name: str, step: int) -> None:
    found, still = stored(runs / name, step), frozen(runs)
    sizes = {name: parameter.numel() for name, parameter in empty_model(runs, runs).named_parameters()}
    kinds = {key.partition(".")[0] for key in found} - {"buffer", "ema_buffer"}
    assert kinds >= {MASTER, EXP_AVG, "exp_avg_sq", "ema"}
    for kind in kinds:
        of_kind = {key.partition(".")[2]: size for key, size in found.items() if key.startswith(f"{kind}.")}
        assert of_kind == {name: size for name, size in sizes.items() if kind == MASTER or name not in still}, kind


@pytest.mark.parametrize(("name", "step"), [("one", 20), ("half", 20), ("four", 10), ("low-half", 6)])
def test_what_is_frozen_keeps_its_bits_and_everything_else_trains(runs: Path, name: str, step: int) -> None:
    initial = {name: value.clone() for name, value in empty_model(runs, runs).named_parameters()}
    still, model = frozen(runs), load_model(runs / name)
    for key, value in model.named_parameters():
        assert torch.equal(value, initial[key]) == (key in still), key
    for length in (0.1, 0.07) if name == "one" else ():  # an average of a run's end, and one that it is fitted to
        averaged = export_average(runs, length)
        assert all(torch.equal(averaged[key], initial[key]) for key in still)


def test_frozen_parts_of_initial_weights_are_kept_to_the_bit_by_a_model_in_bf16(runs: Path) -> None:
    weights, model = load_file(runs / "weights/model.safetensors"), load_model(runs / "from-weights")
    still = frozen(runs, ["final_layer.*", "blocks.*.mlp.*"])
    assert not still <= frozen(runs), "some have been trained before"
    for key, value in model.named_parameters():
        assert torch.equal(value, weights[key]) == (key in still), key


def export_average(runs: Path, length: float) -> dict[str, Tensor]:
    out = runs / f"length-{length}"
    export_checkpoint(runs / "one", out, ema_length=length)
    return load_model(out).state_dict()


@pytest.mark.parametrize(("name", "other", "step"), [("half", "two", 20), ("low-half", "low", 6)])
def test_a_resumed_run_with_frozen_parts_ends_with_the_same_bits(
    runs: Path, digits: Path, name: str, other: str, step: int
) -> None:
    for kind in (MASTER, EXP_AVG, "ema"):
        found = [state_of(runs / run, kind, step) for run in (name, other)]
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(value, found[1][key]) for key, value in found[0].items()), kind


def state_of(run: Path, kind: str, step: int) -> dict[str, Tensor]:
    sizes = {name: size for name, size in stored(run, step).items() if name.startswith((f"{kind}.", "buffer."))}
    dtypes = {name: torch.int64 if name.endswith("_updates") else torch.float32 for name in sizes}
    wanted = [Fragment(name, 0, size, torch.empty(size, dtype=dtypes[name])) for name, size in sizes.items()]
    load_fragments(run / "checkpoints" / f"step-{step:08d}", wanted)
    return {fragment.name: fragment.data for fragment in wanted}


@pytest.mark.parametrize("freeze", [FREEZE[:2], []])
def test_a_resume_does_not_change_what_is_frozen(runs: Path, digits: Path, freeze: list[str]) -> None:
    checkpoint = runs / "half/checkpoints/step-00000020"
    data = open_data(tiny_config(runs / "half", digits))

    def resume(patterns: list[str]) -> int:
        config = tiny_config(runs / "half", digits, settings(30, patterns), SPLIT)
        return progress_from(checkpoint, for_world(config, 2), data, 2).step

    with pytest.raises(UserError, match=r"train\.freeze=.* was trained with train\.freeze=.*use that, or go on in an"):
        resume(freeze)
    assert resume([*FREEZE, "y_embedder.embedding_table.*"]) == 20, "other patterns of the same parameters"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.*.atn.*", r"names are blocks\.\*\.attn\.qkv\.weight, "),
        ("x", r"x matches no parameter; did you mean \*x\*, for one x_embedder"),
        ("nonsense", "nonsense matches no parameter; names are x_embedder"),
        ("attn", r"attn matches no parameter; did you mean \*attn\*, for one blocks\.\*\.attn\.qkv\.weight\?"),
        ("y_embedder", r"did you mean \*y_embedder\*, for one y_embedder\.embedding_table\.weight"),
        ("blocks.*.threshold", "is no parameter: thresholds and the position table are not trained"),
        ("*", r"train\.freeze=\['\*'\] leaves nothing that trains; remove a pattern"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(runs: Path, pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        frozen(runs, [pattern])


def trained_by_the_page() -> dict[str, set[str]]:
    """Of each row of the page, what trains in a model whose dense layers are of one block."""
    rows = re.findall(r"^\| ([^|]+) \| `(\[.*\])` \|$", (ROOT / "docs/finetuning.md").read_text(), re.MULTILINE)
    config = [tiny_config(ROOT, ROOT, settings(1, json.loads(patterns))) for _, patterns in rows]
    names = {name for name, _ in empty_model(ROOT, ROOT).named_parameters()}
    return {row: names - frozen_parameters(of_row) for (row, _), of_row in zip(rows, config, strict=True)}


def test_the_patterns_of_the_page_leave_what_it_says() -> None:
    names = {name for name, _ in empty_model(ROOT, ROOT).named_parameters()}
    experts = {name for name in names if ".mlp.experts." in name or ".mlp.router." in name}
    biases = {name for name in names if name.endswith((".bias", ".b1", ".b2"))}
    assert list(trained_by_the_page().values()) == [
        {name for name in names if ".attn." not in name},
        {"y_embedder.embedding_table.weight"},
        experts,
        biases,
    ]


def test_the_log_tells_what_is_frozen(runs: Path) -> None:
    log = (runs / "two/logs/rank-0.log").read_text()
    assert f" M parameters of this rank frozen by train.freeze={FREEZE}" in log


def test_arithmetic_and_state_of_a_plan_are_those_of_what_trains() -> None:
    whole, head, all_but_head = (plan_of({"train": {"freeze": freeze}}, 1) for freeze in ([], [HEAD], NOT_HEAD))
    forward = sum(whole.accounting.macs().values()) + whole.accounting.attention_macs
    assert whole.accounting.training_flops() == 6 * forward
    counts = head.accounting.macs()["final layer"]
    assert head.accounting.training_flops() == pytest.approx(6 * forward - 2 * counts)
    assert all_but_head.accounting.training_flops() == pytest.approx(2 * forward + 4 * counts)
    of_head = 32 * 4 + 4 + 32 * 64 + 64
    assert all_but_head.persistent["EMA"] == pytest.approx(4 * of_head, abs=64)
    assert all_but_head.persistent["frozen weights"] == whole.persistent["weights"] - head.persistent["frozen weights"]
