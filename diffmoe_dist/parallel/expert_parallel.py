"""The one adapter to DeepSpeed's expert parallelism: its process groups, and experts that its engine recognises."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups, logger
from torch import Tensor, nn

from diffmoe_dist.config import Config
from diffmoe_dist.launch import Launch
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.moe import ExpertInput, Experts
from diffmoe_dist.parallel.dispatch import AllToAllDispatcher
from diffmoe_dist.parallel.pool import DistributedBatch, DistributedPool
from diffmoe_dist.parallel.topology import Topology

logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*is deprecated", category=FutureWarning)
# DeepSpeed would compile a shared-memory operation on the first collective, for minutes, and fail without a compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def create_topology(launch: Launch, device: torch.device, expert: int) -> Topology:
    """Make DeepSpeed's expert-parallel and expert-data-parallel groups; torch.distributed is initialised already."""
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    name = _group_name(expert)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert)
    assert dist.group.WORLD is not None
    return Topology(
        rank=launch.rank,
        world_size=launch.world_size,
        device=device,
        expert=expert,
        world_group=dist.group.WORLD,
        expert_group=groups._get_expert_parallel_group(name),
        expert_data_group=groups._get_expert_data_parallel_group(name),
    )


def apply_expert_parallel(model: DiT, config: Config, topology: Topology) -> None:
    """Edit a single-device model in place: experts are sharded over the expert-parallel group, token pools span ranks.

    The experts' parameters keep their names and become this rank's shard, of undefined values.
    """
    if config.experts is None:
        return
    kind = config.experts.pool_kind()
    for layer in model.moe_layers:
        layer.router.batch = DistributedBatch(topology.world_group)
        if kind in ("global", "expert_parallel"):
            group = topology.world_group if kind == "global" else topology.expert_group
            if dist.get_world_size(group) > 1:
                layer.router.pool = DistributedPool(group, config.parallel.score_exchange)
        if topology.expert > 1:
            layer.experts = ExpertShard(layer.experts, topology)
            layer.dispatcher = AllToAllDispatcher(topology.expert_group)


class ExpertShard(MoE):
    """This rank's shard of the experts, consecutive ones, as a layer that DeepSpeed's engine recognises.

    DeepSpeed reduces expert parameters over their own groups only inside a subclass of its MoE layer. Nothing else of
    that layer is used.
    """

    def __init__(self, experts: Experts, topology: Topology) -> None:
        nn.Module.__init__(self)
        self.ep_size = topology.expert
        self.num_experts = len(experts.w1)
        self.activation = experts.activation
        self.num_local_experts = self.num_experts // topology.expert
        self.expert_group_name = _group_name(topology.expert)
        self.first = topology.expert_rank * self.num_local_experts
        self.b1, self.b2 = None, None
        for name, parameter in experts.named_parameters():
            setattr(self, name, nn.Parameter(torch.empty_like(parameter[: self.num_local_experts])))

    def forward(self, rows: ExpertInput) -> Tensor:
        return Experts.forward(self, rows)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's engine calls this to make the groups; `create_topology` has made them."""
        assert self.expert_group_name in groups._get_expert_parallel_group_dict()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups as DeepSpeed's ZeRO needs them: sharded experts in a group of their own, marked.

    Call it when the parameters are on their device: moving a module off the meta device makes new ones.
    """
    shards = [module for module in model.modules() if isinstance(module, ExpertShard)]
    experts = [parameter for shard in shards for parameter in shard.parameters()]
    for parameter in experts:
        parameter.allreduce = False
        parameter.group_name = shards[0].expert_group_name
    marked = set(experts)
    result: list[dict[str, Any]] = [{"name": "dense", "params": [p for p in model.parameters() if p not in marked]}]
    if experts:
        result.append({"name": shards[0].expert_group_name, "params": experts, "moe": True})
    return result


def _group_name(expert: int) -> str:
    return f"ep_size_{expert}"
