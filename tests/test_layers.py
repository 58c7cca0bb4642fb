"""The floors of the house: a package imports from floors below its own, never upward, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "diffmoe_dist"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the ground up; packages of one floor do not import each other.
FLOORS = (
    ("errors",),
    ("launch", "files", "logs", "own_code"),
    ("command", "config"),
    ("model", "diffusion"),
    ("data", "parallel"),
    ("planning",),
    ("engine",),
    ("sampling",),
    ("evaluation", "library"),
    ("report_page",),
)
COMMANDS = len(FLOORS)  # every other module at the top of the package, the package's own __init__ included
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
TORCH_FREE = ("errors", "launch", "files", "logs", "own_code", "command", "config")


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


def floor(module: str) -> int:
    return FLOOR_OF.get(unit(module), COMMANDS)


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
        if is_or_is_in(name, "torch") and unit(module) in TORCH_FREE:
            wrong.append(f"{module} imports {name}")
        if is_or_is_in(name, PACKAGE) and name != PACKAGE:
            target = name.removeprefix(f"{PACKAGE}.")
            own_room = unit(module) == unit(target) and floor(module) < COMMANDS
            if floor(target) >= floor(module) and not own_room and module not in ("", target):
                wrong.append(f"{module} imports {name}")
    return wrong


def test_every_module_imports_downward_only() -> None:
    modules = sources()

    assert {"model.dit", "parallel.pool", "engine.trainer", "train", "config", ""} <= set(modules)
    assert [complaint for module, text in modules.items() for complaint in complaints(module, text)] == []


def circles(modules: dict[str, str]) -> list[set[str]]:
    """Groups of modules that import each other, be it inside of a function or for types alone."""
    graph = {module: _modules_imported(module, text, set(modules)) for module, text in modules.items()}
    reach = {module: _reachable(module, graph) for module in graph}
    found = {
        frozenset(other for other in graph if other in reach[module] and module in reach[other]) for module in graph
    }
    return sorted(({*circle} for circle in found if circle), key=sorted)


def _modules_imported(module: str, text: str, modules: set[str]) -> set[str]:
    """The modules of the package that one needs; `import a.b` needs `a` too, but a package needs not its modules."""
    names = {name.removeprefix(f"{PACKAGE}.") for name in imports_of(module, text) if name.startswith(f"{PACKAGE}.")}
    return (names & modules) - {module}


def _reachable(module: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = [*graph[module]]
    while ahead:
        here = ahead.pop()
        if here not in seen:
            seen.add(here)
            ahead += graph[here]
    return seen


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(sources()) == []


def test_a_circle_is_found_also_where_an_import_is_inside_of_a_function() -> None:
    modules = {
        "data.a": "from diffmoe_dist.data.b import B",
        "data.b": "def f():\n    from diffmoe_dist.data import c",
        "data.c": "from diffmoe_dist.data.a import A",
        "data.d": "from diffmoe_dist.data.a import A",
    }

    assert circles(modules) == [{"data.a", "data.b", "data.c"}]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("model.dit", "import torch.distributed as dist"),
        ("model.dit", "def f():\n    from torch import distributed"),
        ("diffusion.samplers", "import torch\nx = torch.distributed.get_rank()"),
        ("model.dit", "from diffmoe_dist.diffusion.objectives import RectifiedFlow"),
        ("diffusion.samplers", "from ..model import dit"),
        ("model.dit", "from diffmoe_dist.parallel import pool"),
        ("config.checks", "from diffmoe_dist.model.dit import DiT"),
        ("config.routers.global_pool", "import torch"),
        ("errors", "from diffmoe_dist.launch import detect_launch"),
        ("engine.build", "def f():\n    from diffmoe_dist.sampling.generate import generate"),
        ("sampling.job", "from diffmoe_dist.evaluation.scores import score"),
        ("planning.memory", "from diffmoe_dist.engine.build import deepspeed_settings"),
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
