"""Mixture-of-experts layers by others, in the place of ours: what the whole training step is compared with.

Shape legend: T tokens, D width, H hidden width, N experts, K tokens that an expert takes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from diffmoe_dist.config import Config
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.mlp import Mlp
from diffmoe_dist.model.moe import MoELayer
from diffmoe_dist.model.routing import Router, Routing, RoutingStats, Selection

DEEPSPEED_EXPERTS = ".deepspeed_experts."  # in the names of their parameters
_DECAY = 0.95


class Gate(Router):
    """The layer's own matrix; all of the routing is in the layer's forward."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))


class PublishedLayer(MoELayer):
    """DiffMoE's layer in training, from the paper (eq. 4-13, 17, Alg. 3) and from what its code is known to do.

    A loop over the experts, each over its sorted top-k tokens; their results are scattered, out of place, into zeros of
    (N T, D), which are then summed over N; thresholds are N sorted top-k, averaged in the forward pass.
    """

    def __init__(self, width: int, hidden: int, num_experts: int, layers: int) -> None:
        nn.Module.__init__(self)
        self.router = Gate(num_experts, width)
        self.predictor = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, num_experts))
        self.mlps = nn.ModuleList(Mlp(width, hidden) for _ in range(num_experts))
        self.register_buffer("thresholds", torch.zeros(num_experts))
        self.layers = layers  # that the capacity loss is the mean over
        self.dispatcher = None  # type: ignore[assignment]  # which the trainer looks at

    def forward(self, x_BSD: Tensor, null_B: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        T, N = len(x_TD), len(self.mlps)
        slots = T // N
        weight_ND: Any = self.router.weight
        scores_NT = (x_TD @ weight_ND.T).softmax(dim=-1).T
        gate_NK, token_NK = scores_NT.topk(slots, dim=-1)
        logits_TN = self.predictor(x_TD.detach())
        taken_NT = torch.zeros_like(scores_NT).scatter(1, token_NK, 1.0)
        loss = F.binary_cross_entropy_with_logits(logits_TN.float(), taken_NT.T.float()) / self.layers
        self._move_thresholds(logits_TN.detach().sigmoid(), slots)
        results = [gate[:, None] * mlp(x_TD[token]) for mlp, gate, token in zip(self.mlps, gate_NK, token_NK)]  # noqa: B905
        place_NK = token_NK + T * torch.arange(N, device=x_TD.device)[:, None]
        rows_AD = torch.cat(results)
        zeros = rows_AD.new_zeros(N * T, x_TD.shape[1])
        placed = zeros.scatter(0, place_NK.flatten()[:, None].expand_as(rows_AD), rows_AD)
        y_TD = placed.view(N, T, -1).sum(dim=0)
        return y_TD.view_as(x_BSD), _routing(N, gate_NK, slots, {"capacity": loss})

    @torch.no_grad()
    def _move_thresholds(self, predicted_TN: Tensor, slots: int) -> None:
        thresholds: Any = self.thresholds
        for expert in range(len(thresholds)):
            kth = predicted_TN[:, expert].topk(slots).values[-1]
            thresholds[expert] = _DECAY * thresholds[expert] + (1 - _DECAY) * kth
        dist.all_reduce(thresholds)
        thresholds /= dist.get_world_size()


class DeepSpeedLayer(MoELayer):
    """`deepspeed.moe.layer.MoE`: top-1 token choice with a capacity of 1; tokens beyond it are dropped."""

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        from deepspeed.moe.layer import MoE

        nn.Module.__init__(self)
        self.router = Router()
        self.moe = MoE(width, Mlp(width, hidden), num_experts, k=1, capacity_factor=1.0)
        self.dispatcher = None  # type: ignore[assignment]  # which the trainer looks at

    def forward(self, x_BSD: Tensor, null_B: Tensor) -> tuple[Tensor, Routing]:
        y, loss, counts = self.moe(x_BSD)
        slots = x_BSD.shape[0] * x_BSD.shape[1] // len(counts)
        # The trainer of the model under it knows the one loss, whose weight is 1 where the balance loss's is 0.01.
        return y, _routing(len(counts), y, slots, {"capacity": 0.01 * loss})


def put_into(model: DiT, name: str, config: Config) -> None:
    """Replace the mixture-of-experts layers of a model on the meta device, whose router is the global pool."""
    width, settings = config.model.hidden_size, config.experts
    assert settings is not None
    hidden = int(width * settings.expert_mlp_ratio)
    for block in model.blocks:
        if not isinstance(block.mlp, MoELayer):
            continue
        if name == "published":
            block.mlp = PublishedLayer(width, hidden, settings.num_experts, len(config.moe_blocks))
        else:
            block.mlp = DeepSpeedLayer(width, hidden, settings.num_experts)


def deepspeed_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups, where DeepSpeed's own layers are in the model."""
    experts = {p for name, p in model.named_parameters() if DEEPSPEED_EXPERTS in name}
    for parameter in experts:
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = "ep_size_1"  # type: ignore[attr-defined]
    dense, own = ([p for p in model.parameters() if (p in experts) is kind] for kind in (False, True))
    return [{"name": "dense", "params": dense}, {"name": "ep_size_1", "params": own, "moe": True}]


def _routing(experts: int, like: Tensor, slots: int, losses: dict[str, Tensor]) -> Routing:
    """The statistics that the trainer writes down: every expert's slots are full."""
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    load = torch.full((experts,), slots, device=like.device)
    stats = RoutingStats(load, torch.ones((), device=like.device))
    return Routing(none, losses, stats, Selection(none, 1, slots))
