"""A resume says which settings it changes, and keeps the old ones."""

from __future__ import annotations

from pathlib import Path

from diffmoe_dist.config import load_config
from tests.distributed import run_ranks
from tests.engine.runs import tiny_config, train_all

CHANGED = {
    "objective": {"logit_std": 0.8},
    "optim": {"lr": 5e-4, "betas": [0.9, 0.95]},
    "ema": {"decay": 0.8},
    "checkpoint": {"keep": 5},
}


def test_a_resume_says_in_one_line_which_settings_it_changes_and_keeps_the_old_file(
    tmp_path: Path, digits: Path
) -> None:
    run_dir = tmp_path / "run"
    first, changed = {"train": {"steps": 2}}, {"train": {"steps": 3}, **CHANGED}
    again = {"train": {"steps": 4}, **CHANGED}
    run_ranks(1, train_all, digits, [(run_dir, settings) for settings in (first, changed, again, again)])
    told = [line for line in (run_dir / "logs/rank-0.log").read_text().splitlines() if "settings change" in line]
    assert len(told) == 2, "nothing is said where nothing changes"
    line = told[0].partition(" settings change after step-00000002: ")[2]
    assert line == (
        "objective.logit_std 1.0 -> 0.8, train.steps 2 -> 3, "
        "optim.lr 0.001 -> 0.0005, optim.betas (0.9, 0.999) -> (0.9, 0.95), ema.decay 0.9 -> 0.8, "
        f"checkpoint.keep 2 -> 5; the old ones stay in {run_dir}/config-until-step-00000002.yaml"
    )
    rates = [line for line in (run_dir / "logs/rank-0.log").read_text().splitlines() if "learning rate" in line]
    assert len(rates) == 1 and "the learning rate of step 3 is 0.0005; it would have been 0.001" in rates[0]
    assert "step-00000003: train.steps 3 -> 4; the old ones" in told[1], "what had changed before is not told again"
    written = {path.name: load_config(path) for path in run_dir.glob("config*.yaml")}
    assert written == {
        "config-until-step-00000002.yaml": tiny_config(run_dir, digits, first, {"train": {"micro_batch_size": 16}}),
        "config-until-step-00000003.yaml": tiny_config(run_dir, digits, changed, {"train": {"micro_batch_size": 16}}),
        "config.yaml": tiny_config(run_dir, digits, again, {"train": {"micro_batch_size": 16}}),
    }
