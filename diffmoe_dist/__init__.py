"""Expert-parallel training of mixture-of-experts diffusion transformers."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from typing_extensions import Unpack

    from diffmoe_dist.library.model import Label, LoadedModel
    from diffmoe_dist.library.pipeline import DiffMoEPipeline as DiffMoEPipeline
    from diffmoe_dist.library.sampling import SampleOptions, Samples
    from diffmoe_dist.model.condition import TextCondition

__version__ = "0.2.0"


class _Package(ModuleType):
    """`diffmoe_dist.sample` is the function, also after an import of the command's module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "sample" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """`DiffMoEPipeline`, a `diffusers.DiffusionPipeline`: diffusers is imported when it is asked for."""
    if name != "DiffMoEPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffmoe_dist.errors import UserError

    try:
        from diffmoe_dist.library.pipeline import DiffMoEPipeline
    except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torchvision of another torch
        raise UserError(f"DiffMoEPipeline needs diffusers, which does not import ({error}); install it") from error
    return DiffMoEPipeline


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    *,
    ema_decay: float | None = None,
    ema_length: float | None = None,
) -> LoadedModel:
    """The averaged (EMA) model of a run, or the model of a folder of weights, in eval mode on one device.

    It has fp32 weights and computes in fp32, whatever the precision of the run. `.config` are its settings,
    `.class_names` what its classes are called.

    `model(x, t, y).prediction` has x's shape (N, C, H, W); t is the objective's time as the model is given it:
    `time_scale` * t for a flow, the step 0..999 for DDPM, (N,) or one number for all images; y are labels, (N,) or a
    list of numbers and names or one of them, or what `encode_captions` makes. What it does not take is a `UserError`.

    Args:
        directory: a run folder, for its newest checkpoint, a `step-N` folder, or a folder that `diffmoe_dist.convert`
            has written.
        ema_decay: which average of a run, one of its `ema.decays`; default: that of `ema.decay`.
        ema_length: or one by a power function, of its `ema.lengths`.
    """
    from diffmoe_dist.engine.weights import find_model, read_class_names, read_model
    from diffmoe_dist.library.model import LoadedModel

    folder = find_model(directory)
    model, config = read_model(folder, device, ["precision=fp32"], ema_decay=ema_decay, ema_length=ema_length)
    return LoadedModel.of(model, config, read_class_names(folder))


def sample(
    model: LoadedModel,
    labels: Label | Sequence[Label] | torch.Tensor | str | TextCondition | None = None,
    *,
    prompts: str | Sequence[str] | TextCondition | None = None,
    **options: Unpack[SampleOptions],
) -> Samples:
    """Sample images as the command `diffmoe_dist.sample --precision fp32` does; on the model's device, in one process.

    Image i of a seed is that of the command: a function of the weights, the seed, its number i and its label, or of
    its prompt and its place among the images of that prompt; and with an inference rule that lets images compete, or
    an adaptive sampler, of the block of `batch_size` images that it is sampled in.

    Args:
        model: what `load_model` returns.
        labels: an image of each, by number or name; default: `num` images of all classes in turn. For a model that is
            conditioned on captions they are its prompts.
        prompts: an image of each; with the `encoder` that the model was trained with, or as `encode_captions` has
            encoded them.
        options: of the command, by its names and with its defaults: num, steps (50), sampler, cfg_scale (1),
            cfg_interval, cfg_channels, one_pass, seed (0), time_shift, batch_size (100), decoder, negative_prompt,
            encoder, tokenizer.

    Returns:
        `.images`, (N, C, H, W) fp32 in about [-1, 1], of a model of latents only with a decoder, and `.to_uint8()`,
        (N, H, W, C); `.latents`, what the model made; `.labels`, `.nfe` and `.capacity`, the measured C.

    Raises:
        UserError: an option is not possible, or the model has no such label.
        FloatingPointError: images are not finite.
    """
    from diffmoe_dist.library.sampling import draw_samples

    return draw_samples(model, labels, prompts, options)


def encode_captions(
    captions: Sequence[str],
    encoder: str | Path,
    max_length: int,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
) -> TextCondition:
    """What a model with `model.condition=text` is told; the empty caption is the unconditional one.

    Args:
        encoder: the local folder, or the .json file of several, of the text encoder that the model was trained with.
        max_length: `model.text_max_length`; longer captions are cut.
        tokenizer: the folder of its tokenizer, where it lies elsewhere.
    """
    from diffmoe_dist.data.text import pad_text
    from diffmoe_dist.data.text_encoder import TextEncoder

    opened = TextEncoder.open(encoder, tokenizer, max_length, device, "encoder")
    padded = pad_text([opened.encode_alone(caption) for caption in captions], max_length)
    return padded.map(lambda tensor: tensor.to(device))
