"""Every way to run the same settings on some GPUs: which ones fit, how fast they are, and what they cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from diffmoe_dist.config import Config, check, for_world, pool_samples
from diffmoe_dist.errors import UserError
from diffmoe_dist.planning.accelerators import Accelerator
from diffmoe_dist.planning.estimate import Plan, make_plan
from diffmoe_dist.planning.fit import less_and_less_memory
from diffmoe_dist.planning.workload import Cluster

_PRECISIONS: tuple[Literal["fp32", "bf16_mixed", "bf16"], ...] = ("fp32", "bf16_mixed", "bf16")
_ROWS = 8  # of a table


def sweep(
    config: Config, nodes: int, gpus_per_node: int, accelerator: Accelerator, given: Collection[str] = ()
) -> Iterator[Plan]:
    """Plans on 1 to `nodes` nodes that fit: every expert- and tensor-parallel size and precision.

    Tensor-parallel groups stay inside a node. Nothing is recomputed that need not be. Where images compete for experts
    the micro-batch stays as the settings have it, since a smaller one divides the pool; else it is smaller where memory
    asks for it.

    Args:
        given: names of settings to leave as they are, such as `parallel.expert`.
    """
    for count in range(1, nodes + 1):
        yield from plans_on(config, Cluster(count, gpus_per_node, accelerator), given)


def plans_on(config: Config, cluster: Cluster, given: Collection[str] = ()) -> Iterator[Plan]:
    """The same on one number of nodes."""
    for candidate in _candidates(config, cluster, given):
        if "train.recompute" not in given:
            candidate = replace(candidate, train=replace(candidate.train, recompute="none"))
        plans = (make_plan(variant, cluster) for variant in less_and_less_memory(candidate, cluster.ranks, given))
        plan = next((plan for plan in plans if plan.fits), None)
        if plan is not None:
            yield plan


def _candidates(config: Config, cluster: Cluster, given: Collection[str]) -> Iterator[Config]:
    """Settings that the training command would take on this many ranks."""
    parallel = config.parallel
    experts = [1] if config.experts is None else _divisors(config.experts.num_experts)
    sizes = product(
        [parallel.expert] if "parallel.expert" in given else experts,
        [parallel.tensor] if "parallel.tensor" in given else _divisors(cluster.gpus_per_node),
        [config.precision] if "precision" in given else _PRECISIONS,
    )
    for expert, tensor, precision in sizes:
        tried = replace(config, precision=precision, parallel=replace(parallel, expert=expert, tensor=tensor))
        try:
            check(tried)
            fitted = for_world(tried, cluster.ranks)
        except UserError:
            continue  # these sizes do not divide what they would have to
        yield fitted


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def gpu_hours(plan: Plan) -> float:
    """Of the whole run."""
    return plan.cluster.ranks * plan.config.train.steps * plan.step_seconds / 3600


def days(plan: Plan) -> float:
    """Of the whole run."""
    return plan.config.train.steps * plan.step_seconds / 86400


def overrides(plan: Plan, config: Config) -> list[str]:
    """What to add to the training command of `config` for this plan."""
    chosen = plan.config
    values = {
        "precision": (chosen.precision, config.precision),
        "parallel.expert": (chosen.parallel.expert, config.parallel.expert),
        "parallel.tensor": (chosen.parallel.tensor, config.parallel.tensor),
        "train.recompute": (chosen.train.recompute, config.train.recompute),
    }
    if plan.work.micro_steps > 1:
        values["train.micro_batch_size"] = (chosen.train.micro_batch_size, config.train.micro_batch_size)
    return [f"{name}={value}" for name, (value, given) in values.items() if value != given]


def choose(plans: Sequence[Plan], config: Config, within_days: float | None) -> Plan:
    """The fastest plan in the precision of the settings, or the one with the fewest GPU-hours that ends in time.

    Raises:
        UserError: none fits, or none ends in time.
    """
    own = _in_own_precision(plans, config)
    if not own:
        raise UserError(
            f"train.global_batch_size={config.train.global_batch_size}, precision={config.precision}: no number of "
            "these GPUs divides that batch and has the memory; give other nodes, or another batch"
        )
    fastest = by_speed(own)[0]
    if within_days is None:
        return fastest
    if days(fastest) > within_days:
        raise UserError(f"--days {within_days:g}: the fastest plan takes {days(fastest):.2f}; give more nodes")
    return by_cost([plan for plan in own if days(plan) <= within_days])[0]


def by_speed(plans: Sequence[Plan]) -> list[Plan]:
    return sorted(plans, key=lambda plan: (-plan.images_per_second, gpu_hours(plan)))


def by_cost(plans: Sequence[Plan]) -> list[Plan]:
    return sorted(plans, key=lambda plan: (gpu_hours(plan), -plan.images_per_second))


def _in_own_precision(plans: Sequence[Plan], config: Config) -> list[Plan]:
    return [plan for plan in plans if plan.config.precision == config.precision]


def as_text(plans: Sequence[Plan], best: Plan, config: Config, settings: Sequence[str]) -> str:
    """The fastest plans, the cheapest ones, and the command of the best.

    Args:
        settings: of the command, the path of the configuration and what overrides it.
    """
    own, cluster = _in_own_precision(plans, config), best.cluster
    lines = [
        f"{settings[0]} on up to {max(plan.cluster.nodes for plan in plans)} nodes of {cluster.gpus_per_node} "
        f"{cluster.accelerator.name}: {len(plans)} plans fit. Times are estimates, see docs/planning.md.",
        "",
        *_table("most images a second", by_speed(own)[:_ROWS]),
        "",
        *_table("fewest GPU-hours", by_cost(own)[:_ROWS]),
    ]
    others: dict[tuple[str, int], Plan] = {}
    for plan in by_speed(plans):
        if plan.config.precision != config.precision:
            others.setdefault((plan.config.precision, plan.cluster.nodes), plan)
    if others:
        lines += ["", *_table("other precisions round otherwise: another curve", list(others.values()))]
    if len({_pool(plan) for plan in own}) > 1:
        lines += ["", "Plans with another pool are other runs, with other losses."]
    return "\n".join([*lines, "", "the best:", f"  {_command(best, config, settings)}"])


def _pool(plan: Plan) -> int:
    """Images that are routed together."""
    return pool_samples(plan.config, plan.cluster.ranks)


def _command(plan: Plan, config: Config, settings: Sequence[str]) -> str:
    launcher = f"torchrun --nproc-per-node {plan.cluster.gpus_per_node}"
    if plan.cluster.nodes > 1:
        launcher += f" --nnodes {plan.cluster.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return " ".join([launcher, "-m diffmoe_dist.train --config", *settings, *overrides(plan, config)])


def _table(title: str, plans: Sequence[Plan]) -> list[str]:
    head = (
        f"{'nodes':>5} {'ranks':>5} {'expert':>6} {'tensor':>6} {'micro':>5} {'recompute':>9} {'precision':>10} "
        f"{'pool':>6} {'GiB':>6} {'images/s':>9} {'MFU':>4} {'days':>6} {'GPU-h':>8}  bound by"
    )
    return [title.upper(), head, *(_line(plan) for plan in plans)]


def _line(plan: Plan) -> str:
    config, cluster, memory = plan.config, plan.cluster, plan.memory / 2**30
    return (
        f"{cluster.nodes:5} {cluster.ranks:5} {config.parallel.expert:6} {config.parallel.tensor:6} "
        f"{config.train.micro_batch_size:5} {config.train.recompute:>9} {config.precision:>10} {_pool(plan):6} "
        f"{memory:6.{1 if memory >= 1 else 3}f} {plan.images_per_second:9.0f} {plan.mfu:4.0%} {days(plan):6.2f} "
        f"{gpu_hours(plan):8.0f}  {plan.bound_by}"
    )


def as_dict(plans: Sequence[Plan], best: Plan, config: Config) -> dict[str, object]:
    """The same for programs; the plans from the fastest on."""
    return {"best": _as_row(best, config), "plans": [_as_row(plan, config) for plan in by_speed(plans)]}


def _as_row(plan: Plan, config: Config) -> dict[str, object]:
    return {
        "nodes": plan.cluster.nodes,
        "ranks": plan.cluster.ranks,
        "expert_parallel": plan.config.parallel.expert,
        "tensor_parallel": plan.config.parallel.tensor,
        "micro_batch_size": plan.config.train.micro_batch_size,
        "recompute": plan.config.train.recompute,
        "precision": plan.config.precision,
        "pool_images": _pool(plan),
        "memory_bytes": round(plan.memory),
        "images_per_second": plan.images_per_second,
        "mfu": plan.mfu,
        "days": days(plan),
        "gpu_hours": gpu_hours(plan),
        "overrides": overrides(plan, config),
    }
