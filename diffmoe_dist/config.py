"""Every setting of a run, its default, and what makes a combination impossible.

A run is configured by one YAML file and `key=value` overrides. Unknown keys, wrong types and impossible
combinations end here, before torch is even imported. A setting that the chosen path would ignore is refused:
such settings default to None and `resolve` gives them their value where they mean something.
"""

from __future__ import annotations

import difflib
import importlib
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
    condition: Literal["class", "text"] = "class"
    num_classes: int = 1000  # 0 with condition=text
    text_hidden_size: int | None = None  # with condition=text: width of the encoder's tokens
    text_max_length: int | None = None  # tokens that captions are padded to
    text_pooled_size: int | None = None  # width of the encoder's pooled vector; default: 0, it has none
    text_encoder_sha256: str | None = None  # the encoder's fingerprint; default: that of data.text
    learn_sigma: bool = False  # twice the output channels; the second half is the learned variance


@dataclass
class MoEConfig:
    """A model without experts has no other setting here than the router's name."""

    router: str = "dense"  # or a file of model/routers/, whose `Settings` then take the place of this class


@dataclass
class RouterSettings(MoEConfig):
    """What every router knows; the file of a router extends it by its own settings.

    A default that follows from other settings is None until `resolve`.
    """

    num_experts: int | None = None  # that tokens are routed to; shared and unconditional ones are not counted
    expert_mlp_ratio: float | None = None  # hidden width of an expert over the model's; default: model.mlp_ratio
    activation: Literal["gelu", "swiglu"] = "gelu"  # of the experts; SwiGLU experts have three matrices and no biases
    shared_experts: int = 0  # experts that every token visits, with weight 1

    has_unconditional_expert = False  # a class attribute, no setting: one more expert for images without a condition

    def build_router(self, config: Config) -> Any:
        """The `model.routing.Router` of one layer."""
        raise NotImplementedError

    def structure(self) -> dict[str, Any]:
        """The settings that decide which tensors the layer has and what they mean."""
        names = ("router", "num_experts", "expert_mlp_ratio", "activation", "shared_experts")
        return {name: getattr(self, name) for name in names}

    def pool_kind(self) -> str:
        """Who competes for an expert's slots: global, expert_parallel, rank or sample (nobody beyond the image)."""
        return "sample"

    def shares_batch(self) -> bool:
        """Whether a loss depends on the batch as a whole, across images."""
        return False

    def nominal_capacity(self) -> float:
        """C as the settings mean it: experts that a token visits."""
        return 1.0

    def visits(self, pool_tokens: int) -> float:
        """Experts that a routed token visits in training, in the mean over a pool of so many tokens."""
        return self.nominal_capacity()

    def score_kinds(self) -> int:
        """How many scores of each token and expert compete in a pool; 0: experts choose no tokens."""
        return 0

    def has_predictor(self) -> bool:
        """Whether the router learns how many tokens each expert needs, and proposes thresholds."""
        return False

    def batch_sum_bytes(self, hidden_size: int) -> int:
        """What a layer sums over the ranks in a micro-step for losses of the batch."""
        return 0

    def saved_bytes(self, hidden_size: int, element: int) -> int:
        """What the router keeps of each token for the backward pass, beside its scores: an estimate."""
        return 0

    def resolve(self, config: Config) -> None:
        """Fill in defaults, and refuse what contradicts itself.

        Raises:
            UserError: a setting is missing, out of range, or without effect.
        """
        if self.num_experts is None:
            raise UserError(f"moe.num_experts is not set; moe.router={self.router} needs a number, such as 16")
        if self.expert_mlp_ratio is None:
            self.expert_mlp_ratio = config.model.mlp_ratio
        require(self, "moe", "num_experts", lambda value: value >= 1, "at least 1")
        require(self, "moe", "expert_mlp_ratio", lambda value: 0 < value < math.inf, "above 0 and finite")
        require(self, "moe", "shared_experts", lambda value: value >= 0, "0 (none) or more")

    def check_pool(self, pool_tokens: int) -> None:
        """Refuse a pool that is too small for the experts; for routers whose experts choose tokens."""


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
    initial_weights: str | None = None  # a folder of weights (diffmoe_dist.convert) that a fresh run starts from
    hang_timeout: float = 600.0  # seconds a step may take before the run ends itself; 0: no limit
    skip_non_finite: bool = False  # leave out the update of a batch with a non-finite loss or gradient, and go on


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
class MixtureConfig:
    """One of several data sets that a run reads together; `weight` is its share of the samples against the others'."""

    shards: str | None = None
    latents: str | None = None
    text: str | None = None
    weight: float = 1.0


@dataclass
class DataConfig:
    shards: str | None = None
    latents: str | None = None  # a folder made from the shards by `encode-latents`; takes the place of their images
    text: str | None = None  # a folder made from the shards by `encode-text`
    # In the place of latents and of text: folders of an AutoencoderKL, and of a CLIP or T5, that encode images and
    # captions as they are read; and of the latter's tokenizer, where it lies elsewhere.
    autoencoder: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    mixture: list[MixtureConfig] = field(default_factory=list)  # several, in place of shards, latents and text
    workers: int = 0
    flip: bool = False
    stream: bool = False  # read `shards`, URLs or paths of tars, without an index; not reproducible
    allow_pipe: bool = False  # let the URLs of a stream run commands: `pipe:COMMAND`


@dataclass
class CheckpointConfig:
    every: int = 1000
    keep: int = 3
    keep_every: int = 0  # checkpoints of every n-th step stay for good; 0: none
    allow_pool_change: bool = False  # resume although the token pool would change its size


@dataclass
class LogConfig:
    every: int = 50
    figures_every: int = 0  # steps between figures of what the experts do, in TensorBoard; 0: none


@dataclass
class ValidationConfig:
    shards: str | None = None  # images held out from data.shards
    latents: str | None = None  # and their latents, where the model is trained on latents
    text: str | None = None  # and their encoded captions, where it is told captions
    every: int = 0  # steps between validation losses; 0: none
    images: int = 1024  # the same ones every time


@dataclass
class ProfileConfig:
    steps: tuple[int, int] | None = None  # first and last step of a trace in run_dir/profile
    memory_snapshot: bool = False  # keep CUDA's allocations, and write them there when memory runs out


@dataclass
class SampleConfig:
    every: int = 0  # steps between sample grids; 0: none
    num: int = 40
    steps: int = 50
    cfg_scale: float = 1.0
    decoder: str | None = None  # the folder of the autoencoder that turns latents into images


@dataclass
class ScoreConfig:
    """A score of few samples, drawn by `sample.steps` and `sample.cfg_scale`."""

    every: int = 0  # steps between scores; 0: none
    num: int = 1000
    features: str | None = None  # weights.pth of FID's Inception network, another program.pt2, or module:callable
    reference: str | None = None  # an npz of `python -m diffmoe_dist.evaluate --make-reference`, or ADM's


@dataclass
class Config:
    run_dir: str | None = None
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = False  # products of fp32 matrices in TF32 where CUDA has it; of a bf16 model those are the router's
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False  # on CUDA: the same bits every time, at some cost of speed; on a CPU it is so anyway
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
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @property
    def tokens_per_sample(self) -> int:
        return (self.model.input_size // self.model.patch_size) ** 2

    @property
    def experts(self) -> RouterSettings | None:
        """The settings of the experts and their router; None for a dense model."""
        return self.moe if isinstance(self.moe, RouterSettings) else None

    @property
    def moe_blocks(self) -> list[int]:
        """The blocks that are mixtures of experts. Both papers: those with an odd 0-based index."""
        assert self.model.depth is not None
        return [] if self.experts is None else list(range(1, self.model.depth, 2))


def load_config(path: str | Path, overrides: Sequence[str] = (), *, training: bool = True) -> Config:
    """Read a YAML file, apply `key=value` overrides, and return the checked, resolved configuration.

    Args:
        training: whether it is for a run, which needs `run_dir` and `data.shards`.

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
    return build_config(from_file, from_command, training=training)


def build_config(*layers: DictConfig | dict[str, Any], training: bool = True) -> Config:
    """Merge layers of settings over the defaults, later ones winning; check and resolve the result."""
    given = OmegaConf.to_container(OmegaConf.merge(*layers))
    schema = Config(moe=_moe_schema(given))
    _refuse_unknown_keys(given, schema, prefix="")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        where = error.full_key or "config"
        raise UserError(f"{where}: {str(error).splitlines()[0]}; give a value of the right type") from None
    assert isinstance(config, Config)
    _resolve_model(config.model)
    _resolve_condition(config.model)
    if config.experts is not None:
        config.experts.resolve(config)
    _resolve_objective(config)
    _check(config)
    if training:
        _check_places(config)
    return config


def router_names() -> list[str]:
    """The routers there are: dense, and the files of model/routers/."""
    files = (Path(__file__).parent / "model" / "routers").glob("[!_]*.py")
    return ["dense", *sorted(path.stem for path in files)]


def _moe_schema(given: Any) -> MoEConfig:
    """The settings that the chosen router knows, with their defaults.

    They are written down in the router's own file: the one place where this module looks above itself.
    """
    moe = given.get("moe") if isinstance(given, dict) else None
    router = moe.get("router", MoEConfig.router) if isinstance(moe, dict) else MoEConfig.router
    names = router_names()
    if router not in names:
        close = difflib.get_close_matches(str(router), names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"moe.router={router} is not a router; {hint}choose from {', '.join(names)}")
    if router == "dense":
        return MoEConfig()
    return importlib.import_module(f"diffmoe_dist.model.routers.{router}").Settings(router=router)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved settings as YAML that `load_config` reads back to an equal Config."""
    OmegaConf.save(OmegaConf.structured(config), path)


def model_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which tensors a model has and what they mean, as flat `section.key` -> value."""
    sections = {
        "model": {name: value for name, value in vars(config.model).items() if name != "size"},
        "moe": {"router": "dense"} if config.experts is None else config.experts.structure(),
        "objective": vars(config.objective),
    }
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def loss_weights(config: Config) -> dict[str, float]:
    """What each loss of the router counts beside the diffusion loss, by name: its settings `NAME_loss_weight`."""
    ending = "_loss_weight"
    settings = vars(config.moe).items()
    return {key.removesuffix(ending): value for key, value in settings if key.endswith(ending) and value is not None}


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
    if config.experts is not None:
        samples = pool_samples(config, world_size) if config.experts.pool_kind() != "sample" else 1
        config.experts.check_pool(samples * config.tokens_per_sample)


def pool_samples(config: Config, world_size: int) -> int:
    """How many samples of a training micro-step compete in one token pool, or share a loss over the batch."""
    micro = config.train.micro_batch_size
    assert micro is not None, "check_world fills in the micro batch size"
    kind = "sample" if config.experts is None else config.experts.pool_kind()
    if config.experts is not None and config.experts.shares_batch():
        kind = "global"
    ranks = {"global": world_size, "expert_parallel": config.parallel.expert, "rank": 1}
    return 1 if kind == "sample" else micro * ranks[kind]


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


def _resolve_condition(model: ModelConfig) -> None:
    names = ("text_hidden_size", "text_max_length", "text_pooled_size", "text_encoder_sha256")
    if model.condition == "class":
        require(model, "model", "num_classes", lambda value: value >= 1, "at least 1")
        for name in names:
            if getattr(model, name) is not None:
                raise UserError(
                    f"model.{name}={getattr(model, name)} has no effect with model.condition=class; remove it"
                )
        return
    if model.num_classes != 0:
        raise UserError(f"model.num_classes={model.num_classes}: with model.condition=text there are no classes; use 0")
    for name, meaning in {
        "text_hidden_size": "the width of the text encoder's tokens, such as 768",
        "text_max_length": "the number of tokens that captions were encoded to, such as 77",
    }.items():
        if getattr(model, name) is None:
            raise UserError(f"model.{name} is not set; give {meaning}")
        require(model, "model", name, lambda value: value >= 1, "at least 1")
    if model.text_pooled_size is None:
        model.text_pooled_size = 0
    require(model, "model", "text_pooled_size", lambda value: value >= 0, "0 (none) or more")


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
    model, parallel = config.model, config.parallel
    at_least_one = {
        "model": ("depth", "hidden_size", "num_heads", "patch_size", "input_size", "in_channels"),
        "train": ("steps", "global_batch_size", "micro_batch_size"),
        "parallel": ("expert", "tensor"),
        "checkpoint": ("every", "keep"),
        "log": ("every",),
        "sample": ("num", "steps"),
        "validation": ("images",),
        "score": ("num",),
    }
    for section, names in at_least_one.items():
        for name in names:
            require(getattr(config, section), section, name, lambda value: value >= 1, "at least 1")
    for name in ("clip_grad_norm", "weight_decay"):
        require(config.optim, "optim", name, lambda value: value >= 0, "0 (off) or more")
    for section, names in {"optim": ("lr", "eps"), "model": ("mlp_ratio",), "objective": ("time_scale",)}.items():
        for name in names:
            require(getattr(config, section), section, name, lambda value: 0 < value < math.inf, "above 0 and finite")
    require(config.optim, "optim", "betas", lambda value: all(0 <= beta < 1 for beta in value), "two numbers in [0, 1)")
    _check_data(config)
    require(config.sample, "sample", "every", lambda value: value >= 0, "0 (off) or more")
    require(config.validation, "validation", "every", lambda value: value >= 0, "0 (off) or more")
    require(config.score, "score", "every", lambda value: value >= 0, "0 (off) or more")
    require(config.score, "score", "num", lambda value: value >= 2, "at least 2")
    for section, name in (("validation", "shards"), ("score", "features"), ("score", "reference")):
        every, value = getattr(config, section).every, getattr(getattr(config, section), name)
        if every and not value:
            raise UserError(f"{section}.every={every} needs {section}.{name}; give it, or set {section}.every=0")
        if value and not every:
            raise UserError(
                f"{section}.{name}={value} has no effect with {section}.every=0; set it to a number of steps, such as "
                "5000"
            )
    require(config.train, "train", "hang_timeout", lambda value: 0 <= value < math.inf, "0 (no limit) or more")
    require(config.checkpoint, "checkpoint", "keep_every", lambda value: value >= 0, "0 (none) or more")
    require(config.profile, "profile", "steps", lambda value: 1 <= value[0] <= value[1], "first and last step, from 1")
    if config.checkpoint.keep_every % config.checkpoint.every:
        raise UserError(
            f"checkpoint.keep_every={config.checkpoint.keep_every} is not a multiple of checkpoint.every="
            f"{config.checkpoint.every}, so there would be nothing to keep; choose a multiple"
        )
    require(config.log, "log", "figures_every", lambda value: value >= 0, "0 (off) or more")
    require(config.train, "train", "label_dropout", lambda value: 0 <= value < 1, "in [0, 1)")
    require(config.ema, "ema", "decay", lambda value: 0 <= value < 1, "in [0, 1)")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed={config.seed} is out of range; choose one from 0 to 2**63 - 1")
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
    kind = "sample" if config.experts is None else config.experts.pool_kind()
    if kind not in ("global", "expert_parallel") and parallel.score_exchange != "all_to_all":
        what = f"moe.pool={kind}" if hasattr(config.moe, "pool") else f"moe.router={config.moe.router}"
        raise UserError(
            f"parallel.score_exchange={parallel.score_exchange} has no effect with {what}, which exchanges no scores; "
            "remove it"
        )
    _check_experts(config)


def _check_places(config: Config) -> None:
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


def _check_experts(config: Config) -> None:
    model, experts, parallel = config.model, config.experts, config.parallel
    if experts is None:
        if config.log.figures_every:
            raise UserError(
                f"log.figures_every={config.log.figures_every} has no effect with moe.router=dense, which has no "
                "experts to draw; remove it"
            )
        if parallel.expert != 1:
            raise UserError(f"parallel.expert={parallel.expert} needs experts, but moe.router=dense has none; use 1")
        return
    assert model.hidden_size is not None and experts.num_experts is not None and experts.expert_mlp_ratio is not None
    if not config.moe_blocks:
        raise UserError(f"model.depth={model.depth}: experts are in every second block, there is none; use 2 or more")
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


def _check_data(config: Config) -> None:
    data, held_out, condition = config.data, config.validation, config.model.condition
    for name in ("latents", "text"):
        folder = getattr(held_out, name)
        if folder and not held_out.shards:
            raise UserError(f"validation.{name}={folder} has no effect without validation.shards; remove it")
    if held_out.text and condition == "class":
        raise UserError(f"validation.text={held_out.text} has no effect with model.condition=class; remove it")
    if held_out.shards and condition == "text" and not (held_out.text or data.text_encoder):
        raise UserError("validation.text is not set, but model.condition=text; encode the captions held out")
    require(data, "data", "workers", lambda value: value >= 0, "0 or more")
    if data.mixture and (data.shards or data.latents or data.text):
        raise UserError("data.mixture names its own shards, latents and text; remove data.shards, .latents and .text")
    for number, entry in enumerate(data_sets(data)):
        section = f"data.mixture[{number}]" if data.mixture else "data"
        require(entry, section, "weight", lambda value: 0 < value < math.inf, "above 0 and finite")
        if entry.text and condition == "class":
            raise UserError(
                f"{section}.text={entry.text} has no effect with model.condition=class; remove it or set "
                "model.condition=text"
            )
        if data.stream and condition == "text":
            raise UserError("data.stream=true reads images and classes, but model.condition=text; pack an index")
        if data.stream and (entry.latents or data.mixture):
            raise UserError("data.stream=true reads one stream of images; remove data.latents and data.mixture")
    _check_online(config)
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


def data_sets(data: DataConfig) -> list[MixtureConfig]:
    """The data sets of a run, of which there is usually one."""
    return data.mixture or [MixtureConfig(data.shards, data.latents, data.text)]


def require(section: Any, section_name: str, name: str, accepts: Any, rule: str) -> None:
    """Refuse a setting that is given and not acceptable, naming the rule."""
    value = getattr(section, name)
    if value is not None and not accepts(value):
        raise UserError(f"{section_name}.{name}={value} must be {rule}")


def _refuse_unknown_keys(given: Any, schema: Any, prefix: str) -> None:
    """OmegaConf also refuses them; this names the nearest known key. A null unsets what an earlier layer gave."""
    known = {f.name: getattr(schema, f.name) for f in fields(schema)}
    if not isinstance(given, dict):
        raise UserError(
            f"{prefix.rstrip('.') or 'config'}={given}: expected settings below it, such as {prefix}{next(iter(known))}"
        )
    for key, value in list(given.items()):
        if key in known and is_dataclass(known[key]):
            _refuse_unknown_keys(value, known[key], f"{prefix}{key}.")
        elif key not in known and isinstance(schema, MoEConfig):
            _refuse_unknown_router_setting(given, key, schema)
        elif key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
            raise UserError(f"unknown setting {prefix}{key}={value}; {remedy}")


def _refuse_unknown_router_setting(moe: dict[Any, Any], key: str, schema: MoEConfig) -> None:
    if moe[key] is None:
        del moe[key]
        return
    known = [f.name for f in fields(schema) if f.name != "router"]
    close = difflib.get_close_matches(str(key), known, n=1)
    if close:
        raise UserError(f"unknown setting moe.{key}={moe[key]}; did you mean moe.{close[0]}?")
    raise UserError(
        f"moe.{key}={moe[key]} has no effect with moe.router={schema.router}, which knows "
        f"{', '.join(known) or 'nothing else'}; remove it"
    )
