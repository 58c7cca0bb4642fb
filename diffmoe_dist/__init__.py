"""Expert-parallel training of mixture-of-experts diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from diffmoe_dist.model.condition import TextCondition
    from diffmoe_dist.model.dit import DiT

__version__ = "0.2.0"


def load_model(
    directory: str | Path,
    device: str | torch.device = "cpu",
    *,
    ema_decay: float | None = None,
    ema_length: float | None = None,
) -> DiT:
    """The averaged (EMA) model of a run, or the model of a folder of weights, in eval mode on one device.

    It has fp32 weights and computes in fp32, whatever the precision of the run.

    `model(x, t, y).prediction` has x's shape (N, C, H, W); t is the objective's time as the model is given it:
    `time_scale` * t for a flow, the step 0..999 for DDPM; y are labels, (N,) int64, or what `encode_captions` makes.

    Args:
        directory: a run folder, for its newest checkpoint, a `step-N` folder, or a folder that `diffmoe_dist.convert`
            has written.
        ema_decay: which average of a run, one of its `ema.decays`; default: that of `ema.decay`.
        ema_length: or one by a power function, of its `ema.lengths`.
    """
    from diffmoe_dist.engine.weights import find_model, read_model

    folder = find_model(directory)
    return read_model(folder, device, ["precision=fp32"], ema_decay=ema_decay, ema_length=ema_length)[0]


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
