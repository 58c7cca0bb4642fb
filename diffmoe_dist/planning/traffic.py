"""What a rank sends in an optimizer step: every collective, its bytes, and how many of them leave the node.

Legend: D width, N routed experts, n ranks of a group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from diffmoe_dist.config import Config, RouterSettings, loss_weights
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.model.freezing import GradientFlow
from diffmoe_dist.planning.memory import (
    REDUCTION_CHUNK,
    RankGroup,
    product_bytes,
    weight_bytes,
    wire_bytes,
    zero_groups,
)
from diffmoe_dist.planning.workload import Cluster, Workload

Collective = Literal["all-to-all", "all-reduce", "all-gather", "reduce", "reduce-scatter"]

# Transfers that the step time looks up by name.
ROWS, ROW_GRADIENTS = "tokens to experts and back", "their gradients"
CUT_LAYERS = "cut layers"
GRADIENTS, PARAMETERS = "gradients", "parameters"  # and the name of a ZeRO group


@dataclass(frozen=True)
class Transfer:
    """One kind of collective, of one rank in one optimizer step."""

    name: str
    kind: Collective
    group_size: int  # ranks that take part
    payload: float  # bytes that the rank hands to the collective; for an all-gather, what it has in the end
    calls: int
    intra_node: float  # bytes that the rank sends to ranks of its own node
    inter_node: float  # bytes that it sends to other nodes
    # Of one call: hops of a ring, levels of a tree, or the messages that the rank with most of them sends or receives.
    steps: int = 1
    busiest: float = 1.0  # bytes of the rank that receives most, over the mean

    @property
    def sent(self) -> float:
        return self.intra_node + self.inter_node


def all_transfers(config: Config, cluster: Cluster, work: Workload) -> list[Transfer]:
    """Every collective of one optimizer step.

    Bytes of collectives are those of a direct all-to-all and of rings: an all-reduce of b bytes over n ranks sends
    2 (n - 1) / n b, an all-gather that ends with b bytes (n - 1) / n b, as does a reduce to one rank in the mean over
    the ranks. Neighbours in a ring are neighbours in rank.
    """
    groups = _Groups(cluster, config.parallel.expert, config.parallel.tensor)
    transfers = [] if config.experts is None else _routing_transfers(config, config.experts, groups, work)
    transfers += _tensor_transfers(config, groups, work)
    transfers.append(groups.all_reduce("losses, thresholds, load", "world", _report_bytes(config), 1))
    reductions = work.micro_steps if config.parallel.zero_stage == 2 else 1
    for zero in zero_groups(config, cluster.ranks):
        # Each partition is reduced to the rank that owns it, in chunks: at least as many as this.
        chunks = zero.ranks * math.ceil(zero.partition / REDUCTION_CHUNK)
        reduced = wire_bytes(config) * zero.elements * reductions
        transfers.append(groups.reduce(f"{GRADIENTS}, {zero.name}", zero.group, reduced, chunks * reductions))
        gathered = zero.padded * weight_bytes(config)
        transfers.append(groups.all_gather(f"{PARAMETERS}, {zero.name}", zero.group, gathered, 1))
    return [transfer for transfer in transfers if transfer.payload and transfer.group_size > 1]


def _routing_transfers(config: Config, experts: RouterSettings, groups: _Groups, work: Workload) -> list[Transfer]:
    N, D = experts.num_experts, config.model.hidden_size
    times = len(config.moe_blocks) * work.micro_steps
    rows = work.assignments * D * product_bytes(config)
    flow = GradientFlow(config)
    # Gradients of the results go to the experts, those of the rows from there, where something needs them.
    back = [
        flow.into(f"blocks.{block}.mlp.experts.w1") + flow.reaches_in(f"blocks.{block}.mlp.experts.")
        for block in config.moe_blocks
    ]
    returns = sum(back) * work.micro_steps
    transfers = [
        groups.all_to_all(ROWS, "expert", 2 * rows, 2 * times, times),
        groups.all_to_all(ROW_GRADIENTS, "expert", rows, returns, returns),
    ]
    if not _arrivals_are_known(config, experts, groups.cluster.ranks, work.tokens):
        transfers.append(groups.all_to_all("row counts", "expert", 8 * N, times, times))
    pools: dict[str, RankGroup] = {"global": "world", "expert_parallel": "expert"}
    pool = pools.get(experts.pool_kind())
    if pool is not None:
        transfers += _score_transfers(config, groups, pool, 4 * N * work.tokens * experts.score_kinds(), times)
    transfers.append(groups.all_reduce("sums of the batch", "world", experts.batch_sum_bytes(D), times))
    return transfers


def _score_transfers(config: Config, groups: _Groups, pool: RankGroup, scores: int, times: int) -> list[Transfer]:
    """Of a pool, `scores` bytes of each rank; and the replies, three numbers for each expert."""
    assert config.experts is not None
    N, ranks = config.experts.num_experts, groups.size(pool)
    how = config.parallel.how_scores_travel(scores * ranks, ranks)
    if how == "all_gather":
        return [groups.all_gather("scores", pool, scores * ranks, times)]
    if how == "two_level":
        return [
            groups.all_to_all("scores and cutoffs", "expert", scores + 4 * 3 * N, 2 * times, times),
            groups.all_gather("scores of the groups", "expert data", scores * groups.size("expert data"), times),
        ]
    owners = groups.all_to_all("scores and cutoffs", pool, scores + 4 * 3 * N, 2 * times, times)
    # Where there are more ranks than experts, few ranks get all the scores.
    return [replace(owners, busiest=math.ceil(N / ranks) * ranks / N)]


def _tensor_transfers(config: Config, groups: _Groups, work: Workload) -> list[Transfer]:
    """Gathers of a group's images before its cut layers, and scattered sums behind them, forward and backward.

    A layer of some outputs gathers its input, gathers it again in backward and scatters its gradient; a layer of some
    inputs scatters its output and gathers the gradient of that. What is recomputed gathers once more.
    """
    model, mode, flow = config.model, config.train.recompute, GradientFlow(config)
    gathers = scatters = captions = of_captions = 0
    for block in range(model.depth):
        for module, kind in _cut_modules(config, block).items():
            again = int(mode == "block" if "attn" in module else mode != "none")
            for layer in kind:
                name = f"blocks.{block}.{module}.{layer}.weight"
                into, trains = flow.into(name), name not in flow.frozen
                if layer == "kv":
                    captions += 1 + trains + again
                    of_captions += int(into or trains)
                elif layer in ("proj", "fc2", "down_proj"):
                    # The gate behind attention needs its output.
                    scatters += 1 + again * (module == "attn" and flow.modulates(block))
                    gathers += into or trains
                else:
                    gathers += 1 + trains + again
                    scatters += into or trains
    images = config.parallel.tensor * work.tokens * model.hidden_size * product_bytes(config)
    mask = config.parallel.tensor * work.images * (model.text_max_length if model.condition == "text" else 0)
    text = mask * model.hidden_size * product_bytes(config)
    lengths = model.depth * (1 + (mode == "block"))
    return [
        groups.all_gather(f"{CUT_LAYERS}: images", "tensor", images, gathers * work.micro_steps),
        groups.reduce_scatter(f"{CUT_LAYERS}: sums of images", "tensor", images, scatters * work.micro_steps),
        groups.all_gather(f"{CUT_LAYERS}: captions", "tensor", text, captions * work.micro_steps),
        groups.reduce_scatter(f"{CUT_LAYERS}: sums of captions", "tensor", text, of_captions * work.micro_steps),
        groups.all_gather(f"{CUT_LAYERS}: lengths of captions", "tensor", mask, lengths * work.micro_steps),
    ]


def _cut_modules(config: Config, block: int) -> dict[str, tuple[str, ...]]:
    """The modules of a block whose layers are cut, and those layers."""
    experts = config.experts if block in config.moe_blocks else None
    layers = {"gelu": ("fc1", "fc2"), "swiglu": ("gate_proj", "up_proj", "down_proj")}
    modules: dict[str, tuple[str, ...]] = {"attn": ("qkv", "proj")}
    if config.model.condition == "text":
        modules["cross_attn"] = ("q", "kv", "proj")
    if experts is None:
        modules["mlp"] = layers[config.model.activation]
    elif experts.shared_experts:
        modules["mlp.shared"] = layers[experts.shared_activation]
    return modules


def _arrivals_are_known(config: Config, experts: RouterSettings, ranks: int, tokens: int) -> bool:
    """Whether the dispatcher learns from the pool how many rows arrive; else ranks exchange their counts."""
    kinds = experts.score_kinds()
    if not kinds:
        return False
    if experts.pool_kind() != "global" or ranks == config.parallel.expert:
        return True
    scores = 4 * experts.num_experts * tokens * kinds * ranks
    return config.parallel.how_scores_travel(scores, ranks) == "two_level"


def _report_bytes(config: Config) -> int:
    """Bytes of the one fp64 reduction of a step's report."""
    losses = [*build_objective(config).loss_names, *loss_weights(config)]
    # The loss, its parts, bad samples, whether a rank was asked to stop, and the gradients' squares.
    numbers, experts = 4 + len(losses), config.experts
    if experts is not None:
        numbers += len(config.moe_blocks) * (experts.num_experts * (2 if experts.has_predictor() else 1) + 1)
    return 8 * numbers


class _Groups:
    """The process groups of `parallel.topology`, and how much of each collective leaves a node.

    An expert or tensor group is consecutive ranks, its data groups ranks that many apart. Nodes fill up rank by rank.
    """

    def __init__(self, cluster: Cluster, expert: int, tensor: int) -> None:
        self.cluster = cluster
        everyone = range(cluster.ranks)
        self.members: dict[RankGroup, list[Sequence[int]]] = {
            "world": [everyone],
            "expert": [everyone[first : first + expert] for first in range(0, cluster.ranks, expert)],
            "expert data": [everyone[first::expert] for first in range(expert)],
            "tensor": [everyone[first : first + tensor] for first in range(0, cluster.ranks, tensor)],
            "tensor data": [everyone[first::tensor] for first in range(tensor)],
        }

    def size(self, group: RankGroup) -> int:
        return len(self.members[group][0])

    def all_to_all(self, name: str, group: RankGroup, payload: float, calls: int, times: int) -> Transfer:
        """`payload` bytes in each of `times`."""
        n = self.size(group)
        to_each = payload * times / n
        intra_node = to_each * self._neighbours(group) / self.cluster.ranks
        inter_node = to_each * (n - 1) - intra_node
        return Transfer(name, "all-to-all", n, payload * times, calls, intra_node, inter_node, steps=n - 1)

    def all_reduce(self, name: str, group: RankGroup, payload: float, calls: int) -> Transfer:
        n = self.size(group)
        ring = self._ring(name, "all-reduce", group, payload * calls, calls, 2 * (n - 1) / n * payload * calls)
        return replace(ring, steps=2 * math.ceil(math.log2(n)))  # so small that a tree is faster

    def reduce(self, name: str, group: RankGroup, payload: float, calls: int) -> Transfer:
        """`payload` bytes in all calls together, to each rank the same part.

        Owners follow each other around the ring, so a call starts a hop after the one before, and the last one has
        been around it.
        """
        n = self.size(group)
        ring = self._ring(name, "reduce", group, payload, calls, (n - 1) / n * payload)
        return replace(ring, steps=math.ceil((calls + 2 * (n - 1)) / calls))

    def all_gather(self, name: str, group: RankGroup, payload: float, calls: int) -> Transfer:
        n = self.size(group)
        return self._ring(name, "all-gather", group, payload * calls, calls, (n - 1) / n * payload * calls)

    def reduce_scatter(self, name: str, group: RankGroup, payload: float, calls: int) -> Transfer:
        n = self.size(group)
        return self._ring(name, "reduce-scatter", group, payload * calls, calls, (n - 1) / n * payload * calls)

    def _ring(self, name: str, kind: Collective, group: RankGroup, payload: float, calls: int, sent: float) -> Transfer:
        crossing = self._crossing(group)
        n = self.size(group)
        return Transfer(name, kind, n, payload, calls, sent * (1 - crossing), sent * crossing, steps=n - 1)

    @cache  # noqa: B019  # of one plan
    def _neighbours(self, group: RankGroup) -> int:
        """Ordered pairs of ranks that are in one group and on one node."""
        by_node = [Counter(self._node(rank) for rank in members) for members in self.members[group]]
        return sum(count * (count - 1) for counts in by_node for count in counts.values())

    @cache  # noqa: B019
    def _crossing(self, group: RankGroup) -> float:
        """The part of the edges of its rings that leave a node."""
        edges = [
            (members[place], members[(place + 1) % len(members)])
            for members in self.members[group]
            for place in range(len(members))
        ]
        return sum(self._node(one) != self._node(other) for one, other in edges) / len(edges)

    def _node(self, rank: int) -> int:
        return rank // self.cluster.gpus_per_node
