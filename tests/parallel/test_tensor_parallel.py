"""Attention and dense layers cut over ranks by Megatron's linears, against the same model on one device."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from diffmoe_dist.config import Config, build_config
from diffmoe_dist.engine.fragment_io import check_coverage, load_fragments, read_metadata, write_fragments
from diffmoe_dist.engine.sharded_state import Fragment
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.condition import TextCondition
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.slices import Columns, Slice, is_cut
from tests.distributed import run_ranks
from tests.parallel.test_every_router import EXPERTS, IMAGES, NORMED, ROUTERS, assert_close, fill, run
from tests.parallel.weights import fill_by_name, small_config

LAYOUTS = [(2, 2, 1), (2, 2, 2), (4, 2, 2), (4, 4, 1), (4, 2, 4)]  # (ranks, tensor, expert)
MODEL = {"depth": 4, "hidden_size": 16, "num_heads": 4, "input_size": 8}
TEXT = {"condition": "text", "num_classes": 0, "text_hidden_size": 8, "text_max_length": 6, "text_pooled_size": 8}


def make_config(name: str, tensor: int = 1, expert: int = 1) -> Config:
    if name == "text":
        return build_config(
            {"run_dir": "unused", "data": {"shards": "unused", "text": "unused"}},
            {"model": {**MODEL, **TEXT, "mlp_ratio": 2.0, "in_channels": 3, "qk_norm": "rms"}},
            {"parallel": {"tensor": tensor}, "moe": {"router": "dense"}},
        )
    model = {**MODEL, **(NORMED if name == "swiglu" else {})}
    return small_config(model, {"num_experts": EXPERTS, **ROUTERS[name]}, {"expert": expert, "tensor": tensor})


def run_text(model: DiT, part: slice, ranks: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(IMAGES, 3, 8, 8, generator=generator), torch.rand(IMAGES, generator=generator)
    tokens, pooled = torch.randn(IMAGES, 6, 8, generator=generator), torch.randn(IMAGES, 8, generator=generator)
    lengths = torch.tensor([6, 1, 3, 2, 5, 4, 6, 2])
    mask = torch.arange(6) < lengths[:, None]
    null = torch.zeros(IMAGES, dtype=torch.bool)
    y = TextCondition(*(value[part] for value in (tokens, mask, pooled, null)))
    prediction = model.train()(x[part], t[part], y).prediction
    (prediction.square().mean() / ranks).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"prediction": prediction.detach(), "losses": {}, "gradients": gradients}


def run_case(name: str, model: DiT, part: slice, ranks: int) -> dict[str, Any]:
    return run_text(model, part, ranks) if name == "text" else run(model, part, ranks)


def filled(name: str, model: DiT) -> DiT:
    if name == "text":
        fill_by_name(model, EXPERTS)
        return model
    return fill(model)


def all_cases_on_ranks(rank: int, world_size: int) -> dict[Any, Any]:
    from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, create_topology
    from diffmoe_dist.parallel.tensor_parallel import apply_tensor_parallel

    results: dict[Any, Any] = {}
    part = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    for _, tensor, expert in [layout for layout in LAYOUTS if layout[0] == world_size]:
        launch = Launch(rank, world_size, rank, "environment")
        topology = create_topology(launch, torch.device("cpu"), expert, tensor)
        for name in [*ROUTERS, "text"]:
            config = make_config(name, tensor, expert)
            model = DiT(config)
            apply_expert_parallel(model, config, topology)
            filled(name, model)
            apply_tensor_parallel(model, topology)
            result = run_case(name, model, part, world_size)
            result["slices"] = {n: p.slice for n, p in model.named_parameters() if hasattr(p, "slice")}
            results[tensor, expert, name] = result
    return results


@cache
def results_of(ranks: int) -> list[dict[Any, Any]]:
    return run_ranks(ranks, all_cases_on_ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tensor", "expert"), LAYOUTS)
@pytest.mark.parametrize("name", [*ROUTERS, "text"])
def test_a_cut_model_predicts_and_learns_as_on_one_device(name: str, ranks: int, tensor: int, expert: int) -> None:
    case = [result[tensor, expert, name] for result in results_of(ranks)]
    single = run_case(name, filled(name, DiT(make_config(name))), slice(None), 1)
    # fp32, several layers deep; each rank's part of a product is rounded by itself.
    assert_close(torch.cat([result["prediction"] for result in case]), single["prediction"], 5e-5, "prediction")
    for loss, value in single["losses"].items():
        assert_close(torch.stack([result["losses"][loss] for result in case]).mean(), value, 1e-5, loss)
    for rank, result in enumerate(case):
        assert result["gradients"].keys() == single["gradients"].keys()
        for parameter in result["gradients"]:
            expected, apart = single["gradients"][parameter], 1
            if ".experts." in parameter:
                expected, apart = expected.chunk(expert)[rank % expert], expert
            elif (cut := result["slices"].get(parameter)) is not None:
                expected, apart = cut.of(expected), tensor
            same = [other["gradients"][parameter] for other in case[rank % apart :: apart]]
            assert_close(torch.stack(same).sum(dim=0), expected, 2e-4, parameter)


@pytest.mark.slow
def test_attention_dense_layers_and_shared_experts_are_cut_and_nothing_else_is() -> None:
    for name in [*ROUTERS, "text"]:
        case = results_of(2)[1][2, 2, name]
        assert set(case["slices"]) == {parameter for parameter in case["gradients"] if is_cut(parameter)}
    slices = results_of(2)[1][2, 2, "swiglu"]["slices"]
    assert {
        name: (cut.dim, cut.parts) for name, cut in slices.items() if name.startswith(("blocks.0", "blocks.1"))
    } == {
        "blocks.0.attn.qkv.weight": (0, 3),
        "blocks.0.attn.qkv.bias": (0, 3),
        "blocks.0.attn.proj.weight": (1, 1),
        "blocks.0.mlp.gate_proj.weight": (0, 1),
        "blocks.0.mlp.up_proj.weight": (0, 1),
        "blocks.0.mlp.down_proj.weight": (1, 1),
        "blocks.1.attn.qkv.weight": (0, 3),
        "blocks.1.attn.qkv.bias": (0, 3),
        "blocks.1.attn.proj.weight": (1, 1),
        "blocks.1.mlp.shared.gate_proj.weight": (0, 1),
        "blocks.1.mlp.shared.up_proj.weight": (0, 1),
        "blocks.1.mlp.shared.down_proj.weight": (1, 1),
    }
    assert {cut.rank for cut in slices.values()} == {1}


def test_a_slice_knows_where_its_rows_and_columns_stand() -> None:
    whole = torch.arange(12 * 4).view(12, 4)
    cut = Slice(dim=0, rank=1, ranks=2, parts=3)  # rows 2, 3 of 0 to 3; 6, 7 of 4 to 7; 10, 11 of 8 to 11
    assert cut.of(whole)[:, 0].tolist() == [8, 12, 24, 28, 40, 44]
    assert cut.intervals(torch.Size([6, 4])) == [(0, 8, 8), (8, 24, 8), (16, 40, 8)]
    cut = Slice(dim=1, rank=1, ranks=2)
    assert cut.of(whole)[1].tolist() == [6, 7]
    assert cut.columns(torch.Size([12, 2])) == Columns(first=2, count=2, of=4)


def test_an_interval_of_some_columns_is_at_most_three_rectangles() -> None:
    columns = Columns(first=4, count=3, of=9)
    # From the second element of row 1: its rest, rows 2 and 3 in whole, one element of row 4.
    assert list(columns.rectangles(4, 9)) == [((1, 5), (1, 2)), ((2, 4), (2, 3)), ((4, 4), (1, 1))]
    assert list(columns.rectangles(4, 1)) == [((1, 5), (1, 1))]
    assert list(columns.rectangles(3, 3)) == [((1, 4), (1, 3))]


def cut_up(whole: Tensor, ranks: int, places: list[int]) -> list[Fragment]:
    """Fragments as `ranks` tensor ranks have them, each of whose columns ZeRO has cut at these places."""
    fragments = []
    for rank in range(ranks):
        cut = Slice(1, rank, ranks)
        own = cut.of(whole).flatten()
        ends = [0, *(place for place in places if place < len(own)), len(own)]
        for first, end in pairwise(ends):
            columns = None if ranks == 1 else Columns(*_columns(whole, rank, ranks))
            fragments.append(Fragment("ema.w", first, whole.numel(), own[first:end].clone(), columns))
    return fragments


def _columns(whole: Tensor, rank: int, ranks: int) -> tuple[int, int, int]:
    count = whole.shape[1] // ranks
    return rank * count, count, whole.shape[1]


@pytest.mark.parametrize("read_by", [1, 2, 4])
@pytest.mark.parametrize("written_by", [1, 2, 4])
def test_columns_of_a_matrix_are_stored_and_read_by_any_number_of_ranks(
    tmp_path: Path, written_by: int, read_by: int
) -> None:
    whole = torch.arange(6.0 * 8).view(6, 8)
    write_fragments(tmp_path, cut_up(whole, written_by, [5, 7, 17]))
    check_coverage(read_metadata(tmp_path))

    for wanted in cut_up(whole, read_by, [3, 11]):  # ZeRO leaves a rank one interval of a parameter
        expected = wanted.data.clone()
        wanted.data.zero_()
        load_fragments(tmp_path, [wanted])
        assert torch.equal(wanted.data, expected)


@pytest.mark.parametrize(
    ("rectangles", "problem"),
    [
        ([(0, 0, 2, 4), (0, 4, 1, 4), (1, 4, 1, 4)], None),
        ([(0, 0, 2, 4), (0, 4, 1, 4)], "a part of it is owned by no rank"),
        ([(0, 0, 2, 4), (0, 3, 1, 4), (1, 4, 1, 4)], "row 0, column 3 is owned by two ranks"),
        ([(0, 0, 2, 4), (1, 4, 2, 4)], "a part at row 1 and column 4 goes beyond it"),
    ],
)
def test_a_matrix_of_which_a_part_is_owned_by_no_rank_or_by_two_is_refused(
    rectangles: list[tuple[int, int, int, int]], problem: str | None
) -> None:
    chunks = [ChunkStorageMetadata(torch.Size(r[:2]), torch.Size(r[2:])) for r in rectangles]
    stored = TensorStorageMetadata(TensorProperties(), torch.Size([2, 8]), chunks)
    metadata = Metadata({"w": stored})
    if problem is None:
        check_coverage(metadata)
        return
    with pytest.raises(RuntimeError, match=problem):
        check_coverage(metadata)
