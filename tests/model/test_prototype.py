"""ProMoE's layer against a loop over images, tokens and experts (ProMoE eq. 4-6), in both variants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config.routers.prototype import Settings
from diffmoe_dist.model.mlp import Mlp
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.routers.prototype import PrototypeRouter
from diffmoe_dist.model.routing_losses import contrastive_loss
from tests.model.layers import gelu_expert, gradients

IMAGES, TOKENS, WIDTH, EXPERTS = 4, 8, 8, 4
NULL = [False, True, False, False]
VARIANTS = ["token_choice", "expert_choice"]
SCORES = ["identity", "sigmoid", "softmax"]


class PrototypeLayer(MoELayer):
    router: PrototypeRouter
    shared: Mlp
    unconditional: Mlp


def make_layer(**settings: Any) -> PrototypeLayer:
    chosen = Settings("prototype", EXPERTS, expert_mlp_ratio=2.0, **settings)
    router, experts = PrototypeRouter(WIDTH, chosen, TOKENS), Experts(EXPERTS, WIDTH, 16)
    layer = PrototypeLayer(router, experts, Mlp(WIDTH, 16), Mlp(WIDTH, 16)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return layer


def make_images() -> Tensor:
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def best_places(scores: list[Tensor], count: int) -> list[int]:
    """Of equal scores the first."""
    return sorted(range(len(scores)), key=lambda place: -scores[place].item())[:count]


def row_loss(prototypes: Tensor, means: dict[int, Tensor], temperature: float) -> Tensor:
    """eq. 6 over the experts that have a mean."""
    if len(means) < 2:
        return torch.zeros(())
    total = torch.zeros(())
    for i in means:
        powers = {j: torch.exp(cosine(prototypes[i], means[j]) / temperature) for j in means}
        total = total - torch.log(powers[i] / sum(powers.values()))
    return total / len(means)


def slow(layer: PrototypeLayer, x: Tensor, variant: str, scores: str, top_k: int) -> tuple[Tensor, Tensor]:  # noqa: C901  # as slow as the equations
    prototypes, outputs, assigned = layer.router.prototypes, [], []  # assigned: for each image {expert: tokens}
    slots = math.floor(TOKENS / EXPERTS * top_k)
    for image, is_null in zip(x, NULL, strict=True):
        table = [[cosine(token, prototype) for prototype in prototypes] for token in image]
        if scores == "sigmoid":
            table = [[1 / (1 + torch.exp(-z)) for z in row] for row in table]
        elif scores == "softmax" and variant == "token_choice":
            table = [[torch.exp(z) / sum(torch.exp(other) for other in row) for z in row] for row in table]
        elif scores == "softmax":
            totals = [sum(torch.exp(row[e]) for row in table) for e in range(EXPERTS)]
            table = [[torch.exp(row[e]) / totals[e] for e in range(EXPERTS)] for row in table]
        chosen: set[tuple[int, int]] = set()
        if not is_null and variant == "token_choice":
            for s, row in enumerate(table):
                chosen |= {(s, e) for e in best_places(row, top_k)}
        elif not is_null:
            for e in range(EXPERTS):
                chosen |= {(s, e) for s in best_places([row[e] for row in table], slots)}
        assigned.append({e: [image[s] for s, of in sorted(chosen) if of == e] for e in range(EXPERTS)})
        rows = []
        for s, token in enumerate(image):
            y = layer.shared(token)  # eq. 5
            if is_null:
                y = y + layer.unconditional(token)
            for e in range(EXPERTS):
                if (s, e) in chosen:
                    y = y + table[s][e] * gelu_expert(layer.experts, e, token)
            rows.append(y)
        outputs.append(torch.stack(rows))
    if variant == "token_choice":
        everything = {e: [token for image in assigned for token in image[e]] for e in range(EXPERTS)}
        loss = row_loss(prototypes, {e: torch.stack(v).mean(dim=0) for e, v in everything.items() if v}, 0.07)
    else:
        per_image = [
            row_loss(prototypes, {e: torch.stack(v).mean(dim=0) for e, v in image.items() if v}, 0.07)
            for image, is_null in zip(assigned, NULL, strict=True)
            if not is_null
        ]
        loss = torch.stack(per_image).mean()
    return torch.stack(outputs), loss


def slow_balance(tables: list[list[Tensor]], chosen: list[list[int]]) -> Tensor:
    """N times the sum of f_i P_i over the tokens that are routed; a token's scores and the experts it has."""
    total = torch.zeros(())
    for i in range(EXPERTS):
        picked = sum(experts.count(i) for experts in chosen) / sum(len(experts) for experts in chosen)
        total = total + picked * sum(row[i] for row in tables) / len(tables)
    return EXPERTS * total


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("null", [NULL, [True] * IMAGES])
def test_the_balance_loss_is_that_of_the_tokens_that_are_routed(null: list[bool], scores: Any) -> None:
    layer = make_layer(top_k=2, scores=scores, balance_loss_weight=0.1)
    x, results = make_images(), []
    for fast in (True, False):
        layer.zero_grad()
        if fast:
            loss = layer(x, torch.tensor(null))[1].losses["balance"]
        else:
            tokens = [token for image, is_null in zip(x, null, strict=True) if not is_null for token in image]
            tables = []
            for token in tokens:
                row = torch.stack([cosine(token, prototype) for prototype in layer.router.prototypes])
                row = row.sigmoid() if scores == "sigmoid" else row
                tables.append(list(row.softmax(dim=0)))
            chosen = [best_places(row, 2) for row in tables]
            loss = slow_balance(tables, chosen) if tokens else layer.router.prototypes.sum() * 0
        loss.backward()
        results.append((loss.detach(), layer.router.prototypes.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_prototype_may_be_drawn_to_the_tokens_that_rank_its_expert_first_alone() -> None:
    layer, x = make_layer(top_k=2, contrastive_tokens="first"), make_images()
    _, routing = layer(x, torch.tensor(NULL))
    _, first = slow(layer, x, "token_choice", "identity", 1)
    _, chosen = slow(layer, x, "token_choice", "identity", 2)
    assert routing.losses["contrastive"].item() == pytest.approx(first.item(), rel=1e-4)
    assert chosen.item() != pytest.approx(first.item(), rel=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_an_unconditional_expert_images_without_a_condition_are_routed_as_the_others(variant: Any) -> None:
    settings = Settings("prototype", EXPERTS, variant=variant, unconditional_expert=False)
    layer = make_layer(variant=variant)
    everyone, _ = layer(make_images(), torch.zeros(IMAGES, dtype=torch.bool))
    layer.router.settings, layer.unconditional = settings, None  # type: ignore[assignment]
    y, routing = layer(make_images(), torch.tensor(NULL))
    assert torch.equal(y, everyone)
    assert float(routing.stats.capacity) == 1.0


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_loss_and_gradients_equal_a_loop_over_images_tokens_and_experts(
    variant: str, scores: str, top_k: int
) -> None:
    layer = make_layer(variant=variant, scores=scores, top_k=top_k)
    x, null = make_images(), torch.tensor(NULL)

    def fast(x: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = layer(x, null)
        return y, routing.losses["contrastive"]

    results = []
    for forward in (fast, lambda x: slow(layer, x, variant, scores, top_k)):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        y, loss = forward(x)
        (y.square().sum() + loss).backward()
        results.append([y, loss, x.grad, *gradients(layer)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-5)  # fp32 sums; the temperature magnifies by 14


def test_unconditional_images_go_to_the_unconditional_expert_and_no_other() -> None:
    layer, x = make_layer().eval(), make_images()
    y, routing = layer(x, torch.tensor(NULL))
    assert not set((routing.token_index // TOKENS).tolist()) & {1}
    torch.testing.assert_close(y[1], layer.shared(x[1]) + layer.unconditional(x[1]))
    assert float(routing.stats.capacity) == 1.0, "every token has one expert, the unconditional one counted"


def test_a_batch_of_null_labels_alone_leaves_the_routed_experts_idle_and_still_has_gradients() -> None:
    layer, x = make_layer(), make_images()
    y, routing = layer(x, torch.ones(IMAGES, dtype=torch.bool))
    (y.sum() + routing.losses["contrastive"]).backward()
    assert routing.stats.tokens_per_expert.tolist() == [0] * EXPERTS and routing.losses["contrastive"].item() == 0
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert bool(parameter.grad.any()) == name.startswith(("shared.", "unconditional.")), name


def test_equal_scores_go_to_the_lower_expert() -> None:
    layer = make_layer()
    with torch.no_grad():
        layer.router.prototypes.copy_(layer.router.prototypes[:1].expand(EXPERTS, WIDTH))
    _, routing = layer(make_images(), torch.zeros(IMAGES, dtype=torch.bool))
    assert routing.stats.tokens_per_expert.tolist() == [IMAGES * TOKENS, 0, 0, 0]


def test_the_expert_choice_variant_takes_the_published_number_of_tokens() -> None:
    _, routing = make_layer(variant="expert_choice").eval()(make_images(), torch.tensor(NULL))
    assert routing.stats.tokens_per_expert.tolist() == [3 * (TOKENS // EXPERTS)] * EXPERTS


def test_the_contrastive_loss_is_zero_for_fewer_than_two_active_experts_and_ignores_the_idle_ones() -> None:
    prototypes, means = torch.eye(3), torch.eye(3) * 5
    assert float(contrastive_loss(prototypes, means, torch.tensor([4.0, 0.0, 0.0]), 0.07)) == 0.0
    assert float(contrastive_loss(prototypes, means, torch.zeros(3), 0.07)) == 0.0
    # Two active experts, cosines 1 and 0 at temperature 1: -log(e / (e + 1)).
    two = contrastive_loss(prototypes, means * 2, torch.tensor([2.0, 0.0, 1.0]), 1.0)
    assert float(two) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
