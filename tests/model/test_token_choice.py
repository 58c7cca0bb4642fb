"""Token choice against a loop written from the equations (DiffMoE eq. 1-3 and Alg. 2, and its code's balance loss)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config.routers.token_choice import Settings
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.routers.token_choice import TokenChoice
from diffmoe_dist.model.routing_losses import balance_loss
from tests.model.layers import conditional, gelu_expert, gradients

IMAGES, TOKENS, WIDTH, EXPERTS = 2, 6, 8, 4


def make_layer(top_k: int) -> MoELayer:
    config = Settings("token_choice", EXPERTS, top_k=top_k, balance_loss_weight=0.01)
    layer = MoELayer(TokenChoice(WIDTH, config), Experts(EXPERTS, WIDTH, 16)).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def slow(layer: MoELayer, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Token by token and expert by expert."""
    outputs, probabilities = [], []
    picks = torch.zeros(EXPERTS)
    for token in x.flatten(0, 1):
        p = torch.softmax(layer.router.get_parameter("gate_weight") @ token, dim=0)
        probabilities.append(p)
        total = torch.zeros_like(token)
        for expert in sorted(range(EXPERTS), key=p.tolist().__getitem__, reverse=True)[:top_k]:
            total = total + p[expert] * gelu_expert(layer.experts, expert, token)
            picks[expert] += 1
        outputs.append(total)
    losses = [picks[e] / picks.sum() * torch.stack(probabilities)[:, e].mean() for e in range(EXPERTS)]
    return torch.stack(outputs).view_as(x), EXPERTS * torch.stack(losses).sum()


def fast(layer: MoELayer, x: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    y, routing = conditional(layer, x)
    return y, routing.losses["balance"]


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_outputs_balance_loss_and_gradients_equal_a_loop_over_tokens_and_experts(top_k: int) -> None:
    layer = make_layer(top_k)
    x = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (fast, slow):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        y, loss = forward(layer, x, top_k)
        (y.square().sum() + loss).backward()
        results.append([y, loss, x.grad, *gradients(layer)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # fp32 sums in another order


def test_every_token_has_exactly_k_experts_and_equal_scores_go_to_the_lower_expert() -> None:
    layer = make_layer(top_k=2)
    with torch.no_grad():
        layer.router.get_parameter("gate_weight").zero_()  # all scores equal
    _, routing = conditional(layer, torch.ones(IMAGES, TOKENS, WIDTH))
    assert routing.stats.tokens_per_expert.tolist() == [IMAGES * TOKENS, IMAGES * TOKENS, 0, 0]
    assert float(routing.stats.capacity) == 2.0


def test_assignments_are_ordered_by_expert_and_then_by_token() -> None:
    _, routing = conditional(make_layer(top_k=2), torch.randn(IMAGES, TOKENS, WIDTH))
    pairs = list(zip(routing.expert_index.tolist(), routing.token_index.tolist(), strict=True))
    assert pairs == sorted(pairs)


def test_the_balance_loss_is_one_when_even_and_n_when_all_choose_one() -> None:
    assert float(balance_loss(torch.full((4,), 0.25), torch.full((4,), 0.25))) == pytest.approx(1.0)
    assert float(balance_loss(torch.eye(4)[0], torch.tensor([1.0, 0, 0, 0]))) == pytest.approx(4.0)


def test_at_inference_there_is_no_loss() -> None:
    _, routing = conditional(make_layer(1).eval(), torch.randn(IMAGES, TOKENS, WIDTH))
    assert routing.losses == {}
