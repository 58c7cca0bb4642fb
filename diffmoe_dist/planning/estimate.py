"""What a training run will need, before any process starts: memory, communication, and the time of a step.

The counts follow from the settings alone. *Exact* ones are what the engine really holds and sends, by test; *estimates*
say what they assume. Nothing here needs a process group, data, or a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from diffmoe_dist.config import Config, for_world
from diffmoe_dist.model.accounting import Accounting, account
from diffmoe_dist.planning.accelerators import matmul_format, model_flop_utilization
from diffmoe_dist.planning.memory import USABLE_MEMORY, peak_bytes, persistent_bytes
from diffmoe_dist.planning.step_time import HOST, step_seconds
from diffmoe_dist.planning.traffic import Transfer, all_transfers
from diffmoe_dist.planning.workload import Cluster, Workload, workload

Resource = Literal["compute", "memory", "host", "communication"]
_RESOURCE: dict[str, Resource] = {
    "arithmetic": "compute",
    "activations": "memory",
    "optimizer": "memory",
    HOST: "host",
}


@dataclass(frozen=True)
class Plan:
    config: Config
    cluster: Cluster
    accounting: Accounting
    work: Workload
    persistent: dict[str, int]  # bytes that a rank holds all the time, exact
    peak: dict[str, float]  # bytes beside them at the peak of a step, estimates
    transfers: list[Transfer]
    seconds: dict[str, float]  # of one step, estimates
    capacity: float | None = None  # C where it is not what the settings make it

    @property
    def memory(self) -> float:
        """Bytes of a GPU at the peak of a step."""
        return sum(self.persistent.values()) + sum(self.peak.values())

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that a run can have."""
        return USABLE_MEMORY * self.cluster.accelerator.memory_bytes

    @property
    def fits(self) -> bool:
        return self.memory <= self.usable_memory

    def largest_micro_batch(self) -> int:
        """The most images that a rank can have at once, with the same settings otherwise; 0: not one."""

        def fits(images: int) -> bool:
            batch = images * self.cluster.ranks * self.work.micro_steps
            train = replace(self.config.train, micro_batch_size=images, global_batch_size=batch)
            config = replace(self.config, train=train)
            work = workload(config, self.cluster.ranks, self.capacity)
            peak = sum(peak_bytes(config, self.cluster.ranks, work).values())
            return sum(self.persistent.values()) + peak <= self.usable_memory

        fitting, too_many = 0, 1
        while fits(too_many):
            fitting, too_many = too_many, 2 * too_many
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
        return fitting

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound_by(self) -> Resource:
        """What takes the largest part of a step; memory is its bandwidth.

        Where the GPU waits for its host to start kernels, all that is not communication takes as long as the host.
        """
        parts: dict[Resource, float] = dict.fromkeys(("compute", "memory", "host", "communication"), 0.0)
        for name, seconds in self.seconds.items():
            resource = _RESOURCE.get(name, "communication")
            parts["host" if self.seconds[HOST] and resource != "communication" else resource] += seconds
        return max(parts, key=lambda name: parts[name])

    @property
    def images_per_second(self) -> float:
        return self.config.train.global_batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        """The fraction of the peak arithmetic that the predicted step achieves."""
        peak = self.cluster.accelerator.peak_flops[matmul_format(self.config)]
        flops = self.accounting.training_flops(self.work.capacity)
        return model_flop_utilization(flops, self.images_per_second, self.cluster.ranks, peak)


def make_plan(config: Config, cluster: Cluster, capacity: float | None = None) -> Plan:
    """Plan a run of these settings on a cluster.

    Args:
        capacity: C, experts per token, measured on a run; by default what the settings make it in training.

    Raises:
        UserError: the ranks, the expert-parallel size and the batch do not fit together.
    """
    config = for_world(config, cluster.ranks)
    accounting = account(config)
    work = workload(config, cluster.ranks, capacity)
    transfers = all_transfers(config, cluster, work)
    seconds = step_seconds(config, cluster.accelerator, accounting, work, transfers, cluster.ranks)
    return Plan(
        config=config,
        cluster=cluster,
        accounting=accounting,
        work=work,
        persistent=persistent_bytes(config, cluster.ranks),
        peak=peak_bytes(config, cluster.ranks, work),
        transfers=transfers,
        seconds=seconds,
        capacity=capacity,
    )
