"""What a run that goes on with more or fewer ranks makes of its settings: cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from diffmoe_dist.config import Config, Earlier, build_config, for_nodes, for_ranks, pool_samples, wishes
from diffmoe_dist.errors import UserError

POOL: dict[str, Any] = {"moe": {"router": "global_pool", "num_experts": 8}}
RANK: dict[str, Any] = {"moe": {**POOL["moe"], "pool": "rank"}}
EXPERT: dict[str, Any] = {"moe": {**POOL["moe"], "pool": "expert_parallel"}}
BALANCED: dict[str, Any] = {"moe": {"router": "token_choice", "num_experts": 8, "top_k": 1, "balance_loss_weight": 0.1}}
DENSE: dict[str, Any] = {"moe": {"router": "dense"}}


def settings(layer: dict[str, Any], batch: int = 32, micro: int = 0, expert: int = 1, tensor: int = 1) -> Config:
    base = {
        "model": {"depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 8, "in_channels": 1, "num_classes": 10},
        "train": {"global_batch_size": batch, "micro_batch_size": micro},
        "parallel": {"expert": expert, "tensor": tensor},
    }
    return build_config(base, layer, training=False)


def after(config: Config, *ranks: int) -> Earlier | None:
    """What a checkpoint says of a run of these settings that has gone on from one number of ranks to the next."""
    earlier = None
    for count in ranks:
        fitted = for_ranks(config, count, earlier)
        train = fitted.train
        micro_steps = train.global_batch_size // (train.micro_batch_size * count)
        earlier = Earlier("step-1", fitted, pool_samples(fitted, count), micro_steps, wishes(config))
        assert earlier.ranks == count
    return earlier


# Settings, the ranks one after the other, and then: micro-batch, parallel.expert, parallel.tensor, pool, micro-steps.
CASES: dict[str, tuple[Config, list[int], tuple[int, int, int, int, int]]] = {
    "the batch is the pool": (settings(POOL), [4, 2], (16, 1, 1, 32, 1)),
    "half the batch is the pool, on fewer ranks": (settings(POOL, micro=4), [4, 2], (8, 1, 1, 16, 2)),
    "half the batch is the pool, on more ranks": (settings(POOL, micro=4), [4, 16], (1, 1, 1, 16, 2)),
    "and back": (settings(POOL, micro=4), [4, 1, 4], (4, 1, 1, 16, 2)),
    "twice on as many ranks": (settings(POOL, micro=4), [4, 1, 1], (16, 1, 1, 16, 2)),
    "up and down again and again": (settings(POOL, micro=4, expert=4), [4, 1, 8, 2, 2, 16, 1], (16, 1, 1, 16, 2)),
    "a loss of the batch": (settings(BALANCED, micro=4), [4, 2], (8, 1, 1, 16, 2)),
    "a pool for each rank, on fewer": (settings(RANK), [4, 2], (8, 1, 1, 8, 2)),
    "a pool for each rank, on more": (settings(RANK, micro=4), [4, 8], (4, 1, 1, 4, 1)),
    "a pool for each group, which stays": (settings(EXPERT, expert=2), [8, 2], (4, 2, 1, 8, 4)),
    "a pool for each group, which becomes smaller": (settings(EXPERT, expert=4), [8, 2], (8, 2, 1, 16, 2)),
    "a pool for each group, on one rank": (settings(EXPERT, expert=4), [8, 1], (16, 1, 1, 16, 2)),
    "dense": (settings(DENSE), [4, 2], (16, 1, 1, 1, 1)),
    "dense, accumulated": (settings(DENSE, micro=2), [4, 2], (2, 1, 1, 1, 8)),
    "dense, the largest micro-batch that divides": (settings(DENSE, batch=24, micro=3), [4, 12], (2, 1, 1, 1, 1)),
    "experts on fewer ranks": (settings(POOL, expert=4), [4, 2], (16, 2, 1, 32, 1)),
    "experts over as many ranks as divide both": (settings(POOL, batch=48, expert=8), [8, 12], (4, 4, 1, 48, 1)),
    "experts back": (settings(POOL, expert=4), [4, 1, 8], (4, 4, 1, 32, 1)),
    "layers cut over fewer ranks": (settings(POOL, expert=2, tensor=4), [4, 2], (16, 2, 2, 32, 1)),
    "layers cut over what divides heads": (settings(DENSE, batch=36, tensor=4), [4, 6], (6, 1, 2, 1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_pools_stay_on_other_ranks(case: str) -> None:
    config, ranks, expected = CASES[case]
    earlier = after(config, *ranks)
    assert earlier is not None
    sizes = earlier.config.train.micro_batch_size, earlier.config.parallel.expert, earlier.config.parallel.tensor
    assert (*sizes, earlier.pool_samples, earlier.micro_steps) == expected
    first = after(config, ranks[0])
    assert first is not None and earlier.pool_samples == first.pool_samples


REFUSED: dict[str, tuple[Config, Config, int, str]] = {
    "a batch that is not whole": (
        settings(POOL), settings(POOL), 3, "does not divide over 3 ranks; start on 2 or 4 ranks$",
    ),
    "a pool that is not whole": (
        settings(POOL, micro=2), settings(POOL, micro=2), 16,
        "^train.global_batch_size=32 in token pools of 8 samples, as in step-1, does not divide over 16 ranks; start "
        "on 8 ranks, or set checkpoint.allow_pool_change=true for another pool$",
    ),
    "a pool for each rank, of more than the batch": (
        settings(RANK), settings(RANK), 8, "token pools of 8 samples.* over 8 ranks; start on 4 ranks, or set",
    ),
    "a dense batch": (settings(DENSE), settings(DENSE), 3, "^train.global_batch_size=32 does not divide over 3 ranks"),
    "an expert-parallel size that is set anew": (
        settings(POOL), settings(POOL, expert=8), 2, "^parallel.expert=8 does not divide the 2 ranks; choose a divisor",
    ),
    "a tensor-parallel size that is set anew": (settings(POOL), settings(POOL, tensor=4), 2, "^parallel.tensor=4 does"),
    "a micro-batch that is set anew": (settings(POOL), settings(POOL, micro=5), 2, "micro_batch_size=5 x 2 ranks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_in_a_line_with_what_would_do(case: str) -> None:
    first, now, ranks, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as refusal:
        for_ranks(now, ranks, after(first, 4))
    assert "\n" not in str(refusal.value)


def test_what_is_set_anew_stays_as_it_is_set() -> None:
    earlier = after(settings(POOL, expert=4), 4)
    assert for_ranks(settings(POOL, expert=2), 8, earlier).parallel.expert == 2
    # Another pool: left to the check of the checkpoint, which names it.
    assert for_ranks(settings(POOL, micro=4), 2, earlier).train.micro_batch_size == 4
    # A micro-batch that follows from the ranks is none that is set.
    assert earlier is not None
    unknown = Earlier(earlier.checkpoint, earlier.config, earlier.pool_samples, earlier.micro_steps, asked=None)
    assert for_ranks(settings(POOL, expert=4), 2, unknown).train.micro_batch_size == 16
    # The settings that the run wrote down are no new ones.
    assert earlier is not None
    again = settings(POOL, micro=earlier.config.train.micro_batch_size, expert=4)
    assert for_ranks(again, 2, earlier).train.micro_batch_size == 16
    # Nor does a run keep its pool that is another one by order, or that is allowed to change it.
    assert for_ranks(settings(POOL, batch=64, micro=4), 2, earlier).train.micro_batch_size == 4
    allowed = {**RANK, "checkpoint": {"allow_pool_change": True}}
    assert for_ranks(settings(allowed), 2, after(settings(RANK), 4)).train.micro_batch_size == 16


def test_scores_that_travel_in_two_levels_travel_in_one_where_there_is_one() -> None:
    two_levels = {**POOL, "parallel": {"score_exchange": "two_level"}}
    config = settings(two_levels, expert=2)
    for ranks in ([4, 1], [4, 1, 1]):
        earlier = after(config, *ranks)
        assert earlier is not None and earlier.config.parallel.score_exchange == "auto"
    assert for_ranks(config, 4, earlier).parallel.score_exchange == "two_level"


def test_what_memory_asked_for_stays_on_the_same_ranks_and_goes_with_them() -> None:
    config = settings(DENSE)
    earlier = after(config, 2)
    assert earlier is not None
    fitted = settings({**DENSE, "train": {"recompute": "mlp"}}, micro=4)
    earlier = Earlier("step-1", fitted, 1, 4, wishes(config))
    assert for_ranks(config, 2, earlier).train == fitted.train
    assert for_ranks(config, 4, earlier).train.recompute == "none"


def test_the_nodes_take_part_that_the_batch_divides_over() -> None:
    def choose(config: Config, nodes: int, expert: Any, earlier: Earlier | None = None) -> tuple[int, int, int]:
        taking_part, fitted, reason = for_nodes(config, nodes, 2, expert, earlier)
        assert bool(reason) == (taking_part < nodes)
        return taking_part, fitted.train.micro_batch_size, fitted.parallel.expert

    assert choose(settings(POOL), 2, "any") == (2, 8, 4)
    assert choose(settings(POOL), 3, "any") == (2, 8, 4), "32 images do not divide over 6 GPUs"
    assert choose(settings(POOL, expert=2), 2, "wish") == (2, 8, 2)
    assert choose(settings(POOL, expert=8), 2, "wish") == (2, 8, 4)
    assert choose(settings(POOL, expert=4), 3, "order") == (2, 8, 4)
    assert choose(settings(DENSE), 3, "any") == (2, 8, 1)
    assert choose(settings(RANK), 4, "any", after(settings(RANK), 2)) == (1, 16, 2), "a pool for each rank cannot grow"
    first = after(settings(EXPERT, micro=1, expert=2), 2)  # pools of two images
    assert choose(settings(EXPERT, micro=1), 4, "any", first) == (4, 1, 2), "of eight GPUs they would be others"
    with pytest.raises(UserError, match="parallel.expert=8 does not divide the 6 ranks"):
        for_nodes(settings(POOL, expert=8), 3, 2, "order", None)
