from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measuring import saved_bytes
from diffmoe_dist.config import expert_slots
from diffmoe_dist.config.pool_choice import PREDICTOR_DEFAULTS, PoolChoiceSettings
from diffmoe_dist.config.routers import expert_choice, global_pool
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.routing import LocalPool
from tests.model.layers import PoolChoiceLayer, conditional, gradients, pool_choice
from tests.reference import ReferenceResult, double_weights, moe_layer_over_pools

IMAGES, TOKENS, WIDTH, HIDDEN, EXPERTS = 4, 6, 8, 16, 4
THRESHOLDS = [0.45, 0.5, 0.55, 0.6]
CONFIG = global_pool.Settings("global_pool", EXPERTS, threshold_decay=0.95)

# fp32 against an fp64 reference, relative to the largest entry: a few roundings of 6e-8 along the sums of WIDTH and
# HIDDEN terms forward; gradients add up over the tokens as well.
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5


def make_layer(**settings: Any) -> PoolChoiceLayer:
    return layer_of(replace(CONFIG, **settings))


def layer_of(config: PoolChoiceSettings) -> PoolChoiceLayer:
    generator = torch.Generator().manual_seed(1)
    layer = PoolChoiceLayer(pool_choice(WIDTH, config, TOKENS), Experts(config.num_experts, WIDTH, HIDDEN))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 1.0 if "router" in name else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        # Multiples of 1/8: with inputs of that kind every affinity is exact, so equal tokens tie exactly.
        layer.router.gate_weight.mul_(8).round_().div_(8)
        layer.router.threshold.copy_(torch.tensor((THRESHOLDS * config.num_experts)[: config.num_experts]))
    return layer


def make_tokens(kind: str = "different") -> Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = IMAGES * TOKENS
    x = torch.randn(tokens, WIDTH, generator=generator).mul(8).round().div(8)
    if kind == "five rows repeated":
        x = x[torch.randint(5, (tokens,), generator=generator)]
    elif kind == "all equal":
        x = x[:1].repeat(tokens, 1)
    return x


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert actual is not None and expected is not None
    scale = expected.abs().max().clamp_min(1e-30)
    assert float((actual.double() - expected).abs().max() / scale) <= tolerance


def run_both(kind: str, rule: str, **settings: Any) -> tuple[PoolChoiceLayer, dict[str, Tensor], ReferenceResult]:
    """The layer and the reference, forward and backward; returns the reference's leaves, and `x.grad` of the layer."""
    config = replace(CONFIG, **settings)
    layer = layer_of(config).train(rule == "training")
    x = make_tokens(kind).requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    output, routing = conditional(layer, x.view(IMAGES, TOKENS, WIDTH))
    loss = (output.flatten(0, 1) * cotangent).sum()
    if rule == "training":
        loss = loss + routing.losses["capacity"]
    loss.backward()

    weights = double_weights(dict(layer.named_parameters()))
    x_double = x.detach().double().requires_grad_()
    expected = moe_layer_over_pools(
        x_double,
        weights,
        config.capacity,
        TOKENS if config.pool == "sample" else IMAGES * TOKENS,
        rule,
        layer.router.threshold.tolist(),
    )
    loss = (expected.output * cotangent).sum()
    if rule == "training":
        loss = loss + expected.capacity_loss
    loss.backward()

    assert_close(output.detach().flatten(0, 1), expected.output.detach(), FORWARD_TOLERANCE)
    assert routing.token_index.tolist() == [s for tokens in expected.chosen for s in tokens]
    assert routing.expert_index.tolist() == [e for e, tokens in enumerate(expected.chosen) for _ in tokens]
    gates = torch.stack([gate for gates in expected.gates for gate in gates]).detach()
    assert_close(routing.gate.detach(), gates, FORWARD_TOLERANCE)
    assert routing.stats.tokens_per_expert.tolist() == [len(tokens) for tokens in expected.chosen]
    assert float(routing.stats.capacity) == pytest.approx(len(gates) / len(x))
    if rule == "training":
        assert_close(routing.losses["capacity"].detach(), expected.capacity_loss.detach(), FORWARD_TOLERANCE)
        assert routing.stats.proposed_threshold is not None
        if config.pool == "global":
            assert_close(routing.stats.proposed_threshold, expected.kth_probability, FORWARD_TOLERANCE)
    else:
        assert routing.losses == {}
        assert routing.stats.proposed_threshold is None
    assert x.grad is not None and x_double.grad is not None
    return layer, {**weights, "x": x_double, "x.grad": x.grad}, expected


@pytest.mark.parametrize("capacity", [1.0, 2.0, 0.75])
@pytest.mark.parametrize("kind", ["different", "five rows repeated", "all equal"])
@pytest.mark.parametrize("pool", ["global", "sample"])
def test_training_equals_the_slow_reference_forward_and_backward(pool: str, kind: str, capacity: float) -> None:
    layer, leaves, _ = run_both(kind, "training", pool=pool, capacity=capacity)

    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and leaves[name].grad is not None, name
        assert_close(parameter.grad, leaves[name].grad, GRADIENT_TOLERANCE)
    assert_close(leaves["x.grad"], leaves["x"].grad, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("kind", ["different", "five rows repeated"])
@pytest.mark.parametrize("pool", ["global", "sample"])
def test_the_constant_rule_is_the_count_rule_with_one_threshold_for_all_experts(pool: str, kind: str) -> None:
    constant: dict[str, Any] = {"pool": pool, "inference": "constant"}
    by_constant = make_layer(**constant, constant_threshold=0.5).eval()
    by_count = make_layer(pool=pool, inference="count").eval()
    by_count.router.threshold.fill_(0.5)
    x = make_tokens(kind).view(IMAGES, TOKENS, WIDTH)
    output, routing = conditional(by_constant, x)
    assert torch.equal(output, conditional(by_count, x)[0])
    assert 0 < float(routing.stats.capacity) < EXPERTS
    everything = make_layer(**constant, constant_threshold=0.0).eval()
    assert float(conditional(everything, x)[1].stats.capacity) == EXPERTS, "the papers' interval begins at C = N"


@pytest.mark.parametrize("rule", ["threshold", "count", "static"])
@pytest.mark.parametrize("kind", ["different", "five rows repeated"])
@pytest.mark.parametrize("pool", ["global", "sample"])
def test_the_inference_rules_equal_the_slow_reference(pool: str, kind: str, rule: str) -> None:
    layer, leaves, expected = run_both(kind, rule, pool=pool, inference=rule)

    for name, parameter in layer.named_parameters():
        if "capacity_predictor" not in name:
            assert_close(parameter.grad, leaves[name].grad, GRADIENT_TOLERANCE)
    assert_close(leaves["x.grad"], leaves["x"].grad, GRADIENT_TOLERANCE)
    assert 0 < sum(map(len, expected.chosen)) < IMAGES * TOKENS * EXPERTS


@pytest.mark.parametrize("slots", [5, torch.tensor([[5, 2]])])
def test_ties_go_to_the_lower_global_token_id(slots: int | Tensor) -> None:
    scores_TN = torch.tensor([[1, 3], [2, 2], [1, 2], [3, 2], [1, 2], [1, 1], [2, 2], [1, 9]]).float()

    chosen = LocalPool().select(scores_TN, slots, at_least_zero=True).chosen

    assert chosen[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6]  # 3; 2 and 2; the first two of five ones
    assert chosen[1].nonzero()[:, 0].tolist() == ([0, 1, 2, 3, 7] if isinstance(slots, int) else [0, 7])


@pytest.mark.parametrize("slots", [1, 7, 23, 24])
def test_where_all_scores_are_equal_the_first_tokens_are_chosen(slots: int) -> None:
    for value in (0.0, 0.25, torch.inf, -1.0):
        chosen = LocalPool().select(torch.full((24, 3), value), slots, at_least_zero=value >= 0).chosen
        per_expert = LocalPool().select(torch.full((24, 3), value), torch.full((1, 3), slots)).chosen
        assert torch.equal(chosen, (torch.arange(24) < slots).expand(3, 24)) and torch.equal(per_expert, chosen)


def test_every_number_of_slots_from_none_to_all_is_filled_with_the_best() -> None:
    scores_TN = torch.randint(4, (12, 13), generator=torch.Generator().manual_seed(4)).float()  # one column a count
    slots = torch.arange(13)[None]

    chosen = LocalPool().select(scores_TN, slots).chosen

    for expert in range(13):
        column = scores_TN[:, expert].tolist()
        best = sorted(range(12), key=lambda token: (-column[token], token))[:expert]
        assert chosen[expert].nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("slots", [1, 3, 4])
def test_scores_below_zero_are_in_their_order_too(images: int, slots: int) -> None:
    scores_TN = torch.randint(-3, 4, (12, 5), generator=torch.Generator().manual_seed(6)) / 2
    selection = LocalPool(tokens_per_pool=12 // images).select(scores_TN, slots)

    assert selection.slots_per_expert == images * slots
    for expert, column in enumerate(scores_TN.T.tolist()):
        pools = [range(first, first + 12 // images) for first in range(0, 12, 12 // images)]
        best = [sorted(pool, key=lambda token: (-column[token], token))[:slots] for pool in pools]
        assert selection.chosen[expert].nonzero()[:, 0].tolist() == sorted(token for pool in best for token in pool)


def test_the_faster_way_for_scores_of_zero_and_more_chooses_the_same() -> None:
    scores_TN = torch.randint(0, 4, (24, 5), generator=torch.Generator().manual_seed(6)) / 4
    for slots in (1, 5, 24):
        one, other = (LocalPool().select(scores_TN, slots, at_least_zero=known) for known in (False, True))
        assert torch.equal(one.chosen, other.chosen)
        assert one.slots_per_expert == other.slots_per_expert


def test_an_image_pool_chooses_in_each_image_by_its_own_count() -> None:
    scores_TN = torch.tensor([[1], [5], [5], [9], [9], [9]]).float()

    selection = LocalPool(tokens_per_pool=3).select(scores_TN, torch.tensor([[1], [2]]))

    assert selection.chosen.tolist() == [[False, True, False, True, True, False]]
    assert LocalPool(tokens_per_pool=3).count(scores_TN > 4).tolist() == [[2], [3]]


@pytest.mark.parametrize(("above", "expected"), [("none", 0), ("all", IMAGES * TOKENS)])
@pytest.mark.parametrize("rule", ["count", "threshold"])
@pytest.mark.parametrize("pool", ["global", "sample"])
def test_an_expert_that_wants_no_token_or_every_token_gets_just_that(
    pool: str, rule: str, above: str, expected: int
) -> None:
    layer = make_layer(pool=pool, inference=rule).eval()
    layer.router.threshold[1] = 2.0 if above == "none" else -1.0
    x = make_tokens().view(IMAGES, TOKENS, WIDTH).requires_grad_()

    output, routing = conditional(layer, x)
    output.sum().backward()

    assert routing.stats.tokens_per_expert[1] == expected
    assert 0 < routing.stats.tokens_per_expert[0] < IMAGES * TOKENS
    assert layer.experts.w1.grad is not None
    assert bool(layer.experts.w1.grad[1].any()) == (above == "all")


@pytest.mark.parametrize("rule", ["count", "threshold"])
def test_where_no_expert_wants_a_token_the_layer_returns_zeros(rule: str) -> None:
    layer = make_layer(inference=rule).eval()
    layer.router.threshold.fill_(2.0)
    x = make_tokens().view(IMAGES, TOKENS, WIDTH).requires_grad_()

    output, routing = conditional(layer, x)
    output.sum().backward()

    assert not output.any() and not routing.stats.capacity
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity", "slots"),
    [(256, 16, 1.0, 16), (256, 16, 2.0, 32), (1000, 16, 1.0, 62), (10, 4, 1.9, 4), (7, 2, 2.0, 7), (24, 5, 0.5, 2)],
)
def test_an_expert_has_the_whole_part_of_tokens_over_experts_times_capacity_slots(
    tokens: int, experts: int, capacity: float, slots: int
) -> None:
    assert expert_slots(tokens, experts, capacity) == slots


def test_a_training_forward_fills_the_slots_of_its_pool() -> None:
    x, settings = make_tokens().view(IMAGES, TOKENS, WIDTH), {"num_experts": 5, "capacity": 1.5}
    of_the_batch = conditional(make_layer(**settings), x)[1]
    of_an_image = conditional(make_layer(**settings, pool="sample"), x)[1]

    assert of_the_batch.stats.tokens_per_expert.tolist() == [7] * 5  # int(24 / 5 * 1.5)
    assert of_an_image.stats.tokens_per_expert.tolist() == [4] * 5  # 4 images, int(6 / 5 * 1.5) each


@pytest.mark.parametrize("where", ["some tokens", "every token"])
@pytest.mark.parametrize("rule", ["training", "count", "static"])
def test_not_a_number_still_chooses_exactly_as_many_tokens(rule: str, where: str) -> None:
    layer = make_layer(inference="static" if rule == "training" else rule).train(rule == "training")
    layer.router.threshold.fill_(-1.0)  # count: every token whose prediction is a number
    x = make_tokens()
    rows = [0, 7, 8] if where == "some tokens" else list(range(len(x)))
    x[rows] = torch.nan

    routing = conditional(layer.router, x)

    numbers = len(x) - len(rows)
    expected = numbers if rule == "count" else len(x) // EXPERTS
    assert routing.stats.tokens_per_expert.tolist() == [expected] * EXPERTS
    assert len(routing.token_index) == expected * EXPERTS
    if where == "some tokens":
        assert not set(rows) & set(routing.token_index.tolist())
    for expert in range(EXPERTS):
        tokens = routing.token_index[routing.expert_index == expert].tolist()
        assert len(set(tokens)) == len(tokens) == expected


def test_not_a_number_reaches_the_output_of_a_full_pool() -> None:
    layer = make_layer(capacity=float(EXPERTS))
    x = make_tokens()
    x[3] = torch.nan

    output, _ = conditional(layer, x.view(IMAGES, TOKENS, WIDTH))

    assert output.view(-1, WIDTH).isnan().any(dim=1).nonzero()[:, 0].tolist() == [3]


def test_the_moving_average_of_the_threshold_is_corrected_for_its_start() -> None:
    router = make_layer(threshold_decay=0.5).router
    router.threshold.zero_()
    seen = []
    for proposal in (0.8, 0.2, 0.6):
        router.update_threshold(torch.full((EXPERTS,), proposal))
        seen.append(router.threshold.tolist())

    # The plain average is 0.4, 0.3, 0.45; divided by 1 - 0.5^n, which is 0.5, 0.75, 0.875.
    for thresholds, expected in zip(seen, (0.8, 0.4, 0.45 / 0.875), strict=True):
        assert thresholds == pytest.approx([expected] * EXPERTS, abs=1e-7)
    assert router.threshold_updates == 3


def test_the_threshold_tends_to_the_plain_moving_average_of_decay_095() -> None:
    router = make_layer().router
    router.threshold.zero_()
    proposals = torch.rand(300, EXPERTS, generator=torch.Generator().manual_seed(5))
    plain = torch.zeros(EXPERTS, dtype=torch.float64)
    for proposal in proposals:
        router.update_threshold(proposal)
        plain = 0.95 * plain + 0.05 * proposal.double()

    # What is left of the correction is 0.95^300 = 2e-7; 300 fp32 roundings that the average forgets by 20.
    assert (router.threshold - plain).abs().max() < 2e-6


def test_the_first_proposal_counts_fully_and_a_constant_proposal_stays() -> None:
    router = make_layer().router
    router.threshold.zero_()
    proposal = torch.tensor([0.1, 0.7, 1e-6, 0.999])

    for _ in range(20):
        router.update_threshold(proposal)
        assert torch.equal(router.threshold, proposal)


def test_a_forward_pass_proposes_a_threshold_and_leaves_the_state_alone() -> None:
    router = make_layer().router
    before = router.threshold.clone()

    routing = conditional(router, make_tokens())

    assert torch.equal(router.threshold, before) and router.threshold_updates == 0
    assert routing.stats.proposed_threshold is not None and not routing.stats.proposed_threshold.requires_grad


def test_the_proposal_is_the_kth_largest_predicted_probability() -> None:
    router = make_layer(num_experts=2).router
    # Logits 0, 1, ... 23 and 0, -1, ... -23 from the first entry of the token.
    router._predict = lambda x_TD, predictor: torch.stack([x_TD[:, 0], -x_TD[:, 0]], dim=1)  # type: ignore[method-assign]
    x = torch.zeros(24, WIDTH)
    x[:, 0] = torch.arange(24)

    proposal = conditional(router, x).stats.proposed_threshold

    expected = [1 / (1 + math.exp(-12)), 1 / (1 + math.exp(11))]  # 12 slots: from 23 down to 12, from 0 down to -11
    assert proposal.tolist() == pytest.approx(expected, rel=1e-5)


def test_image_pools_propose_the_mean_of_their_probabilities_however_the_images_are_spread_over_ranks() -> None:
    layer = make_layer(pool="sample")
    x = make_tokens()

    together = conditional(layer.router, x).stats.proposed_threshold
    apart = torch.stack([conditional(layer.router, share).stats.proposed_threshold for share in x.chunk(2)]).mean(dim=0)

    weights = double_weights(dict(layer.named_parameters()))
    assert_close(apart, moe_layer_over_pools(x.double(), weights, 1.0, TOKENS).kth_probability, FORWARD_TOLERANCE)
    assert_close(together, apart.double(), FORWARD_TOLERANCE)


def test_a_threshold_sample_does_not_depend_on_its_batch_mates_but_a_counted_one_does() -> None:
    x = make_tokens().view(IMAGES, TOKENS, WIDTH)
    difference = {}
    for rule in ("threshold", "count"):
        layer = make_layer(inference=rule).eval()
        with torch.no_grad():
            together, _ = conditional(layer, x)
            alone = torch.cat([conditional(layer, image[None])[0] for image in x])
        difference[rule] = float((together - alone).abs().max() / together.abs().max())

    assert difference["threshold"] < FORWARD_TOLERANCE
    assert difference["count"] > 0.1


def test_the_predictor_loss_sends_no_gradient_into_the_tokens_or_the_gate() -> None:
    layer = make_layer()
    x = make_tokens().requires_grad_()

    conditional(layer.router, x).losses["capacity"].backward()

    assert x.grad is None and layer.router.gate_weight.grad is None
    assert layer.router.capacity_predictor is not None
    assert all(grad.any() for grad in gradients(layer.router.capacity_predictor))


def test_nothing_of_the_predictor_is_kept_for_backward_but_its_gradients() -> None:
    router, x_TD = make_layer().router, make_tokens().requires_grad_()
    assert router.capacity_predictor is not None
    kept = saved_bytes(router, lambda: conditional(router, x_TD))
    of_scores = x_TD.numel() + len(x_TD) * EXPERTS  # the tokens, and the softmax
    of_predictor = sum(parameter.numel() for parameter in router.capacity_predictor.parameters())
    assert kept == 4 * (of_scores + of_predictor)
    with torch.no_grad():
        assert not conditional(router, x_TD).losses["capacity"].requires_grad


def test_assignments_are_by_expert_and_then_by_token() -> None:
    for mode, rule in ((True, "static"), (False, "threshold"), (False, "count"), (False, "static")):
        routing = conditional(make_layer(inference=rule).train(mode).router, make_tokens())
        pairs = list(zip(routing.expert_index.tolist(), routing.token_index.tolist(), strict=True))
        assert pairs == sorted(set(pairs))
        assert len(pairs) == int(routing.stats.tokens_per_expert.sum())


def test_the_router_decides_in_fp32_for_a_bf16_token() -> None:
    layer = make_layer()
    x = make_tokens().bfloat16()

    assert layer.router.capacity_predictor is not None
    layer.router.capacity_predictor.bfloat16()
    routing = conditional(layer.router, x)

    assert routing.gate.dtype == torch.float32 and routing.losses["capacity"].dtype == torch.float32
    # Multiples of 1/8 are exact in bf16, so the fp32 router takes the same tokens with the same gates.
    exact = conditional(make_layer().router, x.float())
    assert torch.equal(routing.token_index, exact.token_index) and torch.equal(routing.gate, exact.gate)


def test_a_pool_too_small_for_one_slot_gives_no_expert_a_token_at_inference() -> None:
    config = global_pool.Settings(
        "global_pool", 8, capacity=1.0, pool="sample", inference="static", threshold_decay=0.95
    )
    layer = MoELayer(pool_choice(16, config, tokens_per_sample=6), Experts(8, 16, 32)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    y, routing = conditional(layer, torch.randn(2, 6, 16))
    assert not y.any() and int(routing.stats.tokens_per_expert.sum()) == 0


def test_the_capacity_schedule_starts_with_all_experts_and_falls_linearly_to_the_capacity() -> None:
    settings = replace(CONFIG, capacity_schedule=(2, 4))
    # The published code's schedule for four experts and these bounds, counted from step 0.
    assert [settings.capacity_at(step) for step in range(7)] == [4.0, 4.0, 4.0, 2.5, 1.0, 1.0, 1.0]
    assert [replace(CONFIG, capacity_schedule=(2, 2)).capacity_at(step) for step in (1, 2, 3)] == [4.0, 4.0, 1.0]
    assert CONFIG.capacity_at(0) == 1.0


def test_training_follows_the_schedule_and_inference_does_not() -> None:
    layer = make_layer(capacity_schedule=(2, 4), inference="static")
    x = make_tokens().view(IMAGES, TOKENS, WIDTH)
    capacities = []
    for step in (0, 3, 4):
        layer.router.start_step(step)
        capacities.append(float(conditional(layer.train(), x)[1].stats.capacity))
        assert float(conditional(layer.eval(), x)[1].stats.capacity) == 1.0
    assert capacities == [4.0, 2.5, 1.0]


def test_expert_choice_with_a_predictor_is_the_pool_of_one_image_under_every_rule() -> None:
    for rule in ("threshold", "count", "static"):
        settings: dict[str, Any] = {"capacity_predictor": True, "inference": rule, **PREDICTOR_DEFAULTS}
        own = expert_choice.Settings("expert_choice", EXPERTS, 4.0, **settings)
        layers = [layer_of(own), make_layer(pool="sample", inference=rule)]
        x = make_tokens().view(IMAGES, TOKENS, WIDTH)
        for mode in (True, False):
            (y, ours), (expected, theirs) = (conditional(layer.train(mode), x) for layer in layers)
            assert torch.equal(y, expected) and torch.equal(ours.token_index, theirs.token_index)
            assert ours.losses == theirs.losses
