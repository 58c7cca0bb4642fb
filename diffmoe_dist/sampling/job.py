"""Many images into a folder, by all ranks together: in blocks, each kept on disk as soon as it is drawn.

A job that was interrupted draws what is missing; the folder of another job is refused.

    OUT/blocks/job.json, block-*.npz    while the job runs
    OUT/samples.npz, grid.png, sampling.json, prompts.jsonl, png/, geneval/

Shape legend: N images, H = W image size, C channels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.prompts import (
    ENCODED_SUFFIX,
    EncodedPrompts,
    Prompt,
    encode_prompts,
    open_encoded_prompts,
    read_prompts,
)
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.diffusion.objectives import DDPM_STEPS, Objective, build_objective
from diffmoe_dist.diffusion.samplers import ADAPTIVE, ATOL, RTOL, Guidance
from diffmoe_dist.engine.weights import find_model, read_model, read_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import make_writable, write_atomically, write_json, write_npz
from diffmoe_dist.launch import Launch
from diffmoe_dist.logs import ProgressLog, logger
from diffmoe_dist.model.accounting import account
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.parallel.topology import Topology, from_first_rank
from diffmoe_dist.sampling.conditions import ClassLabels, Conditions, PromptConditions, draw_labels
from diffmoe_dist.sampling.generate import (
    UINT8_RULE,
    Decode,
    choose_sampler,
    generate,
    grid_columns,
    image_grid,
    open_decoder,
    to_uint8,
)
from diffmoe_dist.sampling.geneval import check_metadata, write_geneval
from diffmoe_dist.sampling.settings import SamplingSettings

PROMPTS_NAME = "prompts.jsonl"


@dataclass(frozen=True)
class Block:
    """Images that are drawn together."""

    images: np.ndarray  # (N, H, W, C) uint8
    evaluations: int  # of the guided denoiser, for each image
    slots: float  # see `Generated`
    tokens: int
    seconds: float  # of the job: where several ranks draw at a time, one rank's share


def sample_to_folder(settings: SamplingSettings, out: str | Path, device: torch.device, launch: Launch) -> None:
    """Draw `settings.num` images on all ranks, those that `out` does not have yet; collective.

    Every rank draws every so-manieth missing block of `batch_size` images, so a block is the same on any number of
    ranks. Every rank holds the whole averaged model or, with `settings.expert`, a share of its experts.

    Raises:
        UserError: there is no such checkpoint, its model draws latents, a setting is not for it, or `out` belongs to
            another job.
    """
    out = Path(out)
    try:
        make_writable(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None
    checkpoint = from_first_rank(find_model(settings.checkpoint))
    config = read_settings(checkpoint, settings.overrides)
    conditions = open_conditions(settings, config, device)
    decode = open_decoder(config, settings.decoder or config.sample.decoder, "--decoder", device)
    model, weights = _read_model(settings, checkpoint, device, launch)
    job = describe_job(settings, config, weights, conditions)
    if _is_finished(out, job):
        logger.info("%s has these %d images already", out, job["num"])
    else:
        _draw_missing_blocks(out / "blocks", job, settings, model, config, conditions, decode, launch)
        if launch.rank == 0:
            logger.info("writing %s", out / "samples.npz")
            about = {"checkpoint": str(checkpoint), "overrides": list(settings.overrides)}
            _join_blocks(out, job, config, conditions, about)
    if settings.png and launch.rank == 0:
        _write_png(out)
    if settings.geneval and launch.rank == 0:
        assert isinstance(conditions, PromptConditions)
        _write_geneval(out, conditions)
    dist.barrier()


def open_conditions(settings: SamplingSettings, config: Config, device: torch.device) -> Conditions:
    """What the images of a job are drawn from.

    Raises:
        UserError: classes for a model that is told captions, or the other way round; or a text encoder that is not the
            model's.
    """
    prompts = settings.prompts or settings.prompt
    if config.model.condition == "class":
        if prompts is not None:
            given = f"--prompts {settings.prompts}" if settings.prompts else f"--prompt {settings.prompt}"
            raise UserError(f"{given}: this model is told classes; give --num, and --classes for some of them")
        assert settings.num is not None
        classes = list(range(config.model.num_classes)) if settings.classes is None else list(settings.classes)
        for label in classes:
            if not 0 <= label < config.model.num_classes:
                raise UserError(f"--classes {label}: this model knows the classes 0 to {config.model.num_classes - 1}")
        labels = draw_labels(settings.labels or "balanced", settings.num, classes, settings.seed)
        return ClassLabels(labels, config.model.num_classes)
    for name in ("labels", "classes"):
        if getattr(settings, name) is not None:
            raise UserError(f"--{name} {getattr(settings, name)}: this model is told captions; give --prompts FILE")
    if settings.prompts is None and settings.prompt is None:
        raise UserError("--prompts is missing: this model is told captions; give a FILE of them, or --prompt TEXT")
    assert config.model.text_max_length is not None
    conditions = PromptConditions(_open_prompts(settings, config, device), config.model.text_max_length)
    if settings.geneval:
        check_metadata(conditions.every_metadata)
        if (settings.num or 0) % len(conditions.every_metadata):
            raise UserError(
                f"--num {settings.num}: GenEval wants as many images of each of the {len(conditions.every_metadata)} "
                "prompts; choose a multiple"
            )
    return conditions


def job_prompts(
    out: Path, job: dict[str, Any], config: Config, encoder: str, tokenizer: str | None, device: torch.device
) -> PromptConditions:
    """The prompts that the images of a finished job were drawn from.

    Raises:
        UserError: as `open_conditions`, or the job's prompts are not there.
    """
    lines = read_prompts(out / PROMPTS_NAME, "--samples")[: job["num_prompts"]]
    length = config.model.text_max_length
    opened = TextEncoder.open(encoder, tokenizer, length, device, "--encoder")
    encoded = encode_prompts(lines, job["negative_prompt"], opened)
    _check_encoder(encoded, config, f"--encoder {encoder}")
    assert length is not None
    return PromptConditions(encoded, length)


def _open_prompts(settings: SamplingSettings, config: Config, device: torch.device) -> EncodedPrompts:
    if settings.prompts is not None and settings.prompts.endswith(ENCODED_SUFFIX):
        for name in ("encoder", "tokenizer", "negative_prompt"):
            if getattr(settings, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --prompts {settings.prompts}, whose prompts are "
                    "encoded; give it to encode-prompts"
                )
        encoded = open_encoded_prompts(settings.prompts)
        named = f"--prompts {settings.prompts}"
    else:
        if settings.encoder is None:
            raise UserError("--encoder is missing: the folder of the text encoder that the model was trained with")
        file = settings.prompts
        prompts = [Prompt(str(settings.prompt))] if file is None else read_prompts(file)
        encoder = TextEncoder.open(
            settings.encoder, settings.tokenizer, config.model.text_max_length, device, "--encoder"
        )
        encoded = encode_prompts(prompts, settings.negative_prompt, encoder)
        named = f"--encoder {settings.encoder}"
    _check_encoder(encoded, config, named)
    return encoded


def _check_encoder(encoded: EncodedPrompts, config: Config, named: str) -> None:
    expected = config.model.text_encoder_sha256
    if encoded.encoder_sha256 != expected or encoded.max_length != config.model.text_max_length:
        raise UserError(
            f"{named}: is not the encoder that the model was trained with: SHA-256 {encoded.encoder_sha256[:12]}..., "
            f"{encoded.max_length} tokens, the model's {str(expected)[:12]}..., {config.model.text_max_length} tokens; "
            "use that"
        )


def describe_job(settings: SamplingSettings, config: Config, weights: str, conditions: Conditions) -> dict[str, Any]:
    """What decides the images: two jobs with the same description draw the same.

    Args:
        weights: their fingerprint.

    Raises:
        UserError: a setting does not fit the model.
    """
    sampler, steps = choose_sampler(settings.sampler, settings.steps, config.objective.name)
    num = settings.num
    told: dict[str, Any] = {"labels": settings.labels or "balanced"}
    told["classes"] = "all" if settings.classes is None else list(settings.classes)
    if isinstance(conditions, PromptConditions):
        num = num or len(conditions.encoded.prompts)
        told = {
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
    return {
        "weights": weights,
        "num": num,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "sampler": sampler,
        "steps": steps,
        **({"rtol": RTOL, "atol": ATOL} if sampler == ADAPTIVE else {}),
        "cfg_scale": settings.cfg_scale,
        "cfg_channels": settings.cfg_channels or "all",
        "cfg_interval": None if settings.cfg_interval is None else list(settings.cfg_interval),
        "one_pass": settings.one_pass,
        **told,
        "inference": inference,
        "constant_threshold": getattr(config.moe, "constant_threshold", None),
        "recalibrate": settings.recalibrate,
        "decoder": settings.decoder or config.sample.decoder or config.data.autoencoder,
        "uint8_rule": UINT8_RULE,
        "reproducible_unit": "image" if alone and sampler != ADAPTIVE else "block of batch_size images",
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
    if sampler == ADAPTIVE:
        raise UserError(
            f"--expert {expert}: ranks that share experts must take the same steps, and {sampler} chooses its own; "
            "use euler or heun"
        )
    if num % settings.batch_size:
        raise UserError(
            f"--expert {expert}: ranks that share experts draw blocks of one size; make --num {num} a "
            f"multiple of --batch-size {settings.batch_size}"
        )


def _read_model(settings: SamplingSettings, checkpoint: Path, device: torch.device, launch: Launch) -> tuple[DiT, str]:
    """The model, and the fingerprint of its weights with the thresholds as they are in the checkpoint."""
    spread = None
    if settings.expert > 1:
        spread = partial(share_experts, expert=settings.expert, device=device, launch=launch)
    model, config = read_model(checkpoint, device, settings.overrides, spread)
    weights = weights_fingerprint(model, settings.expert > 1)
    if settings.recalibrate:
        from diffmoe_dist.sampling.calibration import recalibrate_on_training_data  # imports the training engine

        recalibrate_on_training_data(model, config, settings.recalibrate, settings.batch_size)
    return model, weights


def share_experts(model: DiT, config: Config, *, expert: int, device: torch.device, launch: Launch) -> None:
    """Leave this rank its share of the experts; the images of a rank still compete among themselves only.

    Raises:
        UserError: the experts do not divide over the ranks.
    """
    from diffmoe_dist.parallel.expert_parallel import apply_expert_parallel, create_topology  # imports deepspeed

    experts = config.experts
    if experts is None:
        raise UserError(f"--expert {expert} needs experts, but moe.router=dense has none; leave it out")
    assert experts.num_experts is not None
    if launch.world_size % expert or experts.num_experts % expert:
        raise UserError(
            f"--expert {expert} must divide the {launch.world_size} ranks and moe.num_experts={experts.num_experts}"
        )
    topology: Topology = create_topology(launch, device, expert)
    pools = [getattr(layer.router, "pool", None) for layer in model.moe_layers]
    apply_expert_parallel(model, config, topology)
    for layer, pool in zip(model.moe_layers, pools, strict=True):
        if pool is not None:
            layer.router.pool = pool


def weights_fingerprint(model: DiT, is_shared: bool) -> str:
    """SHA-256 over all parameters and buffers, whichever ranks hold the experts; collective where they are shared."""
    digests: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        first = getattr(model.get_submodule(name.rpartition(".")[0]), "first", None)
        parts = {name: tensor}
        if first is not None:
            parts = {f"{name}.{first + local}": part for local, part in enumerate(tensor)}
        digests |= {part_name: _sha256(part) for part_name, part in parts.items()}
    if is_shared:
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, digests)
        digests = {name: digest for of_rank in everyone for name, digest in of_rank.items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _sha256(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _is_finished(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` holds the finished job; refuses the folder of another one."""
    found: dict[str, Any] = {}
    for name in ("blocks/job.json", "sampling.json"):
        text = from_first_rank((out / name).read_text() if (out / name).is_file() else None)
        if text is not None:
            found[name] = json.loads(text)
            _check_same_job(out, found[name], job)
    return "sampling.json" in found


def _check_same_job(out: Path, begun: dict[str, Any], job: dict[str, Any]) -> None:
    for key, value in job.items():
        if begun.get(key) == value:
            continue
        if key == "weights":
            raise UserError(
                f"--out {out}: its images are of other weights than --checkpoint now has; give that checkpoint's "
                "step folder, or another --out"
            )
        raise UserError(f"--out {out}: its images have {key} {begun.get(key)}, not {value}; use that or another --out")


def _draw_missing_blocks(
    blocks: Path,
    job: dict[str, Any],
    settings: SamplingSettings,
    model: DiT,
    config: Config,
    conditions: Conditions,
    decode: Decode,
    launch: Launch,
) -> None:
    """Draw what is not on disk yet, block by block; collective."""
    if launch.rank == 0:
        blocks.mkdir(exist_ok=True)
        write_json(blocks / "job.json", job)
    starts = list(range(0, job["num"], job["batch_size"]))
    missing = from_first_rank(_missing(blocks, starts))
    objective = build_objective(config.objective)
    with ProgressLog(job["num"], job["num"] - _images(missing, job), launch.rank == 0) as watch:
        for begin in range(0, len(missing), launch.world_size):
            at_once = missing[begin : begin + launch.world_size]
            if launch.rank < len(at_once):
                start = at_once[launch.rank]
                block = draw_block(model, objective, decode, job, conditions, start, len(at_once))
                _write_block(blocks / _block_name(start), block)
            elif settings.expert > 1:  # the others need this rank's experts: it goes through the motions
                draw_block(model, objective, decode, job, conditions, at_once[0], len(at_once))
            watch.advance(_images(at_once, job))
    dist.barrier()
    left = from_first_rank(_missing(blocks, starts))
    if left:
        raise UserError(f"--out {blocks.parent}: {len(left)} blocks are not there; use a disk that all ranks share")


def draw_block(
    model: DiT,
    objective: Objective,
    decode: Decode,
    job: dict[str, Any],
    conditions: Conditions,
    start: int,
    ranks: int,
) -> Block:
    """The images `start` to `start` + batch_size of a job, as far as it has them."""
    numbers = list(range(start, min(start + job["batch_size"], job["num"])))
    channels = None if job["cfg_channels"] == "all" else job["cfg_channels"]
    begun = time.perf_counter()
    drawn = generate(
        model, objective, numbers, conditions,
        seed=job["seed"], sampler=job["sampler"], steps=job["steps"],
        guidance=Guidance(job["cfg_scale"], channels, job["cfg_interval"], job["one_pass"]),
    )  # fmt: skip
    pixels = to_uint8(decode(drawn.images))
    seconds = (time.perf_counter() - begun) / ranks
    return Block(pixels, drawn.evaluations, drawn.slots, drawn.tokens, seconds)


def job_classes(job: dict[str, Any], config: Config) -> ClassLabels:
    """The classes that the images of a job were drawn from."""
    classes = list(range(config.model.num_classes)) if job["classes"] == "all" else job["classes"]
    return ClassLabels(draw_labels(job["labels"], job["num"], classes, job["seed"]), config.model.num_classes)


def _images(starts: list[int], job: dict[str, Any]) -> int:
    return sum(min(job["batch_size"], job["num"] - start) for start in starts)


def _block_name(start: int) -> str:
    return f"block-{start:08d}.npz"


def _missing(blocks: Path, starts: list[int]) -> list[int]:
    there = {path.name for path in blocks.glob("block-*.npz")}
    return [start for start in starts if _block_name(start) not in there]


def _write_block(path: Path, block: Block) -> None:
    """All of it or nothing."""
    counts = np.array([block.evaluations, block.slots, block.tokens, block.seconds], dtype=np.float64)
    write_npz(path, images=block.images, counts=counts)


def _read_block(path: Path) -> Block:
    try:
        with np.load(path) as file:
            evaluations, slots, tokens, seconds = file["counts"].tolist()
            return Block(file["images"], int(evaluations), slots, int(tokens), seconds)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and run the command again") from None


def _join_blocks(out: Path, job: dict[str, Any], config: Config, conditions: Conditions, about: dict[str, Any]) -> None:
    """From the blocks, all of which are there, to what a user looks at; sampling.json last, for it says finished."""
    starts = range(0, job["num"], job["batch_size"])
    first = _read_block(out / "blocks" / _block_name(0))
    images = np.empty((job["num"], *first.images.shape[1:]), dtype=np.uint8)
    slots = tokens = seconds = evaluations = 0.0
    for start in starts:
        block = _read_block(out / "blocks" / _block_name(start))
        images[start : start + len(block.images)] = block.images
        slots, tokens, seconds = slots + block.slots, tokens + block.tokens, seconds + block.seconds
        evaluations += block.evaluations * len(block.images)
    labels = [conditions.label(number) for number in range(job["num"])]
    write_npz(out / "samples.npz", arr_0=images, arr_1=np.asarray(labels, dtype=np.int64))
    if isinstance(conditions, PromptConditions):
        lines = [json.dumps(conditions.every_metadata[label]) + "\n" for label in labels]
        write_atomically(out / PROMPTS_NAME, "".join(lines))
    columns = grid_columns(config, job["num"])
    Image.fromarray(image_grid(images[: 10 * columns], columns).squeeze()).save(out / "grid.png")
    capacity = slots / tokens if tokens else None
    counts = account(config)
    record = {
        **about,
        **job,
        "evaluations": evaluations / job["num"],
        "capacity": capacity,
        "parameters": counts.total,
        "activated_parameters": round(counts.activated(capacity)),
        "images_per_second": job["num"] / seconds,
    }
    write_json(out / "sampling.json", record)
    shutil.rmtree(out / "blocks")


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
