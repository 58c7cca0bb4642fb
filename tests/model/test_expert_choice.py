"""Expert choice inside each image against a loop written from the equations (DiffMoE Sec. 2.1, Alg. 1)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config.routers import expert_choice
from diffmoe_dist.model.moe import Experts
from tests.model.layers import PoolChoiceLayer, conditional, gelu_expert, gradients, pool_choice

IMAGES, TOKENS, WIDTH, EXPERTS = 3, 8, 8, 4


def make_layer(capacity: float) -> PoolChoiceLayer:
    config = expert_choice.Settings("expert_choice", EXPERTS, capacity=capacity, inference="static")
    layer = PoolChoiceLayer(pool_choice(WIDTH, config, TOKENS), Experts(EXPERTS, WIDTH, 16)).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return layer


def slow(layer: PoolChoiceLayer, x: Tensor, slots: int) -> Tensor:
    """Image by image, expert by expert."""
    images = []
    for image in x:
        # The router works in fp32, so its reference does too.
        scores = [torch.softmax(layer.router.gate_weight.float() @ token.float(), dim=0) for token in image]
        rows = [torch.zeros(WIDTH, dtype=x.dtype) for _ in image]
        for e in range(EXPERTS):
            column = [row[e].item() for row in scores]
            for s in sorted(range(TOKENS), key=column.__getitem__, reverse=True)[:slots]:
                rows[s] = rows[s] + scores[s][e] * gelu_expert(layer.experts, e, image[s])
        images.append(torch.stack(rows))
    return torch.stack(images)


@pytest.mark.parametrize(("capacity", "slots"), [(1.0, 2), (0.5, 1), (1.7, 3), (4.0, 8)])
def test_outputs_and_gradients_equal_a_loop_over_images_and_experts(capacity: float, slots: int) -> None:
    layer = make_layer(capacity)
    x = torch.randn(IMAGES, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (lambda x: conditional(layer, x)[0], lambda x: slow(layer, x, slots)):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        y = forward(x)
        y.square().sum().backward()
        results.append([y, x.grad, *gradients(layer)])
    for fast, reference in zip(*results, strict=True):
        # fp32 inside the router, fp64 elsewhere.
        torch.testing.assert_close(fast.double(), reference.double(), atol=1e-5, rtol=1e-5)


def test_every_expert_takes_the_same_number_of_tokens_of_every_image() -> None:
    _, routing = conditional(make_layer(1.0), torch.randn(IMAGES, TOKENS, WIDTH, dtype=torch.float64))
    counts = torch.zeros(IMAGES, EXPERTS, dtype=torch.int64)
    counts.index_put_((routing.token_index // TOKENS, routing.expert_index), torch.tensor(1), accumulate=True)
    assert (counts == 2).all()


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    layer = make_layer(1.0).eval()
    x = torch.randn(IMAGES, TOKENS, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(conditional(layer, x)[0][1:2], conditional(layer, x[1:2])[0], atol=1e-12, rtol=0)
