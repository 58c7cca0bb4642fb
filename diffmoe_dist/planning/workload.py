"""The machines of a run, and what each rank computes on them in a micro-step."""

from __future__ import annotations

from dataclasses import dataclass

from diffmoe_dist.config import Config, competing_samples
from diffmoe_dist.planning.accelerators import Accelerator


@dataclass(frozen=True)
class Cluster:
    """Nodes are filled rank by rank; each GPU is one rank."""

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
    assignments: float  # (token, expert) pairs of routed experts
    unconditional: float  # tokens of images without a condition, which ProMoE sends to an expert of their own

    @property
    def capacity(self) -> float:
        """C: experts per token."""
        return (self.assignments + self.unconditional) / self.tokens


def workload(config: Config, ranks: int, capacity: float | None = None) -> Workload:
    """What a rank computes in a micro-step; `config` is one of `for_world`, with its micro-batch size.

    Args:
        capacity: C, experts per token; by default what the settings make it in training.
    """
    images = config.train.micro_batch_size
    tokens = images * config.tokens_per_sample
    micro_steps = config.train.global_batch_size // (images * ranks)
    experts = config.experts
    if experts is None:
        return Workload(images, tokens, micro_steps, 0.0, 0.0)
    unconditional = tokens * config.train.label_dropout if experts.unconditional_expert else 0.0
    if capacity is None:
        pool_tokens = competing_samples(config, ranks) * config.tokens_per_sample
        assignments = (tokens - unconditional) * experts.experts_per_token(pool_tokens)
    else:
        assignments = max(capacity * tokens - unconditional, 0.0)
    return Workload(images, tokens, micro_steps, assignments, unconditional)
