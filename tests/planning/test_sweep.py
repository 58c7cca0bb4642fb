"""Every way to run the same settings, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffmoe_dist.config import Config, load_config, pool_samples
from diffmoe_dist.errors import UserError
from diffmoe_dist.planning.estimate import Plan
from diffmoe_dist.planning.sweep import as_text, by_speed, choose, days, gpu_hours, overrides, sweep
from tests.engine.runs import tiny_config
from tests.machine import ROOT
from tests.planning.plans import DENSE, H100, Case, plan_of

EIGHT = {"model": {"num_heads": 8, "hidden_size": 64}, "moe": {"num_experts": 4}}


def config_of(*settings: Case) -> Config:
    return tiny_config(Path("unused"), Path("unused"), EIGHT, *settings)


def sizes(plans: list[Plan]) -> set[tuple[int, int, int]]:
    return {(plan.cluster.nodes, plan.config.parallel.expert, plan.config.parallel.tensor) for plan in plans}


def test_every_size_that_divides_ranks_experts_heads_and_node_is_planned() -> None:
    plans = list(sweep(config_of(), 2, 4, H100, {"precision"}))
    # 4 experts, 8 heads, 16 images; tensor-parallel groups inside of nodes of 4.
    expected = {(nodes, expert, tensor) for nodes in (1, 2) for expert in (1, 2, 4) for tensor in (1, 2, 4)}
    assert sizes(plans) == expected
    assert len(plans) == len(expected)


def test_nodes_over_which_the_batch_does_not_divide_are_left_out() -> None:
    assert {plan.cluster.nodes for plan in sweep(config_of(), 4, 4, H100)} == {1, 2, 4}


def test_settings_given_stay_as_they_are() -> None:
    parallel = {"parallel": {"expert": 2, "tensor": 2}}
    given = {"parallel.expert", "parallel.tensor", "precision"}
    assert sizes(list(sweep(config_of(parallel), 2, 4, H100, given))) == {(1, 2, 2), (2, 2, 2)}


def test_all_precisions_are_compared() -> None:
    assert {plan.config.precision for plan in sweep(config_of(), 1, 1, H100)} == {"fp32", "bf16_mixed", "bf16"}


def test_a_plan_of_a_sweep_is_the_plan_of_its_settings() -> None:
    plan = next(p for p in sweep(config_of(), 1, 4, H100, {"precision"}) if p.config.parallel.expert == 2)
    alone = plan_of({**EIGHT, "parallel": {"expert": 2}}, 4)
    assert (plan.memory, plan.step_seconds) == (alone.memory, alone.step_seconds)


@pytest.mark.parametrize("name", ["dense_l", "global_pool_l"])
def test_memory_that_is_short_asks_for_smaller_micro_batches_and_recomputation_and_never_for_another_pool(
    name: str,
) -> None:
    config = load_config(ROOT / f"configs/imagenet256/{name}.yaml", ["run_dir=unused", "data.shards=unused"])
    given = {"parallel.tensor", "precision"}
    whole, short = (list(sweep(config, 1, 8, replace(H100, memory_bytes=gib * 2**30), given)) for gib in (79, 12))
    assert {plan.config.train.recompute for plan in whole} == {"none"}
    assert {pool_samples(plan.config, 8) for plan in short} == {1 if name == "dense_l" else 256}
    modes = {plan.config.train.recompute for plan in short}
    micro_batches = {plan.config.train.micro_batch_size for plan in short}
    # 12 GiB: the dense model accumulates gradients; a pool of 256 images has no other way than to recompute.
    assert (modes, micro_batches) == (({"none"}, {8}) if name == "dense_l" else ({"block"}, {32}))


def test_the_command_of_the_best_has_what_differs_and_what_was_given() -> None:
    config = config_of()
    plans = list(sweep(config, 2, 4, H100, {"train.steps"}))
    best = choose(plans, config, None)
    assert best == by_speed([plan for plan in plans if plan.config.precision == "fp32"])[0]
    text = as_text(plans, best, config, ["FILE", "train.steps=100"])
    command = text.splitlines()[-1].split("-m diffmoe_dist.train ")[1]
    assert command.split() == ["--config", "FILE", "train.steps=100", *overrides(best, config)]
    assert "precision" not in command, "another precision is another curve, and nobody's choice but the user's"
    assert "another pool" not in text
    assert max(map(len, text.splitlines()[:-1])) <= 120


def test_plans_whose_pools_differ_are_told_to_be_other_runs() -> None:
    config = config_of({"moe": {"pool": "rank"}})
    plans = list(sweep(config, 2, 4, H100))
    assert "Plans with another pool are other runs" in as_text(plans, choose(plans, config, None), config, ["FILE"])


def test_the_cheapest_plan_in_time_has_the_fewest_gpu_hours_of_those_in_time() -> None:
    config = config_of(DENSE)
    plans = list(sweep(config, 2, 4, H100))
    own = [plan for plan in plans if plan.config.precision == "fp32"]
    assert gpu_hours(choose(plans, config, 1e6)) == min(map(gpu_hours, own))
    limit = days(choose(plans, config, None))
    in_time = [plan for plan in own if days(plan) <= limit]
    assert gpu_hours(choose(plans, config, limit)) == min(map(gpu_hours, in_time))
    with pytest.raises(UserError, match=r"--days .*: the fastest plan takes"):
        choose(plans, config, limit / 2)


def test_a_batch_that_no_number_of_gpus_divides_is_refused() -> None:
    config = config_of()
    plans = list(sweep(config, 1, 3, H100))
    assert plans == []
    with pytest.raises(UserError, match=r"train\.global_batch_size=16, precision=fp32: no number of these GPUs"):
        choose(plans, config, None)
