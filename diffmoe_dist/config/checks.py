"""What makes a setting, or a combination of settings, impossible, and what a launch's ranks decide."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from diffmoe_dist.config.require import require
from diffmoe_dist.config.router import RouterSettings
from diffmoe_dist.config.schedule import check_schedule
from diffmoe_dist.config.schema import Config, ModelConfig, ObjectiveConfig, TrainConfig, data_sets
from diffmoe_dist.errors import UserError

Rule = tuple[Callable[[Any], bool], str]

AT_LEAST_ONE: Rule = (lambda value: value >= 1, "at least 1")


def up_to(most: int) -> Rule:
    """Sizes beyond this are no model's: a damaged file would take all memory, or minutes, before it is found out."""
    return (lambda value: 1 <= value <= most, f"from 1 to {most}")


NOT_NEGATIVE: Rule = (lambda value: 0 <= value < math.inf, "0 (off) or more, and finite")
POSITIVE: Rule = (lambda value: 0 < value < math.inf, "above 0 and finite")
BELOW_ONE: Rule = (lambda value: 0 <= value < 1, "in [0, 1)")
LONGEST_AVERAGE = 0.28  # of ema.lengths; the plain mean of all steps has 0.289

# What each setting by itself must be, where its type does not say it.
RULES: dict[str, Rule] = {
    "model.depth": up_to(1000),
    "model.hidden_size": up_to(2**16),
    "model.num_heads": up_to(2**12),
    "model.head_dim": up_to(2**12),
    "model.mlp_ratio": (lambda value: 0 < value <= 64, "above 0, and at most 64"),
    "model.patch_size": up_to(2**12),
    "model.input_size": up_to(2**14),
    "model.in_channels": up_to(2**12),
    "model.num_classes": (lambda value: 0 <= value <= 10**6, "from 0 to 1000000"),
    "model.text_hidden_size": (lambda value: 0 <= value <= 2**16, f"from 1 to {2**16}"),
    "model.text_max_length": (lambda value: 0 <= value <= 2**16, f"from 1 to {2**16}"),
    "model.text_pooled_size": (lambda value: 0 <= value <= 2**16, f"from 0 (none) to {2**16}"),
    "objective.time_scale": POSITIVE,
    "objective.logit_mean": (lambda value: abs(value) < math.inf, "finite"),
    "objective.logit_std": POSITIVE,
    # Beyond, two uniform numbers would be one time (SD3, section 3.1).
    "objective.mode_scale": (lambda value: -1 <= value <= 2 / (math.pi - 2), "from -1 to 2 / (pi - 2), about 1.75"),
    "objective.time_shift": POSITIVE,
    "objective.min_snr_gamma": POSITIVE,
    "train.steps": AT_LEAST_ONE,
    "train.global_batch_size": up_to(2**24),
    "train.micro_batch_size": (lambda value: value >= 0, "at least 1, or 0 for no accumulation"),
    "train.label_dropout": BELOW_ONE,
    "train.hang_timeout": (lambda value: 0 <= value <= 10**8, "0 (no limit) or more, and at most 100000000 seconds"),
    "optim.lr": POSITIVE,
    "optim.warmup_steps": (lambda value: value >= 0, "0 (none) or more"),
    "optim.decay_steps": (lambda value: value >= 0, "at least 1, or 0 for all steps after the warm-up"),
    "optim.final_lr": (lambda value: 0 <= value < math.inf, "0 or more, and finite"),
    "optim.betas": (lambda value: all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"),
    "optim.eps": POSITIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip_grad_norm": NOT_NEGATIVE,
    "ema.decay": BELOW_ONE,
    "ema.decays": (
        lambda value: len(set(value)) == len(value) and all(0 <= decay < 1 for decay in value),
        "different numbers in [0, 1)",
    ),
    "ema.lengths": (
        lambda value: len(set(value)) == len(value) and all(0 < length <= LONGEST_AVERAGE for length in value),
        f"different numbers above 0, at most {LONGEST_AVERAGE}",
    ),
    "parallel.expert": AT_LEAST_ONE,
    "parallel.tensor": AT_LEAST_ONE,
    "data.workers": (lambda value: 0 <= value <= 1024, "from 0 to 1024"),
    "checkpoint.every": AT_LEAST_ONE,
    "checkpoint.keep": AT_LEAST_ONE,
    "checkpoint.keep_every": (lambda value: value >= 0, "0 (none) or more"),
    "log.every": AT_LEAST_ONE,
    "log.figures_every": NOT_NEGATIVE,
    "sample.every": NOT_NEGATIVE,
    "sample.num": AT_LEAST_ONE,
    "sample.steps": AT_LEAST_ONE,
    "sample.time_shift": POSITIVE,
    "sample.cfg_scale": (lambda value: 0 <= value < math.inf, "0 or more, and finite"),
    "validation.every": NOT_NEGATIVE,
    "validation.images": AT_LEAST_ONE,
    "fid.every": NOT_NEGATIVE,
    "fid.num": (lambda value: value >= 2, "at least 2"),
    "profile.steps": (lambda value: 1 <= value[0] <= value[1], "first and last step, from 1"),
}


def check(config: Config) -> None:
    """Refuse what contradicts itself, whatever the data and the number of ranks.

    Raises:
        UserError: a setting is out of range, has no effect, or does not fit another one.
    """
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} is out of range; choose one from 0 to 2**63 - 1")
    for setting, (accepts, rule) in RULES.items():
        section, name = setting.split(".")
        require(getattr(config, section), section, name, accepts, rule)
    _check_model(config.model)
    _check_condition(config.model)
    _check_without_classes(config)
    _check_objective(config)
    _check_experts(config)
    _check_compile(config)
    _check_parallel(config)
    _check_held_out(config)
    _check_data(config)
    _check_online(config)
    _check_periods(config)
    check_schedule(config)


def _check_model(model: ModelConfig) -> None:
    if model.input_size % model.patch_size:
        raise UserError(
            f"model.input_size={model.input_size} is not divisible by model.patch_size={model.patch_size}; choose a "
            "multiple"
        )
    if model.hidden_size % 4:
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by 4, which the two-dimensional sine-cosine "
            "position table needs; choose a multiple of 4"
        )


def _check_condition(model: ModelConfig) -> None:
    if model.condition == "class":
        for name in ("text_hidden_size", "text_max_length", "text_pooled_size", "text_encoder_sha256"):
            if getattr(model, name):
                raise UserError(
                    f"model.{name}={getattr(model, name)} has no effect with model.condition=class; remove it"
                )
        return
    wrong = []  # all of it at once: whoever comes from classes has all of it wrong
    if model.num_classes != 0:
        wrong.append(f"model.num_classes={model.num_classes}: with model.condition=text there are no classes; use 0")
    for name, meaning in {
        "text_hidden_size": "the width of the text encoder's tokens, such as 768",
        "text_max_length": "the number of tokens that captions were encoded to, such as 77",
    }.items():
        if not getattr(model, name):
            wrong.append(f"model.{name} is not set; give {meaning}")
    if wrong:
        raise UserError("; ".join(wrong))


def _check_without_classes(config: Config) -> None:
    """Refuse what tells conditional from unconditional images where all are of one kind."""
    if config.model.condition != "class" or config.model.num_classes:
        return
    without = {
        "sample.cfg_scale": (config.sample.cfg_scale, 1.0),
        "moe.unconditional_expert": (config.experts is not None and config.experts.unconditional_expert, False),
    }
    if config.train.label_dropout != TrainConfig().label_dropout:  # that nobody needs to take away
        without["train.label_dropout"] = (config.train.label_dropout, 0.0)
    for setting, (value, needed) in without.items():
        if value != needed:
            raise UserError(
                f"{setting}={str(value).lower()} has no effect with model.num_classes=0, which knows no conditions; "
                f"set it to {str(needed).lower()}"
            )


def _check_objective(config: Config) -> None:
    objective, default = config.objective, ObjectiveConfig()
    distribution = f"objective.time_distribution={objective.time_distribution}"
    needed = {
        "logit_mean": (objective.time_distribution == "logit_normal", distribution),
        "logit_std": (objective.time_distribution == "logit_normal", distribution),
        "mode_scale": (objective.time_distribution == "mode", distribution),
        "time_shift": (objective.name == "flow", f"objective.name={objective.name}"),
        "min_snr_gamma": (objective.name == "ddpm", f"objective.name={objective.name}"),
    }
    for name, (has_effect, other) in needed.items():
        value = getattr(objective, name)
        if value != getattr(default, name) and not has_effect:
            raise UserError(f"objective.{name}={value} has no effect with {other}; remove it")
    if objective.name != "ddpm":
        return
    if config.sample.time_shift != 1.0:
        raise UserError(
            f"sample.time_shift={config.sample.time_shift} has no effect with objective.name=ddpm; remove it"
        )
    if not 2 <= config.sample.steps <= 1000:
        raise UserError(
            f"sample.steps={config.sample.steps}: objective.name=ddpm has 1000 steps and needs the first and the last; "
            "choose 2 to 1000"
        )


def _check_experts(config: Config) -> None:
    model, experts, parallel = config.model, config.experts, config.parallel
    if experts is None:
        if config.log.figures_every:
            raise UserError(
                f"log.figures_every={config.log.figures_every} has no effect with moe.router=dense, which has no "
                "experts to show; remove it"
            )
        if parallel.expert != 1:
            raise UserError(f"parallel.expert={parallel.expert} needs experts, but moe.router=dense has none; use 1")
        return
    experts.check(config.tokens_per_sample)
    _check_blocks(model.depth, config.moe_blocks)
    _check_activations(config, experts)
    widths = {
        f"model.hidden_size={model.hidden_size}": model.hidden_size,
        f"moe.expert_mlp_ratio={experts.expert_mlp_ratio}": int(model.hidden_size * experts.expert_mlp_ratio),
    }
    for setting, width in widths.items():
        if width % 8:
            raise UserError(f"{setting} makes experts {width} wide; grouped matrix products need a multiple of 8")
    if experts.num_experts % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide moe.num_experts={experts.num_experts}; choose a divisor"
        )


def _check_blocks(depth: int, blocks: list[int]) -> None:
    if not blocks:
        raise UserError(f"model.depth={depth}: experts are in every second block, there is none; use 2 or more")
    if blocks != sorted(set(blocks)) or blocks[-1] >= depth:
        raise UserError(f"moe.blocks={blocks} must be ascending numbers of blocks, from 0 to {depth - 1}")


def _check_activations(config: Config, experts: RouterSettings) -> None:
    of_dense, of_experts = config.model.activation, experts.activation
    either = "swiglu" if "swiglu" in (of_dense, of_experts) else "gelu"
    if not experts.shared_experts and experts.shared_activation != either:
        raise UserError(
            f"moe.shared_activation={experts.shared_activation} has no effect with moe.shared_experts=0; remove it"
        )
    if len(config.moe_blocks) == config.model.depth and of_dense != of_experts and not experts.shared_experts:
        raise UserError(
            f"model.activation={of_dense} has no effect where moe.blocks={experts.blocks} leaves no dense layer and "
            f"moe.activation={of_experts}; make them equal"
        )


def _check_parallel(config: Config) -> None:
    parallel = config.parallel
    _check_tensor(config)
    kind = pool_kind(config)
    if kind not in ("global", "expert_parallel") and parallel.score_exchange != "auto":
        what = f"moe.pool={kind}" if hasattr(config.moe, "pool") else f"moe.router={config.moe.router}"
        raise UserError(
            f"parallel.score_exchange={parallel.score_exchange} has no effect with {what}, which exchanges no scores; "
            "remove it"
        )
    if parallel.score_exchange == "two_level" and (kind != "global" or parallel.expert == 1):
        raise UserError(
            f"parallel.score_exchange=two_level needs several groups of ranks in a pool, not moe.pool={kind} with "
            f"parallel.expert={parallel.expert}; set moe.pool=global and parallel.expert above 1"
        )


def _check_compile(config: Config) -> None:
    if not config.train.compile:
        return
    tensor, schedule = config.parallel.tensor, getattr(config.moe, "capacity_schedule", None)
    if tensor > 1:
        raise UserError(
            f"train.compile=true compiles no layer that parallel.tensor={tensor} cuts; choose one of the two settings"
        )
    if schedule is not None:
        raise UserError(
            f"train.compile=true would compile anew in each step that moe.capacity_schedule={list(schedule)} changes; "
            "remove one of the two settings"
        )


def _check_tensor(config: Config) -> None:
    """Every layer that tensor parallelism cuts has a width that it divides."""
    tensor, model, experts = config.parallel.tensor, config.model, config.experts
    widths = {f"model.num_heads={model.num_heads}": model.num_heads}
    if len(config.moe_blocks) < model.depth:
        hidden = int(model.hidden_size * model.mlp_ratio)
        widths[f"model.mlp_ratio={model.mlp_ratio:g}, which makes dense layers {hidden} wide,"] = hidden
    if experts is not None and experts.shared_experts:
        hidden = experts.shared_hidden_size(model.hidden_size)
        widths[f"moe.shared_experts={experts.shared_experts}, which are {hidden} wide,"] = hidden
    for setting, width in widths.items():
        if width % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide {setting.rstrip(',')}; choose a divisor")


def _check_held_out(config: Config) -> None:
    held_out, condition = config.validation, config.model.condition
    for name in ("latents", "text"):
        folder = getattr(held_out, name)
        if folder and not held_out.shards:
            raise UserError(f"validation.{name}={folder} has no effect without validation.shards; remove it")
    if held_out.text and condition == "class":
        raise UserError(f"validation.text={held_out.text} has no effect with model.condition=class; remove it")
    if held_out.shards and condition == "text" and not (held_out.text or config.data.text_encoder):
        raise UserError("validation.text is not set, but model.condition=text; encode the captions held out")


def _check_data(config: Config) -> None:
    data, condition = config.data, config.model.condition
    if data.mixture and (data.shards or data.latents or data.text):
        raise UserError("data.mixture names its own shards, latents and text; remove data.shards, .latents and .text")
    for number, entry in enumerate(data_sets(data)):
        section = f"data.mixture[{number}]" if data.mixture else "data"
        require(entry, section, "weight", *POSITIVE)
        if entry.text and condition == "class":
            raise UserError(
                f"{section}.text={entry.text} has no effect with model.condition=class; remove it or set "
                "model.condition=text"
            )
        if data.stream and condition == "text":
            raise UserError("data.stream=true reads images and classes, but model.condition=text; pack an index")
        if data.stream and (entry.latents or data.mixture):
            raise UserError("data.stream=true reads one stream of images; remove data.latents and data.mixture")
    if data.allow_pipe and not data.stream:
        raise UserError("data.allow_pipe=true has no effect without data.stream=true; remove it")


def _check_online(config: Config) -> None:
    """Encoders that run while the data are read take the place of folders, and of folders only."""
    data, held_out = config.data, config.validation
    if data.text_encoder and config.model.condition == "class":
        raise UserError(f"data.text_encoder={data.text_encoder} has no effect with model.condition=class; remove it")
    if data.tokenizer and not data.text_encoder:
        raise UserError(f"data.tokenizer={data.tokenizer} has no effect without data.text_encoder; remove it")
    for encoder, kind in (("autoencoder", "latents"), ("text_encoder", "text")):
        folder = getattr(data, encoder)
        if folder is None:
            continue
        if data.stream:
            raise UserError(f"data.{encoder}={folder}: data.stream=true encodes nothing; pack an index, or remove it")
        if getattr(held_out, kind) or any(getattr(entry, kind) for entry in data_sets(data)):
            raise UserError(f"data.{encoder}={folder} encodes what data.{kind} holds already; give one of them")


def _check_periods(config: Config) -> None:
    """What happens every so many steps has what it needs, and nothing is given for what never happens."""
    for section, name in (("validation", "shards"), ("fid", "features"), ("fid", "reference")):
        every, value = getattr(config, section).every, getattr(getattr(config, section), name)
        if every and not value:
            raise UserError(f"{section}.every={every} needs {section}.{name}; give it, or set {section}.every=0")
        if value and not every:
            raise UserError(
                f"{section}.{name}={value} has no effect with {section}.every=0; set it to a number of steps, such as "
                "5000"
            )
    checkpoint = config.checkpoint
    if checkpoint.keep_every % checkpoint.every:
        raise UserError(
            f"checkpoint.keep_every={checkpoint.keep_every} is not a multiple of checkpoint.every={checkpoint.every}, "
            "so there would be nothing to keep; choose a multiple"
        )


def check_run(config: Config) -> None:
    """Refuse a training run without a folder to write to, without data, or with settings that do nothing in it.

    Raises:
        UserError: names the first.
    """
    if not config.run_dir:
        raise UserError("run_dir is not set; give the folder of this run, such as run_dir=runs/first")
    for number, entry in enumerate(data_sets(config.data)):
        section = f"data.mixture[{number}]" if config.data.mixture else "data"
        if not entry.shards:
            raise UserError(f"{section}.shards is not set; give a folder made by `python -m data_tools pack`")
        if config.model.condition == "text" and not (entry.text or config.data.text_encoder):
            raise UserError(
                f"{section}.text is not set, but model.condition=text; make it with `python -m data_tools encode-text` "
                "or give data.text_encoder"
            )
    profile, steps = config.profile.steps, config.train.steps
    if profile is not None and profile[0] > steps:
        raise UserError(f"profile.steps={list(profile)} begin after train.steps={steps}; lower them")
    experts, ratio = config.experts, config.model.mlp_ratio
    used = () if experts is None else (experts.expert_mlp_ratio, experts.shared_mlp_ratio)
    if experts and len(config.moe_blocks) == config.model.depth and ratio not in (ModelConfig.mlp_ratio, *used):
        raise UserError(
            f"model.mlp_ratio={ratio:g} has no effect where moe.blocks={experts.blocks} leaves no dense layer and "
            f"moe.expert_mlp_ratio={experts.expert_mlp_ratio:g}; remove it"
        )


def for_world(config: Config, world_size: int) -> Config:
    """The configuration on so many ranks: with `train.micro_batch_size` where it was 0, and what only they decide
    checked.

    Raises:
        UserError: the ranks, the expert-parallel size and the batch do not fit together.
    """
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    for name in ("expert", "tensor"):
        size = getattr(config.parallel, name)
        if world_size % size:
            raise UserError(
                f"parallel.{name}={size} does not divide the {world_size} ranks; choose a divisor of {world_size}"
            )
    if not micro and batch % world_size:
        raise UserError(
            f"train.global_batch_size={batch} does not divide over {world_size} ranks; "
            f"choose a multiple of {world_size}, or {_nearest_ranks(batch, world_size)}"
        )
    micro = micro or batch // world_size
    if batch % (micro * world_size):
        more = "" if batch % micro else f", or {_nearest_ranks(batch // micro, world_size)}"
        raise UserError(
            f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} x {world_size} ranks;"
            f" choose a multiple of {micro * world_size}{more}"
        )
    fitted = replace(config, train=replace(config.train, micro_batch_size=micro))
    if config.experts is not None:
        config.experts.check_pool(competing_samples(fitted, world_size) * config.tokens_per_sample)
    return fitted


def _nearest_ranks(parts: int, world_size: int) -> str:
    """The nearest numbers of ranks that so many equal parts divide over."""
    below = next((ranks for ranks in range(world_size - 1, 0, -1) if parts % ranks == 0), None)
    above = next((ranks for ranks in range(world_size + 1, parts + 1) if parts % ranks == 0), None)
    return name_ranks([ranks for ranks in (below, above) if ranks])


def name_ranks(numbers: list[int]) -> str:
    """`2 or 4 ranks`."""
    return f"{' or '.join(map(str, numbers))} rank{'' if numbers == [1] else 's'}"


def pool_kind(config: Config) -> str:
    """Who competes: global, expert_parallel, rank or sample."""
    return "sample" if config.experts is None else config.experts.pool_kind()


def shared_kind(config: Config) -> str:
    """Who competes, or has a loss in common."""
    return "global" if config.experts and config.experts.shares_batch() else pool_kind(config)


def ranks_together(kind: str, config: Config, world_size: int) -> int | None:
    """How many ranks' micro-batches are one pool of this kind; None: each image is one."""
    return {"global": world_size, "expert_parallel": config.parallel.expert, "rank": 1}.get(kind)


def competing_samples(config: Config, world_size: int) -> int:
    """How many samples of a training micro-step compete in one token pool; `config` as `for_world` returns it."""
    return _samples_of(pool_kind(config), config, world_size)


def pool_samples(config: Config, world_size: int) -> int:
    """How many samples compete, or have a loss of the batch in common; `config` as `for_world` returns it."""
    return _samples_of(shared_kind(config), config, world_size)


def _samples_of(kind: str, config: Config, world_size: int) -> int:
    ranks = ranks_together(kind, config, world_size)
    return 1 if ranks is None else ranks * config.train.micro_batch_size
