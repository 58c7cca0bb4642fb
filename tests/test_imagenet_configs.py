"""The configurations of the papers' class-conditional models, each with its recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffmoe_dist.config import for_world, load_config, loss_weights
from diffmoe_dist.model.accounting import account
from tests.machine import ROOT

FOLDER = ROOT / "configs" / "imagenet256"
SHIPPED = "../imagenet128/global_pool_s"  # the configuration of DiffMoE's code
# Millions of parameters, of sizes S, B, L and XL. DiffMoE's have 16 experts, ProMoE's 12 routed ones.
TOTALS = {
    "dense": (32.96, 130.51, 458.10, 675.13),
    "token_choice": (139.34, 555.61, 1969.17, 2906.13),
    "load_balanced": (139.34, 555.61, 1969.17, 2906.13),
    "expert_choice": (139.34, 555.61, 1969.17, 2906.13),
    "global_pool": (140.27, 559.22, 1981.96, 2924.99),
    "prototype": (75.54, 300.61, 1062.68, 1567.73),
}
MODELS = [
    (f"{router}_{size}", total)
    for router, totals in TOTALS.items()
    for size, total in zip(("s", "b", "l", "xl"), totals, strict=True)
] + [
    ("global_pool_xl_tp2", 2924.99), ("sit_xl", 675.13), (SHIPPED, 140.19), ("expert_choice_dynamic_l", 1981.96),
    ("global_pool_l_promoe", 1175.97),
]  # fmt: skip
STEPS = {"sit_xl": 7_000_000, SHIPPED: 1000 * (1_281_167 // 512)}  # an epoch's tail is dropped there


@pytest.mark.parametrize(("name", "millions"), MODELS)
def test_a_configuration_has_the_published_number_of_parameters_and_says_so(name: str, millions: float) -> None:
    path = FOLDER / f"{name}.yaml"
    counts = account(load_config(path))
    assert round(counts.total / 1e6, 2) == millions
    (said, activated), *_ = re.findall(r"# ([\d.]+) M parameters(?:, ([\d.]+) M activated)?", path.read_text())
    assert float(said) == millions
    if activated:
        assert float(activated) == round(counts.activated() / 1e6, 2)
    assert f"{sum(counts.macs().values()) / 1e9:.2f} GMAC" in path.read_text()


def test_there_is_a_configuration_for_each_model_and_no_other() -> None:
    found = [path for folder in (FOLDER, FOLDER / "../imagenet128") for path in folder.iterdir()]
    assert sorted(found) == sorted(FOLDER / f"{name}.yaml" for name, _ in MODELS)


@pytest.mark.parametrize("name", [name for name, _ in MODELS])
def test_a_configuration_follows_its_papers_recipe(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    promoe = name.startswith("prototype") or name.endswith("promoe")
    objective, optim = config.objective, config.optim
    batch = 512 if name == SHIPPED else 256
    assert (config.train.global_batch_size, config.train.label_dropout, config.data.flip) == (batch, 0.1, True)
    assert (optim.lr, tuple(optim.betas), optim.weight_decay, config.ema.decay) == (1e-4, (0.9, 0.999), 0.0, 0.9999)
    assert (objective.name, objective.time_distribution, objective.direction, objective.time_scale) == (
        ("flow", "logit_normal", "noise_at_one", 1000.0) if promoe else ("flow", "uniform", "data_at_one", 1.0)
    )
    assert (config.precision, optim.clip_grad_norm, config.train.steps) == (
        ("bf16_mixed", 0.5, 500_000) if promoe else ("fp32", 0.0, STEPS.get(name, 700_000))
    )
    assert loss_weights(config).get("balance", 0.0) == (0.01 if name.startswith("load_balanced") else 0.0)


@pytest.mark.parametrize("name", [name for name, _ in MODELS])
def test_the_command_in_a_configurations_header_fits_its_ranks(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    (ranks, given, overrides) = re.findall(r"#   deepspeed --num_gpus (\d+) .*--config (\S+)(.*)", path.read_text())[0]
    assert Path(given).name == path.name
    for_world(load_config(path, overrides.split()), int(ranks))
