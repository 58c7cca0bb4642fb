"""The text-to-image configurations: the paper's two numbers, and what the comments say."""

from __future__ import annotations

import re

import pytest

from diffmoe_dist.config import for_world, load_config
from diffmoe_dist.model.accounting import account
from tests.machine import ROOT

FOLDER = ROOT / "configs" / "t2i"
LARGE = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "debug")


@pytest.mark.parametrize("name", LARGE)
def test_the_comment_of_a_configuration_counts_its_model(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    counts = account(load_config(FOLDER / f"{name}.yaml"))
    assert f"# {counts.total / 1e6:.2f} M parameters" in text
    assert f"{sum(counts.macs().values()) / 1e9:.2f} GMAC" in text
    for activated in re.findall(r"([\d.]+) M activated at", text):
        assert float(activated) == round(counts.activated() / 1e6, 2)


def test_the_large_models_have_the_papers_sizes() -> None:
    moe, dense = (account(load_config(FOLDER / f"{name}.yaml")) for name in ("global_pool_1b_e16", "dense_1b"))
    # 4.6 B in all against 1.2 B (DiffMoE, appendix D.2). What C = 1 activates has the routers and predictors beside.
    assert (round(moe.total / 1e9, 1), round(dense.total / 1e9, 1)) == (4.6, 1.2)
    assert moe.activated() / dense.total == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", LARGE)
def test_a_configuration_can_be_launched_as_its_comment_says(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    ranks = 8 if "--num_gpus 8" in path.read_text() else 1
    expert = ranks if load_config(path).experts is not None else 1
    config = for_world(load_config(path, [f"parallel.expert={expert}"]), ranks)
    assert config.data.text is not None and config.model.text_encoder_sha256 == ""
