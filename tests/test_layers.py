"""Imports go downward only: commands > engine, evaluation > parallel, data > model | diffusion > config."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "diffmoe_dist"
ROOT = Path(__file__).parents[1] / PACKAGE

LEVELS = {
    "config": 0,
    "errors": 0,
    "launch": 0,
    "model": 1,
    "diffusion": 1,
    "data": 2,
    "parallel": 2,
    "engine": 3,
    "evaluation": 3,
}
COMMAND = 4  # every other module at the top of the package, the package's own __init__ included
APART = [("model", "diffusion"), ("data", "parallel")]  # of one level, and neither imports the other
TORCH_FREE = ("config", "errors", "launch")


def sources() -> dict[str, str]:
    """Module name below the package to its text: `model.dit`, `train`; `` is the package's __init__."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__")] = path.read_text()
    return files


def imports_of(module: str, text: str) -> set[str]:
    """Every name that the module imports, wherever in it, as dotted absolute names; also what `torch.x.y` refers to."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")]
                base = ".".join([*here[: len(here) - node.level], *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found.add(f"torch.{node.attr}")
    return found


def unit(module: str) -> str:
    return module.split(".")[0]


def level(module: str) -> int:
    return LEVELS.get(unit(module), COMMAND)


def is_or_is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def complaints(module: str, text: str) -> list[str]:
    """What the module must not import."""
    wrong = []
    for name in sorted(imports_of(module, text)):
        if is_or_is_in(name, "torch.distributed") and unit(module) in ("model", "diffusion"):
            wrong.append(f"{module} uses {name}")
        allowed = unit(module) == "engine" or module == "parallel.expert_parallel"
        if is_or_is_in(name, "deepspeed") and not allowed:
            wrong.append(f"{module} imports {name}")
        if is_or_is_in(name, "torch") and module in TORCH_FREE:
            wrong.append(f"{module} imports {name}")
        if is_or_is_in(name, PACKAGE) and name != PACKAGE:
            target = name.removeprefix(f"{PACKAGE}.")
            siblings = {unit(module), unit(target)}
            upward = level(target) > level(module) or (level(target) == COMMAND and module not in ("", target))
            if upward or any(set(pair) == siblings for pair in APART):
                wrong.append(f"{module} imports {name}")
    return wrong


def test_every_module_imports_downward_only() -> None:
    modules = sources()

    assert {"model.dit", "parallel.pool", "engine.trainer", "train", "config", ""} <= set(modules)
    assert [complaint for module, text in modules.items() for complaint in complaints(module, text)] == []


def test_engine_and_evaluation_do_not_import_each_other_both_ways() -> None:
    directions = {
        (unit(module), unit(name.removeprefix(f"{PACKAGE}.")))
        for module, text in sources().items()
        for name in imports_of(module, text)
    }

    assert not {("engine", "evaluation"), ("evaluation", "engine")} <= directions


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("model.dit", "import torch.distributed as dist"),
        ("model.dit", "def f():\n    from torch import distributed"),
        ("diffusion.samplers", "import torch\nx = torch.distributed.get_rank()"),
        ("model.dit", "from diffmoe_dist.diffusion.objectives import RectifiedFlow"),
        ("diffusion.samplers", "from ..model import dit"),
        ("model.dit", "from diffmoe_dist.parallel import pool"),
        ("config", "from diffmoe_dist.model.dit import DiT"),
        ("config", "import torch"),
        ("data.loader", "from diffmoe_dist.parallel.topology import Topology"),
        ("parallel.topology", "import deepspeed"),
        ("train", "from deepspeed.utils import groups"),
        ("parallel.pool", "from diffmoe_dist import engine"),
        ("engine.trainer", "from diffmoe_dist.sample import main"),
        ("sample", "from diffmoe_dist.train import main"),
    ],
)
def test_an_import_that_goes_the_wrong_way_is_seen_in_every_form(module: str, text: str) -> None:
    assert complaints(module, text)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("train", "from diffmoe_dist.engine.build import build_trainer"),
        ("", "from diffmoe_dist.engine.weights import read_model"),
        ("engine.build", "import deepspeed"),
        ("parallel.expert_parallel", "import deepspeed"),
        ("parallel.pool", "import torch.distributed as dist\nfrom .dispatch import plan_dispatch"),
        ("model.dit", "from diffmoe_dist.model.blocks import DiTBlock\nfrom diffmoe_dist.config import Config"),
    ],
)
def test_an_import_that_goes_downward_is_allowed(module: str, text: str) -> None:
    assert complaints(module, text) == []
