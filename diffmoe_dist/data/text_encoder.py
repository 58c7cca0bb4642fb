"""A CLIP or T5 text encoder from local folders: captions in, what a model is trained on out.

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

import torch

from diffmoe_dist.data.encoding import load_in_fp32, model_sha256, one_line, reproducible_arithmetic, to_fp16
from diffmoe_dist.data.model_folder import check_model_folder, refuse_pointers
from diffmoe_dist.data.text import EncodedText
from diffmoe_dist.errors import UserError

USUAL_LENGTH = {"clip": 77, "t5": 120}  # tokens
_KINDS = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}  # by the model_type of config.json
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


class TextEncoder:
    """A text encoder and its tokenizer, in fp32. The vectors are those of the last layer, after its norm.

    Made by `TextEncoder.open`.
    """

    def __init__(self, module: Any, tokenizer: Any, kind: str, max_length: int, folders: Sequence[Path], name: str):
        self.module, self.tokenizer = module, tokenizer
        self.kind, self.max_length = kind, max_length  # "clip" or "t5"; tokens
        self.hidden_size = int(module.config.hidden_size)  # D
        self.pooled_size = self.hidden_size if kind == "clip" else 0  # P; 0: no pooled vector
        self._folders = folders  # of the encoder and, where it is another, of the tokenizer
        self._name = name  # in an error

    @classmethod
    def open(
        cls,
        folder: str | Path,
        tokenizer: str | Path | None,
        max_length: int | None,
        device: torch.device | str,
        setting: str,
    ) -> TextEncoder:
        """Load an encoder in fp32 from a local folder; `setting` is how the user named it.

        Args:
            folder: of a CLIPTextModel or T5EncoderModel.
            tokenizer: the folder of its tokenizer; None: it lies beside the weights.
            max_length: tokens of a caption at most, start and end included; None: 77 for CLIP, 120 for T5.
            device: where to encode.

        Raises UserError for folders that hold no such thing, and for more tokens than the encoder takes.
        """
        path = Path(folder)
        kind = encoder_kind(path, setting)
        module = _load_module(path, kind, setting).to(device)
        folders = (path,) if tokenizer is None else (path, Path(tokenizer))
        loaded = load_tokenizer(folders[-1], f"{setting}={folder}", int(module.config.vocab_size))
        length = USUAL_LENGTH[kind] if max_length is None else max_length
        limit = getattr(module.config, "max_position_embeddings", math.inf)  # T5 has none
        if not 2 <= length <= limit:
            raise UserError(f"{setting}={folder}: takes captions of 2 to {limit} tokens, not of {length}")
        return cls(module, loaded, kind, length, folders, f"{setting}={folder}")

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of the encoder's and the tokenizer's files, which are read for it."""
        return encoder_sha256(*self._folders)

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

    @torch.no_grad()
    def _encode_batch(self, captions: Sequence[str]) -> Iterator[EncodedText]:
        texts = [caption if caption.strip() else "" for caption in captions]
        tokens = self.tokenizer(
            texts, max_length=self.max_length, truncation=True, padding="max_length", return_tensors="pt"
        )
        device = self.module.device
        ids_BL, mask_BL = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        with reproducible_arithmetic():
            output = self.module(input_ids=ids_BL, attention_mask=mask_BL)
        hidden_BLD = to_fp16(output.last_hidden_state.cpu().numpy(), self._name)
        pooled = getattr(output, "pooler_output", None)
        pooled_BP = None if pooled is None else to_fp16(pooled.cpu().numpy(), self._name)
        valid_BL = mask_BL.cpu().numpy().astype(bool)
        for row, text in enumerate(texts):
            tokens_TD = hidden_BLD[row, valid_BL[row]]
            yield EncodedText(tokens_TD, None if pooled_BP is None else pooled_BP[row], is_null=not text)


def encoder_kind(folder: Path, setting: str) -> str:
    """`clip` or `t5`. Raises UserError for any other folder."""
    return _KINDS[check_model_folder(folder, f"{setting}={folder}", "a CLIP or T5 text encoder", _KINDS)]


def encoder_sha256(encoder: Path, tokenizer: Path | None = None) -> str:
    """The fingerprint of an encoder's files, and of its tokenizer's where they lie elsewhere."""
    own = model_sha256(encoder, *_MODEL_FILES)
    return own if tokenizer is None else own[:32] + model_sha256(tokenizer, *_MODEL_FILES)[:32]


def _load_module(folder: Path, kind: str, setting: str) -> Any:
    try:
        from transformers import CLIPTextModel, T5EncoderModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torchvision of another torch
        raise UserError(
            f"{setting}={folder}: transformers does not import ({error}); pip install transformers"
        ) from error
    architecture: Any = CLIPTextModel if kind == "clip" else T5EncoderModel
    with without_loading_bar():
        return load_in_fp32(architecture, folder, f"{setting}={folder}", dtype=torch.float32)


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

    refuse_pointers(folder, named, _MODEL_FILES)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
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
    longer = {token for token in model["vocab"] if len(token.removesuffix(suffix)) > 1}
    made = {first + second.removeprefix(model["continuing_subword_prefix"] or "") for first, second in model["merges"]}
    return len(longer - made - special)
