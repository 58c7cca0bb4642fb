"""Many images into a folder, by all ranks together, in blocks.

A job that was interrupted samples what is missing; the folder of another job is refused.

    OUT/blocks/job.json, block-*.npz    while the job runs
    OUT/samples.npz, grid.png, sampling.json, prompts.jsonl, png/, geneval/
    OUT/lock                            held by the job that is sampling

Shape legend: N images, H = W image size, C channels.
"""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from diffmoe_dist.config import Config, own_router
from diffmoe_dist.data.dataset import TrainingData
from diffmoe_dist.data.open import open_data
from diffmoe_dist.diffusion.objectives import DDPM_STEPS, build_objective
from diffmoe_dist.diffusion.samplers import ATOL, JOINT, RTOL, Guidance
from diffmoe_dist.engine.checkpoint import has_thresholds_of_average
from diffmoe_dist.engine.ema import stored_average
from diffmoe_dist.engine.sharded_state import EMA
from diffmoe_dist.engine.weights import find_model, is_weights_folder, read_class_names, read_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import lock_file, make_writable, write_atomically, write_json, write_npz
from diffmoe_dist.launch import Launch
from diffmoe_dist.logs import logger
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.precision import tf32_products
from diffmoe_dist.parallel.agreement import check_agreement
from diffmoe_dist.parallel.topology import from_first_rank, on_first_rank
from diffmoe_dist.sampling.blocks import Block, BlockSampler, join_blocks, sample_missing_blocks
from diffmoe_dist.sampling.conditions import ClassLabels, Conditions, PromptConditions, open_conditions
from diffmoe_dist.sampling.generate import (
    UINT8_RULE,
    Decode,
    SamplerSettings,
    choose_sampler,
    choose_time_shift,
    open_decoder,
)
from diffmoe_dist.sampling.geneval import check_prompts, write_geneval
from diffmoe_dist.sampling.grid import conditioned_grid
from diffmoe_dist.sampling.model import open_model, uses_tf32
from diffmoe_dist.sampling.settings import PROMPTS_NAME, SamplingSettings

OTHER_CAPACITY = 0.05  # relative; a measured capacity so far from the one trained for is warned of
RECALIBRATED_ON = "recalibrated_on"
AS_BEFORE_0_2 = {"precision": "fp32", "tf32": False}  # what jobs of older versions do not say


@dataclass(frozen=True)
class Source:
    """What images are sampled from. Several jobs can have the same: nothing is opened twice."""

    checkpoint: Path
    config: Config
    model: DiT
    weights: str  # their fingerprint, with the thresholds as they are in the checkpoint
    conditions: Conditions
    decode: Decode
    data: str | None = None  # the fingerprint of those that --recalibrate reads


def sample_to_folder(settings: SamplingSettings, out: str | Path, device: torch.device, launch: Launch) -> None:
    """Sample `settings.num` images on all ranks, those that `out` does not have yet; collective.

    Every rank holds the whole averaged model or, with `settings.expert`, a part of its experts.

    Raises:
        UserError: there is no such checkpoint, its model makes latents and no decoder is given, a setting is not for
            it, or `out` belongs to another job.
    """
    out = Path(out)
    make_writable(out, f"--out {out}")
    source = open_source(settings, device, launch)
    run_job(settings, source, out, launch)
    if launch.rank == 0:
        _tell_capacity(json.loads((out / "sampling.json").read_text()), source.checkpoint)


def open_source(settings: SamplingSettings, device: torch.device, launch: Launch) -> Source:
    """Open model, text encoder and autoencoder; collective. Raises UserError as `sample_to_folder`."""
    checkpoint = from_first_rank(find_model(settings.checkpoint))
    config = read_settings(checkpoint, settings.overrides)
    data = open_data(config, device) if settings.recalibrate else None
    encoders = data.encoders if isinstance(data, TrainingData) else None
    names = read_class_names(checkpoint)
    conditions = open_conditions(settings, config, device, encoders.text if encoders else None, names)
    if settings.geneval:
        assert isinstance(conditions, PromptConditions)
        check_prompts(conditions.every_metadata, settings.num or 0)
    decoder = settings.decoder or config.sample.decoder
    decode = open_decoder(config, decoder, "--decoder", device, encoders.autoencoder if encoders else None)
    model, weights = open_model(settings, checkpoint, device, launch, data)
    return Source(checkpoint, config, model, weights, conditions, decode, data.fingerprint if data else None)


def run_job(settings: SamplingSettings, source: Source, out: Path, launch: Launch) -> None:
    """Sample into `out` what it does not have yet; collective. Raises UserError as `sample_to_folder`."""
    lock = on_first_rank(partial(_lock, out))
    try:
        _run_job(settings, source, out, launch)
        dist.barrier()
    finally:
        if launch.rank == 0 and lock is not None:
            os.close(lock)


def _lock(out: Path) -> int | None:
    try:
        return lock_file(out / "lock")
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another job is sampling into it; wait for its end, or give another --out"
        ) from None


def _run_job(settings: SamplingSettings, source: Source, out: Path, launch: Launch) -> None:
    job = describe_job(settings, source.config, source.weights, source.conditions, source.data)
    values = {"--out": str(out), **job}
    check_agreement(values, "start all ranks with the same options, code and weights", own_router(source.config))
    if _is_finished(out, job, settings):
        logger.info("%s has these %d images already", out, job["num"])
    else:
        blocks = out / "blocks"
        if launch.rank == 0:
            blocks.mkdir(exist_ok=True)
            write_json(blocks / "job.json", job)
        sampler = _block_sampler(job, source, settings.expert > 1)
        with tf32_products(source.model.pos_embed.device, job["tf32"]):
            sample_missing_blocks(sampler, blocks, launch)
        if launch.rank == 0:
            logger.info("writing %s", out / "samples.npz")
            about = {"checkpoint": str(source.checkpoint), "overrides": list(settings.overrides), **job}
            _write_results(out, about, join_blocks(sampler, blocks), source)
            shutil.rmtree(blocks)
    if settings.png and launch.rank == 0:
        _write_png(out)
    if settings.geneval and launch.rank == 0:
        assert isinstance(source.conditions, PromptConditions)
        _write_geneval(out, source.conditions)


def describe_job(
    settings: SamplingSettings, config: Config, weights: str, conditions: Conditions, data: str | None = None
) -> dict[str, Any]:
    """What decides the images: two jobs with the same description make the same images.

    Args:
        weights: their fingerprint.
        data: that of the data the thresholds are found on, which is one on every device, as thresholds are not.

    Raises:
        UserError: a setting does not fit the model.
    """
    sampler, steps = choose_sampler(settings.sampler, settings.steps, config.objective.name)
    shift = choose_time_shift(settings.time_shift, sampler, config)
    num = settings.num
    conditioned: dict[str, Any] = {"labels": settings.labels or "balanced"}
    chosen = conditions.chosen if isinstance(conditions, ClassLabels) else None
    conditioned["classes"] = "all" if chosen is None else list(chosen)
    if isinstance(conditions, PromptConditions):
        num = num or len(conditions.encoded.prompts)
        conditioned = {
            "prompts": conditions.encoded.fingerprint,
            "num_prompts": len(conditions.encoded.prompts),
            "negative_prompt": conditions.encoded.negative_prompt,
            "text_encoder_sha256": conditions.encoded.encoder_sha256,
        }
    assert num is not None
    _check_for_model(settings, config, sampler, num)
    experts = config.experts
    inference = getattr(config.moe, "inference", None)
    alone = experts is None or experts.pool_kind() == "sample" or inference == "threshold"
    precision = settings.precision or config.precision
    # In bf16 an image's rounding, and with it the choice of an expert, can depend on how many are computed at once.
    alone = alone and sampler not in JOINT and precision == "fp32"
    return {
        "ema_decay": settings.ema_decay,
        "ema_length": settings.ema_length,
        "weights": weights,
        "num": num,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "sampler": sampler,
        "steps": steps,
        "time_shift": None if shift == 1.0 else shift,
        **({"rtol": RTOL, "atol": ATOL} if sampler in JOINT else {}),
        "cfg_scale": settings.cfg_scale,
        "cfg_channels": settings.cfg_channels or "all",
        "cfg_interval": None if settings.cfg_interval is None else list(settings.cfg_interval),
        "one_pass": settings.one_pass,
        **conditioned,
        "inference": inference,
        "constant_threshold": getattr(config.moe, "constant_threshold", None),
        "recalibrate": settings.recalibrate,
        **({RECALIBRATED_ON: data} if data else {}),
        "decoder": settings.decoder or config.sample.decoder or config.data.autoencoder,
        "uint8_rule": UINT8_RULE,
        "precision": precision,
        "tf32": uses_tf32(settings, config),
        "reproducible_unit": "image" if alone else "block of batch_size images",
    }


def _check_for_model(settings: SamplingSettings, config: Config, sampler: str, num: int) -> None:
    channels, interval, expert = settings.cfg_channels, settings.cfg_interval, settings.expert
    if channels is not None and channels >= config.model.in_channels:
        raise UserError(f"--cfg-channels {channels}: this model has {config.model.in_channels}; use --cfg-channels all")
    end = 1 if config.objective.name == "flow" else DDPM_STEPS - 1
    if interval is not None and not 0 <= interval[0] <= interval[1] <= end:
        given = f"--cfg-interval {interval[0]:g} {interval[1]:g}"
        raise UserError(f"{given}: the times of objective.name={config.objective.name} are 0 to {end}, lower one first")
    if expert == 1:
        return
    if sampler in JOINT:
        raise UserError(
            f"--expert {expert}: ranks that hold the experts together must take the same steps, and {sampler} chooses "
            "its own; use euler or heun"
        )
    if num % settings.batch_size:
        raise UserError(
            f"--expert {expert}: ranks that hold the experts together sample blocks of one size; make --num {num} a "
            f"multiple of {settings.batch_size_option} {settings.batch_size}"
        )


def sampler_of(job: dict[str, Any]) -> SamplerSettings:
    """How the images of a job are sampled, by its description."""
    channels = None if job["cfg_channels"] == "all" else job["cfg_channels"]
    guidance = Guidance(job["cfg_scale"], channels, job["cfg_interval"], job["one_pass"])
    return SamplerSettings(job["sampler"], job["steps"], guidance, job["seed"], job.get("time_shift") or 1.0)


def _block_sampler(job: dict[str, Any], source: Source, is_sharded: bool) -> BlockSampler:
    objective = build_objective(source.config)
    return BlockSampler(
        source.model, objective, source.decode, source.conditions, sampler_of(job), job["num"], job["batch_size"],
        is_sharded,
    )  # fmt: skip


def _is_finished(out: Path, job: dict[str, Any], settings: SamplingSettings) -> bool:
    """Whether `out` holds the finished job; refuses the folder of another one."""
    found: dict[str, Any] = {}
    for name in ("blocks/job.json", "sampling.json"):
        text = from_first_rank((out / name).read_text() if (out / name).is_file() else None)
        if text is not None:
            found[name] = AS_BEFORE_0_2 | _parsed(text, out / name)
            if name == "sampling.json":  # of an older version: it does not say the data, but nothing is added to it
                found[name].setdefault(RECALIBRATED_ON, job.get(RECALIBRATED_ON))
            _check_same_job(out, found[name], job, settings)
    return "sampling.json" in found


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        job = json.loads(text)
    except (ValueError, RecursionError):
        job = None
    if not isinstance(job, dict):
        raise UserError(f"{path} is damaged: it describes no job; remove its folder, or give another --out")
    return job


def _check_same_job(out: Path, begun: dict[str, Any], job: dict[str, Any], settings: SamplingSettings) -> None:
    for key, value in job.items():
        if begun.get(key) == value:
            continue
        if key == "weights":
            raise UserError(
                f"--out {out}: its images are of other weights than {settings.checkpoint} now has; give that "
                "checkpoint's step folder, or another --out"
            )
        if key == RECALIBRATED_ON:
            known = "other data than the run now has" if key in begun else "data that an older version did not record"
            raise UserError(
                f"--out {out}: the thresholds of its images were found by --recalibrate {settings.recalibrate} on "
                f"{known}; {'give those data, or' if key in begun else 'give'} another --out"
            )
        raise UserError(
            f"--out {out}: its images have {key} {begun.get(key)}, not {value}; "
            f"{_remedy(key, begun.get(key), settings)}another --out"
        )


def _remedy(key: str, value: Any, settings: SamplingSettings) -> str:
    """How the command is made to ask for `value` of a job's description, as far as options can."""
    if key == "tf32":
        return "leave out --precision, or give " if settings.precision else "give --precision fp32, or "
    if key in ("inference", "constant_threshold"):
        return f"leave out moe.{key}, or give " if value is None else f"give moe.{key}={value}, or "
    if key in ("prompts", "num_prompts", "text_encoder_sha256"):
        return f"give the same {'--encoder' if key == 'text_encoder_sha256' else '--prompts'}, or "
    if not hasattr(settings, key):
        return "give "
    option = settings.option(key)
    if not value or value == "all":  # the default
        return f"leave out {option}, or give "
    if value is True:
        return f"give {option}, or "
    separator = "," if key == "classes" else " "
    return f"give {option} {separator.join(map(str, value)) if isinstance(value, list) else value}, or "


def _write_results(out: Path, about: dict[str, Any], all_blocks: Block, source: Source) -> None:
    """What a user looks at; sampling.json last, for it says that the job is finished."""
    images_NHWC, conditions, num = all_blocks.images_NHWC, source.conditions, about["num"]
    labels = [conditions.label(number) for number in range(num)]
    write_npz(out / "samples.npz", arr_0=images_NHWC, arr_1=np.asarray(labels, dtype=np.int64))
    if isinstance(conditions, PromptConditions):
        lines = [json.dumps(conditions.every_metadata[label]) + "\n" for label in labels]
        write_atomically(out / PROMPTS_NAME, "".join(lines))
    Image.fromarray(conditioned_grid(images_NHWC, conditions).squeeze()).save(out / "grid.png")
    capacity = all_blocks.slots / all_blocks.tokens if all_blocks.tokens else None
    counts = account(source.config)
    record = {
        **about,
        **_named(conditions),
        "nfe": all_blocks.nfe,
        "evaluations": all_blocks.nfe,  # its name before version 0.2
        "capacity": capacity,
        "capacity_trained_for": counts.nominal_capacity if capacity is not None else None,
        "parameters": counts.total,
        "activated_parameters": round(counts.activated(capacity)),
        "images_per_second": num / all_blocks.seconds,
    }
    write_json(out / "sampling.json", record)


def _named(conditions: Conditions) -> dict[str, Any]:
    """The names of the classes that were asked for, where they are known."""
    if not isinstance(conditions, ClassLabels) or conditions.chosen is None or not conditions.names:
        return {}
    return {"class_names": [conditions.heading(label) for label in conditions.chosen]}


def _tell_capacity(record: dict[str, Any], checkpoint: Path) -> None:
    """The measured capacity beside the one trained for, and what brings it closer where it is another one."""
    measured, trained_for = record["capacity"], record.get("capacity_trained_for")
    if measured is None or trained_for is None:
        return
    told, apart = f"measured capacity C={measured:.3f}, trained for C={trained_for:g}", abs(measured / trained_for - 1)
    if apart < OTHER_CAPACITY:
        logger.info("%s", told)
    else:
        logger.warning("%s, %.0f %% apart; %s", told, 100 * apart, _remedy_of_capacity(record, checkpoint))


def _remedy_of_capacity(record: dict[str, Any], checkpoint: Path) -> str:
    inference = record["inference"]
    if inference == "constant":
        return f"moe.constant_threshold={record['constant_threshold']} sets it; diffmoe_dist.interval_search finds one"
    if inference not in ("threshold", "count"):
        return "slots are whole numbers in each block, rounded down: give a larger --batch-size"
    static = "moe.inference=static takes as many tokens as training did"
    if record["recalibrate"] or _has_own_thresholds(record, checkpoint):
        return static
    return f"--recalibrate 8 finds the thresholds of these weights, {static}"


def _has_own_thresholds(record: dict[str, Any], checkpoint: Path) -> bool:
    """Whether the thresholds are those of the average that was sampled from."""
    if is_weights_folder(checkpoint) or not has_thresholds_of_average(checkpoint):
        return False
    return stored_average(read_settings(checkpoint).ema, record["ema_decay"], record["ema_length"]) == EMA


def _write_png(out: Path) -> None:
    """One file an image, png/000000.png and on."""
    folder = out / "png"
    folder.mkdir(exist_ok=True)
    with np.load(out / "samples.npz") as file:
        images_NHWC = file["arr_0"]

    def write(number: int) -> None:
        Image.fromarray(images_NHWC[number].squeeze()).save(folder / f"{number:06d}.png")

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(len(images_NHWC))))


def _write_geneval(out: Path, conditions: PromptConditions) -> None:
    prompts = conditions.every_metadata
    with np.load(out / "samples.npz") as file:
        images_NHWC = file["arr_0"]
    write_geneval(out / "geneval", images_NHWC, prompts, len(images_NHWC) // len(prompts))
