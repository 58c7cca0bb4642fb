"""What a training run will need, before any process starts: memory, bytes on the wire, and the time of a step.

The counts follow from the settings alone. *Exact* ones are what the engine really holds and sends, by test; *estimates*
say what they assume. Nothing here needs a process group, data, or a GPU.

Shape legend: L mixture-of-experts layers, N routed experts, D width, T tokens of a rank's micro-batch, S of an image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffmoe_dist.config import Config, RouterSettings, check_world, loss_weights
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.model.accounting import Accounting, account, meta_model
from diffmoe_dist.planning.accelerators import Accelerator, matmul_format

REDUCE_BUCKET = 200_000_000  # gradients that DeepSpeed reduces together, elements

# Assumptions about what a real run gets of the data sheet's numbers. ProMoE's Dense-L at 213 images a second on an A800
# (from its Table 14) is 33 % of the bf16 peak.
COMPUTE_FRACTION = {"bf16": 0.35, "tf32": 0.35, "fp32": 0.7}
MEMORY_FRACTION = 0.8
WIRE_FRACTION = 0.75
CALL_LATENCY = 30e-6  # seconds of a collective beside its bytes
USABLE_MEMORY = 0.92  # beside CUDA's context, NCCL's buffers and fragmentation
ACTIVATION_PASSES = 4  # times that a saved activation crosses the memory bus, with its gradient and what is not saved


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int
    accelerator: Accelerator

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Workload:
    """What one rank computes in a micro-step; the mean over the ranks where they differ."""

    images: int
    tokens: int
    micro_steps: int
    assignments: float  # visits of its tokens to routed experts
    unconditional: float  # tokens of images without a condition, which ProMoE sends to an expert of their own

    @property
    def capacity(self) -> float:
        """C: visits a token."""
        return (self.assignments + self.unconditional) / self.tokens


@dataclass(frozen=True)
class Transfer:
    """One kind of collective, of one rank in one optimizer step; bytes that leave the rank."""

    name: str
    kind: str  # all-to-all, all-reduce or all-gather
    group: int  # ranks that take part
    payload: float  # bytes that the rank hands to the collective; for an all-gather, what it has in the end
    calls: int
    inside: float  # bytes to ranks of the same node
    across: float  # bytes to other nodes

    @property
    def wire(self) -> float:
        return self.inside + self.across

    def seconds(self, accelerator: Accelerator) -> float:
        if self.group == 1:
            return 0.0
        links = max(self.inside / accelerator.nvlink, self.across / accelerator.network)
        return links / WIRE_FRACTION + self.calls * CALL_LATENCY


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    accounting: Accounting
    work: Workload
    held: dict[str, int]  # bytes a rank holds all the time, exact
    passing: dict[str, float]  # bytes at the peak of a step, estimates
    transfers: list[Transfer]
    seconds: dict[str, float]  # of one step, estimates

    @property
    def memory(self) -> float:
        return sum(self.held.values()) + sum(self.passing.values())

    @property
    def fits(self) -> bool:
        return self.memory <= USABLE_MEMORY * self.cluster.accelerator.memory_bytes

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound_by(self) -> str:
        """What takes the largest part of a step: compute, wire or memory (bandwidth)."""
        parts = {"compute": 0.0, "memory": 0.0, "wire": 0.0}
        for name, seconds in self.seconds.items():
            parts[_RESOURCE.get(name, "wire")] += seconds
        return max(parts, key=lambda name: parts[name])

    @property
    def images_per_second(self) -> float:
        return self.config.train.global_batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        """The share of the peak arithmetic that the predicted step achieves."""
        peak = self.cluster.accelerator.peak_flops[matmul_format(self.config)]
        flops = self.accounting.training_flops(self.work.capacity)
        return achieved_share(flops, self.images_per_second, self.cluster.ranks, peak)


_RESOURCE = {"arithmetic": "compute", "activations": "memory", "optimizer": "memory"}


def make_plan(config: Config, cluster: Cluster, capacity: float | None = None) -> Plan:
    """Plan a run; fills in `train.micro_batch_size` of the config.

    Args:
        capacity: C, visits of a token to experts, measured on a run; by default what the settings make it in training.

    Raises:
        UserError: the ranks, the expert-parallel size and the batch do not fit together.
    """
    check_world(config, cluster.ranks)
    accounting = account(config)
    work = workload(config, cluster.ranks, capacity)
    transfers = all_transfers(config, cluster, work)
    activations = activation_bytes(config, work)
    held = held_bytes(config, cluster.ranks)
    passing = {
        "gradients": gradient_bytes(config, cluster.ranks, work.micro_steps),
        "activations": activations + _largest_backward(config, work),
    }
    seconds = _step_seconds(config, cluster, accounting, work, transfers, activations, held)
    return Plan(config, cluster, accounting, work, held, passing, transfers, seconds)


def achieved_share(flops_per_image: float, images_per_second: float, ranks: int, peak: float) -> float:
    """Model FLOP utilisation: the arithmetic that the model needs, over what the devices could do in that time."""
    return flops_per_image * images_per_second / (ranks * peak)


def workload(config: Config, ranks: int, capacity: float | None = None) -> Workload:
    """What a rank computes; `check_world` has filled in the micro-batch size."""
    images = config.train.micro_batch_size
    assert images is not None, "check_world fills it in"
    tokens = images * config.tokens_per_sample
    micro_steps = config.train.global_batch_size // (images * ranks)
    experts = config.experts
    if experts is None:
        return Workload(images, tokens, micro_steps, 0.0, 0.0)
    unconditional = tokens * config.train.label_dropout if experts.has_unconditional_expert else 0.0
    if capacity is None:
        assignments = (tokens - unconditional) * _visits(config, experts, ranks, tokens)
    else:
        assignments = max(capacity * tokens - unconditional, 0.0)
    return Workload(images, tokens, micro_steps, assignments, unconditional)


def _visits(config: Config, experts: RouterSettings, ranks: int, tokens: int) -> float:
    """Visits to routed experts of a token that is routed, in training once a capacity schedule has ended."""
    pools = {"global": ranks * tokens, "expert_parallel": config.parallel.expert * tokens, "rank": tokens}
    return experts.visits(pools.get(experts.pool_kind(), config.tokens_per_sample))


# Memory


@dataclass(frozen=True)
class _Shard:
    """A ZeRO group: parameters that one rank has, and the ranks that have the same ones."""

    name: str
    group: str
    elements: int
    ranks: int

    @property
    def padded(self) -> int:
        """DeepSpeed rounds up to two elements a rank."""
        return math.ceil(self.elements / (2 * self.ranks)) * 2 * self.ranks

    @property
    def partition(self) -> int:
        return self.padded // self.ranks


def _shards(config: Config, ranks: int) -> list[_Shard]:
    """The dense parameters, and apart from them the experts where ranks share them out."""
    expert = config.parallel.expert
    sizes = {name: parameter.numel() for name, parameter in meta_model(config).named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    total = sum(sizes.values())
    if expert == 1:
        return [_Shard("all", "world", total, ranks)]
    return [
        _Shard("dense", "world", total - routed, ranks),
        _Shard("experts", "expert data", routed // expert, ranks // expert),
    ]


def held_bytes(config: Config, ranks: int) -> dict[str, int]:
    """What a rank holds from its first to its last step, in bytes: exact."""
    shards = _shards(config, ranks)
    partitions = sum(shard.partition for shard in shards)
    buffers = list(meta_model(config).buffers())
    return {
        "weights": sum(shard.padded for shard in shards) * _element_bytes(config),
        "fp32 master weights": partitions * 4,
        "AdamW moments": 2 * partitions * 4 + 4 * len(shards),  # and its step counts
        "EMA": partitions * 4,
        "buffers": sum(buffer.numel() * buffer.element_size() for buffer in buffers),
    }


def gradient_bytes(config: Config, ranks: int, micro_steps: int) -> float:
    """Gradients at their peak on a GPU, with DeepSpeed's buffers: an estimate, from how ZeRO 1 and 2 work.

    Two reduction buckets are filled in turn; a bucket is copied once more to be reduced, and in bf16 again to fp32. The
    reduced gradients of a rank's own partition stay, and are copied to one flat fp32 tensor for the optimizer.
    """
    element = _element_bytes(config)
    shards = _shards(config, ranks)
    own = sum(shard.partition for shard in shards)
    elements = sum(shard.elements for shard in shards)
    bucket = reduce_bucket(elements)
    reducing = bucket * (2 * element + element + (4 if element < 4 else 0))
    stepping = own * (4 + (element if element < 4 else 0))
    kept = 0  # between micro-steps: ZeRO 1 reduces at the last one only
    if micro_steps > 1:
        kept = (elements if config.parallel.zero_stage == 1 else own) * element
    return max(reducing, stepping) + own * element + kept


def reduce_bucket(elements: int) -> int:
    """Elements of one reduction bucket of a rank that holds `elements` parameters."""
    return min(elements, REDUCE_BUCKET)


def activation_bytes(config: Config, work: Workload) -> float:
    """What a forward pass leaves for backward, in bytes: an estimate, within 3 % of what autograd keeps."""
    model = config.model
    assert model.depth is not None and model.hidden_size is not None and model.num_heads is not None
    D, e = model.hidden_size, _element_bytes(config)
    # Of each block: input, two norms' outputs and their modulations, q, k, v, attention's output, its projection, the
    # residual stream in the middle, the feed-forward output; then statistics of norms and attention, and adaLN.
    block = work.tokens * (12 * D * e + 16 + 4 * model.num_heads) + work.images * 9 * D * e
    dense = work.tokens * 2 * int(D * model.mlp_ratio) * e
    moe_layers = len(config.moe_blocks)
    last = work.tokens * 3 * D * e
    moe = _moe_activation_bytes(config, work) if moe_layers else 0.0
    text = _text_activation_bytes(config, work) if model.condition == "text" else 0.0
    return model.depth * block + (model.depth - moe_layers) * dense + moe_layers * moe + last + text


def _text_activation_bytes(config: Config, work: Workload) -> float:
    """Of the captions' embedder and of cross-attention in all blocks."""
    model, e = config.model, _element_bytes(config)
    assert model.depth is not None and model.hidden_size is not None and model.num_heads is not None
    assert model.text_hidden_size is not None and model.text_max_length is not None
    D, text_tokens = model.hidden_size, work.images * model.text_max_length
    # The residual stream before it and its norm, q, the output; then k and v; statistics of norm and attention.
    block = work.tokens * (4 * D * e + 8 + 4 * model.num_heads) + text_tokens * 2 * D * e
    embedder = text_tokens * (model.text_hidden_size + 3 * D) * e
    return model.depth * block + embedder


def _moe_activation_bytes(config: Config, work: Workload) -> float:
    """Of one mixture-of-experts layer, beyond its input and output."""
    experts, D, e = config.experts, config.model.hidden_size, _element_bytes(config)
    assert experts is not None and D is not None and experts.expert_mlp_ratio is not None
    N, H = int(experts.num_experts or 0), int(D * experts.expert_mlp_ratio)
    hidden = (4 if experts.activation == "swiglu" else 2) * H * e
    fp32_copy = 4 * D if e < 4 else 0
    router = work.tokens * (4 * N + fp32_copy + experts.saved_bytes(D, e))
    rows = work.assignments * (2 * D * e + hidden + 4 * 8)  # in and out of the experts, and four indices
    beside = work.tokens * experts.shared_experts * hidden + work.unconditional * (D * e + hidden)
    return router + rows + beside


def _largest_backward(config: Config, work: Workload) -> float:
    """Gradients of activations in the backward pass of one feed-forward layer."""
    D, e = config.model.hidden_size, _element_bytes(config)
    assert D is not None
    rows = max(work.tokens * config.model.mlp_ratio, work.assignments * _expert_ratio(config))
    return (2 * rows + 4 * work.tokens) * D * e


def _expert_ratio(config: Config) -> float:
    return 0.0 if config.experts is None else float(config.experts.expert_mlp_ratio or 0.0)


# Wire


def all_transfers(config: Config, cluster: Cluster, work: Workload) -> list[Transfer]:
    """Every collective of one optimizer step but the gradient norm's and the overflow check's single numbers.

    Bytes of collectives are those of a direct all-to-all and of rings: an all-reduce of b bytes over n ranks sends
    2 (n - 1) / n b, an all-gather that ends with b bytes (n - 1) / n b. Neighbours in a ring are neighbours in rank.
    """
    groups = _Groups(cluster.ranks, cluster.gpus_per_node, config.parallel.expert)
    transfers = [] if config.experts is None else _routing_transfers(config, config.experts, groups, work)
    transfers.append(groups.all_reduce("losses, thresholds, load", "world", _report_bytes(config), 1))
    reductions = work.micro_steps if config.parallel.zero_stage == 2 else 1
    for shard in _shards(config, cluster.ranks):
        # Always in fp32, and an all-reduce: each rank keeps its own partition of the result.
        transfers.append(groups.all_reduce(f"gradients, {shard.name}", shard.group, 4 * shard.elements, reductions))
        gathered = shard.padded * _element_bytes(config)
        transfers.append(groups.all_gather(f"parameters, {shard.name}", shard.group, gathered, 1))
    return [transfer for transfer in transfers if transfer.payload and transfer.group > 1]


def _routing_transfers(config: Config, experts: RouterSettings, groups: _Groups, work: Workload) -> list[Transfer]:
    N, D = int(experts.num_experts or 0), int(config.model.hidden_size or 0)
    times = len(config.moe_blocks) * work.micro_steps
    rows = work.assignments * D * _element_bytes(config)
    transfers = [
        groups.all_to_all("tokens to experts and back", "expert", 2 * rows, 2 * times, times),
        groups.all_to_all("their gradients", "expert", 2 * rows, 2 * times, times),
    ]
    if not _arrivals_are_known(config, experts, groups.ranks):
        transfers.append(groups.all_to_all("row counts", "expert", 8 * N, times, times))
    pool = {"global": "world", "expert_parallel": "expert"}.get(experts.pool_kind())
    if pool is not None:
        scores = 4 * N * work.tokens * experts.score_kinds()
        if config.parallel.score_exchange == "all_to_all":
            # And the answers: three numbers for each expert.
            transfers.append(groups.all_to_all("scores and cutoffs", pool, scores + 4 * 3 * N, 2 * times, times))
        else:
            transfers.append(groups.all_gather("scores", pool, scores * groups.size(pool), times))
    transfers.append(groups.all_reduce("sums of the batch", "world", experts.batch_sum_bytes(D), times))
    return transfers


def _arrivals_are_known(config: Config, experts: RouterSettings, ranks: int) -> bool:
    """Whether the dispatcher learns from the pool how many rows arrive; else ranks exchange their counts."""
    if not experts.score_kinds():
        return False
    return experts.pool_kind() != "global" or ranks == config.parallel.expert


def _report_bytes(config: Config) -> int:
    """The one fp64 reduction of a step's report."""
    losses = [*build_objective(config.objective).loss_names, *loss_weights(config)]
    # The loss, its parts, bad samples, and whether a rank was asked to stop.
    numbers, experts = 3 + len(losses), config.experts
    if experts is not None:
        N = int(experts.num_experts or 0)
        numbers += len(config.moe_blocks) * (N * (2 if experts.has_predictor() else 1) + 1)
    return 8 * numbers


class _Groups:
    """The process groups of `parallel.topology`, and how much of each collective leaves a node.

    An expert group is consecutive ranks, an expert data group ranks that many apart; nodes are filled rank by rank.
    """

    def __init__(self, ranks: int, gpus_per_node: int, expert: int) -> None:
        self.ranks = ranks
        self.gpus_per_node = gpus_per_node
        everyone = range(ranks)
        self.members: dict[str, list[Sequence[int]]] = {
            "world": [everyone],
            "expert": [everyone[first : first + expert] for first in range(0, ranks, expert)],
            "expert data": [everyone[first::expert] for first in range(expert)],
        }

    def size(self, name: str) -> int:
        return len(self.members[name][0])

    def all_to_all(self, name: str, group: str, payload: float, calls: int, times: int) -> Transfer:
        """`payload` bytes in each of `times`."""
        n = self.size(group)
        neighbours = 0  # ordered pairs on one node
        for members in self.members[group]:
            by_node: dict[int, int] = {}
            for rank in members:
                by_node[self._node(rank)] = by_node.get(self._node(rank), 0) + 1
            neighbours += sum(count * (count - 1) for count in by_node.values())
        sent = payload * times / n  # to each member
        inside = sent * neighbours / self.ranks
        return Transfer(name, "all-to-all", n, payload * times, calls, inside, sent * (n - 1) - inside)

    def all_reduce(self, name: str, group: str, payload: float, calls: int) -> Transfer:
        n = self.size(group)
        return self._ring(name, "all-reduce", group, payload * calls, calls, 2 * (n - 1) / n * payload * calls)

    def all_gather(self, name: str, group: str, payload: float, calls: int) -> Transfer:
        n = self.size(group)
        return self._ring(name, "all-gather", group, payload * calls, calls, (n - 1) / n * payload * calls)

    def _ring(self, name: str, kind: str, group: str, payload: float, calls: int, sent: float) -> Transfer:
        edges = [
            (members[place], members[(place + 1) % len(members)])
            for members in self.members[group]
            for place in range(len(members))
        ]
        crossing = sum(self._node(one) != self._node(other) for one, other in edges) / len(edges)
        return Transfer(name, kind, self.size(group), payload, calls, sent * (1 - crossing), sent * crossing)

    def _node(self, rank: int) -> int:
        return rank // self.gpus_per_node


# Time


def _step_seconds(
    config: Config,
    cluster: Cluster,
    accounting: Accounting,
    work: Workload,
    transfers: list[Transfer],
    activations: float,
    held: dict[str, int],
) -> dict[str, float]:
    """The parts of a step that follow each other. Gradients are reduced while the backward pass runs; what is longer
    than that shows."""
    accelerator, kind = cluster.accelerator, matmul_format(config)
    images = work.images * work.micro_steps
    arithmetic = images * accounting.training_flops(work.capacity)
    arithmetic /= accelerator.peak_flops[kind] * COMPUTE_FRACTION[kind]
    bandwidth = accelerator.memory_bandwidth * MEMORY_FRACTION
    moved = ACTIVATION_PASSES * activations * work.micro_steps / bandwidth
    # Read and write: master weights, two moments, average; read the gradient, write the weights.
    states = held["fp32 master weights"] + held["AdamW moments"] + held["EMA"]
    optimizer = (2 * states + held["fp32 master weights"] + held["weights"]) / bandwidth
    wire = {transfer.name: transfer.seconds(accelerator) for transfer in transfers}
    reduction = sum(seconds for name, seconds in wire.items() if name.startswith("gradients"))
    gather = sum(seconds for name, seconds in wire.items() if name.startswith("parameters"))
    tokens = sum(wire.get(name, 0.0) for name in ("tokens to experts and back", "their gradients"))
    compute = {"arithmetic": arithmetic} if arithmetic >= moved else {"activations": moved}
    return {
        **compute,
        "token exchange": tokens,
        "other routing and report": sum(wire.values()) - tokens - reduction - gather,
        "gradients beyond backward": max(0.0, reduction - 2 / 3 * max(arithmetic, moved)),
        "parameter gather": gather,
        "optimizer": optimizer,
    }


def _element_bytes(config: Config) -> int:
    return 2 if config.precision == "bf16" else 4
