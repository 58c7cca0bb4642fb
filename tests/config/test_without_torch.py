"""Settings load, and mistakes in them are told, where torch is not installed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from diffmoe_dist.config import for_world, load_config
from tests.machine import ROOT

# An import of torch fails as where it is not installed, and nothing may have caught that.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from diffmoe_dist.config import load_config
from diffmoe_dist.errors import UserError
try:
    print(load_config(sys.argv[1], sys.argv[2:]).moe)
except UserError as error:
    print("told:", error)
assert not [name for name in sys.modules if name.split(".")[0] == "torch" and sys.modules[name] is not None]
"""


def load_without_torch(config: str, *overrides: str) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "configs" / config), "data.shards=somewhere", *overrides]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("router", ["dense", "global_pool", "expert_choice_dynamic", "prototype", "token_choice"])
def test_the_settings_of_every_router_load_without_torch(router: str) -> None:
    assert load_without_torch(f"debug/{router}.yaml").startswith(("Settings(router=", "MoEConfig(router="))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("moe.capacity=99", "told: moe.capacity=99.0 is more than moe.num_experts="),
        ("moe.capactiy=1", "told: unknown setting moe.capactiy=1; did you mean moe.capacity?"),
        ("moe.router=globl", "told: moe.router=globl is not a router; did you mean global_pool?"),
        ("model.depth=0", "told: model.depth=0 must be from 1 to 1000"),
    ],
)
def test_a_mistake_is_told_without_torch(override: str, told: str) -> None:
    assert load_without_torch("debug/global_pool.yaml", override).startswith(told)


def test_the_training_command_tells_a_mistake_in_a_routers_settings_before_it_imports_torch() -> None:
    program = (
        "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('diffmoe_dist.train', run_name='__main__')"
    )
    arguments = ["--config", "configs/debug/global_pool.yaml", "data.shards=somewhere", "moe.capacity=99"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: moe.capacity=99.0 is more than moe.num_experts=")


def test_a_configuration_does_not_change() -> None:
    config = load_config(ROOT / "configs/debug/global_pool.yaml", ["data.shards=somewhere"])
    with pytest.raises(FrozenInstanceError):
        config.train.micro_batch_size = 3  # type: ignore[misc]
    assert for_world(config, 2).train.micro_batch_size == config.train.global_batch_size // 2
    assert config.train.micro_batch_size == 0
