"""One page about a run, complete in itself: its training, what it draws, and where its experts work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from diffmoe_dist.config import Config, load_config
from diffmoe_dist.data.open import open_data
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.diffusion.samplers import Guidance
from diffmoe_dist.engine.checkpoint import complete_checkpoints, read_checkpoint_model, read_progress
from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.report_page import figures
from diffmoe_dist.report_page.loss_curve import read_run_metrics
from diffmoe_dist.sampling.calibration import recalibrate_on_training_data
from diffmoe_dist.sampling.conditions import Conditions, job_classes, job_prompts, run_conditions
from diffmoe_dist.sampling.generate import (
    SamplerSettings,
    choose_sampler,
    generate,
    grid_columns,
    image_grid,
    to_uint8,
)
from diffmoe_dist.sampling.model import weights_fingerprint
from diffmoe_dist.sampling.routing_trace import Recorder, RoutingTrace, recorded

CSS = """
:root{--ink:#1c1f24;--soft:#5b616b;--line:#e3e6ea;--accent:#2a5d9f}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 18px 60px}
h1{font-size:1.75rem;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 6px}
p{margin:0 0 12px;max-width:84ch}
.soft,figcaption{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:22px 0 8px}
.card,figure,details{background:#fff;border:1px solid var(--line);border-radius:10px}
.card{padding:10px 14px}
.card b{display:block;font-size:1.3rem;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.card span{color:var(--soft);font-size:.86rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));gap:16px;margin:14px 0;
align-items:start}
.figures.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
figure{margin:0;padding:14px}
figure.wide{grid-column:1/-1}
figure h3{font-size:1rem;margin:0 0 8px}
figure img{display:block;width:100%;height:auto}
figure.wide .scroll{overflow-x:auto}
figure.wide img{min-width:560px;max-width:920px;margin:0 auto}
@media(min-width:860px){figure.grid{grid-column:span 2}}
figure.grid img{width:auto;max-width:100%;margin:0 auto;image-rendering:pixelated;border-radius:4px}
figcaption{font-size:.9rem;margin-top:10px}
details{padding:10px 14px;margin-top:14px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.82rem;line-height:1.45;margin:10px 0 2px}
table{border-collapse:collapse;font-size:.92rem}
td{padding:3px 18px 3px 0;vertical-align:top;overflow-wrap:anywhere}
td:first-child{color:var(--soft);white-space:nowrap}
@media(max-width:560px){main{padding:18px 12px 40px}figure{padding:10px}h1{font-size:1.45rem}}
@media print{body{background:#fff}figure{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Drawn:
    """Images drawn for the page, and what happened meanwhile."""

    images_NHWC: np.ndarray  # uint8
    conditions: Conditions
    settings: dict[str, Any]
    trace: RoutingTrace | None  # None: no experts

    @property
    def labels(self) -> list[int]:
        return [self.conditions.label(number) for number in range(len(self.images_NHWC))]


def write_report(
    run_dir: Path,
    samples: Path | None,
    num_images: int,
    device: torch.device,
    encoder: str | None = None,
    tokenizer: str | None = None,
) -> Path:
    """Write run_dir/report.html; returns its path.

    Args:
        samples: a folder of `sample`, whose settings, first images and grid are taken; else images are drawn with the
            defaults.
        num_images: drawn and traced for the page, together in one batch.
        encoder, tokenizer: folders, to draw from the prompts of the samples; else from captions of the training data.

    Raises:
        UserError: the run has logged nothing, or the samples are of other weights.
    """
    lines = read_run_metrics(run_dir)
    loads = read_metrics(run_dir / "expert_load.jsonl")
    found = complete_checkpoints(run_dir / "checkpoints")
    config = load_config((found[-1] if found else run_dir) / "config.yaml")
    sections = [_training_section(lines, loads, config)]
    cards = {"steps": f"{lines[-1]['step']:,}", "images seen": _short(lines[-1]["images_seen"])}
    if found:
        _, drawn = _draw(found[-1], samples, num_images, device, (encoder, tokenizer))
        cards |= _model_cards(config, drawn)
        sections += _drawn_sections(drawn, config, samples, read_progress(found[-1]).step)
    elif samples is not None:
        raise UserError(f"--samples {samples}: {run_dir} has no complete checkpoint they could be of; leave it out")
    else:
        sections.append(_section("What it draws", "This run has no complete checkpoint yet.", []))
    cards["images per second in training"] = f"{np.median([line['images_per_second'] for line in lines]):,.0f}"
    page = run_dir / "report.html"
    page.write_text(_page(run_dir.resolve().name, config, cards, sections))
    return page


def _draw(
    checkpoint: Path,
    samples: Path | None,
    num_images: int,
    device: torch.device,
    encoder: tuple[str | None, str | None],
) -> tuple[DiT, Drawn]:
    record = {} if samples is None else _read_record(samples)
    model, config = read_checkpoint_model(checkpoint, device, overrides=record.get("overrides", ()))
    if samples is not None and record["weights"] != weights_fingerprint(model, is_sharded=False):
        raise UserError(f"--samples {samples}: they are of other weights than {checkpoint}; give samples of those")
    if record.get("recalibrate"):
        data = open_data(config, device)
        recalibrate_on_training_data(model, config, data, record["recalibrate"], record["batch_size"])
    sampler, steps = choose_sampler(record.get("sampler"), record.get("steps"), config.objective.name)
    channels = record.get("cfg_channels", "all")
    guidance = Guidance(
        record.get("cfg_scale", 1.0),
        None if channels == "all" else channels,
        record.get("cfg_interval"),
        record.get("one_pass", False),
    )
    num = min(num_images, record.get("num", num_images))
    sampling = SamplerSettings(sampler, steps, guidance, record.get("seed", 0))
    conditions = _conditions(config, samples, record, encoder, device)
    objective = build_objective(config.objective)

    def drawn_images(recorder: Recorder | None) -> Tensor:
        return generate(model, objective, list(range(num)), conditions, sampling, recorder).images

    if model.moe_layers:
        with recorded(model, objective) as recorder, torch.no_grad():
            images = drawn_images(recorder)
        trace = recorder.trace()
    else:
        images, trace = drawn_images(None), None
    settings = {
        "sampler": sampler,
        "steps": "its own" if steps is None else steps,
        "guidance scale": guidance.scale,
        "inference rule": getattr(config.moe, "inference", None) or "none",
        "seed": sampling.seed,
        "thresholds": "found anew for the averaged weights" if record.get("recalibrate") else "as trained",
    }
    return model, Drawn(_visible(images), conditions, settings, trace)


def _conditions(
    config: Config,
    samples: Path | None,
    record: dict[str, Any],
    encoder: tuple[str | None, str | None],
    device: torch.device,
) -> Conditions:
    """What the samples were drawn from, or the run's own classes or captions."""
    if "labels" in record:
        return job_classes(record, config)
    if encoder[0] is not None:
        if samples is None or "prompts" not in record:
            raise UserError(f"--encoder {encoder[0]}: the samples were not drawn from prompts; remove it")
        return job_prompts(samples, record, config, encoder[0], encoder[1], device)
    if config.model.condition == "class":
        return run_conditions(config, None)
    return run_conditions(config, open_data(config, device))


def _read_record(samples: Path) -> dict[str, Any]:
    try:
        record = json.loads((samples / "sampling.json").read_text())
        return {**record, "weights": record["weights"]}
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"--samples {samples}: no readable sampling.json there; give a folder that diffmoe_dist.sample finished"
        ) from None


def _visible(images: Tensor) -> np.ndarray:
    """Pixels as they are; of latents the first three channels, each from its darkest to its brightest value."""
    if images.shape[1] in (1, 3):
        return to_uint8(images)
    images = images[:, :3]
    low, high = images.amin(dim=(0, 2, 3), keepdim=True), images.amax(dim=(0, 2, 3), keepdim=True)
    return to_uint8(2 * (images - low) / (high - low).clamp_min(1e-9) - 1)


def _training_section(lines: list[dict[str, Any]], loads: list[dict[str, Any]], config: Config) -> str:
    pictures = [
        _figure("Losses", figures.loss_figure(lines), _loss_caption(lines)),
        _figure("Gradient norm", figures.grad_norm_figure(lines), "Of the global batch, before clipping."),
        _figure("Speed", figures.speed_figure(lines), "Wall-clock, mean since the logged step before."),
    ]
    if loads and config.experts is not None:
        pictures.append(_load_in_training(loads, config))
    return _section("Training", "", pictures)


def _loss_caption(lines: list[dict[str, Any]]) -> str:
    last = lines[-1]
    losses = {name: value for name, value in last.items() if name.startswith("loss_") and value is not None}
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return f"Of the global batch. At step {last['step']:,}: {parts}."


def _load_in_training(loads: list[dict[str, Any]], config: Config) -> str:
    everything = np.array([line["load"] for line in loads])
    if np.ptp(everything) == 0:
        return _note(
            "Expert load in training",
            "Every expert takes the same number of tokens in each of the "
            f"{len(loads)} logged steps: that is how moe.router={config.moe.router} chooses while it trains.",
        )
    return _figure(
        "Expert load in training",
        figures.load_in_training_figure(loads, config.moe_blocks),
        "A row for each expert, its tokens over the mean of its layer. "
        f"At the last logged step the busiest has {everything[-1].max():.2f} times the mean, the idlest "
        f"{everything[-1].min():.2f} times.",
    )


def _drawn_sections(drawn: Drawn, config: Config, samples: Path | None, step: int) -> list[str]:
    num = len(drawn.labels)
    columns = grid_columns(config, num)
    about = f"Averaged weights of step {step:,}. {num} images, drawn for this page together in one batch"
    about += " with the settings of the samples." if samples is not None else "."
    if drawn.conditions.kind == "caption":
        about += " The captions are the first ones of the training data."
    if config.model.in_channels not in (1, 3):
        about += " They are latents: their first three channels are shown as red, green and blue."
    grid = _figure(
        "Pictures", figures.grid_picture(image_grid(drawn.images_NHWC, columns)), _grid_caption(drawn, columns),
        "grid",
    )  # fmt: skip
    first = _section("What it draws", about, [grid, _table("How they were drawn", drawn.settings)])
    if drawn.trace is None:
        text = "This model is dense: it has no experts, and every token of every step costs the same."
        return [first, _section("Where the compute goes", text, [])]
    return [first, _compute_section(drawn, drawn.trace, config), _experts_section(drawn, drawn.trace, config)]


def _grid_caption(drawn: Drawn, columns: int) -> str:
    labels, conditions = drawn.labels, drawn.conditions
    if conditions.kind != "class":
        return "; ".join(f"{label}: {conditions.name(label)}" for label in labels)
    if len(labels) > columns and all(label == labels[place % columns] for place, label in enumerate(labels)):
        return f"A column for each class: {', '.join(map(str, labels[:columns]))}."
    return f"Classes, row by row: {', '.join(map(str, labels[:60]))}{' ...' if len(labels) > 60 else ''}."


def _compute_section(drawn: Drawn, trace: RoutingTrace, config: Config) -> str:
    passes, blocks = trace.conditional, config.moe_blocks
    kind, name = drawn.conditions.kind, drawn.conditions.name
    of_step = passes.capacity_by_layer.mean(axis=1)
    low, high = int(of_step.argmin()), int(of_step.argmax())
    by_step = (
        f"Between {of_step[low]:.2f} (at {passes.progress_P[low]:.2f}) and {of_step[high]:.2f} (at "
        f"{passes.progress_P[high]:.2f}), mean {of_step.mean():.3f}."
    )
    trained_for = getattr(config.moe, "capacity", None)
    if trained_for is not None:
        by_step += f" Dotted: C = {trained_for:g}, which it was trained for."
    means = {label: passes.capacity_by_image[np.array(drawn.labels) == label].mean() for label in set(drawn.labels)}
    dearest, cheapest = max(means, key=lambda label: means[label]), min(means, key=lambda label: means[label])
    text = (
        "C is the number of experts that a token takes, averaged over tokens, images and layers (DiffMoE eq. 8-9). "
        f"The passes without a {drawn.conditions.kind}, which guidance needs, are left out but for the dashed line."
    )
    pictures = [
        _figure("Capacity over the sampling steps", figures.capacity_figure(trace, blocks, trained_for), by_step),
        _figure(
            "Capacity by layer and step", figures.capacity_map_figure(passes, blocks), "The same numbers as a map."
        ),
        _figure(
            f"Capacity by {kind}",
            figures.class_figure(passes, drawn.labels, name),
            f"A bar for each {kind}, a dot for each image. Most takes {name(dearest)} ({means[dearest]:.3f}), least "
            f"{name(cheapest)} ({means[cheapest]:.3f}). The axis does not begin at zero.",
        ),
        _figure(
            "Where in the picture",
            figures.pictures_figure(passes, drawn.images_NHWC, drawn.labels, name),
            "Experts that each token took, mean over the layers, laid over the finished picture; the numbers on top "
            "are the way gone from noise (0) to image (1).",
            "wide",
        ),
    ]
    return _section("Where the compute goes", text, pictures)


def _experts_section(drawn: Drawn, trace: RoutingTrace, config: Config) -> str:
    passes, blocks = trace.conditional, config.moe_blocks
    pictures = [
        _figure(
            "Load in sampling",
            figures.load_in_sampling_figure(passes, blocks),
            "Tokens of each expert over the mean of its layer, all steps together.",
        ),
        _figure(
            "Which steps they like",
            figures.expert_times_figure(passes, blocks),
            "A row for each expert; red where it takes more tokens than on the mean of its way, blue where fewer.",
        ),
        _figure(
            f"Which {drawn.conditions.kinds} they like",
            figures.expert_classes_figure(passes, blocks, drawn.labels, drawn.conditions.kind),
            f"A row for each expert; red for {drawn.conditions.kinds} of which it takes more tokens than of the mean "
            f"{drawn.conditions.kind}.",
        ),
    ]
    if trace.overlap_PL is not None:
        overlap = trace.overlap_PL
        pictures.append(
            _figure(
                "Do the rules count and threshold agree?",
                figures.overlap_figure(trace, blocks),
                "The share of (token, expert) pairs that both rules choose among those that either does, from the same "
                f"tokens: mean {overlap.mean():.2f}, from {overlap.min():.2f} to {overlap.max():.2f}. Both take "
                "as many tokens; count takes those with the highest gate, threshold those with the highest predicted "
                "score.",
            )
        )
    return _section("What the experts do", "", pictures, "figures two")


def _model_cards(config: Config, drawn: Drawn) -> dict[str, str]:
    counts = account(config)
    if drawn.trace is None or config.experts is None:
        return {"parameters, dense": _short(counts.total)}
    capacity = float(drawn.trace.conditional.capacity_by_layer.mean())
    return {
        "parameters": _short(counts.total),
        "activated by a token, at this C": _short(counts.activated(capacity)),
        f"experts in each of {len(config.moe_blocks)} layers": str(config.experts.num_experts),
        "C measured in sampling": f"{capacity:.3f}",
    }


def _short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _section(title: str, text: str, parts: Sequence[str], kind: str = "figures") -> str:
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f'<section><h2>{escape(title)}</h2>{paragraph}<div class="{kind}">{"".join(parts)}</div></section>'


def _figure(title: str, drawing: Figure | str, caption: str, kind: str = "") -> str:
    data_uri = drawing if isinstance(drawing, str) else figures.embedded(drawing)
    picture = f'<div class="scroll"><img src="{data_uri}" alt="{escape(title)}"></div>'
    return (
        f'<figure class="{kind}"><h3>{escape(title)}</h3>{picture}<figcaption>{escape(caption)}</figcaption></figure>'
    )


def _note(title: str, text: str) -> str:
    return f"<figure><h3>{escape(title)}</h3><figcaption>{escape(text)}</figcaption></figure>"


def _table(title: str, rows: dict[str, Any]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<figure><h3>{escape(title)}</h3><table>{cells}</table></figure>"


def _page(name: str, config: Config, cards: dict[str, str], sections: Sequence[str]) -> str:
    model = config.model
    experts = config.experts
    told = "text" if model.condition == "text" else f"{model.num_classes} classes"
    kind = "dense" if experts is None else f"{experts.router}, {experts.num_experts} experts"
    subtitle = (
        f"{kind}; depth {model.depth}, width {model.hidden_size}, {model.num_heads} heads, patches of "
        f"{model.patch_size}; {model.input_size} x {model.input_size} x {model.in_channels}, "
        f"{told}; {config.objective.name}"
    )
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(key)}</span></div>' for key, value in cards.items()
    )
    settings = escape(_yaml(config))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(name)}</title><style>{CSS}</style></head><body><main>'
        f'<h1>{escape(name)}</h1><p class="soft">{escape(subtitle)}</p><div class="cards">{shown}</div>'
        f"{''.join(sections)}<section><h2>Settings</h2><details><summary>config.yaml</summary><pre>{settings}</pre>"
        "</details></section></main></body></html>\n"
    )


def _yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))
