"""Every setting of a run, and its default.

A configuration is made by `load_config` and never changes. A setting that has no default follows from others, and
`load.py` says how; one that may be None is a feature that a run need not have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal

from omegaconf import MISSING

from diffmoe_dist.config.router import MoEConfig, RouterSettings

# depth, hidden size, heads (DiT, DiffMoE Table 1)
MODEL_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass(frozen=True)
class ModelConfig:
    size: Literal["S", "B", "L", "XL"] | None = None  # a preset for the next three, which may also be given freely
    depth: int = MISSING
    hidden_size: int = MISSING
    num_heads: int = MISSING
    head_dim: int = MISSING  # width of an attention head; default: hidden_size / num_heads
    qk_norm: Literal["none", "layer", "rms"] = "none"  # of each head's queries and keys: layer norm (published) or RMS
    mlp_ratio: float = 4.0
    activation: Literal["gelu", "swiglu"] = "gelu"  # of dense feed-forward layers; SwiGLU has no biases
    patch_size: int = 2
    input_size: int = 32  # height and width of what the model sees: latents or pixels
    in_channels: int = 4
    condition: Literal["class", "text"] = "class"
    num_classes: int = 1000  # 0: images without labels, or condition=text
    text_hidden_size: int = 0  # with condition=text: width of the encoder's tokens
    text_max_length: int = 0  # tokens that captions are padded to
    text_pooled_size: int = 0  # width of the encoder's pooled vector; 0: it has none
    text_encoder_sha256: str = ""  # the encoder's fingerprint; default: that of data.text or data.text_encoder
    learn_sigma: bool = False  # twice the output channels; the second half is the learned variance


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is not given is the objective's own (`load.OBJECTIVE_DEFAULTS`); DDPM knows no other values than those."""

    name: Literal["flow", "ddpm"] = "flow"
    time_distribution: Literal["uniform", "logit_normal", "mode"] = MISSING
    direction: Literal["data_at_one", "noise_at_one"] = MISSING  # which end of time 1 is
    time_scale: float = MISSING  # the model is given time_scale * t
    logit_mean: float = 0.0  # with logit_normal: mean and deviation of the logit of the time
    logit_std: float = 1.0
    mode_scale: float = 1.29  # with mode: more than 0 favours the middle times, less the ends (SD3, section 3.1)
    time_shift: float = 1.0  # of flow: the noise of training, relative to the data, is multiplied by this (SD3, eq. 23)
    min_snr_gamma: float | None = (
        None  # of DDPM: the largest signal-to-noise ratio that counts in full (min-SNR, eq. 8)
    )
    same_t_per_batch: bool = False  # all images of a training step have one time; in validation each has its own


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100_000
    global_batch_size: int = 256
    micro_batch_size: int = 0  # images a rank computes at once; 0: its part of the global batch, without accumulation
    label_dropout: float = 0.1
    initial_weights: str | None = None  # a folder of weights (diffmoe_dist.convert) that a fresh run starts from
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that do not train, as "blocks.*.attn.*"
    hang_timeout: float = 600.0  # seconds a step may take before the run ends itself; 0: no limit
    # What is not kept for backward but computed again in it: hidden activations of MLPs and experts, or also attention.
    recompute: Literal["none", "mlp", "block"] = "none"
    compile: bool = False  # blocks by torch.compile; takes minutes at the start, and needs a C++ compiler or Triton
    skip_non_finite: bool = False  # leave out the update of a batch with a non-finite loss or gradient, and go on


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-4  # the highest one; config/schedule.py says what the rate of a step is
    schedule: Literal["constant", "cosine", "linear", "wsd", "milestones"] = "constant"
    warmup_steps: int = 0  # the rate grows linearly up to this step
    decay_steps: int = 0  # length of the decay; cosine and linear: 0 is all after the warm-up; wsd: the last ones
    final_lr: float | None = None  # where the decay ends; default: 0, with milestones a tenth after each
    milestones: list[int] = field(default_factory=list)  # steps after which the rate falls
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float = 0.0  # 0: no clipping


@dataclass(frozen=True)
class EMAConfig:
    decay: float = 0.9999  # of the average that samples and scores of the run are taken from
    decays: list[float] = field(default_factory=list)  # of averages kept beside it
    # And averages by a power function (EDM2): the standard deviation of the steps that they are of, as a part of all.
    lengths: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many averages there are."""
        return len({self.decay, *self.decays}) + len(self.lengths)


@dataclass(frozen=True)
class ParallelConfig:
    expert: int = 1  # ranks that one set of experts is sharded over
    tensor: int = 1  # ranks that attention and dense feed-forward layers are cut over
    zero_stage: Literal[1, 2] = 1
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"  # in which ranks exchange and add up gradients
    # How a pool's scores travel, with equal results: each expert's to one rank and cutoffs back; all to all ranks in
    # one round; or each expert's to the rank of every expert-parallel group that holds it, which gathers those of the
    # other groups. auto: the second where a layer's scores of the whole pool are at most 1 MiB, else the third where
    # the pool spans several groups and at least 64 ranks.
    score_exchange: Literal["auto", "all_to_all", "all_gather", "two_level"] = "auto"

    def how_scores_travel(self, pool_bytes: int, pool_ranks: int) -> Literal["all_to_all", "all_gather", "two_level"]:
        """Of a pool of so many ranks, all the scores of which have so many bytes."""
        if self.score_exchange != "auto":
            return self.score_exchange
        if pool_bytes <= 2**20:
            return "all_gather"
        return "two_level" if 1 < self.expert < pool_ranks >= 64 else "all_to_all"


@dataclass(frozen=True)
class MixtureConfig:
    """One of several data sets that a run reads together; `weight` is its part of the samples against the others'."""

    shards: str = ""
    latents: str | None = None
    text: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    shards: str = ""
    latents: str | None = None  # a folder made from the shards by `encode-latents`; takes the place of their images
    text: str | None = None  # a folder made from the shards by `encode-text`
    # In the place of latents and of text: folders of an autoencoder, and of a text encoder, that encode images and
    # captions as they are read; and of the latter's tokenizer, where it lies elsewhere.
    autoencoder: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    mixture: list[MixtureConfig] = field(default_factory=list)  # several, in place of shards, latents and text
    workers: int = 0
    flip: bool = False
    stream: bool = False  # read `shards`, URLs or paths of tars, without an index; not reproducible
    allow_pipe: bool = False  # let the URLs of a stream run commands: `pipe:COMMAND`


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    keep: int = 3
    keep_every: int = 0  # checkpoints of every n-th step stay for good; 0: none
    allow_pool_change: bool = False  # resume although the token pool would change its size


@dataclass(frozen=True)
class LogConfig:
    every: int = 50
    figures_every: int = 0  # steps between figures of what the experts do, in TensorBoard; 0: none
    wandb: bool = False  # also to Weights & Biases: offline, into run_dir/wandb, unless $WANDB_MODE says otherwise


@dataclass(frozen=True)
class ValidationConfig:
    shards: str | None = None  # images held out from data.shards
    latents: str | None = None  # and their latents, where the model is trained on latents
    text: str | None = None  # and their encoded captions, where it is told captions
    every: int = 0  # steps between validation losses; 0: none
    images: int = 1024  # the same ones every time


@dataclass(frozen=True)
class ProfileConfig:
    steps: tuple[int, int] | None = None  # first and last step of a trace in run_dir/profile
    memory_snapshot: bool = False  # keep CUDA's allocations, and write them there when memory runs out


@dataclass(frozen=True)
class SampleConfig:
    every: int = 0  # steps between sample grids; 0: none
    num: int = 40
    steps: int = 50
    time_shift: float = MISSING  # of the sampler's steps; default: objective.time_shift
    cfg_scale: float = 1.0
    decoder: str | None = None  # the folder of the autoencoder that turns latents into images


@dataclass(frozen=True)
class FidConfig:
    """The Fréchet distance of few samples, made with `sample.steps` and `sample.cfg_scale`."""

    every: int = 0  # steps between distances; 0: none
    num: int = 1000
    features: str | None = None  # weights.pth of FID's Inception, the folder of a DINOv2 or CLIP, or module:callable
    reference: str | None = None  # an npz of `python -m diffmoe_dist.evaluate --make-reference`, or ADM's


@dataclass(frozen=True)
class Config:
    run_dir: str = ""
    seed: int = 0
    # bf16_mixed: products in bf16 over fp32 weights (autocast), norms and residual stream in fp32, as ProMoE trains.
    # bf16: a bf16 model, residual stream included, with fp32 master weights.
    precision: Literal["fp32", "bf16_mixed", "bf16"] = "fp32"
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
    fid: FidConfig = field(default_factory=FidConfig)
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
        """The blocks that are mixtures of experts, counted from 0."""
        depth = self.model.depth
        named = {"odd": range(1, depth, 2), "all": range(depth)}
        return [] if self.experts is None else list(named.get(str(self.experts.blocks), self.experts.blocks))


def data_sets(data: DataConfig) -> list[MixtureConfig]:
    """The data sets of a run, of which there is usually one."""
    return data.mixture or [MixtureConfig(data.shards, data.latents, data.text)]


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting by its whole name, such as `optim.lr`, in the order of this file."""
    flat: dict[str, Any] = {}
    for name, value in vars(config).items():
        flat |= {f"{name}.{key}": below for key, below in vars(value).items()} if is_dataclass(value) else {name: value}
    return flat


def model_settings(config: Config) -> dict[str, Any]:
    """The settings that decide which tensors a model has and what they mean, as flat `section.key` -> value."""
    experts = config.experts
    sections = {
        "model": {name: value for name, value in vars(config.model).items() if name != "size"},
        "moe": {"router": "dense"} if experts is None else {**experts.structure(), "blocks": config.moe_blocks},
        "objective": {name: getattr(config.objective, name) for name in ("name", "direction", "time_scale")},
    }
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def loss_weights(config: Config) -> dict[str, float]:
    """What each loss of the router counts beside the diffusion loss, by name: its settings `NAME_loss_weight`."""
    ending = "_loss_weight"
    settings = vars(config.moe).items()
    return {key.removesuffix(ending): value for key, value in settings if key.endswith(ending) and value is not None}
