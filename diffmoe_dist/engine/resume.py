"""Where a run begins: at its newest valid checkpoint, if that is of the same run, or at step 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffmoe_dist.config import Config, flat_settings, learning_rate, load_config, model_settings, pool_samples, wishes
from diffmoe_dist.config.checks import name_ranks
from diffmoe_dist.config.elastic import FITTED
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.engine.checkpoint import newest_valid_checkpoint
from diffmoe_dist.engine.ema import averages
from diffmoe_dist.engine.fine_tuning import tensors_anew
from diffmoe_dist.engine.progress import Progress, read_progress
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.freezing import frozen_parameters

SET_FOR_RANKS = (*FITTED, "parallel.score_exchange")  # what a change of ranks may change


@dataclass(frozen=True)
class Start:
    """Where a run begins: at its newest complete checkpoint, or at step 0."""

    checkpoint: Path | None
    progress: Progress
    damaged: tuple[str, ...] = ()  # what is wrong with newer checkpoints, which are passed over


def find_start(
    config: Config, data: TrainingData | StreamedData, world_size: int, asked: Mapping[str, int | str] | None = None
) -> Start:
    """Look for the newest valid checkpoint in `run_dir` and check that this run continues it.

    Collective where a process group exists.

    Args:
        config: fitted to the ranks.
        asked: `wishes` of the settings as they were given, if they were others.

    Raises:
        UserError: the checkpoint is of another model, seed, data set or pool size; or all checkpoints are damaged.
    """
    checkpoint, damaged = newest_valid_checkpoint(Path(config.run_dir) / "checkpoints")
    return Start(checkpoint, progress_from(checkpoint, config, data, world_size, asked), tuple(damaged))


def progress_from(
    checkpoint: Path | None,
    config: Config,
    data: TrainingData | StreamedData,
    world_size: int,
    asked: Mapping[str, int | str] | None = None,
) -> Progress:
    """Where a run stands that continues a checkpoint, or begins.

    Raises:
        UserError: the checkpoint is of another model, seed, data set or pool size; or there is none, and
            `train.initial_weights` are of another model.
    """
    micro_batch_size = config.train.micro_batch_size
    assert config.model.condition == "class" or config.model.text_encoder_sha256, "see data.open.with_text_encoder"
    fresh = Progress(
        step=0,
        images_seen=0,
        seed=config.seed,
        data_fingerprint=data.fingerprint,
        pool_samples=pool_samples(config, world_size),
        micro_steps=config.train.global_batch_size // (micro_batch_size * world_size),
        asked=dict(asked or wishes(config)),
    )
    now_frozen = frozen_parameters(config)
    if checkpoint is None:
        if config.train.initial_weights is not None:
            tensors_anew(config)
        return fresh
    saved = read_progress(checkpoint)
    _check_same_model(checkpoint, config)
    _check_same_run(checkpoint, saved, fresh, config.checkpoint.allow_pool_change)
    _check_frozen(checkpoint, config, now_frozen)
    _check_averages(checkpoint, config)
    return replace(fresh, step=saved.step, images_seen=saved.images_seen, skipped=saved.skipped)


def changed_settings(checkpoint: Path, config: Config) -> dict[str, str]:
    """What a run that continues a checkpoint changes in its settings: `0.001 -> 0.0005` by the name of each."""
    saved = flat_settings(load_config(checkpoint / "config.yaml", training=False, stored=True))
    now = flat_settings(config)
    # Of one model, by `_check_same_model`: so both know the same settings.
    return {name: f"{saved[name]} -> {value}" for name, value in now.items() if saved[name] != value}


def change_of_ranks(checkpoint: Path, config: Config, progress: Progress, ranks: int) -> str:
    """How a run that continues a checkpoint is fitted to the ranks there are; empty: as it was, and as was asked for.

    Args:
        progress: of this start.
    """
    saved = read_progress(checkpoint)
    train = load_config(checkpoint / "config.yaml", training=False, stored=True).train
    before = train.global_batch_size // (train.micro_batch_size * saved.micro_steps)
    others = {name: size for name, size in (progress.asked or {}).items() if size not in (0, wishes(config)[name])}
    if ranks == before and not others:
        return ""
    changed, now, parts = changed_settings(checkpoint, config), flat_settings(config), []
    for name in SET_FOR_RANKS:
        if name in changed or name in others:
            asked = f" (asked for: {others[name]})" if name in others else ""
            parts.append(f"{name} {changed.get(name, now[name])}{asked}")
    parts.append(f"{progress.micro_steps} micro-step{'s' * (progress.micro_steps > 1)} a step")
    if saved.pool_samples == progress.pool_samples > 1:
        parts.append(f"token pools of {saved.pool_samples} samples as before")
    return f"on {name_ranks([ranks])}, after {before}: {', '.join(parts)}"


def changed_rate(checkpoint: Path, step: int, config: Config) -> str:
    """How the learning rate of step `step`, the next one, is not what it would have been; else empty."""
    before = learning_rate(load_config(checkpoint / "config.yaml", training=False, stored=True), step)
    now = learning_rate(config, step)
    return f"the learning rate of step {step} is {now:g}; it would have been {before:g}" if now != before else ""


def _check_same_model(checkpoint: Path, config: Config) -> None:
    """Refuse a checkpoint of another model, naming the first setting that differs."""
    saved = load_config(checkpoint / "config.yaml", stored=True)
    _refuse_other_model(config, saved, f"the checkpoint {checkpoint}", "another run_dir")


def _refuse_other_model(config: Config, saved: Config, whose: str, otherwise: str) -> None:
    """Name the first setting that makes the model of `config` another one than the saved one."""
    settings = model_settings(saved)
    for key, value in model_settings(config).items():
        if settings[key] != value:
            raise UserError(
                f"{key}={value}, but {whose} is of another model with {key}={settings[key]}; "
                f"use that value or {otherwise}"
            )


def _check_frozen(checkpoint: Path, config: Config, frozen: frozenset[str]) -> None:
    """Refuse to train other parameters than before: their moments and averages are not there."""
    saved = load_config(checkpoint / "config.yaml", stored=True)
    if frozen_parameters(saved) != frozen:
        raise UserError(
            f"train.freeze={list(config.train.freeze)}, but {checkpoint} was trained with train.freeze="
            f"{list(saved.train.freeze)}; use that, or go on in another run_dir from its weights: python -m "
            "diffmoe_dist.convert makes a folder of them for train.initial_weights"
        )


def _check_averages(checkpoint: Path, config: Config) -> None:
    """Refuse averages that a checkpoint does not have: the steps before it cannot be averaged any more."""
    saved = load_config(checkpoint / "config.yaml", stored=True).ema
    if config.ema.decay != saved.decay and config.ema.decay in saved.decays:
        raise UserError(
            f"ema.decay={config.ema.decay:g}, but {checkpoint} has that average in ema.decays, beside ema.decay="
            f"{saved.decay:g}; leave it there, and choose it by --ema-decay"
        )
    if averages(config.ema).keys() - averages(saved).keys():
        now, then = (f"{ema.decay:g}, {ema.decays} and {ema.lengths}" for ema in (config.ema, saved))
        raise UserError(
            f"ema.decay, ema.decays and ema.lengths are {now}, but {checkpoint} has averages by {then}; use "
            "those, some of them, or another run_dir"
        )


def _check_same_run(checkpoint: Path, saved: Progress, now: Progress, allow_pool_change: bool) -> None:
    """Refuse a resume with another seed, other data or another token pool: it would be another run."""
    if saved.seed != now.seed:
        raise UserError(
            f"seed={now.seed}, but {checkpoint} was trained with seed={saved.seed}; use that or another run_dir"
        )
    if saved.data_fingerprint != now.data_fingerprint:
        raise UserError(
            f"data.shards holds other data (index {now.data_fingerprint[:12]}) than {checkpoint} was trained on "
            f"({saved.data_fingerprint[:12]}); use the same shards or another run_dir"
        )
    if saved.pool_samples != now.pool_samples and not allow_pool_change:
        raise UserError(
            f"one token pool of this launch has {now.pool_samples} samples, of {checkpoint} it had "
            f"{saved.pool_samples}; set train.micro_batch_size so that they agree, or checkpoint.allow_pool_change=true"
        )
