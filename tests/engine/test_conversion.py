"""Published files to folders of weights, through the command and back through load_model."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffmoe_dist import load_model
from diffmoe_dist.config import Config, build_config, load_config, model_settings
from diffmoe_dist.convert import main
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.engine import weights as weights_module
from diffmoe_dist.engine.conversion import read_state_dict
from diffmoe_dist.engine.weights import read_model, read_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.published import check_buildable
from tests.commands import start
from tests.published import Form, Router, forward, synthetic_state_dict

MODEL = [
    "model.depth=4", "model.hidden_size=32", "model.num_heads=4", "model.input_size=8", "model.num_classes=10",
    "model.learn_sigma=true",
]  # fmt: skip
DIFFMOE = ["moe.num_experts=4", "objective.direction=data_at_one"]
PROMOE = ["moe.router=prototype", "moe.num_experts=4", "objective.direction=noise_at_one", "objective.time_scale=1000"]
GLOBAL_POOL = ["moe.router=global_pool", *DIFFMOE, "moe.inference=count"]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command in this process: what to convert, and its arguments, to a folder."""

    def run(layout: str, content: Any, *arguments: str, name: str = "out", file: str = "published.pt") -> Path:
        config, out = tmp_path / "config.yaml", tmp_path / name
        config.write_text("seed: 0\n")
        if content is not None:
            torch.save(content, tmp_path / file)
        command = ["convert", "--from", layout, str(tmp_path / file), "--config", str(config), *MODEL, *arguments]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
        main()
        return out

    return run


def images(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, times in [0, 1], labels with two null ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, 8, 8, generator=generator)
    return x, torch.rand(6, generator=generator), torch.tensor([0, 10, 3, 9, 10, 5])


def all_channels(folder: Path, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """(N, 2 C, H, W), with the times given to the model as the folder's objective says."""
    model, config = read_model(folder, "cpu")
    assert not model.training
    objective = build_objective(config)
    output = model(x, objective.model_time(objective.times(t.double())), y)
    assert output.variance is not None
    return torch.cat([output.prediction, output.variance], dim=1)


CASES: dict[str, tuple[str, str, list[str], dict[str, Any]]] = {
    "dit": ("dit", "dense", ["objective.name=ddpm"], {}),
    "diffmoe dense": ("diffmoe", "dense", [], {}),
    "promoe dense": ("promoe", "dense", ["objective.time_scale=1000"], {}),
    **{
        f"TC-DiT top {k}": (
            "diffmoe", "token_choice", ["moe.router=token_choice", *DIFFMOE, f"moe.top_k={k}"], {"top_k": k},
        )
        for k in (1, 2)
    },
    **{
        f"EC-DiT capacity {c}": (
            "diffmoe", "expert_choice", ["moe.router=expert_choice", *DIFFMOE, f"moe.capacity={c}"], {"capacity": c},
        )
        for c in (1.0, 2.0)
    },
    "DiffMoE": ("diffmoe", "global_pool", GLOBAL_POOL, {}),
    **{
        f"ProMoE {variant} top {k} {scores}": (
            "promoe", variant, [*PROMOE, f"moe.variant={variant}", f"moe.top_k={k}", f"moe.scores={scores}"],
            {"top_k": k, "activation": scores},
        )
        for variant in ("token_choice", "expert_choice") for k in (1, 2)
        for scores in ("identity", "sigmoid", "softmax")
    },
}  # fmt: skip


# Options of the code bases that change which tensors there are.
ALL = "moe.blocks=all"
TOKEN_CHOICE, EXPERT_CHOICE = ["moe.router=token_choice", *DIFFMOE], ["moe.router=expert_choice", *DIFFMOE]
SHARED_SWIGLU = ["moe.shared_experts=2", "moe.shared_mlp_ratio=1.0", "moe.shared_activation=swiglu"]
NO_UNCONDITIONAL = ["moe.unconditional_expert=false", "model.qk_norm=layer"]
FORMS: dict[str, Form] = {
    "dit normed": Form(qk_norm="layer"),
    "dit RMS, wide heads": Form(qk_norm="rms", head_dim=12),
    "diffmoe dense SwiGLU, narrow heads": Form(swiglu=True, head_dim=4),
    "DiffMoE SwiGLU, every block, GELU shared": Form(
        swiglu=True, every_block=True, shared=("gelu", 8 * 32), qk_norm="layer", head_dim=12
    ),
    "TC-DiT SwiGLU shared": Form(shared=("swiglu", 2 * 32), qk_norm="layer"),
    "EC-DiT SwiGLU throughout": Form(swiglu=True, shared=("swiglu", 2 * 32), every_block=True),
    "ProMoE without an unconditional expert": Form(unconditional=False, qk_norm="layer", head_dim=12),
    "ProMoE in every block": Form(every_block=True, shared=("gelu", 24)),
    "ProMoE expert choice, renamed": Form(unconditional=False, renamed=True, qk_norm="layer"),
}
CASES |= {
    "dit normed": ("dit", "dense", ["objective.name=ddpm", "model.qk_norm=layer"], {}),
    "dit RMS, wide heads": ("dit", "dense", ["objective.name=ddpm", "model.qk_norm=rms", "model.head_dim=12"], {}),
    "diffmoe dense SwiGLU, narrow heads": (
        "diffmoe", "dense", ["model.activation=swiglu", "model.head_dim=4"], {}
    ),
    "DiffMoE SwiGLU, every block, GELU shared": (
        "diffmoe", "global_pool",
        [*GLOBAL_POOL, ALL, "model.activation=swiglu", "model.qk_norm=layer", "model.head_dim=12",
         "moe.shared_experts=2", "moe.shared_activation=gelu"], {},
    ),
    "TC-DiT SwiGLU shared": ("diffmoe", "token_choice", [*TOKEN_CHOICE, *SHARED_SWIGLU, "model.qk_norm=layer"], {}),
    "EC-DiT SwiGLU throughout": (
        "diffmoe", "expert_choice", [*EXPERT_CHOICE, *SHARED_SWIGLU, ALL, "model.activation=swiglu"], {}
    ),
    "ProMoE without an unconditional expert": (
        "promoe", "token_choice", [*PROMOE, *NO_UNCONDITIONAL, "model.head_dim=12"], {}
    ),
    "ProMoE in every block": ("promoe", "token_choice", [*PROMOE, ALL, "moe.shared_mlp_ratio=0.75"], {}),
    "ProMoE expert choice, renamed": (
        "promoe", "expert_choice", [*PROMOE, *NO_UNCONDITIONAL, "moe.variant=expert_choice"], {}
    ),
}  # fmt: skip


def state_of(case: str) -> dict[str, Tensor]:
    layout, variant, _, _ = CASES[case]
    # The dense models of all code bases have one layout.
    return synthetic_state_dict("dit" if variant == "dense" else layout, variant, form=FORMS.get(case))


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_computes_what_the_published_one_computes(case: str, convert: Any) -> None:
    layout, variant, settings, options = CASES[case]
    dense_or_own = "dit" if variant == "dense" else layout
    state = state_of(case)
    folder = convert(layout, state, *settings)
    x, t, y = images()
    model_time = (1000 * t).floor() if layout == "dit" else 1000 * t if layout == "promoe" else t
    expected = forward(dense_or_own, state, x, model_time, y, Router(variant, **options))
    torch.testing.assert_close(all_channels(folder, x, t, y), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1, "there is something to compare"


ONE_OF_EACH = [case for case in CASES if "top 2" not in case and "sigmoid" not in case and "2.0" not in case]


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_model_is_recognised_by_its_tensors_and_goes_back_to_them(
    case: str, convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, variant, settings, _ = CASES[case]
    state = state_of(case)
    folder = convert(layout, state, *settings)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["convert", "--inspect", str(tmp_path / "published.pt")])
    main()
    printed = capsys.readouterr().out
    (tmp_path / "found.yaml").write_text(printed)
    assert printed.startswith(f"# published.pt: convert it with --from {'dit' if variant == 'dense' else layout}.")
    unseen = ["model.num_heads", "moe.variant", "moe.scores", *([] if "qk_norm" in printed else ["model.head_dim"])]
    given = [one for one in [*MODEL, *settings] if one.startswith(tuple(unseen))]
    found, expected = load_config(tmp_path / "found.yaml", given, training=False), read_settings(folder)
    for key, value in model_settings(expected).items():
        if not key.startswith("objective."):
            assert model_settings(found)[key] == value, key
    if "RMS" in case:
        return  # the code bases have none
    monkeypatch.setattr(
        sys, "argv", ["convert", "--to", layout, "--checkpoint", str(folder), "--out", str(tmp_path / "back.pt")]
    )
    if case == "dit normed":
        with pytest.raises(UserError, match=r"--to dit: its code has no model with model\.qk_norm=layer; --to safet"):
            main()
        return
    main()
    back, taken = read_state_dict(tmp_path / "back.pt")
    assert taken == ("ema" if layout == "promoe" else "only")
    if case == "ProMoE expert choice, renamed":
        state = {re.sub(r"(\.[02]\.mlp\.)up_proj", r"\1fc1", name): value for name, value in state.items()}
        state = {re.sub(r"(\.[02]\.mlp\.)down_proj", r"\1fc2", name): value for name, value in state.items()}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("promoe", ["moe.router=global_pool", "moe.num_experts=4"], r"no model with moe\.router=global_pool;"),
        ("dit", ["model.head_dim=12"], r"no model with model\.head_dim=12;"),
        ("promoe", ["model.activation=swiglu"], r"no model with model\.activation=swiglu;"),
        ("diffmoe", [*GLOBAL_POOL, "moe.blocks=[0, 2]"], r"no model with moe\.blocks=\[0, 2\];"),
        ("diffmoe", [*GLOBAL_POOL, "moe.activation=swiglu"], r"no model with moe\.activation=swiglu;"),
        ("diffmoe", [*GLOBAL_POOL, "moe.expert_mlp_ratio=2.0"], r"no model with moe\.expert_mlp_ratio=2;"),
        ("diffmoe", [*TOKEN_CHOICE, "moe.shared_experts=1"], r"no model with moe\.shared_experts of gelu, 128 wide;"),
        ("diffmoe", [*GLOBAL_POOL, "moe.shared_experts=1"], r"no model with moe\.shared_experts of gelu, 128 wide;"),
        ("promoe", [*PROMOE, "moe.shared_experts=2"], r"no model with moe\.shared_experts=2;"),
        ("diffmoe", [*EXPERT_CHOICE, "moe.capacity_predictor=true"], r"no model with moe\.capacity_predictor=true;"),
    ],
)
def test_a_model_that_published_code_cannot_build_is_not_written_in_its_names(
    layout: str, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=f"--to {layout}: its code has {message} --to safetensors takes every model"):
        check_buildable(layout, build_config({}, overrides=[*MODEL, *settings], training=False))


def test_a_file_of_another_code_base_is_told_as_such(convert: Any, tmp_path: Path) -> None:
    state = synthetic_state_dict("diffmoe", "token_choice")
    with pytest.raises(
        UserError, match=r"--from promoe: .* has the names of --from diffmoe, with moe\.router=token_ch"
    ):
        convert("promoe", state, *PROMOE)
    assert not (tmp_path / "out").exists()


def test_what_is_no_published_file_is_told_when_it_is_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = synthetic_state_dict("promoe", "token_choice")
    for change, message in (
        (lambda s: s.pop("x_embedder.proj.weight"), r"x_embedder\.proj\.weight is missing, so it is no file of DiT"),
        (lambda s: s.update(rope=torch.ones(2)), r"rope of shape \[2\] has no place in a model of these settings"),
        (lambda s: s.pop("blocks.3.mlp.experts.1.up_proj.bias"), r"experts\.1\.up_proj\.bias is missing"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "file.pt")
        monkeypatch.setattr(sys, "argv", ["convert", "--inspect", str(tmp_path / "file.pt")])
        with pytest.raises(UserError, match=message):
            main()


def test_the_folder_says_what_it_is_and_where_it_came_from(convert: Any, tmp_path: Path) -> None:
    folder = convert("promoe", synthetic_state_dict("promoe", "token_choice"), *PROMOE)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    record = json.loads((folder / "config.json").read_text())
    assert (record["format"], record["version"]) == ("diffmoe-weights", 1)
    assert record["source"] == {
        "layout": "promoe", "file": "published.pt", "sha256": file_sha256(tmp_path / "published.pt"), "weights": "only",
        "upcycled": False,
    }  # fmt: skip
    assert record["sha256"] == {"model.safetensors": file_sha256(folder / "model.safetensors")}
    assert record["settings"]["moe"]["expert_mlp_ratio"] == 2.0
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert str(tmp_path) not in (folder / "config.json").read_text()


def scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in state.items()}


WRAPPERS = {
    "DiffMoE": ("ema", "model", {"opt": {"state": {}}, "args": argparse.Namespace(config="c.yaml", steps=7)}),
    "ProMoE": ("ema_model_state_dict", "model_state_dict", {"step": 5, "optimizer_state_dict": {}}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_averaged_weights_of_a_training_checkpoint_are_taken_unless_told(convert: Any, wrapper: str) -> None:
    averaged, own, rest = WRAPPERS[wrapper]
    state = synthetic_state_dict("dit")
    content = {averaged: state, own: scaled(state, 2), **rest}
    for arguments, name, factor in (((), "ema", 1), (("--weights", "model"), "model", 2)):
        folder = convert("dit", content, *arguments, name=name)
        bias = load_file(folder / "model.safetensors")["x_embedder.proj.bias"]
        assert torch.equal(bias, factor * state["x_embedder.proj.bias"])
        assert json.loads((folder / "config.json").read_text())["source"]["weights"] == name
    del content[averaged]
    folder = convert("dit", content, name="rest")
    assert json.loads((folder / "config.json").read_text())["source"]["weights"] == "model"
    with pytest.raises(UserError, match=r"--weights ema: .* holds no such weights, only --weights model"):
        convert("dit", content, "--weights", "ema", name="none")
    with pytest.raises(UserError, match=r"--weights ema: .* holds one set of weights; leave it out"):
        convert("dit", state, "--weights", "ema", name="none")


@pytest.mark.parametrize("form", ["bfloat16", "old pickle", "safetensors"])
def test_a_file_may_be_in_half_precision_in_the_old_format_or_in_safetensors(
    convert: Any, tmp_path: Path, form: str
) -> None:
    state = synthetic_state_dict("dit")
    if form == "bfloat16":
        folder = convert("dit", {name: value.bfloat16() for name, value in state.items()})
        state = {name: value.bfloat16().float() for name, value in state.items()}
    elif form == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
        folder = convert("dit", None, file="model.safetensors")
    else:
        torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        folder = convert("dit", None, file="old.pt")
    assert all(torch.equal(value, state[name]) for name, value in load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.", "module.module."],
)
def test_names_that_distributed_training_or_compiling_has_put_a_prefix_before_are_read(
    convert: Any, prefix: str
) -> None:
    state = synthetic_state_dict("dit")
    folder = convert("dit", {"ema": {f"{prefix}{name}": value for name, value in state.items()}})
    assert all(torch.equal(value, state[name]) for name, value in load_file(folder / "model.safetensors").items())


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_fsdp_wrapped_module._orig_mod"])
def test_names_that_compiling_or_sharding_has_changed_in_their_middle_are_read(convert: Any, wrapper: str) -> None:
    state = synthetic_state_dict("dit")
    folder = convert("dit", {name.replace("blocks.1.", f"blocks.1.{wrapper}."): value for name, value in state.items()})
    assert all(torch.equal(value, state[name]) for name, value in load_file(folder / "model.safetensors").items())


def test_the_averages_of_torchs_averaged_model_are_read(convert: Any) -> None:
    state = synthetic_state_dict("dit")
    module = torch.nn.Module()
    averaged = torch.optim.swa_utils.AveragedModel(module).state_dict()
    averaged.update({f"module.{name}": value for name, value in state.items()})
    folder = convert("dit", {"ema": averaged})
    assert load_file(folder / "model.safetensors").keys() == state.keys()


def test_two_tensors_under_one_name_are_refused(convert: Any) -> None:
    state = synthetic_state_dict("dit")
    with pytest.raises(UserError, match="tensors under one name but for module"):
        convert("dit", {**state, "module.x_embedder.proj.bias": state["x_embedder.proj.bias"]})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_written(
    convert: Any, tmp_path: Path, value: float
) -> None:
    state = synthetic_state_dict("dit")
    state["x_embedder.proj.bias"][1] = value
    with pytest.raises(UserError, match=r"x_embedder\.proj\.bias holds numbers that are not finite, 1 of "):
        convert("dit", state, name="diverged")
    assert not (tmp_path / "diverged").exists()


def test_a_file_that_is_a_pointer_of_git_lfs_is_told(convert: Any, tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
        with pytest.raises(UserError, match="is a pointer of Git LFS, not the file itself; run git lfs pull"):
            convert("dit", None, file=name)


def test_the_position_table_of_the_file_is_taken_over(convert: Any) -> None:
    state = synthetic_state_dict("dit")
    torch.testing.assert_close(load_model(convert("dit", state)).pos_embed, state["pos_embed"], atol=0, rtol=0)
    state["pos_embed"] = state["pos_embed"] + 1
    assert torch.equal(load_model(convert("dit", state, name="other")).pos_embed, state["pos_embed"])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999])
def test_thresholds_move_on_as_the_published_moving_average_would(convert: Any, decay: float) -> None:
    state = synthetic_state_dict("diffmoe", "global_pool")
    for name in state:
        if name.endswith(".ema_decay"):
            state[name] = torch.full((1,), decay)
    model, config = read_model(convert("diffmoe", state, *GLOBAL_POOL), "cpu")
    assert config.moe.threshold_decay == decay  # type: ignore[attr-defined]
    router: Any = model.moe_layers[0].router
    before, proposal = router.threshold.clone(), torch.tensor([0.1, 0.9, 0.5, 0.0])
    assert torch.equal(before, state["blocks.1.mlp.expert_threshold"])
    router.update_threshold(proposal)
    torch.testing.assert_close(router.threshold, decay * before + (1 - decay) * proposal, atol=1e-7, rtol=0)


def without(state: dict[str, Tensor], name: str) -> None:
    del state[name]


def changed(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    state[name] = value


MISFITS: dict[str, tuple[Any, list[str], str]] = {
    "missing": (
        lambda s: without(s, "blocks.2.attn.proj.bias"), [],
        r"blocks\.2\.attn\.proj\.bias is missing, but these settings need it, of shape \[32\]; set model\.hidden_size",
    ),
    "missing expert": (
        lambda s: without(s, "blocks.3.mlp.experts.2.fc1.weight"), [],
        r"blocks\.3\.mlp\.experts\.2\.fc1\.weight is missing, .* of shape \[128, 32\]; set moe\.router, moe\.num_exp",
    ),
    "extra": (
        lambda s: changed(s, "blocks.0.attn.q_norm.weight", torch.ones(8)), [],
        r"blocks\.0\.attn\.q_norm\.weight of shape \[8\] has no place in a model of these settings",
    ),
    "transposed": (
        lambda s: changed(s, "blocks.1.mlp.experts.0.fc2.weight", torch.ones(128, 32)), [],
        r"experts\.0\.fc2\.weight has shape \[128, 32\], but these settings need \[32, 128\]",
    ),
    "integers": (
        lambda s: changed(s, "final_layer.linear.bias", torch.ones(32, dtype=torch.int64)), [],
        r"final_layer\.linear\.bias is of type torch\.int64",
    ),
    "more classes": (
        lambda s: None, ["model.num_classes=1000"],
        r"y_embedder.* has shape \[11, 32\], but these settings need \[1001, 32\]; set model\.num_classes",
    ),
    "more experts": (
        lambda s: None, ["moe.num_experts=8"],
        r"blocks\.1\.mlp\.gate_weight has shape \[4, 32\], but these settings need \[8, 32\].*moe\.num_experts",
    ),
    "less depth": (
        lambda s: None, ["model.depth=2"], r"blocks\.2\.attn\.qkv\.weight of shape .* has no place .*model\.depth",
    ),
    "no learned variance": (
        lambda s: None, ["model.learn_sigma=false"],
        r"final_layer\.linear\.weight has shape \[32, 32\], but these settings need \[16, 32\].*model\.learn_sigma",
    ),
    "another router": (
        lambda s: None, ["moe.router=token_choice", "moe.inference=null"],
        r"blocks\.1\.mlp\.gate\.weight is missing",
    ),
    "decay out of range": (
        lambda s: changed(s, "blocks.1.mlp.ema_decay", torch.tensor([1.0])), [],
        r"blocks\.1\.mlp\.ema_decay is 1\.0, which is no decay in \[0, 1\)",
    ),
    "decays that differ": (
        lambda s: changed(s, "blocks.1.mlp.ema_decay", torch.tensor([0.5])), [],
        r"the decays \[0\.5, 0\.95\] differ between layers",
    ),
    "no tensor": (
        lambda s: changed(s, "blocks.1.mlp.ema_decay", 0.95), [],  # type: ignore[arg-type]
        r"blocks\.1\.mlp\.ema_decay is a float, no tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(convert: Any, tmp_path: Path, misfit: str) -> None:
    change, settings, message = MISFITS[misfit]
    state = synthetic_state_dict("diffmoe", "global_pool")
    change(state)
    with pytest.raises(UserError, match=message) as caught:
        convert("diffmoe", state, *GLOBAL_POOL, *settings)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "published.pt"]


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("dit", ["moe.router=token_choice", "moe.num_experts=4"], "--from dit is a dense model, .*or --upcycle"),
        ("diffmoe", PROMOE, "--from diffmoe has no model with moe.router=prototype; .* the names of --from promoe"),
        ("promoe", GLOBAL_POOL, "--from promoe has no model with moe.router=global_pool; .* the names of --from diffm"),
        ("sit", [], "--from sit: unknown layout; choose from dit, diffmoe, promoe"),
        ("diffmoe", ["--upcycle", *GLOBAL_POOL], "--upcycle starts from a dense model; use it with --from dit"),
        ("dit", ["--upcycle"], "--upcycle makes experts, but moe.router=dense has none"),
        ("dit", ["--upcycle", *PROMOE], "moe.expert_mlp_ratio=2.0, but the dense layers have model.mlp_ratio=4.0"),
        ("dit", ["--upcycle", *GLOBAL_POOL, "moe.activation=swiglu"], "--upcycle: moe.activation=swiglu, but"),
        ("dit", ["--upcycle", *GLOBAL_POOL, "moe.shared_experts=2"], "--upcycle: moe.shared_experts=2 are one layer"),
    ],
)
def test_a_model_that_a_layout_does_not_have_is_refused(
    convert: Any, tmp_path: Path, layout: str, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        convert(layout, synthetic_state_dict("dit"), *settings)
    assert not (tmp_path / "out").exists()


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_names_code_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "executed"
    content = {"ema": synthetic_state_dict("dit"), "args": Malicious(target)}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    ended = start(
        "diffmoe_dist.convert", "--from", "dit", tmp_path / "bad.pt", "--config", tmp_path / "config.yaml", *MODEL,
        "--out", tmp_path / "out", folder=tmp_path,
    )[0]  # fmt: skip
    assert ended.wait() == 2
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "names posix.mkdir, which could be code" in ended.stderr
    assert not target.exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert target.exists(), "the file would have done it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no file of torch.save, or damaged"),
        (b"what is this" * 100, "is no file of torch.save, or damaged"),
        (b"PK\x03\x04" + b"\0" * 100, "is no file of torch.save, or damaged"),
        (None, "no such file"),
        ([torch.ones(2)], "holds a list, no state dict"),
        ({"step": 5, "weights": {}}, "step is a int, no tensor"),
    ],
)
def test_a_file_that_is_no_state_dict_is_refused(convert: Any, tmp_path: Path, content: Any, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / "published.pt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert("dit", None if isinstance(content, bytes) else content)


def test_a_folder_that_holds_something_is_never_written_over(convert: Any, tmp_path: Path) -> None:
    state = synthetic_state_dict("dit")
    (tmp_path / "empty").mkdir()
    folder = convert("dit", state, name="empty")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"--out .*empty: exists and is not an empty folder; choose another"):
        convert("dit", state, name="empty")
    assert (folder / "config.json").read_bytes() == before


def test_a_conversion_that_fails_while_writing_leaves_nothing(
    convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_module, "write_json", full)
    with pytest.raises(UserError, match=r"--out .*out: cannot be written \(.*No space left on device\)"):
        convert("dit", synthetic_state_dict("dit"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "published.pt"]


def test_settings_of_a_folder_can_be_overridden_when_it_is_read(convert: Any) -> None:
    folder = convert("diffmoe", synthetic_state_dict("diffmoe", "global_pool"), *GLOBAL_POOL)
    assert read_model(folder, "cpu", ["moe.inference=static"])[1].moe.inference == "static"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"moe\.inference"):
        read_model(folder, "cpu", ["moe.inference=best"])


UPCYCLED = ["moe.router=token_choice", "moe.num_experts=4", "moe.top_k=4", "objective.time_scale=1000"]


def test_an_upcycled_model_whose_gates_sum_to_one_computes_what_the_dense_model_computes(convert: Any) -> None:
    state = synthetic_state_dict("dit")
    x, t, y = images()
    expected = forward("dit", state, x, 1000 * t, y)
    folder = convert("dit", state, "--upcycle", *UPCYCLED)
    torch.testing.assert_close(all_channels(folder, x, t, y), expected, atol=1e-5, rtol=0)
    assert json.loads((folder / "config.json").read_text())["source"]["upcycled"] is True


def settings_of(*settings: str) -> Config:
    nested: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = {"true": True}.get(value, value)
    return build_config(nested, training=False)


@pytest.mark.parametrize(
    "settings",
    [
        GLOBAL_POOL,
        ["moe.router=expert_choice", *DIFFMOE, "moe.shared_experts=1"],
        [*PROMOE, "moe.expert_mlp_ratio=4.0", "moe.variant=expert_choice"],
    ],
)
def test_upcycling_copies_the_dense_layer_to_every_expert_and_starts_the_router_as_the_seed_says(
    convert: Any, settings: list[str]
) -> None:
    state = synthetic_state_dict("dit")
    model = load_model(convert("dit", state, "--upcycle", *settings))
    fresh = DiT(settings_of(*MODEL, *settings))
    initialize(fresh, 0)
    for block in (1, 3):
        dense = {name: state[f"blocks.{block}.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight")}
        layer: Any = model.blocks[block].mlp
        expected: Any = fresh.blocks[block].mlp
        for expert in range(4):
            assert torch.equal(layer.experts.w1[expert], dense["fc1.weight"].T)
            assert torch.equal(layer.experts.b1[expert], dense["fc1.bias"])
            assert torch.equal(layer.experts.w2[expert], dense["fc2.weight"].T)
        for copy in (layer.shared, layer.unconditional):
            assert copy is None or torch.equal(copy.fc1.weight, dense["fc1.weight"])
        for name, value in expected.router.state_dict().items():
            assert torch.equal(layer.router.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "o"], "give one of --from {dit,diffmoe,promoe,diffusers} FILE, --to {safetensors,dit,"),
        (["--inspect", "f", "--from", "dit", "f", "--out", "o"], "give one of --from"),
        (["--inspect", "f", "--out", "o"], "--out has no effect with --inspect"),
        (["--inspect", "f", "a=b"], "a=b has no effect with --inspect"),
        (["--from", "dit", "f", "--config", "c"], "--out is not set"),
        (["--to", "dit", "--out", "o"], "--to dit needs --checkpoint DIR"),
        (["--from", "dit", "f", "--to", "safetensors", "--out", "o"], "give one of --from"),
        (["--from", "dit", "f", "--out", "o"], "--from dit needs --config FILE"),
        (["--from", "dit", "f", "--config", "c", "--checkpoint", "r", "--out", "o"], "--checkpoint has no effect"),
        (["--to", "safetensors", "--out", "o"], "--to safetensors needs --checkpoint DIR"),
        (["--to", "safetensors", "--checkpoint", "r", "--config", "c", "--out", "o"], "--config has no effect with"),
        (["--to", "safetensors", "--checkpoint", "r", "a=b", "--out", "o"], "a=b has no effect with --to"),
        (["--to", "safetensors", "--checkpoint", "/nowhere", "--out", "/nowhere/o"], "no complete checkpoint there"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(UserError, match=message):
        main()
