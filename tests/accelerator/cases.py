"""What runs on the simulated device: a small model of each router, on one device or on ranks, and a step of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe_dist.config import Config, build_config
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.blocks import DiTBlock
from diffmoe_dist.model.condition import Condition, TextCondition
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.moe import MoELayer
from diffmoe_dist.model.pool_choice import PoolChoice
from tests.accelerator.simulator import Log, on_device, simulate, to_device

WIDTH, IMAGES, TOKENS, CLASSES = 128, 4, 64, 10
MOE: dict[str, dict[str, Any]] = {
    "dense": {"router": "dense"},
    "global_pool": {"router": "global_pool", "num_experts": 16},
    "global_pool swiglu": {"router": "global_pool", "num_experts": 16, "activation": "swiglu"},
    "global_pool sample": {"router": "global_pool", "num_experts": 16, "pool": "sample"},
    "expert_choice": {"router": "expert_choice", "num_experts": 16},
    "expert_choice predictor": {"router": "expert_choice", "num_experts": 16, "capacity_predictor": True},
    "token_choice": {"router": "token_choice", "num_experts": 16},
    "token_choice balanced": {"router": "token_choice", "num_experts": 16, "balance_loss_weight": 0.01},
    "token_choice swiglu": {"router": "token_choice", "num_experts": 16, "activation": "swiglu"},
    "prototype": {"router": "prototype", "num_experts": 12},
    "prototype expert_choice": {"router": "prototype", "num_experts": 12, "variant": "expert_choice"},
}
_CAPTIONS = {
    "condition": "text", "num_classes": 0, "text_hidden_size": 32, "text_max_length": 8, "text_pooled_size": 16,
    "text_encoder_sha256": "x",
}  # fmt: skip


def config(name: str, captions: bool = False, expert: int | None = None, **moe: Any) -> Config:
    """Of a case's model, with other settings of its router.

    Args:
        expert: the size of the expert-parallel groups, where there are ranks.
    """
    model = {"depth": 2, "hidden_size": WIDTH, "num_heads": 2, "input_size": 16, "num_classes": CLASSES}
    parallel = {} if expert is None else {"expert": expert}
    settings = {"model": {**model, **(_CAPTIONS if captions else {})}, "moe": {**MOE[name], **moe}}
    places = {"run_dir": "unused", "data": {"shards": "unused", **({"text": "unused"} if captions else {})}}
    return build_config({**places, **settings, "parallel": parallel})


@torch.no_grad()
def host_model(settings: Config) -> DiT:
    """With weights of which none is zero; on ranks, where there are any."""
    made = DiT(settings)
    if dist.is_initialized():
        # DeepSpeed takes seconds to import.
        from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, create_topology

        launch = Launch(dist.get_rank(), dist.get_world_size(), 0, "environment")
        apply_expert_parallel(made, settings, create_topology(launch, torch.device("cpu"), settings.parallel.expert))
    initialize(made, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    for layer in made.moe_layers:
        if isinstance(layer.router, PoolChoice) and layer.router.capacity_predictor is not None:
            layer.router.threshold.fill_(0.4)
    return made.train()


def model(settings: Config, dtype: torch.dtype) -> DiT:
    """The same on the simulated device."""
    moved: DiT = to_device(host_model(settings), dtype)
    return moved


def host_inputs(captions: bool = False) -> tuple[Tensor, Tensor, Condition]:
    """Noisy images, times, and labels or captions, the first of which is the null one."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(IMAGES, 4, 16, 16, generator=generator), torch.rand(IMAGES, generator=generator)
    null = torch.arange(IMAGES) == 0
    y: Condition = torch.where(null, CLASSES, torch.arange(IMAGES))
    if captions:
        tokens = torch.randn(IMAGES, 8, 32, generator=generator).half()
        pooled = torch.randn(IMAGES, 16, generator=generator).half()
        y = TextCondition(tokens, (torch.arange(8) < 5).expand(IMAGES, 8).contiguous(), pooled, null)
    return x, t, y


def inputs(captions: bool = False) -> tuple[Tensor, Tensor, Condition]:
    """The same on the simulated device."""
    x, t, y = host_inputs(captions)
    return on_device(x), on_device(t), y.map(on_device) if isinstance(y, TextCondition) else on_device(y)


def train(made: DiT, x: Tensor, t: Tensor, y: Condition) -> Log:
    """Forward and backward of a whole model."""
    with simulate() as log:
        out = made(x, t, y)
        loss = out.prediction.square().mean()
        for extra in out.losses.values():
            loss = loss + extra
        loss.backward()
    return log


def train_part(part: nn.Module, dtype: torch.dtype) -> Log:
    """Forward and backward of a feed-forward layer or a block on the simulated device."""
    given, gradients = ([on_device(tensor) for tensor in tensors] for tensors in part_inputs(part, dtype))
    with simulate() as log:
        step_of_part(part, given, gradients)
    return log


def part_inputs(part: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Of a feed-forward layer or a block: what it is called with, and the gradients of its result and of a loss."""
    generator = torch.Generator().manual_seed(2)
    shape = IMAGES, TOKENS, WIDTH
    x, gradient = torch.randn(2, *shape, generator=generator).to(dtype)
    condition = torch.randn(IMAGES, WIDTH, generator=generator).to(dtype).requires_grad_()
    null = torch.arange(IMAGES) == 0
    x = x.clone().requires_grad_()
    return {DiTBlock: [x, condition, null], MoELayer: [x, null]}.get(type(part), [x]), [gradient, torch.ones(())]


def step_of_part(part: nn.Module, given: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Forward and backward, also of the losses; returns the result."""
    part.zero_grad()
    out = part(*given)
    y, routing = out if isinstance(out, tuple) else (out, None)
    losses: list[Tensor] = list(routing.losses.values()) if routing is not None else []
    torch.autograd.backward([y, *losses], [gradients[0], *gradients[1:] * len(losses)])
    return y.detach()
