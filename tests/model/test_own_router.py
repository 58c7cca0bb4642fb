"""The worked example of docs/architecture.md: a router of one's own is two short files and one configuration."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffmoe_dist import config as configuration
from diffmoe_dist import load_model
from diffmoe_dist.config import load
from diffmoe_dist.engine.weights import read_settings, write_weights
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.planning.workload import workload
from tests.machine import ROOT

DOCUMENT = ROOT / "docs/architecture.md"
LAYERS: list[dict[str, Any]] = [
    {"run_dir": "r", "data": {"shards": "s"}},
    {"model": {"depth": 4, "hidden_size": 16, "num_heads": 2, "input_size": 8, "in_channels": 1, "num_classes": 5}},
    {"moe": {"router": "by_place", "num_experts": 4, "shared_experts": 1}},
]


@pytest.fixture
def by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the document's two files among the settings and the routers."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    for package, sign in (("config", "class Settings(RouterSettings)"), ("model", "class ByPlace(Router)")):
        (text,) = [block for block in blocks if sign in block]
        file = tmp_path / f"{package}_by_place.py"
        file.write_text(text)
        name = f"diffmoe_dist.{package}.routers.by_place"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    names = [*configuration.router_names(), "by_place"]
    monkeypatch.setattr(load, "router_names", lambda: names)


def workload_of(config: configuration.Config) -> float:
    """Assignments to experts that are planned for a micro-batch of three images."""
    three = replace(config, train=replace(config.train, global_batch_size=3, micro_batch_size=3))
    return workload(three, ranks=1).assignments


@pytest.mark.usefixtures("by_place")
def test_the_documented_example_trains_and_its_settings_are_checked() -> None:
    config = configuration.build_config(*LAYERS, {"moe": {"gate_loss_weight": 0.1}})
    assert configuration.loss_weights(config) == {"gate": 0.1}
    model = DiT(config).train()
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    output = model(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 5]))
    (output.prediction.square().mean() + output.losses["gate"]).backward()
    assert all(p.grad is not None and p.grad.any() for layer in model.moe_layers for p in layer.router.parameters())
    assert [stats.tokens_per_expert.tolist() for stats in output.routing] == [[12] * 4] * 2  # 3 images of 16 tokens
    assert account(config).nominal_capacity == 1.0 and workload_of(config) == 3 * 16  # one expert per token
    with pytest.raises(UserError, match=r"moe\.top_k=2 has no effect with moe\.router=by_place"):
        configuration.build_config(*LAYERS, {"moe": {"top_k": 2}})


def test_a_router_by_its_import_path_is_trained_kept_and_missed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[:2]
    package = tmp_path / "own_routers"
    package.mkdir()
    (package / "by_place.py").write_text(first + second.partition("annotations\n")[2])
    (package / "empty.py").write_text("")
    (tmp_path / "named_alone.py").write_text("class Settings: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = {"moe": {"router": "own_routers.by_place"}}

    config = configuration.build_config(*LAYERS, own, {"moe": {"gate_loss_weight": 0.1}})
    model = DiT(config).eval()
    initialize(model, 0)
    write_weights(tmp_path / "weights", model.state_dict(), config, {})
    assert load_model(tmp_path / "weights").config.moe == config.moe
    assert configuration.own_router(config) == "own_routers.by_place"
    assert configuration.own_router(configuration.build_config(*LAYERS[:2])) is None
    assert configuration.loss_weights(config) == {"gate": 0.1} and workload_of(config) == 3 * 16
    for router, message in (
        (
            "own_routers.none",
            r"there is no module own_routers\.none that Python can import; install what",
        ),
        ("own_routers.empty", r"empty\.py has no dataclass Settings that extends diffmoe_dist\.config\.RouterSettings"),
        ("named_alone", r"named_alone\.py has no dataclass Settings"),
        ("pickle", r"moe\.router=pickle is not a router; .*, or the import path of your own, as my_package\.my_router"),
        ("../x", r"moe\.router=\.\./x is not a router"),
    ):
        with pytest.raises(UserError, match=message):
            configuration.build_config(*LAYERS, {"moe": {"router": router}})
    with pytest.raises(UserError, match=r"moe\.top_k=2 has no effect with moe\.router=own_routers\.by_place"):
        configuration.build_config(*LAYERS, own, {"moe": {"top_k": 2}})
    for name in ("own_routers", "own_routers.by_place"):
        del sys.modules[name]
    with pytest.raises(UserError, match=r"moe\.router=own_routers\.by_place is code outside .* to say that it may run"):
        load_model(tmp_path / "weights")
    assert "own_routers" not in sys.modules  # what a folder names is not imported
    with pytest.raises(UserError, match=r"moe\.router=dense, but the model is one with moe\.router=own_routers"):
        read_settings(tmp_path / "weights", ["moe.router=dense"])
    assert read_settings(tmp_path / "weights", ["moe.router=own_routers.by_place"]).moe.router == "own_routers.by_place"
    assert load_model(tmp_path / "weights").config.moe.router == "own_routers.by_place"  # now that it is imported
    for name in ("own_routers", "own_routers.by_place"):
        del sys.modules[name]
    (tmp_path / "own_routers").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"config\.json: .*=own_routers\.by_place: there is no module own_routers"):
        read_settings(tmp_path / "weights", ["moe.router=own_routers.by_place"])


def test_without_its_files_the_router_is_not_known() -> None:
    with pytest.raises(UserError, match=r"moe\.router=by_place is not a router"):
        configuration.build_config(*LAYERS)
