from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffmoe_dist.config import build_config
from diffmoe_dist.config.routers import global_pool
from diffmoe_dist.model import blocks
from diffmoe_dist.model import moe as moe_module
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.mlp import Mlp, SwiGLU
from diffmoe_dist.model.moe import ExpertInput, Experts, LocalDispatcher
from diffmoe_dist.model.routing import Routing
from tests.model.layers import PoolChoiceLayer, conditional, gelu_expert, gradients, pool_choice

CONFIG = global_pool.Settings(
    router="global_pool",
    num_experts=4,
    capacity=1.0,
    pool="global",
    inference="threshold",
    capacity_loss_weight=1.0,
    threshold_decay=0.95,
)
# fp32 sums in another order: a few roundings of 6e-8, relative to the largest entry.
TOLERANCE = 2e-6


def make_experts(experts: int, width: int, hidden: int, seed: int = 0, activation: str = "gelu") -> Experts:
    module = Experts(experts, width, hidden, activation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def make_layer(
    config: global_pool.Settings = CONFIG, tokens_per_sample: int = 6, width: int = 8, hidden: int = 16
) -> PoolChoiceLayer:
    router = pool_choice(width, config, tokens_per_sample)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return PoolChoiceLayer(router, make_experts(config.num_experts, width, hidden))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float = TOLERANCE) -> None:
    assert actual is not None and expected is not None
    scale = expected.abs().max().clamp_min(1e-30)
    assert float((actual - expected).abs().max() / scale) <= tolerance


def forward_backward(experts: Experts, rows: ExpertInput, cotangent: Tensor) -> list[Tensor]:
    """The output, the gradient of the rows and those of the parameters."""
    x = rows.x.clone().requires_grad_()
    output = experts(replace(rows, x=x))
    return [output.detach(), *torch.autograd.grad(output, [x, *experts.parameters()], cotangent)]


def loop_over_experts(experts: Experts, x_RD: Tensor, counts: list[int], cotangent: Tensor) -> list[Tensor]:
    x = x_RD.clone().requires_grad_()
    parts = []
    for e, rows in enumerate(x.split(counts)):
        if experts.activation == "swiglu":
            hidden = experts.w2.shape[1]
            gate, up = rows @ experts.w1[e, :, :hidden], rows @ experts.w1[e, :, hidden:]
            parts.append((gate * torch.sigmoid(gate) * up) @ experts.w2[e])
        else:
            parts.append(gelu_expert(experts, e, rows))
    output = torch.cat(parts)
    return [output.detach(), *torch.autograd.grad(output, [x, *experts.parameters()], cotangent)]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_batched_path_equals_the_grouped_path_and_a_loop_over_the_experts(activation: str) -> None:
    experts = make_experts(4, 8, 16, activation=activation)
    x, cotangent = random(20, 8, seed=2), random(20, 8, seed=3)
    counts = torch.full((4,), 5)

    batched = forward_backward(experts, ExpertInput(x, counts, rows_per_expert=5), cotangent)
    grouped = forward_backward(experts, ExpertInput(x, counts, rows_per_expert=None), cotangent)
    looped = loop_over_experts(experts, x, [5] * 4, cotangent)

    assert len(batched) == (6 if activation == "gelu" else 4)
    for one, two, three in zip(batched, grouped, looped, strict=True):
        assert_close(one, three)
        assert_close(two, three)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", [[3, 0, 7, 2], [0, 0, 12, 0], [0, 5, 7, 0], [1, 1, 1, 9]])
def test_the_grouped_path_equals_a_loop_over_the_experts_for_uneven_counts(counts: list[int], activation: str) -> None:
    experts = make_experts(4, 8, 16, activation=activation)
    x, cotangent = random(12, 8, seed=2), random(12, 8, seed=3)

    grouped = forward_backward(experts, ExpertInput(x, torch.tensor(counts), rows_per_expert=None), cotangent)
    looped = loop_over_experts(experts, x, counts, cotangent)

    for one, two in zip(grouped, looped, strict=True):
        assert_close(one, two)


def test_an_expert_without_tokens_has_zero_gradients_and_the_others_have_theirs() -> None:
    experts, x = make_experts(3, 8, 16), random(6, 8, seed=2)

    experts(ExpertInput(x, torch.tensor([4, 0, 2]), rows_per_expert=None)).square().sum().backward()

    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert [bool(grad.any()) for grad in parameter.grad] == [True, False, True], name
        assert parameter.grad.isfinite().all(), name


def test_experts_without_any_token_return_no_row_and_zero_gradients() -> None:
    experts, x = make_experts(3, 8, 16), torch.zeros(0, 8, requires_grad=True)

    output = experts(ExpertInput(x, torch.zeros(3, dtype=torch.int64), rows_per_expert=None))
    output.backward(torch.zeros(0, 8))

    assert output.shape == (0, 8)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_one_expert_that_takes_every_token_is_the_dense_layer() -> None:
    layer, dense = make_layer(replace(CONFIG, num_experts=1)), Mlp(8, 16)
    assert layer.experts.b1 is not None and layer.experts.b2 is not None
    with torch.no_grad():
        dense.fc1.weight.copy_(layer.experts.w1[0].T)
        dense.fc1.bias.copy_(layer.experts.b1[0])
        dense.fc2.weight.copy_(layer.experts.w2[0].T)
        dense.fc2.bias.copy_(layer.experts.b2[0])
    x, cotangent = random(4, 6, 8, seed=2), random(4, 6, 8, seed=3)
    x_moe, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()

    output, routing = conditional(layer, x_moe)
    output.backward(cotangent)
    expected = dense(x_dense)
    expected.backward(cotangent)

    assert torch.equal(routing.gate, torch.ones(24))
    assert_close(output.detach(), expected.detach())
    assert_close(x_moe.grad, x_dense.grad)
    found = {name: p.grad[0] for name, p in layer.experts.named_parameters() if p.grad is not None}
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = gradients(dense)
    assert_close(found["w1"], fc1_weight.T)
    assert_close(found["b1"], fc1_bias)
    assert_close(found["w2"], fc2_weight.T)
    assert_close(found["b2"], fc2_bias)
    assert layer.router.gate_weight.grad is not None
    assert not layer.router.gate_weight.grad.any()  # a softmax over one expert is 1 whatever the weight


def test_a_token_that_no_expert_takes_gets_zero_and_the_others_do_not() -> None:
    layer = make_layer(replace(CONFIG, capacity=0.5))

    output, routing = conditional(layer, random(4, 6, 8, seed=2))

    taken = torch.zeros(24, dtype=torch.bool)
    taken[routing.token_index] = True
    assert 0 < taken.sum() < 24
    assert torch.equal(output.flatten(0, 1).any(dim=1), taken)


def test_a_token_of_several_experts_gets_the_sum_of_gate_times_result() -> None:
    layer = make_layer(replace(CONFIG, capacity=4.0))  # every expert takes every token
    x = random(4, 6, 8, seed=2)

    output = conditional(layer, x)[0].detach()

    gates = (x.flatten(0, 1) @ layer.router.gate_weight.T).softmax(dim=1)
    results = [gates[:, e : e + 1] * gelu_expert(layer.experts, e, x.flatten(0, 1)) for e in range(4)]
    assert_close(output.flatten(0, 1), torch.stack(results).sum(dim=0).detach())


def test_the_layer_keeps_the_type_and_shape_of_its_input() -> None:
    layer = make_layer().bfloat16()

    output, routing = conditional(layer, random(4, 6, 8, seed=2).bfloat16())

    assert output.dtype == torch.bfloat16 and output.shape == (4, 6, 8)
    assert routing.gate.dtype == torch.float32


def test_a_local_training_step_takes_the_batched_path() -> None:
    layer = make_layer()
    x_TD = random(24, 8, seed=2)

    dispatcher, routing = LocalDispatcher(), conditional(layer.router, x_TD)
    assert dispatcher.counts(routing, by_expert=True) is None
    rows = dispatcher.rows(dispatcher.start(x_TD, routing, None, None))
    assert rows.rows_per_expert == 6 and rows.token_index is not None and len(rows.token_index) == 24

    routing = conditional(layer.eval().router, x_TD)
    counts = dispatcher.counts(routing, by_expert=False)
    assert counts is not None
    rows = dispatcher.rows(dispatcher.start(x_TD, routing, counts, counts.tolist()))
    assert rows.rows_per_expert is None and rows.counts == counts.tolist()


class LargestTensor(TorchDispatchMode):
    """Remembers the element count and the shape of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.shape = 0, torch.Size()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.shapes.add(tuple(tensor.shape))
                if tensor.numel() > self.elements:
                    self.elements, self.shape = tensor.numel(), tensor.shape
        return result


@pytest.mark.parametrize("rule", ["training", "threshold", "count", "static"])
def test_nothing_as_large_as_a_copy_of_the_tokens_for_every_expert_is_made(rule: Any) -> None:
    experts, tokens, width, hidden = 16, 128, 8, 32
    config = replace(CONFIG, num_experts=experts, inference="static" if rule == "training" else rule)
    layer = make_layer(config, 32, width, hidden).train(rule == "training")
    x = random(4, 32, width, seed=2).requires_grad_()
    assert layer.router.capacity_predictor is not None
    predicted = layer.router.capacity_predictor(x.detach().flatten(0, 1)).sigmoid()
    layer.router.threshold.copy_(predicted.quantile(0.85, dim=0))  # a sixth of the tokens for every expert

    with LargestTensor() as largest:
        output, routing = conditional(layer, x)
        loss = output.square().sum() + sum(routing.losses.values())
        loss.backward()

    assert tokens <= len(routing.token_index) < experts * tokens / 6
    # The hidden layer of the chosen tokens, the weights and the scores are all below it.
    assert largest.elements < experts * tokens * width, largest.shape
    assert (len(routing.token_index), width) in largest.shapes and (tokens, width) in largest.shapes


def test_the_size_recorder_sees_a_copy_of_the_tokens_for_every_expert() -> None:
    x = random(128, 8, seed=2).requires_grad_()
    with LargestTensor() as forward:
        product = x[:, None] * random(16, 1, seed=3)
    with LargestTensor() as backward:
        product.sum().backward()

    assert forward.elements == backward.elements == 16 * 128 * 8


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_shared_experts_add_their_sum_to_every_token_whatever_the_router(activation: str) -> None:
    settings = {"num_experts": 4, "activation": activation}
    models = {}
    for shared in (0, 2):
        config = build_config(
            {"run_dir": "r", "data": {"shards": "s"}, "model": {"depth": 2, "hidden_size": 8, "num_heads": 2}},
            {"moe": {"router": "global_pool", "shared_experts": shared, **settings}},
        )
        models[shared] = DiT(config)
        initialize(models[shared], 0)
    without, with_two = models[0].moe_layers[0], models[2].moe_layers[0]
    x = random(2, 256, 8, seed=1)
    extra = conditional(with_two, x)[0] - conditional(without, x)[0]

    assert isinstance(with_two.shared, Mlp | SwiGLU)
    total = torch.zeros(2, 256, 8)
    for half in (slice(0, 32), slice(32, 64)):  # each shared expert is one half of the hidden units
        if isinstance(with_two.shared, Mlp):
            h = F.gelu(
                F.linear(x, with_two.shared.fc1.weight[half], with_two.shared.fc1.bias[half]), approximate="tanh"
            )
            total = total + F.linear(h, with_two.shared.fc2.weight[:, half], with_two.shared.fc2.bias / 2)
        else:
            gate, up = (F.linear(x, w.weight[half]) for w in (with_two.shared.gate_proj, with_two.shared.up_proj))
            total = total + F.linear(F.silu(gate) * up, with_two.shared.down_proj.weight[:, half])
    assert_close(extra.detach(), total.detach(), 1e-5)  # a difference of two fp32 sums


def block_step(moe: dict[str, Any], constant_gates: bool = False) -> list[Tensor]:
    """Of a block with this mixture: its output and all gradients."""
    shape = {"depth": 2, "hidden_size": 8, "num_heads": 2}
    config = build_config({"run_dir": "r", "data": {"shards": "s"}, "model": shape, "moe": {"num_experts": 4, **moe}})
    model = DiT(config)
    initialize(model, 0)
    block: Any = model.blocks[1]
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number))
    x, condition = random(2, 256, 8, seed=1).requires_grad_(), random(2, 8, seed=2).requires_grad_()

    if constant_gates:
        forward = block.mlp.router.forward
        block.mlp.router.forward = lambda *inputs: without_gradients(forward(*inputs))
    y, routing = block(x, condition, torch.tensor([True, False]))
    (y.square().sum() + sum(routing.losses.values())).backward()
    return [y.detach(), *(p.grad for p in (x, condition, *block.parameters()) if p.grad is not None)]


def without_gradients(routing: Routing) -> Routing:
    return replace(routing, scores_TN=routing.scores_TN.detach())


def test_gates_without_gradients_keep_the_sum_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = {"router": "token_choice"}
    again = block_step(moe, constant_gates=True)
    monkeypatch.setattr(blocks, "made_again", lambda h: nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(again, block_step(moe, constant_gates=True), strict=True))


@pytest.mark.parametrize("shared", [0, 1])
def test_a_block_adds_the_results_of_its_experts_up_again_in_backward_and_so_does_not_keep_their_sum(
    shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    add_up = moe_module._add_up

    def counted(*args: Any) -> Tensor:
        made.append(1)
        return add_up(*args)

    monkeypatch.setattr(moe_module, "_add_up", counted)
    moe = {"router": "global_pool", "shared_experts": shared}

    again = block_step(moe)
    sums = len(made)
    monkeypatch.setattr(blocks, "made_again", lambda h: nullcontext())
    once = block_step(moe)

    assert sums == (1 if shared else 2) and len(made) - sums == 1  # with a shared expert's results the sum is kept
    assert len(again) == len(once) and all(torch.equal(a, b) for a, b in zip(again, once, strict=True))
