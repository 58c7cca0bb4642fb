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
        check_encoder(encoded.encoder_sha256, encoded.max_length, config, f"--prompts {file}")
        return encoded
    if settings.encoder is None:
        raise UserError("--encoder is missing: the folder of the text encoder that the model was trained with")
    prompts = [Prompt(str(settings.prompt))] if file is None else read_prompts(file)
    if opened is None or (settings.encoder, settings.tokenizer) != (config.data.text_encoder, config.data.tokenizer):
        opened = open_encoder(settings.encoder, settings.tokenizer, config, device)
    return encode_prompts(prompts, settings.negative_prompt, opened)


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
    return encode_prompts(prompts, negative_prompt, open_encoder(encoder, tokenizer, config, device))


def open_encoder(folder: str, tokenizer: str | None, config: Config, device: torch.device | str) -> TextEncoder:
    """The text encoder in the folder --encoder.

    Raises:
        UserError: it is not the encoder that the model was trained with.
    """
    opened = TextEncoder.open(folder, tokenizer, config.model.text_max_length, device, "--encoder")
    check_encoder(opened.sha256, opened.max_length, config, f"--encoder {folder}")
    return opened


def check_encoder(sha256: str, max_length: int, config: Config, named: str) -> None:
    """Raises UserError for another encoder, or another number of tokens, than the model was trained with."""
    expected = config.model.text_encoder_sha256
    if sha256 != expected or max_length != config.model.text_max_length:
        raise UserError(
            f"{named}: is not the encoder that the model was trained with: SHA-256 {sha256[:12]}..., {max_length} "
            f"tokens, the model's {expected[:12]}..., {config.model.text_max_length} tokens; use that"
        )
