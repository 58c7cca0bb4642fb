"""Pipelines of diffusers: the images of our own sampler, and models that go there and come back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffmoe_dist
from diffmoe_dist import DiffMoEPipeline, convert, load_model
from diffmoe_dist.config import build_config
from diffmoe_dist.data.class_names import ClassNames
from diffmoe_dist.data.prompts import Prompt
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.engine.conversion import convert_diffusers
from diffmoe_dist.engine.weights import write_weights
from diffmoe_dist.errors import UserError
from diffmoe_dist.library.export import Parts, export_pipeline
from diffmoe_dist.library.model import LoadedModel
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.sampling.conditions import PromptConditions
from diffmoe_dist.sampling.generate import initial_noise, step_generator
from diffmoe_dist.sampling.prompts import encode_for_model
from tests.data.encoders import save_encoder

MODEL: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2, "input_size": 8, "in_channels": 1}
POOL = {"router": "global_pool", "num_experts": 4, "capacity": 1.5}
DDPM = {"objective": {"name": "ddpm"}}
DENSE_LATENTS = {"model": {"in_channels": 4, "learn_sigma": True}, "moe": {"router": "dense"}}
TEXTS = ["a red square", "a circle", "a red square"]


def save_model(folder: Path, *layers: dict[str, Any]) -> Path:
    """A folder of weights of a model that is not trained, but predicts something, with thresholds."""
    config = build_config({"model": {**MODEL, "num_classes": 5}}, *layers, training=False)
    model = DiT(config)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(".threshold"):
                buffer.copy_(torch.tensor([0.41, 0.47, 0.53, 0.57]))
    names = ClassNames((("cat",), ("dog", "hound"), ("cow",), ("hen",), ("bee",)) if config.model.num_classes else ())
    write_weights(folder, model.state_dict(), config, {"step": 7, "images_seen": 112}, names)
    return folder


def save_vae(folder: Path) -> Path:
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.7,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def noise(model: LoadedModel, keys: list[int], seed: int = 3) -> Tensor:
    return torch.stack([initial_noise(model, seed, key) for key in keys])


def opened(folder: Path, out: Path, **parts: str) -> Any:
    """The pipeline of a folder of weights, written and read."""
    _, kind = export_pipeline(folder, out, None, Parts(**parts))
    assert kind == "DiffMoEPipeline"
    pipe = DiffMoEPipeline.from_pretrained(str(out), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


FLOWS: dict[str, list[dict[str, Any]]] = {
    "DiffMoE": [{"moe": {**POOL, "inference": "count"}, "objective": {"time_scale": 1000.0, "time_shift": 3.0}}],
    "ProMoE": [
        {"moe": {"router": "prototype", "num_experts": 4, "top_k": 2}, "model": {"learn_sigma": True}},
        {"objective": {"direction": "noise_at_one", "time_scale": 1000.0}},
    ],
    "without classes": [{"moe": {**POOL, "inference": "threshold"}, "model": {"num_classes": 0}}],
}


@pytest.mark.parametrize("name", FLOWS)
def test_a_pipeline_has_the_images_of_the_sampler(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "weights", *FLOWS[name])
    model, pipe = load_model(folder), opened(folder, tmp_path / "pipeline")
    labels: Any
    labels, scale = ([0, 0, 0, 0], 1.0) if name == "without classes" else (["hen", 1, 4, "hound"], 2.0)

    made = diffmoe_dist.sample(model, labels, steps=6, cfg_scale=scale, seed=3)
    options = {"latents": noise(model, [0, 1, 2, 3]), "num_inference_steps": 6, "guidance_scale": scale}
    found = pipe(labels, **options, output_type="latent")

    torch.testing.assert_close(found.images, made.images, atol=2e-5, rtol=1e-5)
    assert found.capacity == pytest.approx(made.capacity, abs=1e-12)
    pictures = np.stack([np.asarray(image) for image in pipe(labels, **options).images])
    assert (abs(pictures.astype(int) - made.to_uint8()[..., 0]) <= 1).all()  # a grey value may round the other way


def test_a_ddpm_has_the_images_of_the_sampler_by_its_own_and_by_another_scheduler(tmp_path: Path) -> None:
    folder = save_model(
        tmp_path / "weights", {"moe": POOL, "model": {"learn_sigma": True}, "objective": {"name": "ddpm"}}
    )
    model, pipe = load_model(folder), opened(folder, tmp_path / "pipeline")
    options: dict[str, Any] = {"num_inference_steps": 7, "guidance_scale": 2.0, "output_type": "latent"}

    def found() -> Tensor:
        generators = [step_generator(3, key) for key in range(2)]
        return pipe([2, 4], latents=noise(model, [0, 1]), generator=generators, **options).images

    def made(sampler: str) -> Tensor:
        return diffmoe_dist.sample(model, [2, 4], steps=7, cfg_scale=2.0, seed=3, sampler=sampler).images

    torch.testing.assert_close(found(), made("ddpm"), atol=1e-4, rtol=1e-4)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        {**pipe.scheduler.config, "variance_type": None}, timestep_spacing="linspace"
    )
    torch.testing.assert_close(found(), made("dpm-solver++"), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="scheduler DPMSolverMultistepScheduler is not for a flow"):
        flow = opened(save_model(tmp_path / "flow", {"moe": POOL}), tmp_path / "flow-pipeline")
        flow.scheduler = pipe.scheduler
        flow([0])


def test_prompts_have_the_images_of_the_sampler(tmp_path: Path) -> None:
    for kind in ("clip", "t5"):
        save_encoder(tmp_path / kind, kind)
    encoder = tmp_path / "encoders.json"  # as of SD3: two side by side, and one behind them
    pair = [{"folder": "clip", "max_length": 16, "layer": -2}, {"folder": "clip", "max_length": 16}]
    encoder.write_text(json.dumps([pair, {"folder": "t5", "max_length": 12}]))
    text = {
        "condition": "text", "num_classes": 0, "in_channels": 3, "text_hidden_size": 32, "text_max_length": 28,
        "text_pooled_size": 32, "text_encoder_sha256": TextEncoder.open(encoder, None, 28, "cpu", "encoder").sha256,
    }  # fmt: skip
    folder = save_model(tmp_path / "weights", {"model": text, "moe": POOL})
    with pytest.raises(UserError, match="--encoder is missing"):
        export_pipeline(folder, tmp_path / "pipeline", None, Parts())
    pipe = opened(folder, tmp_path / "pipeline", encoder=str(encoder))
    model = load_model(folder)

    made = diffmoe_dist.sample(model, TEXTS, encoder=encoder, negative_prompt="a", steps=4, cfg_scale=3.0, seed=3)
    prompts = [Prompt(text) for text in TEXTS]
    encoded = encode_for_model(prompts, None, model.config, str(encoder), None, torch.device("cpu"))
    keys = [PromptConditions(encoded, 28).noise_key(number) for number in range(3)]
    found = pipe(
        prompt=TEXTS, negative_prompt="a", latents=noise(model, keys), num_inference_steps=4, guidance_scale=3.0,
        output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(found.images, made.images, atol=2e-5, rtol=1e-5)
    with pytest.raises(UserError, match="this model is conditioned on captions; give prompt"):
        pipe([0])
    assert 'pipe(prompt="...", num_inference_steps=50)' in (tmp_path / "pipeline/README.md").read_text()


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A DiffMoE as a folder of weights, and as a pipeline that the command has made."""
    place = tmp_path_factory.mktemp("pipelines")
    folder = save_model(place / "weights", {"moe": {**POOL, "inference": "threshold"}})
    samples = place / "samples"
    samples.mkdir()
    record = {"capacity": 1.21, "sampler": "euler", "steps": 50, "num": 100}
    (samples / "sampling.json").write_text(json.dumps(record))
    (samples / "scores.json").write_text(json.dumps({"scores": {"fid_100": 12.3456}}))
    (samples / "grid.png").write_bytes(b"picture")
    words = ("--to", "diffusers", "--checkpoint", folder, "--samples", samples, "--out", place / "pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert", *map(str, words)])
        convert.main()
    return folder, place / "pipeline"


def test_an_autoencoder_is_refused_for_a_model_of_pixels(pixels: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--decoder=vae: this model makes pixels, not latents; remove it"):
        export_pipeline(pixels[0], tmp_path / "pipeline", None, Parts(decoder="vae"))


def test_a_pipeline_goes_and_comes_back_with_its_card(
    pixels: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, folder = pixels
    card = (folder / "README.md").read_text()
    for said in (
        "library_name: diffusers",
        "# license: yours",
        "C = 1.2100",
        "| fid_100 | 12.3456 |",
        "7 steps and 112",
    ):
        assert said in card, said
    assert "![Samples](samples.png)" in card and (folder / "samples.png").read_bytes() == b"picture"
    pipe = DiffMoEPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False)
    sent: dict[str, Any] = {}

    def upload(self: Any, path: str, repo_id: str, **options: Any) -> str:
        sent.update(
            {"files": {file.name: file.read_bytes() for file in Path(path).iterdir() if file.is_file()}, **options}
        )
        return "sent"

    made = type("Made", (), {"repo_id": "me/demo"})
    monkeypatch.setattr("diffmoe_dist.library.pipeline.create_repo", lambda repo_id, **options: made)
    monkeypatch.setattr(DiffMoEPipeline, "_upload_folder", upload)
    assert pipe.push_to_hub("demo", private=True, commit_message="first") == "sent"
    assert sent["files"]["README.md"].decode() == card.replace("![Samples](samples.png)\n\n", "")
    assert sent["commit_message"] == "first" and {"model_index.json"} < set(sent["files"])
    convert_diffusers(folder, None, tmp_path / "back")
    ours, theirs = (load_model(place) for place in (weights, tmp_path / "back"))
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert ours.config == theirs.config and ours.names == theirs.names


def test_a_pipeline_in_bf16_rounds_the_weights_alone_and_comes_back(pixels: tuple[Path, Path], tmp_path: Path) -> None:
    exact: Any
    pipe: Any
    exact, pipe = (
        DiffMoEPipeline.from_pretrained(str(pixels[1]), low_cpu_mem_usage=False, torch_dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    buffers = dict(exact.transformer.named_buffers())

    for rounded in (pipe, exact.to(torch.bfloat16)):
        assert {parameter.dtype for parameter in rounded.transformer.parameters()} == {torch.bfloat16}
        assert all(torch.equal(tensor, buffers[name]) for name, tensor in rounded.transformer.named_buffers())
    image = pipe([1], num_inference_steps=2, output_type="pt").images
    assert image.dtype == torch.float32 and image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    pipe.save_pretrained(tmp_path / "rounded")
    convert_diffusers(tmp_path / "rounded", None, tmp_path / "back")
    for name, tensor in load_model(tmp_path / "back").state_dict().items():
        assert torch.equal(tensor, pipe.transformer.model.state_dict()[name].float()), name


def test_a_call_takes_what_those_of_other_pipelines_take(pixels: tuple[Path, Path]) -> None:
    pipe: Any = DiffMoEPipeline.from_pretrained(str(pixels[1]), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[int, tuple[int, ...]]] = []

    def stop(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tuple(given["latents"].shape)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(given["latents"])}

    def draw(**options: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        return pipe(1, num_inference_steps=4, generator=generator, output_type="np", **options).images

    assert np.array_equal(draw(), draw()) and draw().shape == (1, 8, 8, 1)
    assert draw(num_images_per_prompt=3).shape == (3, 8, 8, 1)
    assert (draw(callback_on_step_end=stop) == 0.5).all() and seen == [(0, (1, 1, 8, 8)), (1, (1, 1, 8, 8))]
    assert isinstance(pipe([0, 1], num_inference_steps=1, return_dict=False)[0], list)
    for arguments, message in (
        ({"class_labels": [7]}, "class_labels: 7 is no label of this model, which knows the classes 0 to 4"),
        ({"prompt": "a cat"}, "this model is conditioned on classes; give class_labels"),
        (
            {"class_labels": [0], "latents": torch.zeros(2, 1, 8, 8)},
            r"latents have shape \(2, 1, 8, 8\); this",
        ),
        ({"class_labels": [0], "output_type": "gif"}, "output_type='gif': choose pil"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**arguments)


def test_a_dense_ddpm_of_latents_is_a_dit_pipeline_and_comes_back(tmp_path: Path) -> None:
    latents = {"in_channels": 4, "learn_sigma": True}
    folder = save_model(
        tmp_path / "weights", {"model": latents, "objective": {"name": "ddpm"}, "moe": {"router": "dense"}}
    )
    vae = save_vae(tmp_path / "vae")
    assert export_pipeline(folder, tmp_path / "dit", None, Parts(decoder=str(vae)))[1] == "DiTPipeline"
    pipe: Any = DiTPipeline.from_pretrained(str(tmp_path / "dit"), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    model = load_model(folder)
    made = diffmoe_dist.sample(model, [2], steps=50, cfg_scale=3.0, seed=3, sampler="ddim", decoder=vae)
    start_at = noise(model, [0])

    def found() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: start_at)
            return pipe([2], guidance_scale=3.0, num_inference_steps=50, output_type="pt").images

    expected = (made.images / 2 + 0.5).clamp(0, 1)
    assert (found() - expected).abs().max() > 1e-3, "diffusers has taken DiT's own frequencies: tell no more of them"
    for block in pipe.transformer.transformer_blocks:  # DiT's own
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(found(), expected, atol=1e-4, rtol=1e-4)
    assert pipe.get_label_ids(["hound", "cow"]) == [1, 2] and isinstance(pipe.scheduler, DDIMScheduler)
    convert_diffusers(tmp_path / "dit", None, tmp_path / "back")
    back = load_model(tmp_path / "back")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (
        back.names == model.names
        and back.config.model == model.config.model
        and back.config.objective == model.config.objective
    )


def test_what_is_no_dit_of_diffusers_is_told(tmp_path: Path) -> None:
    latents = {"in_channels": 4, "learn_sigma": True}
    folder = save_model(
        tmp_path / "weights", {"model": latents, "objective": {"name": "ddpm"}, "moe": {"router": "dense"}}
    )
    export_pipeline(folder, tmp_path / "dit", None, Parts(decoder=str(save_vae(tmp_path / "vae"))))
    transformer = tmp_path / "dit/transformer"
    config, file = json.loads((transformer / "config.json").read_text()), next(transformer.glob("*.safetensors"))
    tensors = load_file(file)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (
            {**config, "norm_type": "ada_norm_single"},
            tensors,
            "norm_type=ada_norm_single: our models have ada",
        ),
        ({**config, "_class_name": "UNet2DModel"}, tensors, "holds a UNet2DModel; of diffusers DiTTransformer2DModel"),
        (config, {**tensors, name: tensors[name] + 1}, "t_embedder.mlp.0.bias of block 1 is not that of block 0"),
        (config, {key: value for key, value in tensors.items() if key != name}, f"{name} is missing"),
        (config, {**tensors, "more": torch.zeros(1)}, "more has no place in a DiT"),
        ({**config, "num_layers": 1}, tensors, "transformer_blocks.1.* has no place in a DiT"),
    ]
    for described, stored, message in cases:
        (transformer / "config.json").write_text(json.dumps(described))
        save_file(stored, file)
        with pytest.raises(UserError, match=message):
            convert_diffusers(tmp_path / "dit", None, tmp_path / "back")
        assert not (tmp_path / "back").exists()
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(No such file or directory\)"):
        convert_diffusers(tmp_path / "vae/none", None, tmp_path / "back")
