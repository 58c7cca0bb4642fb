"""The training state as ZeRO leaves it on each rank, addressed without any rank in it.

ZeRO 1 and 2 cut the flattened parameters of a group into one partition a rank, and AdamW's moments with them; the
weight average here is cut the same way. So what a rank owns of a parameter is an interval of the flattened parameter,
and a rank's shard of the experts is an interval of the flattened stack of all experts. A `Fragment` says which.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffmoe_dist.engine.zero import ReducingZero
from diffmoe_dist.model.moe import Experts
from diffmoe_dist.parallel.expert_parallel import ranks_with_equal
from diffmoe_dist.parallel.slices import Columns
from diffmoe_dist.parallel.topology import Topology, all_gather

MASTER, EXP_AVG, EXP_AVG_SQ, EMA = "master", "exp_avg", "exp_avg_sq", "ema"
BUFFER, EMA_BUFFER = "buffer", "ema_buffer"  # the latter as it is for the average of `ema.decay`


@dataclass(frozen=True)
class Fragment:
    """An interval of a flattened tensor, or of some columns of a matrix, flattened."""

    name: str
    start: int
    total: int  # elements of the whole tensor
    data: Tensor  # (n,) the elements start to start + n; a view that can be written
    columns: Columns | None = None


class ShardedState:
    """This rank's partitions of what trains: fp32 weights, AdamW's moments and averages, one flat tensor a group each.

    Beside them stands what is frozen.
    """

    def __init__(
        self, model: nn.Module, zero: ReducingZero, frozen: FrozenState, averages: Iterable[str] = (EMA,)
    ) -> None:
        """
        Args:
            model: the model whose parameters DeepSpeed has partitioned.
            zero: the ZeRO optimizer, around a torch AdamW that has not stepped yet.
            frozen: what of the model DeepSpeed does not know.
            averages: the kinds of `ema.averages`.
        """
        self.model = model
        self.zero = zero
        self.frozen = frozen
        self.adamw: torch.optim.AdamW = zero.optimizer
        masters = [group["params"][0] for group in self.adamw.param_groups]
        for master in masters:
            # AdamW would make its state at the first step; made here, a fresh run and a resumed one take one path.
            self.adamw.state[master] = {
                "step": torch.zeros((), device=master.device),  # where the fused AdamW keeps it
                EXP_AVG: torch.zeros_like(master),
                EXP_AVG_SQ: torch.zeros_like(master),
            }
        self.flat: dict[str, list[Tensor]] = {
            MASTER: [master.detach() for master in masters],
            EXP_AVG: [self.adamw.state[master][EXP_AVG] for master in masters],
            EXP_AVG_SQ: [self.adamw.state[master][EXP_AVG_SQ] for master in masters],
            **{kind: [master.detach().clone() for master in masters] for kind in averages},
        }

    def fragments(self) -> Iterator[Fragment]:
        """Everything this rank owns, by `kind.parameter`; over all ranks each element once."""
        yield from self.frozen.fragments()
        for name, parameter in self.model.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)  # what this rank owns of it
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            for kind, flats in self.flat.items():
                data = flats[mapping.param_group_index].narrow(0, there.start, there.numel)
                yield from _in_whole(self.model, name, parameter, here.start, kind, data)

    def gradient_squares(self) -> Tensor:
        """The sum of the squares of the gradients that this rank owns, () fp64: over all ranks the global norm's."""
        return self.zero.gradient_squares()

    def set_norm(self, norm: float, skip: bool) -> None:
        """Tell the next optimizer step the global norm of the gradients, and whether to leave its update out."""
        self.zero.norm, self.zero.skip = norm, skip

    def set_learning_rate(self, rate: float) -> None:
        """That of the next optimizer step."""
        for group in self.adamw.param_groups:
            group["lr"] = rate

    def after_load(self, updates: int) -> None:
        """Bring AdamW's step count and the model's own weights in line with partitions just written."""
        for group in self.adamw.param_groups:
            self.adamw.state[group["params"][0]]["step"].fill_(updates)
        self.zero.update_lp_params()
        self.frozen.after_load()


@dataclass(frozen=True)
class _Part:
    """Of a parameter, the elements from `start` on that this rank owns; each rank that has it owns as many."""

    name: str
    start: int
    length: int  # of a rank's part; the last ones may have less
    exact: Tensor  # (n,) fp32
    group: Any


class FrozenState:
    """The fp32 values of parameters that do not train, of which each rank owns a part for checkpoints.

    ZeRO knows nothing of them. Where the model is in fp32 the parts are the model's own. A model in bf16 is rounded,
    and a checkpoint of that would not be what the weights were.

    To be made of the model in fp32, after `parameter_groups` and before DeepSpeed rounds it.
    """

    def __init__(self, model: nn.Module, names: Collection[str], topology: Topology, rounded: bool) -> None:
        self.model = model
        self.parts = [_part(model, name, topology, rounded) for name, _ in model.named_parameters() if name in names]

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns, as `master.NAME`; over all ranks each element once."""
        for part in self.parts:
            if len(part.exact):
                parameter = self.model.get_parameter(part.name)
                yield from _in_whole(self.model, part.name, parameter, part.start, MASTER, part.exact)

    @torch.no_grad()
    def after_load(self) -> None:
        """Bring the model in line with parts just written; collective."""
        for part in self.parts:
            flat = self.model.get_parameter(part.name).view(-1)
            own = flat.new_zeros(part.length)
            own[: len(part.exact)] = part.exact
            whole = flat.new_empty(part.length * dist.get_world_size(part.group))
            all_gather(whole, own, group=part.group)
            flat.copy_(whole[: len(flat)])


def _part(model: nn.Module, name: str, topology: Topology, rounded: bool) -> _Part:
    parameter = model.get_parameter(name)
    group, flat = ranks_with_equal(parameter, topology), parameter.detach().view(-1)
    length = -(-len(flat) // dist.get_world_size(group))
    start = min(dist.get_rank(group) * length, len(flat))
    exact = flat[start : start + length]
    return _Part(name, start, length, exact.clone() if rounded else exact, group)


def _in_whole(
    model: nn.Module, name: str, parameter: nn.Parameter, start: int, kind: str, data: Tensor
) -> Iterator[Fragment]:
    """Elements from `start` of the parameter at hand, flattened, as fragments of the whole one."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    key, cut = f"{kind}.{name}", getattr(parameter, "slice", None)
    if hasattr(owner, "num_local_experts"):  # of a shard of the experts
        one_expert = parameter[0].numel()
        yield Fragment(key, owner.first * one_expert + start, owner.num_experts * one_expert, data)
    elif cut is None:
        yield Fragment(key, start, parameter.numel(), data)
    elif cut.dim == 1:
        yield Fragment(key, start, parameter.numel() * cut.ranks, data, cut.columns(parameter.shape))
    else:
        for here, there, length in cut.intervals(parameter.shape):
            first, end = max(start, here), min(start + len(data), here + length)
            if first < end:
                total = parameter.numel() * cut.ranks
                yield Fragment(key, there + first - here, total, data[first - start : end - start])


def weights(model: nn.Module, kind: str, frozen: Collection[str] = ()) -> list[Fragment]:
    """The parameters of a model, of its experts the shard at hand, as fragments to load `kind` into.

    Of frozen ones the weights themselves are every average, and stored once.
    """
    assert not any(isinstance(m, Experts) and m.first for m in model.modules()), (
        "a shard of the experts knows how many there are"
    )
    return [
        fragment
        for name, parameter in model.named_parameters()
        for fragment in _in_whole(
            model, name, parameter, 0, MASTER if name in frozen else kind, parameter.detach().view(-1)
        )
    ]


def buffers(model: nn.Module) -> list[Fragment]:
    """The buffers that are state (capacity thresholds), the same on every rank."""
    persistent = model.state_dict().keys() - dict(model.named_parameters()).keys()
    return [
        Fragment(f"{BUFFER}.{name}", 0, buffer.numel(), buffer.view(-1))
        for name, buffer in model.named_buffers()
        if name in persistent
    ]
