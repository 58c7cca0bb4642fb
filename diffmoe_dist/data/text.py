"""Encoded captions: reading those of a sample, choosing one of them, padding them to a batch.

Shape legend: B samples, T tokens of one caption, L tokens after padding, D hidden size, P size of the pooled vector.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffmoe_dist.data.captions import captions_in
from diffmoe_dist.data.format import ABSENT, CAPTION_FIELD, METADATA_FIELD, POOLED_TEXT_FIELD, TEXT_FIELD, File
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import read_fp16
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from diffmoe_dist.model.condition import TextCondition


@dataclass(frozen=True)
class EncodedText:
    """One caption."""

    tokens_TD: np.ndarray  # fp16
    pooled_P: np.ndarray | None  # fp16; None where the encoder has no pooled vector
    is_null: bool = False  # the empty caption


def text_field(caption: int) -> str:
    """The field with the tokens of a sample's caption number 0, 1, ..."""
    return f"{caption}.{TEXT_FIELD}"


def pooled_field(caption: int) -> str:
    return f"{caption}.{POOLED_TEXT_FIELD}"


def captions_of(base: ShardIndex, sample_id: int) -> list[str]:
    """All captions of a sample, of which there may be none; strings that are no text in UTF-8 do not count.

    Raises CorruptShardError for a `json` that is none, and a `txt` that is no text.
    """
    try:
        return captions_in(base.read(sample_id, (CAPTION_FIELD, METADATA_FIELD)))
    except (ValueError, RecursionError) as error:
        raise base.corrupt(sample_id, f"its captions cannot be read ({error})") from error


def check_captions(base: ShardIndex, named: str) -> None:
    """Raises UserError where no sample has a caption; looks no further than to the first that has one."""
    if not {CAPTION_FIELD, METADATA_FIELD} & set(base.fields):
        raise UserError(f"{named}: holds no captions ({', '.join(base.fields)}); pack some with them")
    if not any(captions_of(base, sample_id) for sample_id in range(base.num_samples)):
        raise UserError(f"{named}: none of {base.num_samples} samples has a caption; pack some with them")


def choose_caption(captions: Sequence[str], uniform: float) -> str:
    """One of the captions, each as likely as the others, or the empty one; `uniform` in [0, 1) decides."""
    return captions[int(uniform * len(captions))] if captions else ""


class TextReader:
    """Reads captions from a side folder. `null` is the empty caption, also that of a sample without one.

    Raises UserError for a folder without encoded captions, or whose empty caption is missing or damaged.
    """

    def __init__(self, index: ShardIndex) -> None:
        if index.text is None:
            command = "python -m data_tools encode-text BASE OUT"
            raise UserError(f"{index.named}: holds no text; make a folder with it: {command}")
        self.index, self.spec = index, index.text
        pooled = self.spec.null_pooled
        self.null = EncodedText(self._null(self.spec.null), None if pooled is None else self._null(pooled), True)

    def num_captions(self, sample_id: int) -> int:
        """How many captions a sample has; they are numbered from 0."""
        entries = self.index.entries(sample_id)
        return sum(size != ABSENT and field.endswith(f".{TEXT_FIELD}") for field, _, size, _ in entries)

    def read(self, sample_id: int, uniform: float) -> EncodedText:
        """One of the captions of a sample, each as likely as the others; `uniform` in [0, 1) decides.

        Raises CorruptShardError for damage.
        """
        number = self.num_captions(sample_id)
        if number == 0:
            return self.null
        caption = int(uniform * number)
        names = [text_field(caption), *([pooled_field(caption)] if self.spec.pooled_size else [])]
        payloads = self.index.read(sample_id, names)
        missing = [name for name in names if name not in payloads]
        if missing:
            raise self.index.corrupt(sample_id, f"has no {missing[0]}")
        arrays = [read_fp16(self.index, sample_id, name, payloads[name]) for name in names]
        tokens, spec = arrays[0], self.spec
        if tokens.ndim != 2 or tokens.shape[1] != spec.hidden_size or not 0 < len(tokens) <= spec.max_length:
            problem = f"{names[0]} has shape {tokens.shape}, the index says (1..{spec.max_length}, {spec.hidden_size})"
            raise self.index.corrupt(sample_id, problem)
        if spec.pooled_size and arrays[1].shape != (spec.pooled_size,):
            problem = f"{names[1]} has shape {arrays[1].shape}, the index says ({spec.pooled_size},)"
            raise self.index.corrupt(sample_id, problem)
        return EncodedText(tokens, arrays[1] if spec.pooled_size else None)

    def _null(self, file: File) -> np.ndarray:
        path = self.index.folder / file.name
        try:
            if file_sha256(path) == file.sha256:
                return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except FileNotFoundError:
            pass
        raise UserError(f"{self.index.named}: {file.name} is missing or another; encode the text again")


def pad_text(captions: Sequence[EncodedText], max_length: int) -> TextCondition:
    """Captions as one batch, padded to `max_length`: one shape for every batch, however the samples are split."""
    hidden_size = captions[0].tokens_TD.shape[1]
    tokens_BLD = np.zeros((len(captions), max_length, hidden_size), dtype=np.float16)
    mask_BL = np.zeros((len(captions), max_length), dtype=bool)
    for row, caption in enumerate(captions):
        length = len(caption.tokens_TD)
        tokens_BLD[row, :length], mask_BL[row, :length] = caption.tokens_TD, True
    pooled = [caption.pooled_P for caption in captions if caption.pooled_P is not None]
    return TextCondition(
        torch.from_numpy(tokens_BLD),
        torch.from_numpy(mask_BL),
        torch.from_numpy(np.stack(pooled)) if pooled else None,
        torch.tensor([caption.is_null for caption in captions]),
    )
