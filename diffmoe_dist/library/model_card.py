"""The model card of an exported pipeline: README.md with the header that the Hugging Face hub reads."""

from __future__ import annotations

import json
from typing import Any

import yaml

from diffmoe_dist.config import Config
from diffmoe_dist.library.model import LoadedModel
from diffmoe_dist.model.accounting import account

CARD_NAME = "README.md"
GRID_NAME = "samples.png"
RECIPE = ("seed", "precision", "model", "moe", "objective", "train", "optim", "ema")  # settings that are shown
Facts = dict[str, Any]  # JSON: `step`, `images_seen` and `weights` of the training; `samples`, `scores`, `grid`
SAMPLED = ("num", "sampler", "steps", "cfg_scale", "time_shift", "inference", "precision", "nfe")


def model_card(model: LoadedModel, settings: dict[str, Any], facts: Facts, pipeline: str) -> str:
    """The text of README.md.

    Args:
        settings: of the run, as a folder of weights has them.
        facts: what is known of the training and of samples; what is missing is said.
        pipeline: the class that opens the folder.
    """
    config, samples = model.config, facts.get("samples") or {}
    text = config.model.condition == "text"
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if text else "unconditional-image-generation",
        "tags": ["diffmoe-dist", "diffusion-transformer", *(["mixture-of-experts"] if config.experts else [])],
    }
    parts = [
        f"---\n# license: yours to choose\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_kind(config)}",
        _described(model),
        *_capacity(config, samples),
        "## Use",
        _use(config, pipeline),
        *([f"![Samples]({GRID_NAME})"] if facts.get("grid") else []),
        "## Scores",
        _scores(facts.get("scores") or {}, samples),
        "## Recipe",
        _recipe(settings, facts),
    ]
    return "\n\n".join(parts) + "\n"


def _kind(config: Config) -> str:
    objective = {"flow": "rectified flow", "ddpm": "DDPM"}[config.objective.name]
    if config.experts is None:
        return f"A diffusion transformer (DiT), {objective}"
    return f"A diffusion transformer with {config.experts.num_experts} experts ({config.moe.router}), {objective}"


def _described(model: LoadedModel) -> str:
    config, counts = model.config, account(model.config)
    size, channels = config.model.input_size, config.model.in_channels
    condition = "captions" if config.model.condition == "text" else f"{config.model.num_classes} classes"
    kind = "pixels" if channels in (1, 3) else "latents"
    sizes = f"{counts.total / 1e6:.4g} M parameters"
    if config.experts is not None:
        sizes += f", {counts.activated() / 1e6:.4g} M of them activated at C = {counts.nominal_capacity:g}"
    return f"{sizes}; {kind} of {channels} x {size} x {size}, conditioned on {condition}."


def _capacity(config: Config, samples: dict[str, Any]) -> list[str]:
    """What samples used of the experts, beside what was trained for."""
    if config.experts is None:
        return []
    trained = f"Trained for C = {config.experts.nominal_capacity():g} experts a token"
    if samples.get("capacity") is None:
        return [f"{trained}; what samples use was not measured at the export (`--samples`)."]
    activated = samples.get("activated_parameters")
    more = "" if activated is None else f", {activated / 1e6:.4g} M activated parameters"
    return [f"{trained}; measured in sampling: C = {samples['capacity']:.4f}{more}."]


def _use(config: Config, pipeline: str) -> str:
    what = 'prompt="..."' if config.model.condition == "text" else "class_labels=[0]"
    package = "diffusers" if pipeline == "DiTPipeline" else "diffmoe_dist"
    steps = "num_inference_steps=50"
    return (
        f"```python\nfrom {package} import {pipeline}\n\n"
        f'pipe = {pipeline}.from_pretrained("FOLDER")\nimage = pipe({what}, {steps}).images[0]\n```'
    )


def _scores(scores: dict[str, Any], samples: dict[str, Any]) -> str:
    how = ", ".join(f"{name} {samples[name]}" for name in SAMPLED if samples.get(name) is not None)
    if not scores:
        return f"None were given.{f' Samples: {how}.' if how else ''}"
    rows = [f"| {name} | {value:.4f} |" for name, value in scores.items()]
    return "\n".join(["| score | value |", "|---|---|", *rows]) + f"\n\nOf samples: {how or 'not recorded how'}."


def _recipe(settings: dict[str, Any], facts: Facts) -> str:
    seen = [f"{facts[name]:,} {what}" for name, what in (("step", "steps"), ("images_seen", "images")) if name in facts]
    kind = "as trained, not averaged" if facts.get("weights") == "model" else "averaged (EMA)"
    begin = f"{' and '.join(seen)}; weights {kind}." if seen else "Converted weights."
    ordered = {name: settings[name] for name in RECIPE if name in settings}
    shown = {name: dict(sorted(value.items())) if isinstance(value, dict) else value for name, value in ordered.items()}
    return f"{begin}\n\n```yaml\n{yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False)}```"
