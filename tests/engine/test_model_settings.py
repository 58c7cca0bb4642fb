"""One seed, one loss curve with normed heads of any width, SwiGLU, experts in chosen blocks, and ProMoE's variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.engine.runs import curve, metrics, train_all

pytestmark = pytest.mark.slow

MODEL = {"qk_norm": "layer", "head_dim": 12, "activation": "swiglu"}
SHARED = {"blocks": "all", "shared_experts": 1, "shared_mlp_ratio": 1.0, "shared_activation": "gelu"}
PROTOTYPE = {
    "router": "prototype", "top_k": 2, "contrastive_tokens": "first", "balance_loss_weight": 0.1,
    "unconditional_expert": False, "blocks": [0],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"model": MODEL, "moe": SHARED},
    "prototype": {"model": {"qk_norm": "rms", "activation": "swiglu"}, "moe": PROTOTYPE},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "e2": {"parallel": {"expert": 2}},
    "t2, recomputed": {"parallel": {"tensor": 2}, "recompute": "block"},
}


def job(kind: str, steps: int, recompute: str = "none", **layers: Any) -> dict[str, Any]:
    train = {"steps": steps, "global_batch_size": 16, "recompute": recompute}
    return {**KINDS[kind], **layers, "train": train, "checkpoint": {"every": 10, "keep": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    root = tmp_path_factory.mktemp("settings")
    run_ranks(1, train_all, digits, [(root / f"{kind}_1", job(kind, 20)) for kind in KINDS])
    jobs = []
    for kind in KINDS:
        jobs += [(root / f"{kind}_{name}", job(kind, 20, **layout)) for name, layout in LAYOUTS.items()]
        jobs += [(root / f"{kind}_resumed", job(kind, steps, **LAYOUTS["e2"])) for steps in (10, 20)]
    run_ranks(2, train_all, digits, jobs)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_have_the_same_losses_however_the_model_is_spread(runs: Path, kind: str, layout: str) -> None:
    alone = metrics(runs / f"{kind}_1")
    losses = [name for name in alone[0] if name.startswith("loss")]
    assert ("loss_balance" in losses) == (kind == "prototype")
    for name in losses:
        assert curve(runs / f"{kind}_{layout}", name) == pytest.approx(curve(runs / f"{kind}_1", name), abs=1e-6, rel=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_on_bit_for_bit(runs: Path, kind: str) -> None:
    for name in ("loss", "grad_norm"):
        assert curve(runs / f"{kind}_resumed", name) == curve(runs / f"{kind}_e2", name)
