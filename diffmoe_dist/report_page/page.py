"""One page about a run, complete in itself: its training, its samples, and where its experts work."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from diffmoe_dist.config import Config, load_config
from diffmoe_dist.engine.progress import complete_checkpoints, read_progress
from diffmoe_dist.engine.run_log import read_metrics
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import write_atomically
from diffmoe_dist.model.accounting import account
from diffmoe_dist.report_page import figures
from diffmoe_dist.report_page.html import document, figure, note, section, short, table
from diffmoe_dist.report_page.loss_curve import read_run_metrics
from diffmoe_dist.report_page.samples import FinishedSamples, PageSamples, sample_for_page
from diffmoe_dist.sampling.grid import conditioned_grid, has_class_columns, lay_out
from diffmoe_dist.sampling.routing_trace import Passes, RoutingTrace
from diffmoe_dist.sampling.settings import SamplingSettings


def write_report(run_dir: Path, asked: SamplingSettings | FinishedSamples, device: torch.device) -> Path:
    """Write run_dir/report.html; returns its path.

    Args:
        asked: which images to sample and trace for the page, together in one batch.

    Raises:
        UserError: the run has logged nothing, a setting is not for its model, or the samples are of other weights.
    """
    lines = read_run_metrics(run_dir)
    loads = read_metrics(run_dir / "expert_load.jsonl")
    found = complete_checkpoints(run_dir / "checkpoints")
    config = load_config((found[-1] if found else run_dir) / "config.yaml", stored=True)
    sections = [_training_section(lines, loads, config)]
    cards = {"steps": f"{lines[-1]['step']:,}", "images seen": short(lines[-1]["images_seen"])}
    if found:
        samples = sample_for_page(found[-1], asked, device)
        cards |= _model_cards(config, samples)
        about = _about_samples(samples, config, read_progress(found[-1]).step, isinstance(asked, FinishedSamples))
        sections += _sample_sections(samples, config, about)
    elif isinstance(asked, FinishedSamples):
        raise UserError(
            f"--samples {asked.folder}: {run_dir} has no complete checkpoint they could be of; leave it out"
        )
    else:
        sections.append(section("Samples", "This run has no complete checkpoint yet.", []))
    cards["images per second in training"] = f"{np.median([line['images_per_second'] for line in lines]):,.0f}"
    page = run_dir / "report.html"
    write_atomically(page, _page(run_dir.resolve().name, config, cards, sections))
    return page


def _training_section(lines: list[dict[str, Any]], loads: list[dict[str, Any]], config: Config) -> str:
    parts = [
        figure("Losses", figures.loss_figure(lines), _loss_caption(lines)),
        figure("Gradient norm", figures.grad_norm_figure(lines), "Of the global batch, before clipping."),
        figure("Speed", figures.speed_figure(lines), "Wall-clock, mean since the logged step before."),
    ]
    if loads and config.experts is not None:
        parts.append(_load_in_training(loads, config))
    return section("Training", "", parts)


def _loss_caption(lines: list[dict[str, Any]]) -> str:
    last = lines[-1]
    losses = {name: value for name, value in last.items() if name.startswith("loss_") and value is not None}
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    return f"Of the global batch. At step {last['step']:,}: {parts}."


def _load_in_training(loads: list[dict[str, Any]], config: Config) -> str:
    everything = np.array([line["load"] for line in loads])
    if np.ptp(everything) == 0:
        return note(
            "Expert load in training",
            "Every expert takes the same number of tokens in each of the "
            f"{len(loads)} logged steps: that is how moe.router={config.moe.router} chooses while it trains.",
        )
    return figure(
        "Expert load in training",
        figures.load_in_training_figure(loads, config.moe_blocks),
        "A row for each expert, its tokens over the mean of its layer. "
        f"At the last logged step the busiest has {everything[-1].max():.2f} times the mean, the least busy "
        f"{everything[-1].min():.2f} times.",
    )


def _about_samples(samples: PageSamples, config: Config, step: int, finished: bool) -> str:
    about = f"Averaged weights of step {step:,}. {len(samples.labels)} images, sampled for this page in one batch"
    about += " by the settings of --samples." if finished else "."
    if samples.conditions.kind == "caption":
        about += " They are conditioned on the first captions of the training data."
    if config.model.in_channels not in (1, 3):
        about += " They are latents: their first three channels are shown as red, green and blue."
    return about


def _sample_sections(samples: PageSamples, config: Config, about: str) -> list[str]:
    grid = figures.image_uri(conditioned_grid(samples.images_NHWC, samples.conditions))
    parts = [
        figure("Images", grid, _grid_caption(samples), "grid"),
        table("How they were sampled", samples.settings),
    ]
    first = section("Samples", about, parts)
    if samples.trace is None:
        text = "This model is dense: it has no experts, and every token of every step costs the same."
        return [first, section("Where the compute goes", text, [])]
    return [
        first,
        _compute_section(samples, samples.trace, config),
        _experts_section(samples, samples.trace, config),
    ]


def _grid_caption(samples: PageSamples) -> str:
    labels, conditions = samples.labels, samples.conditions
    if conditions.kind != "class":
        return "; ".join(f"{label}: {conditions.name(label)}" for label in labels)
    classes = list(dict.fromkeys(labels))
    if len(classes) > 1 and has_class_columns(lay_out(len(labels), labels), labels):
        return f"Columns are classes: {', '.join(map(conditions.name, classes))}."
    shown = ", ".join(map(conditions.name, classes[:60]))
    return f"Of {shown}{' ...' if len(classes) > 60 else ''}."


def _compute_section(samples: PageSamples, trace: RoutingTrace, config: Config) -> str:
    passes, blocks = trace.conditional, config.moe_blocks
    kind, name = samples.conditions.kind, samples.conditions.name
    trained_for = getattr(config.moe, "capacity", None)
    text = (
        "C is the number of experts per token, averaged over tokens, images and layers (DiffMoE eq. 8-9). The "
        "unconditional passes, which classifier-free guidance needs, are left out but for the dashed line."
    )
    return section(
        "Where the compute goes",
        text,
        [
            figure(
                "Capacity over the sampling steps",
                figures.capacity_figure(trace, blocks, trained_for),
                _capacity_caption(passes, trained_for),
            ),
            figure(
                "Capacity by layer and step", figures.capacity_map_figure(passes, blocks), "The same numbers as a map."
            ),
            figure(
                f"Capacity by {kind}",
                figures.class_figure(passes, samples.labels, name),
                _class_caption(passes, samples),
            ),
            figure(
                "Where in the image",
                figures.experts_over_images_figure(passes, samples.images_NHWC, samples.labels, name),
                "Experts per token, mean over the layers, laid over the finished image; the numbers on top are the "
                "progress from noise (0) to image (1).",
                "wide",
            ),
        ],
    )


def _capacity_caption(passes: Passes, trained_for: float | None) -> str:
    C_P = passes.capacity_by_layer.mean(axis=1)
    low, high = int(C_P.argmin()), int(C_P.argmax())
    caption = (
        f"Between {C_P[low]:.2f} (at {passes.progress_P[low]:.2f}) and {C_P[high]:.2f} (at "
        f"{passes.progress_P[high]:.2f}), mean {C_P.mean():.3f}."
    )
    return caption if trained_for is None else f"{caption} Dotted: C = {trained_for:g}, which it was trained for."


def _class_caption(passes: Passes, samples: PageSamples) -> str:
    kind, name = samples.conditions.kind, samples.conditions.name
    labels = np.array(samples.labels)
    means = {label: passes.capacity_by_image[labels == label].mean() for label in set(samples.labels)}
    most, least = max(means, key=lambda label: means[label]), min(means, key=lambda label: means[label])
    return (
        f"A bar for each {kind}, a dot for each image. Most: {name(most)} ({means[most]:.3f}); least: {name(least)} "
        f"({means[least]:.3f}). The axis does not begin at zero."
    )


def _experts_section(samples: PageSamples, trace: RoutingTrace, config: Config) -> str:
    passes, blocks = trace.conditional, config.moe_blocks
    kind, kinds = samples.conditions.kind, samples.conditions.kinds
    parts = [
        figure(
            "Load in sampling",
            figures.load_in_sampling_figure(passes, blocks),
            "Tokens of each expert over the mean of its layer, all steps together.",
        ),
        figure(
            "Load by sampling step",
            figures.expert_times_figure(passes, blocks),
            "A row for each expert; red where it takes more tokens than in its own mean over the steps, blue where "
            "fewer.",
        ),
        figure(
            f"Load by {kind}",
            figures.expert_classes_figure(passes, blocks, samples.labels, samples.conditions),
            f"A row for each expert; red for {kinds} of which it takes more tokens than in its own mean over the "
            f"{kinds}, blue for those of which it takes fewer.",
        ),
    ]
    if trace.overlap_PL is not None:
        overlap = trace.overlap_PL
        caption = (
            "The fraction of (token, expert) pairs that both rules choose among those that either chooses, from the "
            f"same tokens: mean {overlap.mean():.2f}, from {overlap.min():.2f} to {overlap.max():.2f}. Both take as "
            "many tokens; count takes those with the highest gate, threshold those with the highest predicted score."
        )
        title = "Do the rules count and threshold agree?"
        parts.append(figure(title, figures.overlap_figure(overlap, passes.progress_P, blocks), caption))
    return section("What the experts do", "", parts, "figures two")


def _model_cards(config: Config, samples: PageSamples) -> dict[str, str]:
    counts = account(config)
    if samples.trace is None or config.experts is None:
        return {"parameters, dense": short(counts.total)}
    capacity = float(samples.trace.conditional.capacity_by_layer.mean())
    return {
        "parameters": short(counts.total),
        "activated by a token, at this C": short(counts.activated(capacity)),
        f"experts in each of {len(config.moe_blocks)} layers": str(config.experts.num_experts),
        "C measured in sampling": f"{capacity:.3f}",
    }


def _page(name: str, config: Config, cards: dict[str, str], sections: Sequence[str]) -> str:
    model = config.model
    experts = config.experts
    condition = "text" if model.condition == "text" else f"{model.num_classes or 'no'} classes"
    kind = "dense" if experts is None else f"{experts.router}, {experts.num_experts} experts"
    subtitle = (
        f"{kind}; depth {model.depth}, width {model.hidden_size}, {model.num_heads} heads, patches of "
        f"{model.patch_size}; {model.input_size} x {model.input_size} x {model.in_channels}, "
        f"{condition}; {config.objective.name}"
    )
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(key)}</span></div>' for key, value in cards.items()
    )
    settings = escape(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return document(
        name,
        f'<p class="soft">{escape(subtitle)}</p><div class="cards">{shown}</div>{"".join(sections)}'
        f"<section><h2>Settings</h2><details><summary>config.yaml</summary><pre>{settings}</pre></details></section>",
    )
