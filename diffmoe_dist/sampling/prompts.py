"""The prompts of a sampling job, encoded by the text encoder that its model was trained with."""

from __future__ import annotations

import torch

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
from diffmoe_dist.errors import UserError
from diffmoe_dist.sampling.settings import SamplingSettings


def open_prompts(
    settings: SamplingSettings, config: Config, device: torch.device, opened: TextEncoder | None = None
) -> EncodedPrompts:
    """What --prompts or --prompt names.

    Args:
        opened: that of `data.text_encoder`, where something else has opened it: it is not opened again.

    Raises:
        UserError: the prompts cannot be read, or their encoder is missing or not the model's.
    """
    file = settings.prompts
    if file is not None and file.endswith(ENCODED_SUFFIX):
        for name in ("encoder", "tokenizer", "negative_prompt"):
            if getattr(settings, name) is not None:
                raise UserError(
                    f"{settings.option(name)} has no effect with --prompts {file}, whose prompts are encoded; give it "
                    "to encode-prompts"
                )
        encoded = open_encoded_prompts(file)
        _check_encoder(encoded, config, f"--prompts {file}")
        return encoded
    if settings.encoder is None:
        raise UserError("--encoder is missing: the folder of the text encoder that the model was trained with")
    prompts = [Prompt(str(settings.prompt))] if file is None else read_prompts(file)
    if opened is None or (settings.encoder, settings.tokenizer) != (config.data.text_encoder, config.data.tokenizer):
        opened = _open_encoder(settings.encoder, settings.tokenizer, config, device)
    return _encode(prompts, settings.negative_prompt, opened, config, f"--encoder {settings.encoder}")


def encode_for_model(
    prompts: list[Prompt],
    negative_prompt: str | None,
    config: Config,
    encoder: str,
    tokenizer: str | None,
    device: torch.device,
) -> EncodedPrompts:
    """Encode prompts with the text encoder in the folder --encoder.

    Raises:
        UserError: it is not the encoder that the model was trained with.
    """
    opened = _open_encoder(encoder, tokenizer, config, device)
    return _encode(prompts, negative_prompt, opened, config, f"--encoder {encoder}")


def _open_encoder(folder: str, tokenizer: str | None, config: Config, device: torch.device) -> TextEncoder:
    return TextEncoder.open(folder, tokenizer, config.model.text_max_length, device, "--encoder")


def _encode(
    prompts: list[Prompt], negative_prompt: str | None, encoder: TextEncoder, config: Config, named: str
) -> EncodedPrompts:
    encoded = encode_prompts(prompts, negative_prompt, encoder)
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
