"""The one adapter to DeepSpeed's expert parallelism: its process groups, and experts that its engine recognises."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

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


def create_topology(launch: Launch, device: torch.device, expert: int, tensor: int = 1) -> Topology:
    """Make DeepSpeed's groups; torch.distributed is initialised already.

    Of `n` consecutive ranks among which parameters are sharded, and of the ranks, n apart, that hold the same ones,
    DeepSpeed speaks as of expert-parallel and expert-data-parallel groups. So slices of tensor parallelism are to it
    what experts are.
    """
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    for size in sorted({expert, tensor}):
        if _group_name(size) not in groups._get_expert_parallel_group_dict():
            _make_groups(size)
    assert dist.group.WORLD is not None
    return Topology(
        rank=launch.rank,
        world_size=launch.world_size,
        device=device,
        expert=expert,
        world_group=dist.group.WORLD,
        expert_group=groups._get_expert_parallel_group(_group_name(expert)),
        expert_data_group=groups._get_expert_data_parallel_group(_group_name(expert)),
        tensor=tensor,
        tensor_group=groups._get_expert_parallel_group(_group_name(tensor)),
    )


def _make_groups(size: int) -> None:
    """This rank's two groups of `size`, where DeepSpeed looks for them; collective.

    DeepSpeed's own function lets every rank take part in making every group, one by one: of 1,024 ranks 1,105 groups.
    Here ranks meet those of their group alone. All make them in one order, so nobody waits in a circle.
    """
    rank, ranks, name = dist.get_rank(), dist.get_world_size(), _group_name(size)
    consecutive = range(rank - rank % size, rank - rank % size + size)
    apart = range(rank % size, ranks, size)
    for made, members_of, members in (
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, apart),
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, consecutive),
    ):
        made[name] = dist.new_group([*members], use_local_synchronization=True)
        members_of[name] = members


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
                levels = (topology.expert_group, topology.expert_data_group) if kind == "global" else None
                layer.router.pool = DistributedPool(group, config.parallel, levels)
        if topology.expert > 1:
            layer.experts = cast(Any, ExpertShard(layer.experts, topology))
            layer.dispatcher = AllToAllDispatcher(topology.expert_group)


class Sharded(MoE):
    """A module by which DeepSpeed's engine notices that consecutive ranks hold different parameters.

    It reduces such parameters over their own groups only where it meets a subclass of its MoE layer; and where it meets
    one, some of them must train. Nothing else of that layer is used.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.num_experts = 1  # the engine keeps the number, and asks for it no more

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's engine calls this to make the groups; `create_topology` has made them."""


class ExpertShard(nn.Module):
    """This rank's shard of the experts, consecutive ones."""

    def __init__(self, experts: Experts, topology: Topology) -> None:
        super().__init__()
        self.group_name = _group_name(topology.expert)
        self.num_experts = len(experts.w1)
        self.activation = experts.activation
        self.num_local_experts = self.num_experts // topology.expert
        self.first = topology.expert_rank * self.num_local_experts
        self.b1, self.b2 = None, None
        for name, parameter in experts.named_parameters():
            setattr(self, name, nn.Parameter(torch.empty_like(parameter[: self.num_local_experts])))

    def forward(self, rows: ExpertInput) -> Tensor:
        return Experts.forward(cast(Any, self), rows)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The optimizer's parameter groups as DeepSpeed's ZeRO needs them: what is sharded in groups of its own, marked.

    Of parameters that train. A module tells DeepSpeed of the groups that are marked; frozen parameters that are sharded
    are marked too, else DeepSpeed would send the first rank's to all.

    The last parameters come first, as in backward: so the owners of chunks that are reduced one after the other are
    neighbours in NCCL's ring, where a reduction starts behind its owner and ends there. It starts when the one before
    has passed, and not when that has been around all ranks.

    Call it when the parameters are on their device: moving a module off the meta device makes new ones.
    """
    group_of: dict[nn.Parameter, str] = {}
    for module in model.modules():
        if isinstance(module, ExpertShard):
            group_of |= dict.fromkeys(module.parameters(), module.group_name)
    for part in model.parameters():
        if (cut := getattr(part, "slice", None)) is not None:
            group_of[part] = _group_name(cut.ranks)
    members: dict[str, list[nn.Parameter]] = {"dense": []}
    parameter: Any
    for parameter in reversed(list(model.parameters())):
        name = group_of.get(parameter, "dense")
        if name != "dense":
            parameter.allreduce, parameter.group_name = False, name
        if parameter.requires_grad:
            members.setdefault(name, []).append(parameter)
    if len(members) > 1:
        model.add_module("sharded", Sharded())
    return [
        {"name": name, "params": parameters} | ({} if name == "dense" else {"moe": True})
        for name, parameters in members.items()
        if parameters
    ]


def ranks_with_equal(parameter: nn.Parameter, topology: Topology) -> dist.ProcessGroup:
    """The ranks that hold the same values of a parameter, which `parameter_groups` has seen."""
    name = getattr(parameter, "group_name", None)
    return topology.world_group if name is None else groups._get_expert_data_parallel_group(name)


def _group_name(expert: int) -> str:
    return f"ep_size_{expert}"
