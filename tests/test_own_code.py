"""Modules of the user's own, by import path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffmoe_dist.errors import UserError
from diffmoe_dist.own_code import import_callable, import_score


def test_what_a_module_of_ones_own_raises_is_not_told_as_a_module_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises_at_import.py").write_text('int("a")\n')
    (tmp_path / "needs_another.py").write_text("import module_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="invalid literal for int"):
        import_callable("raises_at_import:score", "--score")
    with pytest.raises(ModuleNotFoundError, match="module_that_is_missing"):
        import_callable("needs_another:score", "--score")
    for name in ("", ".raises_at_import", "raises..at_import"):
        with pytest.raises(UserError, match="--score: there is no module without a name that Python can import"):
            import_callable(f"{name}:score", "--score")


def test_a_metric_of_ones_own_that_gives_no_finite_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text("def score(images):\n    return images\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    score = import_score("own_metric")
    assert score("0.5") == 0.5
    with pytest.raises(UserError, match=r"^--score own_metric: it returned a list; return a number$"):
        score([])
    for value in ("nan", "inf"):
        with pytest.raises(UserError, match=rf"^--score own_metric: it returned {value}; return a finite number$"):
            score(value)
