"""A run that goes on with more or fewer ranks: the micro-batch and the parallel sizes that keep its token pools.

A setting that says what it said when the run was last started is a wish, for the same command may find other ranks; one
that says something new is an order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from diffmoe_dist.config.checks import (
    check,
    competing_samples,
    for_world,
    name_ranks,
    pool_samples,
    ranks_together,
    shared_kind,
)
from diffmoe_dist.config.schema import Config, flat_settings
from diffmoe_dist.errors import UserError

FITTED = ("train.micro_batch_size", "parallel.expert", "parallel.tensor", "train.recompute")
Wish = int | str


@dataclass(frozen=True)
class Earlier:
    """How the ranks of a run shared its batch until a checkpoint."""

    checkpoint: str  # its name
    config: Config  # as it ran
    pool_samples: int
    micro_steps: int
    asked: Mapping[str, Wish] | None  # `wishes` of the settings as they were given; None: not known

    @property
    def ranks(self) -> int:
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.micro_steps)


def wishes(config: Config) -> dict[str, Wish]:
    """The settings that are fitted to the ranks of a run that goes on, by name."""
    flat = flat_settings(config)
    return {name: flat[name] for name in FITTED}


def orders(config: Config, earlier: Earlier) -> list[str]:
    """The settings that are fitted to ranks or memory, and were set anew: they stay."""
    return [name for name in FITTED if _is_order(name, config, earlier)]


def for_ranks(config: Config, world_size: int, earlier: Earlier | None) -> Config:
    """The configuration on so many ranks, as `for_world` returns it, of a run that is new or goes on.

    Of one that goes on the token pools stay as they were: the micro-batch follows from the ranks, and sizes of
    `parallel` that do not divide them give way to the largest ones below that do. What is set anew stays as it is set.

    Raises:
        UserError: the ranks and the batch do not fit together, or no micro-batch keeps the pools.
    """
    if earlier is None:
        return for_world(config, world_size)
    if world_size == earlier.ranks:
        config = _as_before(config, earlier)
    found = _fit(config, world_size, earlier)
    if isinstance(found, Config):
        return found
    if found is not None:
        raise found
    batch, pool = config.train.global_batch_size, earlier.pool_samples
    shared = f"train.global_batch_size={batch}"
    if pool > 1:
        shared += f" in token pools of {pool} samples, as in {earlier.checkpoint},"
    raise UserError(f"{shared} does not divide over {world_size} ranks; {_remedy(config, world_size, earlier)}")


def for_nodes(
    config: Config, nodes: int, gpus: int, expert: Literal["any", "wish", "order"], earlier: Earlier | None
) -> tuple[int, Config, str]:
    """The most of these nodes that can take part, the configuration there, and what keeps more from it, if any are.

    Args:
        gpus: of each node, a rank each.
        expert: what `parallel.expert` is; of any size, it becomes the largest one that divides GPUs and experts.

    Raises:
        UserError: as `for_ranks`, of all nodes.
    """
    problems: list[UserError] = []
    for count in range(nodes, 0, -1):
        most = {"any": config.experts.num_experts if config.experts else 1, "wish": config.parallel.expert}.get(expert)
        sizes = [config.parallel.expert] if most is None else _divisors_below(most, count * gpus, config)
        refused: list[UserError] = []
        for size in sizes:
            tried = replace(config, parallel=replace(config.parallel, expert=size))
            try:
                return count, for_ranks(tried, count * gpus, earlier), str(problems[0]) if problems else ""
            except UserError as error:
                refused.append(error)
        problems.append(refused[0])
    raise problems[0]


def _fit(config: Config, world_size: int, earlier: Earlier) -> Config | UserError | None:
    """The first candidate that keeps the pools; else what is wrong with one, or None: no micro-batch keeps them."""
    problems: list[UserError] = []
    others: list[Config] = []
    for tried in _candidates(config, world_size, earlier):
        try:
            check(tried)
            fitted = for_world(tried, world_size)
        except UserError as error:
            problems.append(error)
            continue
        if config.checkpoint.allow_pool_change or _pools(fitted, world_size) == _pools(earlier.config, earlier.ranks):
            return fitted
        others.append(fitted)  # by order; whoever loads the checkpoint refuses it
    return others[0] if others else problems[0] if problems else None


def _candidates(config: Config, world_size: int, earlier: Earlier) -> Iterator[Config]:
    """Settings for these ranks, those that change the least first."""
    parallel = config.parallel
    experts, tensors = [parallel.expert], [parallel.tensor]
    if not _is_order("parallel.expert", config, earlier):
        experts = _divisors_below(parallel.expert, world_size, config)
    if not _is_order("parallel.tensor", config, earlier):
        tensors = [size for size in range(parallel.tensor, 0, -1) if world_size % size == 0]
    for expert in experts:
        for tensor in tensors:
            now = replace(parallel, expert=expert, tensor=tensor)
            if expert == 1 and parallel.score_exchange == "two_level":
                now = replace(now, score_exchange="auto")  # there is one level
            tried = replace(config, parallel=now)
            for micro in _micro_batches(tried, world_size, earlier):
                yield replace(tried, train=replace(config.train, micro_batch_size=micro))


def _divisors_below(most: int, world_size: int, config: Config) -> list[int]:
    """Sizes of an expert-parallel group of at most so many ranks, the largest first."""
    experts = config.experts.num_experts if config.experts else 1
    return [size for size in range(most, 0, -1) if world_size % size == 0 == experts % size]


def _micro_batches(config: Config, world_size: int, earlier: Earlier) -> Iterator[int]:
    """What to try as micro-batch with the sizes of `parallel` that `config` has."""
    train, kind = config.train, shared_kind(config)
    other_run = train.global_batch_size != earlier.config.train.global_batch_size or kind != shared_kind(earlier.config)
    ordered = other_run or _is_order("train.micro_batch_size", config, earlier)
    if ordered or config.checkpoint.allow_pool_change:
        yield train.micro_batch_size
    if ordered or train.global_batch_size % world_size:
        return
    share = train.global_batch_size // world_size
    together = ranks_together(kind, config, world_size)
    if together is None:  # images are on their own
        most = train.micro_batch_size or share
        yield next(size for size in range(min(most, share), 0, -1) if share % size == 0)
        return
    micro, left_over = divmod(earlier.pool_samples, together)
    if micro and not left_over and share % micro == 0:
        yield micro


def _as_before(config: Config, earlier: Earlier) -> Config:
    """The settings, with what they were fitted to on as many ranks."""
    for name in FITTED:
        if not _is_order(name, config, earlier):
            section, key = name.split(".")
            fitted = replace(getattr(config, section), **{key: wishes(earlier.config)[name]})
            config = replace(config, **{section: fitted})
    return config


def _is_order(name: str, config: Config, earlier: Earlier) -> bool:
    """Whether a setting is neither what it was nor what it was fitted to, as the run's config.yaml has it."""
    before, now = wishes(earlier.config), wishes(config)[name]
    if name == "train.micro_batch_size" and not now:  # it follows from the ranks
        return False
    return now not in (before[name], (earlier.asked or before)[name])


def _pools(config: Config, world_size: int) -> tuple[int, int]:
    """Images with a loss in common, and images that compete: two sizes only of a router that has both."""
    return pool_samples(config, world_size), competing_samples(config, world_size)


def _remedy(config: Config, world_size: int, earlier: Earlier) -> str:
    """The nearest numbers of ranks that would do."""
    batch = config.train.global_batch_size

    def first(numbers: range) -> list[int]:
        for ranks in numbers:
            if batch % ranks == 0 and isinstance(_fit(config, ranks, earlier), Config):
                return [ranks]
        return []

    near = first(range(world_size - 1, 0, -1)) + first(range(world_size + 1, batch + 1))
    remedy = f"start on {name_ranks(near)}" if near else "use another run_dir"
    try:
        for_world(replace(config, checkpoint=replace(config.checkpoint, allow_pool_change=True)), world_size)
    except UserError:
        return remedy
    return f"{remedy}, or set checkpoint.allow_pool_change=true for another pool"
