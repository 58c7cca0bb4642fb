"""What a sampling job is asked for: one set of settings, and the command-line options that set them.

`sample`, `evaluate`, `interval_search` and `report` share both. No torch here: a mistake is reported before torch is
imported.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from diffmoe_dist.config import Config, let_router_run
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import is_utf8

OVERRIDABLE = (
    "moe.inference", "moe.constant_threshold", "data.shards", "data.latents", "data.text", "data.autoencoder",
    "data.text_encoder", "data.tokenizer", "moe.router",
)  # fmt: skip
PROMPTS_NAME = "prompts.jsonl"  # beside the images: the prompt of each
PRECISIONS: tuple[str, ...] = get_args(get_type_hints(Config)["precision"])
# Those of diffusion.samplers.
SAMPLERS = (
    "euler", "heun", "sde", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "dopri5", "dopri8",
    "bosh3", "fehlberg2", "adaptive_heun", "ddpm", "ddim", "dpm-solver++",
)  # fmt: skip


@dataclass(frozen=True)
class SamplingSettings:
    checkpoint: str
    num: int | None = None  # None: one image for each prompt
    steps: int | None = None  # None: the default of the sampler
    cfg_scale: float = 1.0
    seed: int = 0
    sampler: str | None = None  # None: the default of the model's objective
    time_shift: float | None = None  # None: the run's own
    batch_size: int = 100
    overrides: tuple[str, ...] = ()  # key=value, of OVERRIDABLE
    recalibrate: int = 0  # batches of training data from which the thresholds are found anew
    cfg_channels: int | None = None  # None: all
    cfg_interval: tuple[float, float] | None = None  # in the objective's time
    one_pass: bool = False
    labels: Literal["balanced", "random"] | None = None  # None: balanced, for a model conditioned on classes
    classes: tuple[int, ...] | str | None = None  # numbers, or the text of --classes; None: all
    ema_decay: float | None = None  # which average of a checkpoint; None: that of ema.decay
    ema_length: float | None = None  # or one by a power function, of those in ema.lengths
    precision: str | None = None  # one of PRECISIONS, without TF32; None: the run's precision, and its TF32
    expert: int = 1  # ranks that one set of experts is sharded over
    png: bool = False
    decoder: str | None = None  # of latents; default: the run's own
    prompts: str | None = None  # a file of prompts, or of encoded ones
    prompt: str | None = None  # or one prompt
    negative_prompt: str | None = None
    encoder: str | None = None  # the folder of the text encoder
    tokenizer: str | None = None  # and of its tokenizer, where it lies elsewhere
    geneval: bool = False
    batch_size_option: str = "--batch-size"  # what the command calls it, for messages

    def option(self, name: str) -> str:
        """The command-line option that sets the field of this name."""
        return self.batch_size_option if name == "batch_size" else _option(name)

    def check(self) -> None:
        """Refuse what is wrong whatever the model.

        Raises:
            UserError: a value is out of range, or has no effect beside the others.
        """
        for name in ("num", "steps", "batch_size", "expert"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{self.option(name)} {value}: choose at least 1")
            if value is not None and value > _MOST:
                raise UserError(f"{self.option(name)} {value}: choose at most {_MOST}")
        self._check_prompts()
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: choose one from 0 to 2**63 - 1")
        if self.time_shift is not None and not 0 < self.time_shift < math.inf:
            raise UserError(f"--time-shift {self.time_shift}: choose a number above 0, and finite; 1 is no shift")
        if self.recalibrate < 0:
            raise UserError(f"--recalibrate {self.recalibrate}: choose 0 (no) or a number of batches, such as 4")
        self._check_guidance()
        if self.ema_decay is not None and self.ema_length is not None:
            raise UserError("--ema-decay and --ema-length: each chooses an average of the weights; give one of them")
        for override in self.overrides:
            if override.partition("=")[0] not in OVERRIDABLE:
                raise UserError(
                    f"{override}: sampling can change {', '.join(OVERRIDABLE)} of a run, nothing else; remove it"
                )

    def _check_guidance(self) -> None:
        if not 0 <= self.cfg_scale < math.inf:
            raise UserError(f"--cfg-scale {self.cfg_scale}: choose 0 or more, and finite; 1 is no guidance")
        if self.cfg_scale == 1:
            for name in ("cfg_channels", "cfg_interval", "one_pass", "negative_prompt"):
                if getattr(self, name) not in (None, False):
                    raise UserError(
                        f"{_option(name)} has no effect without guidance; remove it or set --cfg-scale above 1"
                    )

    def _check_prompts(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not is_utf8(getattr(self, name) or ""):
                raise UserError(f"{_option(name)}: is no text in UTF-8; write it again")
        if self.prompts is not None and self.prompt is not None:
            raise UserError("--prompts and --prompt: give one of them")
        if self.prompts is None and self.prompt is None:
            if self.num is None:
                raise UserError("--num is missing: how many images to sample; or give --prompts, for one of each")
            for name in ("negative_prompt", "encoder", "tokenizer"):
                if getattr(self, name) is not None:
                    raise UserError(f"{_option(name)} has no effect without --prompts or --prompt; remove it")
        if self.geneval and self.prompts is None:
            raise UserError("--geneval needs --prompts, a file such as GenEval's evaluation_metadata.jsonl")


def read_classes(text: str) -> str:
    """The text; which classes it names, only the model can tell."""
    if not all(part.strip() for part in text.split(",")):
        raise UserError(f"--classes {text}: expected numbers or names with commas between them, such as 1,2,cat")
    return text


_FLAG: dict[str, Any] = {"action": "store_true", "default": None}
_FOLDER: dict[str, Any] = {"metavar": "DIR"}
_MOST = 10**8  # images, steps, ranks: beyond it a job would not end
# What argparse needs to know of the option of each field.
_OPTIONS: dict[str, dict[str, Any]] = {
    "num": {"type": int, "metavar": "N", "help": "how many images (default with prompts: one of each)"},
    "steps": {"type": int, "metavar": "N", "help": "sampler steps (default 50; adaptive samplers choose their own)"},
    "seed": {"type": int, "metavar": "N", "help": "of the noise and of random labels (default 0)"},
    "sampler": {
        "choices": SAMPLERS,
        "metavar": "NAME",
        "help": "for objective.name=flow: euler (its default), heun (two NFE a step), sde (SiT's, adds noise), dopri5 "
        "(adaptive, images of a batch share their steps), or another method of torchdiffeq: midpoint, heun2, heun3, "
        "rk4, explicit_adams, implicit_adams, dopri8, bosh3, fehlberg2, adaptive_heun; for ddpm: ddpm (its default), "
        "ddim, dpm-solver++",
    },
    "time_shift": {
        "type": float,
        "metavar": "FACTOR",
        "help": "of a flow's steps, above 1: more of them where there is more noise (default: the run's "
        "sample.time_shift)",
    },
    "cfg_scale": {
        "type": float,
        "metavar": "SCALE",
        "help": "scale of classifier-free guidance (CFG), 1: none (default)",
    },
    "cfg_channels": {"choices": ["all", "3"], "help": "which are guided (default all; 3: as published DiT)"},
    "cfg_interval": {
        "type": float,
        "nargs": 2,
        "metavar": ("LO", "HI"),
        "help": "guide at these times of the objective only",
    },
    "one_pass": {
        **_FLAG,
        "help": "guide with conditional and unconditional tokens in one batch, and so in one pool",
    },
    "labels": {"choices": ["balanced", "random"], "help": "the classes in turn (default) or random ones"},
    "classes": {"type": read_classes, "metavar": "A,B,...", "help": "only these classes, by number or by name"},
    "batch_size": {"type": int, "metavar": "N", "help": "images sampled together, a block (default 100)"},
    "ema_decay": {"type": float, "metavar": "D", "help": "another average of the weights, of ema.decays"},
    "ema_length": {"type": float, "metavar": "L", "help": "or one by a power function, of ema.lengths"},
    "precision": {
        "choices": PRECISIONS,
        "help": "what the model computes in, without TF32 (default: the run's precision and tf32)",
    },
    "decoder": {**_FOLDER, "help": "the autoencoder of a model of latents (default: the run's sample.decoder)"},
    "recalibrate": {
        "type": int,
        "metavar": "BATCHES",
        "help": "first find the capacity thresholds of the averaged weights on this many batches of training data",
    },
    "prompts": {"metavar": "FILE", "help": "for a model conditioned on captions: .txt, .jsonl, or encoded .npz"},
    "prompt": {"metavar": "TEXT", "help": "or one prompt"},
    "negative_prompt": {"metavar": "TEXT", "help": "what guidance moves away from (default: the empty caption)"},
    "encoder": {**_FOLDER, "help": "local folder of the text encoder that the model was trained with"},
    "tokenizer": {**_FOLDER, "help": "and of its tokenizer, where it lies elsewhere"},
    "geneval": {**_FLAG, "help": "also write the images into the folder geneval as GenEval reads them"},
    "expert": {"type": int, "metavar": "RANKS", "help": "ranks that one set of experts is sharded over (default 1)"},
    "png": {**_FLAG, "help": "also write every image as png/NUMBER.png"},
    "overrides": {
        "nargs": "*",
        "metavar": "key=value",
        "help": "another moe.inference or moe.constant_threshold; other data.shards, data.latents, ...; "
        "moe.router=PATH, that a router of your own may run",
    },
}


def add_sampling_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    *,
    leave_out: Collection[str] = (),
    batch_size_option: str = "--batch-size",
) -> None:
    """Add an option for each field of `SamplingSettings` but `checkpoint`; `settings_from` reads them.

    Every default is None, so that a command can see what was given.

    Args:
        leave_out: fields that have no effect in this command.
        batch_size_option: where `--batch-size` has another meaning.
    """
    parser.set_defaults(batch_size_option=batch_size_option)
    other_names = {"num": ["--num", "--num-images"], "batch_size": [batch_size_option]}
    for name, options in _OPTIONS.items():
        if name in leave_out:
            continue
        if name == "overrides":
            parser.add_argument(name, **options)
        else:
            parser.add_argument(*other_names.get(name, [_option(name)]), dest=name, **options)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the user gave of the options of `add_sampling_options`, by the field that each sets."""
    found = {field.name: getattr(arguments, field.name, None) for field in fields(SamplingSettings)}
    del found["checkpoint"], found["batch_size_option"]
    return {name: value for name, value in found.items() if value not in (None, [])}


def settings_from(arguments: argparse.Namespace, checkpoint: str, num: int | None = None) -> SamplingSettings:
    """The settings that the options of `add_sampling_options` ask for.

    Args:
        checkpoint: a run, step or weights folder.
        num: the command's own default of `--num`.
    """
    given = {"num": num, **given_options(arguments)}
    let_router_run(given.get("overrides", ()))
    channels = given.pop("cfg_channels", "all")
    if "cfg_interval" in given:
        given["cfg_interval"] = tuple(given["cfg_interval"])
    return SamplingSettings(
        checkpoint=checkpoint,
        cfg_channels=None if channels == "all" else int(channels),
        overrides=tuple(given.pop("overrides", ())),
        batch_size_option=arguments.batch_size_option,
        **given,
    )


def refuse_sampling_options(arguments: argparse.Namespace, beside: str, allowed: Collection[str] = ()) -> None:
    """Refuse the sampling options that were given: they have no effect `beside` what else was.

    Raises:
        UserError: one of them was given that is not `allowed`.
    """
    for name, value in given_options(arguments).items():
        if name not in allowed:
            raise UserError(f"{_as_written(arguments, name, value)} has no effect with {beside}; leave it out")


def _as_written(arguments: argparse.Namespace, name: str, value: Any) -> str:
    if name == "overrides":
        return str(value[0])
    option = arguments.batch_size_option if name == "batch_size" else _option(name)
    if value is True:
        return option
    return f"{option} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
