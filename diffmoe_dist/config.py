"""Every setting of a run, its default, and what makes a combination impossible.

A run is configured by one YAML file and `key=value` overrides. Unknown keys, wrong types and impossible
combinations end here, before torch is even imported. A setting that the chosen path would ignore is refused:
such settings default to None and `resolve` gives them their value where they mean something.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffmoe_dist.errors import UserError

# depth, hidden size, heads (DiT, DiffMoE Table 1)
MODEL_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass
class ModelConfig:
    size: Literal["S", "B", "L", "XL"] | None = None  # a preset for the next three, which may also be given freely
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    patch_size: int = 2
    input_size: int = 32  # height and width of what the model sees: latents or pixels
    in_channels: int = 4
    num_classes: int = 1000
    learn_sigma: bool = False  # twice the output channels; the second half is the learned variance


@dataclass
class MoEConfig:
    """A router knows `num_experts` and the settings that it has a default for in `ROUTER_DEFAULTS`."""

    router: Literal["dense", "token_choice", "expert_choice", "global_pool"] = "dense"
    num_experts: int | None = None
    capacity: float | None = None  # expert slots per token, C in the papers
    top_k: int | None = None  # experts a token chooses
    pool: Literal["global", "expert_parallel", "rank", "sample"] | None = None  # who competes for an expert's slots
    inference: Literal["threshold", "count", "static"] | None = None
    capacity_loss_weight: float | None = None
    threshold_decay: float | None = None
    balance_loss_weight: float | None = None


ROUTER_DEFAULTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "token_choice": {"top_k": 1, "balance_loss_weight": 0.0},
    "expert_choice": {"capacity": 1.0},
    "global_pool": {
        "capacity": 1.0,
        "pool": "global",
        "inference": "threshold",
        "capacity_loss_weight": 1.0,
        "threshold_decay": 0.95,
    },
}


@dataclass
class ObjectiveConfig:
    """An objective knows its name and the settings that it has a default for in `OBJECTIVE_DEFAULTS`."""

    name: Literal["flow", "ddpm"] = "flow"
    time_distribution: Literal["uniform", "logit_normal"] | None = None
    direction: Literal["data_at_one", "noise_at_one"] | None = None  # which end of time 1 is
    time_scale: float | None = None  # the model is given time_scale * t


OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "flow": {"time_distribution": "uniform", "direction": "data_at_one", "time_scale": 1.0},
    "ddpm": {},
}


@dataclass
class TrainConfig:
    steps: int = 100_000
    global_batch_size: int = 256
    micro_batch_size: int | None = None  # images a rank computes at once; default: no accumulation
    label_dropout: float = 0.1


@dataclass
class OptimConfig:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 0.0  # 0: no clipping


@dataclass
class EMAConfig:
    decay: float = 0.9999


@dataclass
class ParallelConfig:
    expert: int = 1  # ranks that share one set of experts
    tensor: int = 1
    zero_stage: Literal[1, 2] = 1
    score_exchange: Literal["all_to_all", "all_gather"] = "all_to_all"


@dataclass
class DataConfig:
    shards: str | None = None
    workers: int = 0
    flip: bool = False


@dataclass
class CheckpointConfig:
    every: int = 1000
    keep: int = 3
    allow_pool_change: bool = False  # resume although the token pool would change its size


@dataclass
class LogConfig:
    every: int = 50


@dataclass
class SampleConfig:
    every: int = 0  # steps between sample grids; 0: none
    num: int = 40
    steps: int = 50
    cfg_scale: float = 1.0


@dataclass
class Config:
    run_dir: str | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @property
    def tokens_per_sample(self) -> int:
        return (self.model.input_size // self.model.patch_size) ** 2


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, and return the checked, resolved configuration.

    Raises:
        UserError: the file or a key is unknown, a value has the wrong type, or settings contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file; see configs/ for examples")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override '{override}': expected key=value, such as optim.lr=1e-4")
    try:
        from_file = OmegaConf.load(path)
        from_command = OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} {' '.join(overrides)}: not readable as YAML: {error}") from None
    if not isinstance(from_file, DictConfig):
        raise UserError(f"--config {path}: expected a mapping of settings at the top level")
    return build_config(from_file, from_command)


def build_config(*layers: DictConfig | dict[str, Any]) -> Config:
    """Merge layers of settings over the defaults, later ones winning; check and resolve the result."""
    merged = OmegaConf.structured(Config)
    for layer in layers:
        _refuse_unknown_keys(OmegaConf.to_container(OmegaConf.create(layer)), Config, prefix="")
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            where = error.full_key or "config"
            raise UserError(f"{where}: {str(error).splitlines()[0]}; give a value of the right type") from None
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        where = error.full_key or "config"
        raise UserError(f"{where}: {str(error).splitlines()[0]}; give the value itself") from None
    assert isinstance(config, Config)
    _resolve_model(config.model)
    _resolve_moe(config.moe)
    _resolve_objective(config)
    _check(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that `load_config` reads back to an equal Config."""
    OmegaConf.save(OmegaConf.structured(config), path)


def model_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which tensors a model has and what they mean, as flat `section.key` -> value."""
    sections = {
        "model": {name: value for name, value in vars(config.model).items() if name != "size"},
        "moe": {name: getattr(config.moe, name) for name in ("router", "num_experts")},
        "objective": vars(config.objective),
    }
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def loss_weights(config: Config) -> dict[str, float]:
    """What each loss of the router counts beside the diffusion loss, by the name the router gives it."""
    weights = {"capacity": config.moe.capacity_loss_weight, "balance": config.moe.balance_loss_weight}
    return {name: weight for name, weight in weights.items() if weight is not None}


def check_world(config: Config, world_size: int) -> None:
    """Check what only the number of ranks decides; fill in `train.micro_batch_size`.

    Raises:
        UserError: the ranks, the expert-parallel size and the batch do not fit together.
    """
    ep, batch = config.parallel.expert, config.train.global_batch_size
    if world_size % ep:
        raise UserError(
            f"parallel.expert={ep} does not divide the {world_size} ranks; choose a divisor of {world_size}"
        )
    micro = config.train.micro_batch_size
    if micro is None:
        if batch % world_size:
            raise UserError(
                f"train.global_batch_size={batch} does not divide over {world_size} ranks; "
                f"choose a multiple of {world_size}"
            )
        config.train.micro_batch_size = micro = batch // world_size
    if batch % (micro * world_size):
        raise UserError(
            f"train.global_batch_size={batch} is not a multiple of train.micro_batch_size={micro} x {world_size} ranks;"
            f" choose a multiple of {micro * world_size}"
        )
    if config.moe.capacity is not None:
        _check_capacity(config, world_size)


def pool_samples(config: Config, world_size: int) -> int:
    """How many samples of a training micro-step compete in one token pool, or share a loss over the batch."""
    micro = config.train.micro_batch_size
    assert micro is not None, "check_world fills in the micro batch size"
    ranks = {"global": world_size, "expert_parallel": config.parallel.expert, "rank": 1}
    kind = pool_kind(config.moe)
    return 1 if kind == "sample" else micro * ranks[kind]


def pool_kind(moe: MoEConfig) -> str:
    """Whose tokens compete for an expert's slots or, where none do, share a loss over the batch."""
    return moe.pool or ("global" if moe.router == "token_choice" else "sample")


def expert_slots(pool_tokens: int, num_experts: int, capacity: float) -> int:
    """Slots of one expert in one pool: int(T / N * C) (DiffMoE Alg. 3)."""
    return min(int(pool_tokens / num_experts * capacity), pool_tokens)


def _resolve_model(model: ModelConfig) -> None:
    preset = MODEL_SIZES[model.size] if model.size is not None else (None, None, None)
    for name, value in zip(("depth", "hidden_size", "num_heads"), preset, strict=True):
        if getattr(model, name) is None:
            setattr(model, name, value)
        elif value is not None and getattr(model, name) != value:
            raise UserError(
                f"model.{name}={getattr(model, name)} contradicts model.size={model.size} ({name} {value}); drop one"
            )
        if getattr(model, name) is None:
            raise UserError(f"model.{name} is not set; give it a value or choose model.size from {list(MODEL_SIZES)}")


def _resolve_moe(moe: MoEConfig) -> None:
    defaults = ROUTER_DEFAULTS[moe.router]
    for name, value in vars(moe).items():
        if name == "router" or (name == "num_experts" and moe.router != "dense"):
            continue
        if name not in defaults and value is not None:
            known = ", ".join(["num_experts", *defaults]) if defaults else "nothing else"
            raise UserError(
                f"moe.{name}={value} has no effect with moe.router={moe.router}, which knows {known}; remove it"
            )
        if value is None:
            setattr(moe, name, defaults.get(name))
    if moe.router != "dense" and moe.num_experts is None:
        raise UserError(f"moe.num_experts is not set; moe.router={moe.router} needs a number, such as 16")


def _resolve_objective(config: Config) -> None:
    objective = config.objective
    defaults = OBJECTIVE_DEFAULTS[objective.name]
    for name, value in vars(objective).items():
        if name == "name":
            continue
        if name not in defaults and value is not None:
            raise UserError(f"objective.{name}={value} has no effect with objective.name={objective.name}; remove it")
        if value is None:
            setattr(objective, name, defaults.get(name))
    if objective.name != "ddpm":
        return
    if not config.model.learn_sigma:
        raise UserError(
            "model.learn_sigma=false, but objective.name=ddpm trains a learned variance; set model.learn_sigma=true"
        )
    if not 2 <= config.sample.steps <= 1000:
        raise UserError(
            f"sample.steps={config.sample.steps}: objective.name=ddpm has 1000 steps and needs the first and the last; "
            "choose 2 to 1000"
        )


def _check(config: Config) -> None:
    model, moe, parallel = config.model, config.moe, config.parallel
    at_least_one = {
        "model": ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels", "num_classes"),
        "moe": ("num_experts", "top_k"),
        "train": ("steps", "global_batch_size", "micro_batch_size"),
        "parallel": ("expert", "tensor"),
        "checkpoint": ("every", "keep"),
        "log": ("every",),
        "sample": ("num", "steps"),
    }
    for section, names in at_least_one.items():
        for name in names:
            _require(getattr(config, section), section, name, lambda value: value >= 1, "at least 1")
    for name in ("clip_grad_norm", "weight_decay"):
        _require(config.optim, "optim", name, lambda value: value >= 0, "0 (off) or more")
    for section, names in {"optim": ("lr", "eps"), "model": ("mlp_ratio",), "objective": ("time_scale",)}.items():
        for name in names:
            _require(getattr(config, section), section, name, lambda value: 0 < value < math.inf, "above 0 and finite")
    _require(
        config.optim, "optim", "betas", lambda value: all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)"
    )
    _require(config.data, "data", "workers", lambda value: value >= 0, "0 or more")
    _require(config.sample, "sample", "every", lambda value: value >= 0, "0 (off) or more")
    _require(config.train, "train", "label_dropout", lambda value: 0 <= value < 1, "in [0, 1)")
    _require(config.ema, "ema", "decay", lambda value: 0 <= value < 1, "in [0, 1)")
    _require(moe, "moe", "threshold_decay", lambda value: 0 <= value < 1, "in [0, 1)")
    _require(moe, "moe", "capacity", lambda value: value > 0, "above 0")
    for name in ("capacity_loss_weight", "balance_loss_weight"):
        _require(moe, "moe", name, lambda value: value >= 0, "0 or more")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} is out of range; choose one from 0 to 2**63 - 1")
    if not config.run_dir:
        raise UserError("run_dir is not set; give the folder of this run, such as run_dir=runs/first")
    if not config.data.shards:
        raise UserError("data.shards is not set; give a folder made by `python -m data_tools pack`")
    if model.hidden_size % model.num_heads:  # type: ignore[operator]
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_heads={model.num_heads}; "
            "choose a multiple"
        )
    if model.hidden_size % 4:  # type: ignore[operator]
        raise UserError(
            f"model.hidden_size={model.hidden_size} is not divisible by 4, which the two-dimensional sine-cosine "
            "position table needs; choose a multiple of 4"
        )
    if model.input_size % model.patch_size:
        raise UserError(
            f"model.input_size={model.input_size} is not divisible by model.patch_size={model.patch_size}; "
            "choose a multiple"
        )
    if parallel.tensor != 1:
        raise UserError(f"parallel.tensor={parallel.tensor}: tensor parallelism is not available yet; use 1")
    if moe.pool not in ("global", "expert_parallel") and parallel.score_exchange != "all_to_all":
        what = f"moe.router={moe.router}" if moe.pool is None else f"moe.pool={moe.pool}"
        raise UserError(
            f"parallel.score_exchange={parallel.score_exchange} has no effect with {what}, which exchanges no scores; "
            "remove it"
        )
    if moe.router == "dense":
        if parallel.expert != 1:
            raise UserError(f"parallel.expert={parallel.expert} needs experts, but moe.router=dense has none; use 1")
        return
    if model.depth < 2:  # type: ignore[operator]
        raise UserError(f"model.depth={model.depth}: experts are in every second block, there is none; use 2 or more")
    for name, width in (("hidden_size", model.hidden_size), ("mlp_ratio", int(model.hidden_size * model.mlp_ratio))):  # type: ignore[operator]
        if width % 8:  # type: ignore[operator]
            raise UserError(
                f"model.{name}={getattr(model, name)} makes experts {width} wide; grouped matrix products need a "
                "multiple of 8"
            )
    assert moe.num_experts is not None
    if moe.num_experts % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide moe.num_experts={moe.num_experts}; choose a divisor"
        )
    if moe.top_k is not None and moe.top_k > moe.num_experts:
        raise UserError(f"moe.top_k={moe.top_k} is more than moe.num_experts={moe.num_experts}; lower it")
    if moe.capacity is not None and moe.capacity > moe.num_experts:
        raise UserError(
            f"moe.capacity={moe.capacity} is more than moe.num_experts={moe.num_experts}: "
            "a token cannot visit an expert twice; lower it"
        )


def _check_capacity(config: Config, world_size: int) -> None:
    moe = config.moe
    assert moe.num_experts is not None and moe.capacity is not None
    tokens = pool_samples(config, world_size) * config.tokens_per_sample
    if expert_slots(tokens, moe.num_experts, moe.capacity) < 1:
        raise UserError(
            f"moe.capacity={moe.capacity} gives each of moe.num_experts={moe.num_experts} experts no slot in a pool of "
            f"{tokens} tokens (moe.pool={moe.pool or 'sample'}); raise the capacity or the batch"
        )


def _require(section: Any, section_name: str, name: str, accepts: Any, rule: str) -> None:
    value = getattr(section, name)
    if value is not None and not accepts(value):
        raise UserError(f"{section_name}.{name}={value} must be {rule}")


def _refuse_unknown_keys(given: Any, schema: type, prefix: str) -> None:
    """OmegaConf also refuses them; this names the nearest known key."""
    known = {f.name: f for f in fields(schema)}
    if not isinstance(given, dict):
        raise UserError(
            f"{prefix.rstrip('.') or 'config'}={given}: expected settings below it, such as {prefix}{next(iter(known))}"
        )
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
            raise UserError(f"unknown setting {prefix}{key}={value}; {remedy}")
        default = known[key].default_factory
        if is_dataclass(default):
            _refuse_unknown_keys(value, default, f"{prefix}{key}.")  # type: ignore[arg-type]
