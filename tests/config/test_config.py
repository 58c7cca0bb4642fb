from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffmoe_dist.config import (
    Config,
    build_config,
    expert_slots,
    for_world,
    load_config,
    model_settings,
    pool_samples,
    save_config,
)
from diffmoe_dist.errors import UserError
from tests.machine import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MOE = {"router": "global_pool", "num_experts": 8}


def config(*layers: dict[str, Any]) -> Config:
    return build_config({"run_dir": "r", "data": {"shards": "s"}, "model": {"size": "S"}, "moe": MOE}, *layers)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    assert load_config(path, ["data.shards=somewhere"]).data.shards == "somewhere"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_resolved_config_reads_back_equal(path: Path, tmp_path: Path) -> None:
    resolved = load_config(path, ["data.shards=somewhere"])
    save_config(resolved, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == resolved


def test_settings_from_python_may_be_tuples() -> None:
    assert config({"optim": {"betas": (0.9, 0.95)}}).optim.betas == (0.9, 0.95)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run_dir: r\ndata: {shards: s}\nmodel: {size: S}\noptim: {lr: 1.0e-3}\n")
    assert load_config(path).optim.lr == 1e-3
    assert load_config(path, ["optim.lr=2e-4", "seed=5"]).optim.lr == 2e-4


def test_a_size_is_a_preset_of_depth_width_and_heads() -> None:
    assert [getattr(config({"model": {"size": "XL"}}).model, k) for k in ("depth", "hidden_size", "num_heads")] == [
        28, 1152, 16,
    ]  # fmt: skip
    free = config({"model": {"size": None, "depth": 3, "hidden_size": 24, "num_heads": 3}})
    assert (free.model.depth, free.model.hidden_size, free.model.num_heads) == (3, 24, 3)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"optmi": {"lr": 1}}, r"unknown setting optmi=.*did you mean optim\?"),
        ({"moe": {"num_expert": 8}}, r"unknown setting moe\.num_expert=8; did you mean moe\.num_experts\?"),
        ({"optim": {"lr": "fast"}}, r"optim\.lr=fast: give a number, such as 0\.5 or 1e-4"),
        (
            {"moe": {"router": "globl"}},
            r"moe\.router=globl is not a router; did you mean global_pool\? choose from dense,",
        ),
        ({"moe": {"router": None}}, r"moe\.router=None is not a router; choose from dense, "),
        ({"moe": {"router": ["dense"]}}, r"moe\.router=\['dense'\] is not a router"),
        ({"moe": 3}, r"moe=3: expected settings below it"),
        ({"run_dir": None}, r"run_dir is not set"),
        ({"data": {"shards": None}}, r"data\.shards is not set"),
        ({"seed": -1}, r"seed=-1 is out of range"),
        ({"train": {"steps": 0}}, r"train\.steps=0 must be at least 1"),
        ({"optim": {"lr": 0.0}}, r"optim\.lr=0\.0 must be above 0"),
        ({"optim": {"lr": float("inf")}}, r"optim\.lr=inf must be above 0 and finite"),
        ({"optim": {"betas": [2.0, 0.9]}}, r"optim\.betas=\(2\.0, 0\.9\) must be two numbers in"),
        ({"objective": {"time_scale": 0.0}}, r"objective\.time_scale=0\.0 must be above 0"),
        (
            {"objective": {"name": "ddpm", "time_scale": 1000.0}, "model": {"learn_sigma": True}},
            r"objective\.time_scale=1000\.0 has no effect with objective\.name=ddpm; remove it",
        ),
        (
            {"objective": {"name": "ddpm", "direction": "data_at_one"}, "model": {"learn_sigma": True}},
            r"objective\.direction=data_at_one has no effect with objective\.name=ddpm; remove it",
        ),
        ({"objective": {"logit_mean": 0.5}}, r"objective\.logit_mean=0\.5 has no effect .*time_distribution=uniform"),
        (
            {"objective": {"time_distribution": "mode", "logit_std": 0.5}},
            r"objective\.logit_std=0\.5 has no effect with objective\.time_distribution=mode; remove it",
        ),
        (
            {"objective": {"time_distribution": "logit_normal", "mode_scale": 0.5}},
            r"objective\.mode_scale=0\.5 has no effect with objective\.time_distribution=logit_normal",
        ),
        ({"objective": {"time_distribution": "mode", "mode_scale": 1.76}}, r"mode_scale=1\.76 must be from -1 to 2 /"),
        (
            {"objective": {"min_snr_gamma": 5.0}},
            r"objective\.min_snr_gamma=5\.0 has no effect with objective\.name=flow",
        ),
        (
            {"objective": {"name": "ddpm", "time_shift": 2.0}},
            r"objective\.time_shift=2\.0 has no effect with .*name=ddpm",
        ),
        ({"objective": {"name": "ddpm"}, "sample": {"time_shift": 2.0}}, r"sample\.time_shift=2\.0 has no effect with"),
        ({"objective": {"time_shift": 0.0}}, r"objective\.time_shift=0\.0 must be above 0"),
        (
            {"objective": {"time_distribution": "logit_normal", "logit_std": 0.0}},
            r"objective\.logit_std=0\.0 must be above 0",
        ),
        (
            {"objective": {"name": "ddpm"}, "model": {"learn_sigma": True}, "sample": {"steps": 1001}},
            r"sample\.steps=1001: objective\.name=ddpm has 1000 steps .* choose 2 to 1000",
        ),
        ({"run_dir": "${nope}"}, r"run_dir=\$\{nope\}: \$\{ stands for nothing here"),
        ({"model": {"size": None, "depth": 1, "hidden_size": 32, "num_heads": 2}}, r"model\.depth=1: experts are in"),
        ({"model": {"size": None, "depth": 2, "hidden_size": 36, "num_heads": 3}}, r"hidden_size=36 makes experts 36"),
        ({"model": {"mlp_ratio": 1.01}}, r"mlp_ratio=1\.01 makes experts 387 wide"),
        (
            {"moe": {"top_k": 2}},
            r"moe\.top_k=2 has no effect with moe\.router=global_pool, which knows",
        ),
        ({"moe": {"router": "token_choice", "top_k": 9}}, r"moe\.top_k=9 must be from 1 to moe\.num_experts=8"),
        ({"moe": {"router": "token_choice", "top_k": 0}}, r"moe\.top_k=0 must be from 1 to moe\.num_experts=8"),
        ({"moe": {"router": "prototype", "top_k": 9}}, r"moe\.top_k=9 must be from 1 to moe\.num_experts=8"),
        (
            {"moe": {"router": "prototype", "variant": "expert_choice", "num_experts": 300}},
            r"moe\.top_k=1 gives each of moe\.num_experts=300 experts no slot among the 256 tokens of an image",
        ),
        (
            {"moe": {"router": "prototype", "capacity": 1.0}},
            r"moe\.capacity=1\.0 has no effect with moe\.router=prototype",
        ),
        (
            {"moe": {"router": "token_choice", "variant": "x"}},
            r"moe\.variant=x has no effect with moe\.router=token_choice",
        ),
        (
            {"moe": {"router": "expert_choice", "threshold_decay": 0.9}},
            r"moe\.threshold_decay=0\.9 has no effect without a capacity predictor",
        ),
        (
            {"moe": {"router": "expert_choice", "inference": "count"}},
            r"moe\.inference=count needs the capacity predictor; set moe\.capacity_predictor=true",
        ),
        ({"moe": {"inference": "constant"}}, r"moe\.constant_threshold is not set, but moe\.inference=constant"),
        (
            {"moe": {"constant_threshold": 0.4}},
            r"moe\.constant_threshold=0\.4 has no effect with moe\.inference=threshold",
        ),
        ({"moe": {"capacity_schedule": [5, 2]}}, r"moe\.capacity_schedule=\[5, 2\] must be two steps"),
        ({"moe": {"shared_experts": -1}}, r"moe\.shared_experts=-1 must be from 0 \(none\)"),
        ({"moe": {"expert_mlp_ratio": 0.01}}, r"moe\.expert_mlp_ratio=0\.01 makes experts 3 wide"),
        ({"moe": {"activation": "relu"}}, r"moe\.activation=relu is none of the choices; .*gelu"),
        ({"model": {"qk_norm": True}}, r"model\.qk_norm=True is none of the choices; choose from .*layer"),
        ({"optim": {"schedule": "cosin"}}, r"optim\.schedule=cosin is none of the choices; did you mean cosine\?"),
        ({"parallel": {"zero_stage": 3}}, r"parallel\.zero_stage=3 is none of the choices; choose from 1, 2"),
        (
            {"train": {"steps": 9}, "profile": {"steps": [10, 12]}},
            r"profile\.steps=\[10, 12\] begin after train\.steps=9",
        ),
        (
            {"model": {"mlp_ratio": 3.0}, "moe": {"blocks": "all", "expert_mlp_ratio": 2.0}},
            r"model\.mlp_ratio=3 has no effect where moe\.blocks=all leaves no dense layer",
        ),
        (
            {"moe": {"router": "prototype", "contrastive_loss_weight": 0, "contrastive_temperature": 0.1}},
            r"moe\.contrastive_temperature=0\.1 has no effect with moe\.contrastive_loss_weight=0; remove it",
        ),
        ({"ema": {"decays": 0.99}}, r"ema\.decays=0\.99: give a list, such as \[1, 2\]"),
        ({"model": {"head_dim": 0}}, r"model\.head_dim=0 must be from 1"),
        ({"moe": {"blocks": "even"}}, r"moe\.blocks=even must be odd, all, or the numbers of blocks"),
        ({"moe": {"blocks": []}}, r"moe\.blocks=\[\] must be odd, all, or"),
        ({"moe": {"blocks": [1, "x"]}}, r"moe\.blocks=\[1, x\] must be odd, all, or"),
        ({"moe": {"blocks": [3, 1]}}, r"moe\.blocks=\[3, 1\] must be ascending numbers of blocks, from 0 to 11"),
        ({"moe": {"blocks": [1, 12]}}, r"moe\.blocks=\[1, 12\] must be ascending numbers of blocks, from 0 to 11"),
        (
            {"model": {"activation": "swiglu"}, "moe": {"blocks": "all", "activation": "gelu"}},
            r"model\.activation=swiglu has no effect where moe\.blocks=all leaves no dense layer",
        ),
        ({"moe": {"shared_mlp_ratio": 2.0}}, r"moe\.shared_mlp_ratio=2\.0 has no effect with moe\.shared_experts=0"),
        ({"moe": {"shared_activation": "swiglu"}}, r"moe\.shared_activation=swiglu has no effect with moe\.shared_exp"),
        (
            {"moe": {"unconditional_expert": False}},
            r"moe\.unconditional_expert=False has no effect with moe\.router=global_pool",
        ),
        (
            {"moe": {"router": "prototype", "variant": "expert_choice", "balance_loss_weight": 0.1}},
            r"moe\.balance_loss_weight=0\.1 has no effect with moe\.variant=expert_choice",
        ),
        (
            {"moe": {"router": "prototype", "contrastive_tokens": "first"}},
            r"moe\.contrastive_tokens=first has no effect with moe\.top_k=1",
        ),
        (
            {"moe": {"router": "expert_choice", "pool": "global"}},
            r"moe\.pool=global has no effect with moe\.router",
        ),
        ({"ema": {"decay": 1.0}}, r"ema\.decay=1\.0 must be in \[0, 1\)"),
        ({"model": {"size": "S", "depth": 13}}, r"model\.depth=13 contradicts model\.size=S"),
        ({"model": {"size": None}}, r"model\.depth is not set"),
        ({"model": {"patch_size": 3}}, r"model\.input_size=32 is not divisible by model\.patch_size=3"),
        ({"model": {"size": None, "depth": 2, "hidden_size": 32, "num_heads": 3}}, r"hidden_size=32 .*num_heads=3"),
        ({"model": {"size": None, "depth": 2, "hidden_size": 6, "num_heads": 3}}, r"hidden_size=6 .* by 4"),
        ({"parallel": {"tensor": 5}}, r"parallel\.tensor=5 does not divide model\.num_heads="),
        ({"parallel": {"tensor": 2}, "train": {"compile": True}}, r"train\.compile=true compiles no layer"),
        (
            {"moe": {"capacity_schedule": [10, 20]}, "train": {"compile": True}},
            r"train\.compile=true .* moe\.capacity_schedule=\[10, 20\]",
        ),
        ({"parallel": {"expert": 3}}, r"parallel\.expert=3 does not divide moe\.num_experts=8"),
        ({"moe": {"num_experts": None}}, r"moe\.num_experts is not set"),
        ({"moe": {"capacity": 9.0}}, r"moe\.capacity=9\.0 is more than moe\.num_experts=8"),
        ({"moe": {"router": "dense"}}, r"moe\.num_experts=8 has no effect with moe\.router=dense"),
        (
            {"moe": {"router": "dense", "num_experts": None}, "parallel": {"expert": 2}},
            r"parallel\.expert=2 needs experts",
        ),
        (
            {"moe": {"pool": "rank"}, "parallel": {"score_exchange": "all_gather"}},
            r"parallel\.score_exchange=all_gather has no effect with moe\.pool=rank",
        ),
        (
            {"parallel": {"score_exchange": "two_level"}},
            r"parallel\.score_exchange=two_level needs several groups .* parallel\.expert=1; set",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_setting_value_and_remedy(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(layer)
    assert "\n" not in str(caught.value)


def test_what_is_not_given_of_a_layer_follows_from_the_other_layers() -> None:
    def chosen(model: dict[str, Any], moe: dict[str, Any]) -> tuple[Any, ...]:
        made: Any = config({"model": model, "moe": moe})
        return made.model.head_dim, made.moe.activation, made.moe.shared_activation, made.moe.shared_mlp_ratio

    assert chosen({}, {"shared_experts": 1, "expert_mlp_ratio": 2.0}) == (64, "gelu", "gelu", 2.0)
    assert chosen({"activation": "swiglu"}, {"shared_experts": 1}) == (64, "swiglu", "swiglu", 4.0)
    assert chosen({}, {"shared_experts": 1, "activation": "swiglu"}) == (64, "swiglu", "swiglu", 4.0)
    assert chosen({"head_dim": 48}, {"shared_experts": 2, "shared_activation": "swiglu", "shared_mlp_ratio": 1.0}) == (
        48, "gelu", "swiglu", 1.0,
    )  # fmt: skip


def test_blocks_are_odd_all_or_named_ones_and_equal_where_they_are_the_same() -> None:
    for blocks, expected in (("odd", [1, 3, 5, 7, 9, 11]), ("all", list(range(12))), ([0, 7], [0, 7])):
        made = config({"moe": {"blocks": blocks}})
        assert made.moe_blocks == expected
        assert model_settings(config({"moe": {"blocks": expected}})) == model_settings(made)
    given = {"model": {"size": "S"}, "moe": MOE}
    assert build_config(given, overrides=["moe.blocks=[2, 3]"], training=False).moe_blocks == [2, 3]
    assert build_config(given, overrides=["moe.blocks=all"], training=False).moe_blocks == list(range(12))


def test_an_objective_knows_its_own_settings_alone() -> None:
    flow = config().objective
    assert (flow.name, flow.time_distribution, flow.direction, flow.time_scale) == (
        "flow", "uniform", "data_at_one", 1.0,
    )  # fmt: skip
    ddpm = config({"objective": {"name": "ddpm"}, "model": {"learn_sigma": True}}).objective
    assert (ddpm.time_distribution, ddpm.direction, ddpm.time_scale) == ("uniform", "noise_at_one", 1.0)


@pytest.mark.parametrize(
    ("layer", "ranks", "message"),
    [
        ({"parallel": {"expert": 4}}, 6, r"parallel\.expert=4 does not divide the 6 ranks"),
        ({"train": {"global_batch_size": 10}}, 4, r"train\.global_batch_size=10 does not divide over 4 ranks"),
        (
            {"train": {"global_batch_size": 16, "micro_batch_size": 3}},
            2,
            r"train\.global_batch_size=16 is not a multiple of train\.micro_batch_size=3 x 2 ranks",
        ),
        ({"moe": {"pool": "sample", "capacity": 0.01}}, 1, r"moe\.capacity=0\.01 gives each .* no slot"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(layer: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        for_world(config(layer), ranks)


def test_without_a_micro_batch_size_nothing_is_accumulated() -> None:
    for ranks in (1, 2, 4):
        fitted = config({"train": {"global_batch_size": 16}})
        fitted = for_world(fitted, ranks)
        assert fitted.train.micro_batch_size == 16 // ranks
        assert pool_samples(fitted, ranks) == 16, "so the global pool is the global batch on any number of ranks"


def test_the_pool_is_what_its_name_says() -> None:
    sizes = {}
    for pool in ("global", "expert_parallel", "rank", "sample"):
        fitted = config({"train": {"global_batch_size": 16}, "moe": {"pool": pool}, "parallel": {"expert": 2}})
        fitted = for_world(fitted, 4)
        sizes[pool] = pool_samples(fitted, 4)
    assert sizes == {"global": 16, "expert_parallel": 8, "rank": 4, "sample": 1}


def test_slots_are_checked_in_the_pool_where_images_compete_though_a_loss_spans_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pools = []
    sharing = config({"train": {"global_batch_size": 16}, "moe": {"pool": "rank"}})
    monkeypatch.setattr(type(sharing.moe), "shares_batch", lambda self: True)
    monkeypatch.setattr(type(sharing.moe), "check_pool", lambda self, pool_tokens: pools.append(pool_tokens))

    fitted = for_world(sharing, 4)

    assert pool_samples(fitted, 4) == 16 and pools == [4 * fitted.tokens_per_sample]


def test_expert_slots_are_the_papers_rule() -> None:
    assert expert_slots(16_384, 16, 1.0) == 1024
    assert expert_slots(256, 8, 1.0) == 32
    assert expert_slots(256, 12, 1.0) == 21
    assert expert_slots(10, 16, 1.0) == 0
    assert expert_slots(10, 2, 2.0) == 10, "every token"


def test_a_section_under_its_old_name_still_counts_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    told = config({"score": {"every": 5, "num": 50, "features": "f.pth", "reference": "r.npz"}, "fid": {"num": 60}}).fid
    assert (told.every, told.num, told.features, told.reference) == (5, 60, "f.pth", "r.npz")
    assert [record.getMessage() for record in caplog.records] == [
        "the settings score.* are called fid.* now; the old name goes with version 0.3"
    ]
    with pytest.raises(UserError, match=r"unknown setting fid\.refrence=x; did you mean fid\.reference\?"):
        config({"score": {"refrence": "x"}})


def test_a_section_of_an_old_run_that_did_nothing_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    assert config({"score": {"every": 0, "num": 50, "features": None}}).fid.num == 50
    assert not caplog.records
