from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import Topology
from tests.distributed import run_ranks
from tests.model.layers import conditional
from tests.parallel.weights import fill_by_name, small_config
from tests.reference import ReferenceResult, double_weights, moe_layer_over_pools

WIDTH, EXPERTS, TOKENS_PER_IMAGE, IMAGES = 8, 4, 4, 8  # images of the whole batch
TOKENS = IMAGES * TOKENS_PER_IMAGE
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # (ranks, expert-parallel size)
POOLS = ["global", "expert_parallel", "rank", "sample"]
TOKEN_KINDS = ["different", "five rows repeated", "one rank avoids expert 0"]
RULES = ["threshold", "count", "static"]

# fp32 against an fp64 reference, relative to the largest entry: a few roundings of 6e-8 along the sums of the width
# forward; gradients add up over the tokens, and over the ranks in another order.
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5


def exchanges(pool: str, expert: int) -> list[str]:
    if pool != "global":
        return ["all_to_all"]
    return ["all_to_all", "all_gather"] + (["two_level"] if expert > 1 else [])


def make_config(expert: int, pool: str, rule: str = "threshold", exchange: str = "all_to_all") -> Config:
    parallel: dict[str, Any] = {"expert": expert}
    if pool in ("global", "expert_parallel"):
        parallel["score_exchange"] = exchange
    model = {"depth": 2, "hidden_size": WIDTH, "input_size": 4}
    moe = {"router": "global_pool", "num_experts": EXPERTS, "pool": pool, "inference": rule}
    return small_config(model, moe, parallel)


@torch.no_grad()
def fill(model: DiT) -> None:
    fill_by_name(model, EXPERTS)
    for layer in model.moe_layers:
        # Multiples of 1/8, like the tokens: the affinities are exact, so equal tokens tie on every rank.
        layer.router.get_parameter("gate_weight").mul_(16).round_().div_(8)
        # Probabilities that some tokens exceed, for the first two; none and all of the others' tokens do.
        layer.router.get_buffer("threshold").copy_(torch.tensor([0.5, 0.6, 1.0, 0.0]))


def single_device_model(config: Config) -> DiT:
    model = DiT(config)
    fill(model)
    return model


def make_tokens(kind: str, model: DiT, ranks: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, WIDTH, generator=generator).mul(8).round().div(8)
    if kind == "five rows repeated":
        x = x[torch.randint(5, (TOKENS,), generator=generator)]
    elif kind == "one rank avoids expert 0":
        gate = model.moe_layers[0].router.get_parameter("gate_weight").detach()
        towards = (gate[0] - gate.mean(dim=0)).mul(8).round().div(8)
        x[: TOKENS // ranks] -= 2 * towards
        x[TOKENS // ranks :] += 2 * towards
    return x


def cotangent_of(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(11))


def run_layer(layer: Any, x: Tensor, cotangent: Tensor, ranks: int) -> dict[str, Any]:
    """Forward and backward of a part of the batch; the ranks' losses add up to the batch's."""
    layer.zero_grad(set_to_none=True)
    rows_per_expert = []
    hook = layer.experts.register_forward_pre_hook(lambda _, inputs: rows_per_expert.append(inputs[0].rows_per_expert))
    x = x.clone().requires_grad_()
    output, routing = conditional(layer, x.view(-1, TOKENS_PER_IMAGE, WIDTH))
    hook.remove()
    loss = (output.flatten(0, 1) * cotangent).sum()
    for value in routing.losses.values():  # means over tokens
        loss = loss + value / ranks
    loss.backward()
    return {
        "output": output.detach().flatten(0, 1),
        "x": x.grad,
        "gradients": {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None},
        "capacity_loss": [value.detach() for value in routing.losses.values()],
        "threshold": routing.stats.proposed_threshold,
        "tokens_per_expert": routing.stats.tokens_per_expert,
        "rows_per_expert": rows_per_expert[0],
    }


def distributed_model(config: Config, topology: Topology) -> DiT:
    from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel

    model = DiT(config)
    apply_expert_parallel(model, config, topology)
    fill(model)
    return model


def add_up_gradients(result: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Over the ranks that hold the same parameters."""
    for name, gradient in result["gradients"].items():
        group = topology.expert_data_group if name.startswith("experts.") else topology.world_group
        dist.all_reduce(gradient, group=group)
    return result


def all_cases_on_ranks(rank: int, world_size: int) -> dict[Any, Any]:
    from diffmoe_dist.parallel.expert_parallel import create_topology

    results: dict[Any, Any] = {}
    whole = single_device_model(make_config(1, "global"))
    part = slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)
    for expert in [expert for ranks, expert in LAYOUTS if ranks == world_size]:
        launch = Launch(rank, world_size, rank, "environment")
        topology = create_topology(launch, torch.device("cpu"), expert)
        results[expert, "topology"] = {
            "expert_group": dist.get_process_group_ranks(topology.expert_group),
            "expert_data_group": dist.get_process_group_ranks(topology.expert_data_group),
            "expert_rank": topology.expert_rank,
            "mean": topology.mean(torch.tensor([float(rank), 0.1])),
        }
        for pool in POOLS:
            for exchange in exchanges(pool, expert):
                layer = distributed_model(make_config(expert, pool, exchange=exchange), topology).moe_layers[0]
                for kind in TOKEN_KINDS:
                    x = make_tokens(kind, whole, world_size)
                    result = run_layer(layer, x[part], cotangent_of(x)[part], world_size)
                    results[expert, pool, exchange, kind] = add_up_gradients(result, topology)
        for pool in POOLS if expert > 1 else []:
            for rule in RULES:
                layer = distributed_model(make_config(expert, pool, rule), topology).moe_layers[0].eval()
                x = make_tokens("different", whole, world_size)
                result = run_layer(layer, x[part], cotangent_of(x)[part], world_size)
                results[expert, pool, rule] = add_up_gradients(result, topology)
        results[expert, "model"] = run_model(
            distributed_model(make_config(expert, "global"), topology), rank, world_size
        )
    return results


def run_model(model: DiT, rank: int, world_size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    part = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    x, t = torch.randn(IMAGES, 3, 4, 4, generator=generator)[part], torch.rand(IMAGES, generator=generator)[part]
    y = torch.randint(6, (IMAGES,), generator=generator)[part]
    output = model(x, t, y)
    (output.prediction.square().sum() + output.losses["capacity"] / world_size).backward()
    dense = {name: p.grad for name, p in model.named_parameters() if ".experts." not in name}
    gradients = {name: grad.clone() for name, grad in dense.items() if grad is not None}
    assert gradients.keys() == dense.keys()
    for gradient in gradients.values():
        if world_size > 1:
            dist.all_reduce(gradient)
    return {"prediction": output.prediction.detach(), "gradients": gradients, "state": model.state_dict()}


@cache
def results_of(ranks: int) -> list[dict[Any, Any]]:
    return run_ranks(ranks, all_cases_on_ranks)


def tokens_per_pool(pool: str, ranks: int, expert: int) -> int:
    part = TOKENS // ranks
    return {"global": TOKENS, "expert_parallel": part * expert, "rank": part, "sample": TOKENS_PER_IMAGE}[pool]


def reference(kind: str, pool: str, ranks: int, expert: int, rule: str) -> tuple[ReferenceResult, dict[str, Tensor]]:
    """The slow layer on the whole batch, forward and backward, and its leaves by name and as `x`."""
    model = single_device_model(make_config(1, pool))
    layer = model.moe_layers[0]
    weights = double_weights(dict(layer.named_parameters()))
    x = make_tokens(kind, model, ranks)
    leaf = x.double().requires_grad_()
    result = moe_layer_over_pools(
        leaf, weights, 1.0, tokens_per_pool(pool, ranks, expert), rule, layer.router.get_buffer("threshold").tolist()
    )
    loss = (result.output * cotangent_of(x)).sum()
    if rule == "training":
        loss = loss + result.capacity_loss
    loss.backward()
    return result, {**weights, "x": leaf}


def assert_close(
    actual: Tensor, expected: Tensor | None, tolerance: float, what: object, part: slice = slice(None)
) -> None:
    """The tolerance is relative to the largest expected entry; `part` is the expected rows that are at hand."""
    assert expected is not None, what
    scale = expected.detach().abs().max().clamp_min(1e-30)
    difference = actual.double().flatten() - expected.detach()[part].flatten()
    assert (difference.abs().max() / scale).item() <= tolerance, what


def assert_ranks_equal_the_reference(
    results: list[dict[str, Any]], expected: ReferenceResult, leaves: dict[str, Tensor], expert: int
) -> None:
    assert_close(torch.cat([r["output"] for r in results]), expected.output, FORWARD_TOLERANCE, "output")
    assert_close(torch.cat([r["x"] for r in results]), leaves["x"].grad, GRADIENT_TOLERANCE, "x")
    assert sum(r["tokens_per_expert"] for r in results).tolist() == [len(tokens) for tokens in expected.chosen]
    for rank, result in enumerate(results):
        for name, gradient in result["gradients"].items():
            first, held = rank % expert * (EXPERTS // expert), EXPERTS // expert
            part = slice(first, first + held) if name.startswith("experts.") else slice(None)
            assert_close(gradient, leaves[name].grad, GRADIENT_TOLERANCE, (rank, name), part)


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("ranks", "expert"), LAYOUTS)
def test_a_training_layer_on_any_layout_of_ranks_equals_the_slow_reference_on_the_whole_batch(
    ranks: int, expert: int, pool: str
) -> None:
    results = results_of(ranks)
    for kind in TOKEN_KINDS:
        expected, leaves = reference(kind, pool, ranks, expert, "training")
        for exchange in exchanges(pool, expert):
            case = [result[expert, pool, exchange, kind] for result in results]
            assert all(len(result["gradients"]) == 9 for result in case)  # the gate, the predictor's 4, the experts' 4
            assert_ranks_equal_the_reference(case, expected, leaves, expert)
            loss = torch.stack([value for result in case for value in result["capacity_loss"]]).mean()
            assert_close(loss, expected.capacity_loss[None], FORWARD_TOLERANCE, "capacity loss")
            if pool != "sample":
                thresholds = torch.stack([result["threshold"] for result in case])
                assert_close(thresholds.mean(dim=0), expected.kth_probability, FORWARD_TOLERANCE, "threshold")
                if pool == "global":
                    assert all(torch.equal(threshold, thresholds[0]) for threshold in thresholds)


@pytest.mark.slow
def test_in_one_case_a_rank_sends_nothing_to_an_expert_and_others_send_it_everything() -> None:
    sent = [
        result[4, "global", "all_to_all", "one rank avoids expert 0"]["tokens_per_expert"] for result in results_of(4)
    ]

    assert sent[0][0] == 0
    assert sum(sent).tolist() == [TOKENS // EXPERTS] * EXPERTS


@pytest.mark.parametrize("kind", TOKEN_KINDS)
def test_the_outputs_of_a_global_pool_do_not_depend_on_the_expert_parallel_size_or_the_exchange(kind: str) -> None:
    by_layout = {
        (expert, exchange): torch.cat([result[expert, "global", exchange, kind]["output"] for result in results_of(4)])
        for expert in (1, 2, 4)
        for exchange in exchanges("global", expert)
    }
    base = by_layout[1, "all_to_all"]
    for layout, output in by_layout.items():
        assert_close(output, base.double(), FORWARD_TOLERANCE, layout)
        assert torch.equal(output.any(dim=1), base.any(dim=1)), layout


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("ranks", "expert"), [(2, 2), (4, 2), (4, 4)])
def test_the_inference_rules_on_ranks_equal_the_slow_reference_on_the_whole_batch(
    ranks: int, expert: int, pool: str, rule: str
) -> None:
    expected, leaves = reference("different", pool, ranks, expert, rule)
    case = [result[expert, pool, rule] for result in results_of(ranks)]

    assert all(len(result["gradients"]) == 5 for result in case)  # the predictor has none
    assert_ranks_equal_the_reference(case, expected, leaves, expert)
    if rule != "static":
        assert [len(tokens) for tokens in expected.chosen[2:]] == [0, TOKENS]
        assert all(0 < len(tokens) < TOKENS for tokens in expected.chosen[:2])


@pytest.mark.parametrize(("ranks", "expert"), LAYOUTS)
def test_a_whole_model_on_any_layout_of_ranks_predicts_and_learns_as_on_one_device(ranks: int, expert: int) -> None:
    results = [result[expert, "model"] for result in results_of(ranks)]
    single = run_model(single_device_model(make_config(1, "global")), 0, 1)

    prediction = torch.cat([result["prediction"] for result in results])
    # Both are fp32 and several layers deep, and a dense layer may round differently for another batch size.
    assert_close(prediction, single["prediction"].double(), 1e-5, "prediction")
    for result in results:
        for name, gradient in result["gradients"].items():
            assert_close(gradient, single["gradients"][name].double(), 1e-4, name)


@pytest.mark.parametrize(("ranks", "expert"), LAYOUTS)
def test_a_rank_holds_its_consecutive_experts_under_their_own_names(ranks: int, expert: int) -> None:
    whole = single_device_model(make_config(1, "global")).state_dict()
    held = EXPERTS // expert
    for rank, result in enumerate(results_of(ranks)):
        state = result[expert, "model"]["state"]
        assert list(state) == list(whole)
        for name, tensor in state.items():
            first = rank % expert * held
            expected = whole[name][first : first + held] if ".experts." in name else whole[name]
            assert torch.equal(tensor, expected), name


def test_expert_groups_are_consecutive_ranks_and_their_data_groups_hold_the_same_experts() -> None:
    for rank, result in enumerate(results_of(4)):
        topology = result[2, "topology"]
        assert topology["expert_group"] == ([0, 1] if rank < 2 else [2, 3])
        assert topology["expert_data_group"] == ([0, 2] if rank % 2 == 0 else [1, 3])
        assert topology["expert_rank"] == rank % 2
        assert result[4, "topology"]["expert_group"] == [0, 1, 2, 3]
        assert result[1, "topology"]["expert_data_group"] == [0, 1, 2, 3]


def test_the_mean_over_the_ranks_is_exact_where_they_agree() -> None:
    for result in results_of(4):
        mean = result[2, "topology"]["mean"]
        assert mean.dtype == torch.float64
        assert mean.tolist() == [1.5, torch.tensor(0.1).double().item()]


@pytest.mark.parametrize(
    ("expert", "rows"),
    [
        (4, {"global": 8, "expert_parallel": 8, "rank": 8, "sample": 8}),
        # An expert has 8 tokens of the whole batch; how many of them are from one of two groups is not known.
        (2, {"global": None, "expert_parallel": 4, "rank": 4, "sample": 4}),
        (1, {"global": None, "expert_parallel": 2, "rank": 2, "sample": 2}),
    ],
)
def test_experts_know_their_number_of_rows_wherever_the_pools_of_their_group_fix_it(
    expert: int, rows: dict[str, int | None]
) -> None:
    for result in results_of(4):
        for pool, expected in rows.items():
            assert result[expert, pool, "all_to_all", "different"]["rows_per_expert"] == expected, pool
