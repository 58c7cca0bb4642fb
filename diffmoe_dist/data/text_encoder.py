"""A text encoder, or several, from local folders: captions in, what a model is trained on out.

Shape legend: B captions, T tokens of one caption, L tokens after padding, D hidden size, P size of the pooled vector.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffmoe_dist.data.encoder_choice import (
    CLIP,
    MODEL_FILES,
    T5,
    EncoderChoice,
    choices_sha256,
    choose_encoders,
    import_transformers,
    kind_of,
)
from diffmoe_dist.data.encoding import load_in_fp32, one_line, reproducible_arithmetic, to_fp16
from diffmoe_dist.data.model_folder import refuse_pointers
from diffmoe_dist.data.text import EncodedText
from diffmoe_dist.errors import UserError


class TextEncoder:
    """A text encoder and its tokenizer, in fp32. The vectors are the last layer's, after its norm, or another's.

    Made by `TextEncoder.open`, or of a model and a tokenizer that are open already.
    """

    def __init__(self, module: Any, tokenizer: Any, max_length: int, layer: int | None, named: str):
        self.kind = kind_of(module.config.model_type)  # "clip", "t5" or a model_type
        config = module.config.get_text_config() if self.kind not in (CLIP, T5) else module.config
        self.module, self.tokenizer, self.layer = module, tokenizer, layer
        self.max_length = max_length  # tokens
        self.hidden_size = int(config.hidden_size)  # D
        projected = type(module).__name__.endswith("WithProjection")
        self._pooled = ("text_embeds" if projected else "pooler_output") if self.kind == CLIP else None
        self.pooled_size = 0 if self._pooled is None else int(config.projection_dim if projected else self.hidden_size)
        self._choices: tuple[EncoderChoice, ...] = ()
        self._name = named  # in an error

    @classmethod
    def open(
        cls,
        folder: str | Path,
        tokenizer: str | Path | None,
        max_length: int | None,
        device: torch.device | str,
        setting: str,
    ) -> TextEncoder:
        """Load an encoder, or several, in fp32 from local folders; `setting` is how the user named them.

        Args:
            folder: of an encoder, or a .json file that names some (`encoder_choice.choose_encoders`).
            tokenizer: the folder of its tokenizer; None: it lies beside the weights.
            max_length: tokens of a caption at most, start and end included; None: 77 for CLIP, 120 for T5, 256 else.
            device: where to encode.

        Raises UserError for folders that hold no such thing, and for more tokens or layers than the encoder has.
        """
        choices = choose_encoders(folder, tokenizer, max_length, setting)
        return joined_encoder([_open(choice, device) for choice in choices], [choice.beside for choice in choices])

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the encoder's and the tokenizer's files, which are read for it; of `open`."""
        return choices_sha256(self._choices)

    def encode(self, captions: Sequence[str], batch_size: int = 32) -> Iterator[EncodedText]:
        """The captions in order, `batch_size` of them at a time. The last bits depend on which are encoded together."""
        for start in range(0, len(captions), batch_size):
            yield from self._encode_batch(captions[start : start + batch_size])

    def encode_alone(self, caption: str) -> EncodedText:
        """One caption as a batch of its own: to the last bit a function of the caption, on one kind of device."""
        (encoded,) = self._encode_batch([caption])
        return encoded

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has before it is cut to `max_length`, start and end included."""
        if not captions:
            return []
        ids = self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        return [len(tokens) for tokens in ids]

    def cuts(self, captions: Sequence[str]) -> list[tuple[int, int]]:
        """Of each caption that is cut, how many tokens it has and how many are left."""
        return [(length, self.max_length) for length in self.num_tokens(captions) if length > self.max_length]

    @torch.no_grad()
    def _encode_batch(self, captions: Sequence[str]) -> Iterator[EncodedText]:
        texts = [caption if caption.strip() else "" for caption in captions]
        tokens = self.tokenizer(
            texts, max_length=self.max_length, truncation=True, padding="max_length", return_tensors="pt"
        )
        ids_BL, mask_BL = tokens["input_ids"], tokens["attention_mask"]
        mask_BL[:, 0] = 1  # an empty caption of an encoder without start and end is one token of padding
        device = self.module.device
        with reproducible_arithmetic():
            output = self.module(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                output_hidden_states=self.layer is not None,
            )
        hidden_BLD = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        pooled_BP = None if self._pooled is None else to_fp16(output[self._pooled].float().cpu().numpy(), self._name)
        tokens_BLD, valid_BL = to_fp16(hidden_BLD.float().cpu().numpy(), self._name), mask_BL.numpy().astype(bool)
        for row, text in enumerate(texts):
            tokens_TD = tokens_BLD[row, valid_BL[row]]
            yield EncodedText(tokens_TD, None if pooled_BP is None else pooled_BP[row], is_null=not text)


class JoinedTextEncoder(TextEncoder):
    """Several encoders of one caption: their tokens one after the other, as wide as the widest of them.

    Narrower vectors are filled up with zeros, and pooled vectors are put side by side, as SD3 does with CLIP and T5.
    """

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self.encoders = encoders
        self.module = nn.ModuleList([encoder.module for encoder in encoders])
        self.kind = "+".join(encoder.kind for encoder in encoders)
        self.max_length = sum(encoder.max_length for encoder in encoders)
        self.hidden_size = max(encoder.hidden_size for encoder in encoders)
        self.pooled_size = sum(encoder.pooled_size for encoder in encoders)
        self._choices = tuple(choice for encoder in encoders for choice in encoder._choices)

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        counts = [encoder.num_tokens(captions) for encoder in self.encoders]
        return [sum(of_caption) for of_caption in zip(*counts, strict=True)]

    def cuts(self, captions: Sequence[str]) -> list[tuple[int, int]]:
        """Of each caption that one of the encoders cuts, its tokens for the first of these, and how many are left."""
        found = ([cut for encoder in self.encoders for cut in encoder.cuts([caption])] for caption in captions)
        return [cuts[0] for cuts in found if cuts]

    def _encode_batch(self, captions: Sequence[str]) -> Iterator[EncodedText]:
        for parts in zip(*(encoder._encode_batch(captions) for encoder in self.encoders), strict=True):
            widths = [(0, self.hidden_size - part.tokens_TD.shape[1]) for part in parts]
            padded = [np.pad(part.tokens_TD, ((0, 0), width)) for part, width in zip(parts, widths, strict=True)]
            pooled = [part.pooled_P for part in parts if part.pooled_P is not None]
            yield EncodedText(np.concatenate(padded), np.concatenate(pooled) if pooled else None, parts[0].is_null)


class TextEncodersBeside(TextEncoder):
    """Encoders that split a caption into equal tokens: the vectors of a token side by side, as of SD3's two CLIPs."""

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        self.encoders = encoders
        self.module = nn.ModuleList([encoder.module for encoder in encoders])
        self.kind = "|".join(encoder.kind for encoder in encoders)
        self.max_length = encoders[0].max_length
        self.hidden_size = sum(encoder.hidden_size for encoder in encoders)
        self.pooled_size = sum(encoder.pooled_size for encoder in encoders)
        self._choices = tuple(choice for encoder in encoders for choice in encoder._choices)

    def num_tokens(self, captions: Sequence[str]) -> list[int]:
        return self.encoders[0].num_tokens(captions)

    def _encode_batch(self, captions: Sequence[str]) -> Iterator[EncodedText]:
        encoded = zip(*(encoder._encode_batch(captions) for encoder in self.encoders), strict=True)
        for caption, parts in zip(captions, encoded, strict=True):
            lengths = [len(part.tokens_TD) for part in parts]
            if len(set(lengths)) > 1:
                names = " and ".join(encoder._name for encoder in self.encoders)
                raise UserError(
                    f"{names} make {' and '.join(map(str, lengths))} tokens of {caption!r:.60}; only encoders with "
                    "the same tokens stand side by side"
                )
            pooled = [part.pooled_P for part in parts if part.pooled_P is not None]
            tokens_TD = np.concatenate([part.tokens_TD for part in parts], axis=1)
            yield EncodedText(tokens_TD, np.concatenate(pooled) if pooled else None, parts[0].is_null)


def joined_encoder(encoders: Sequence[TextEncoder], beside: Sequence[bool]) -> TextEncoder:
    """The one encoder, or several as one.

    Args:
        beside: whether its vectors stand beside those of the encoder before it.
    """
    groups: list[list[TextEncoder]] = []
    for encoder, is_beside in zip(encoders, beside, strict=True):
        groups += [] if is_beside else [[]]
        groups[-1].append(encoder)
    joined = [group[0] if len(group) == 1 else TextEncodersBeside(group) for group in groups]
    return joined[0] if len(joined) == 1 else JoinedTextEncoder(joined)


def parts_of(encoder: TextEncoder) -> list[tuple[TextEncoder, bool]]:
    """What `joined_encoder` has made one: each encoder, and whether it is beside the one before it."""
    if isinstance(encoder, JoinedTextEncoder):
        return [part for of_group in encoder.encoders for part in parts_of(of_group)]
    if isinstance(encoder, TextEncodersBeside):
        return [(part, number > 0) for number, part in enumerate(encoder.encoders)]
    return [(encoder, False)]


def _open(choice: EncoderChoice, device: torch.device | str) -> TextEncoder:
    module = _load_module(choice).to(device)
    known = choice.kind in (CLIP, T5)
    config = module.config if known else module.config.get_text_config()
    if not known:
        config.use_cache = False  # of keys and values, which a causal model keeps for the next token
    tokenizer = load_tokenizer(choice.folders[-1], choice.named, int(config.vocab_size))
    limit = getattr(config, "max_position_embeddings", None) or math.inf  # T5 has none
    if not 2 <= choice.length <= limit:
        raise UserError(f"{choice.named}: takes captions of 2 to {limit} tokens, not of {choice.length}")
    layers = int(config.num_hidden_layers)
    if choice.layer is not None and not -layers - 1 <= choice.layer <= layers:
        raise UserError(
            f"{choice.named}: has layers 0 (embeddings) to {layers}, or -{layers + 1} to -1, not {choice.layer}"
        )
    opened = TextEncoder(module, tokenizer, choice.length, choice.layer, choice.named)
    opened._choices = (choice,)
    return opened


def _load_module(choice: EncoderChoice) -> Any:
    architecture = getattr(import_transformers(choice.named), choice.class_name)
    with without_loading_bar():
        return load_in_fp32(architecture, choice.folder, choice.named, dtype=torch.float32)


@contextmanager
def without_loading_bar() -> Iterator[None]:
    """No progress bar of transformers' own, of which every process would show one."""
    from transformers.utils import logging

    progress_bar: Any = logging
    shown = progress_bar.is_progress_bar_enabled()
    progress_bar.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            progress_bar.enable_progress_bar()


def load_tokenizer(folder: Path, named: str, vocab_size: int) -> Any:
    """A tokenizer that knows words, from a local folder.

    Args:
        named: how the user named the encoder.
        vocab_size: how many tokens the encoder has embeddings of.

    Raises:
        UserError: it does not load, knows no letter, lacks merges or is of a larger vocabulary: of files that are
            missing transformers makes an empty tokenizer without a word, to which all captions are one.
    """
    from transformers import AutoTokenizer

    refuse_pointers(folder, named, MODEL_FILES)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        if tokenizer.pad_token is None:  # as of causal models
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        letters = {tuple(ids) for ids in tokenizer(list(string.ascii_letters), add_special_tokens=False)["input_ids"]}
        largest = max(tokenizer.get_vocab().values(), default=0)
        missing = _missing_merges(tokenizer)
    except Exception as error:  # damaged files make it fail in any way
        raise UserError(
            f"{named}: no tokenizer loads from {folder} ({one_line(error)}); name the tokenizer's folder"
        ) from error
    if len(letters) < 2:
        raise UserError(
            f"{named}: the tokenizer in {folder} knows no words; fetch its tokenizer.json, or vocab.json and "
            "merges.txt, or spiece.model"
        )
    if missing:
        raise UserError(f"{named}: the tokenizer in {folder} lacks {missing} merges; fetch merges.txt again")
    if largest >= vocab_size:
        raise UserError(
            f"{named}: the tokenizer in {folder} has token {largest}, the encoder {vocab_size} embeddings; give the "
            "encoder's own tokenizer"
        )
    return tokenizer


def _missing_merges(tokenizer: Any) -> int:
    """How many tokens of a byte-pair vocabulary no merge makes: the file of merges is cut."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return 0
    suffix = model["end_of_word_suffix"] or ""
    special = {token["content"] for token in whole["added_tokens"]} | {model["unk_token"]}
    if model.get("byte_fallback"):  # made from SentencePiece, where symbols of the user's come without merges
        return 0
    longer = {token for token in model["vocab"] if len(token.removesuffix(suffix)) > 1}
    made = {first + second.removeprefix(model["continuing_subword_prefix"] or "") for first, second in model["merges"]}
    return len(longer - made - special)
