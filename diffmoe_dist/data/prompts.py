"""Prompts: read from a file, encoded when they are asked for, or read as `encode-prompts` has encoded them.

Shape legend: N prompts, T tokens of one prompt, D hidden size, P size of the pooled vector.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffmoe_dist.data.text import EncodedText
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import refuse_irregular

ENCODED_SUFFIX = ".npz"
_FORMAT, _VERSION = "diffmoe-prompts", 1
_KEPT = 1024  # encoded prompts in memory; one of T5-XXL's 120 tokens is a megabyte
_QUOTED = 60  # characters of a prompt in a message
# What zipfile, numpy and json raise: OSError where an offset that was damaged leads out of the file.
_DAMAGE = (
    ValueError, LookupError, TypeError, RuntimeError, EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_UTF8_MARK = b"\xef\xbb\xbf"  # of Windows editors

logger = logging.getLogger("diffmoe_dist.data")


@dataclass(frozen=True)
class Prompt:
    text: str
    metadata: dict[str, Any] | None = None  # the whole object, where the prompt comes from .jsonl


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as a text encoder sees them; a blank one is the null caption."""

    prompts: Sequence[Prompt]
    negative_prompt: str | None
    kind: str  # "clip", "t5", a model_type of transformers, or several joined by "+" and "|"
    encoder_sha256: str
    max_length: int  # tokens; a longer prompt was cut
    null: EncodedText
    negative: EncodedText  # what guidance moves away from: the negative prompt, else the null caption
    caption: Callable[[int], EncodedText]  # by a prompt's number from 0; the same bits whatever the others are

    @property
    def hidden_size(self) -> int:
        return int(self.null.tokens_TD.shape[1])

    @property
    def pooled_size(self) -> int:
        """0 where the encoder has no pooled vector."""
        return 0 if self.null.pooled_P is None else len(self.null.pooled_P)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the prompts, the negative one and the encoder; precomputed or not."""
        return hashlib.sha256(self.describe()).hexdigest()

    def describe(self) -> bytes:
        """All but the encodings, as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "encoder": self.kind,
                "encoder_sha256": self.encoder_sha256,
                "max_length": self.max_length,
                "negative_prompt": self.negative_prompt,
                "prompts": [{"text": prompt.text, "metadata": prompt.metadata} for prompt in self.prompts],
            }
        ).encode()


def read_prompts(path: str | Path, setting: str = "--prompts") -> list[Prompt]:
    """Prompts from .txt, one a line, or .jsonl, an object with the string `prompt` a line; blank lines are skipped.

    `setting` is how the user named the file. Raises UserError, with the line, for a file that is no such thing.
    """
    path = Path(path)
    if path.suffix not in _PARSERS:
        raise UserError(f"{setting}={path}: is neither .txt nor .jsonl; write a prompt a line, and name the file so")
    try:
        lines = refuse_irregular(path).read_bytes().removeprefix(_UTF8_MARK).split(b"\n")
    except OSError as error:
        raise UserError(f"{setting}={path}: cannot be read ({error.strerror}); name a file of prompts") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            if text := line.decode().strip():
                prompts.append(_PARSERS[path.suffix](text))
        except ValueError as error:
            raise UserError(f"{setting}={path}: line {number}: {error}; correct the line") from None
    if not prompts:
        raise UserError(f"{setting}={path}: holds no prompt; write one a line")
    return prompts


def _parse_object(line: str) -> Prompt:
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError("is JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError("is no object with a string `prompt`")
    found["prompt"].encode()  # JSON can write half a character, which no tokenizer takes
    return Prompt(found["prompt"], found)


_PARSERS: dict[str, Callable[[str], Prompt]] = {".txt": Prompt, ".jsonl": _parse_object}


def encode_prompts(prompts: Sequence[Prompt], negative_prompt: str | None, encoder: TextEncoder) -> EncodedPrompts:
    """Prompts that are encoded when they are asked for."""
    negative_prompt = _unless_blank(negative_prompt)

    @lru_cache(maxsize=_KEPT)
    def caption(number: int) -> EncodedText:
        return encode_prompt(prompts[number].text, encoder)

    null = encoder.encode_alone("")
    negative = null if negative_prompt is None else encode_prompt(negative_prompt, encoder)
    return EncodedPrompts(
        prompts, negative_prompt, encoder.kind, encoder.sha256, encoder.max_length, null, negative, caption
    )


def encode_prompt(prompt: str, encoder: TextEncoder) -> EncodedText:
    """Encode a prompt alone, with a warning where it is too long and cut."""
    for length, left in encoder.cuts([prompt]):
        begin = " ".join(prompt.split())[:_QUOTED]
        logger.warning('prompt "%s...": %d tokens, cut to %d', begin, length, left)
    return encoder.encode_alone(prompt)


def save_encoded_prompts(file: BinaryIO, encoded: EncodedPrompts) -> None:
    """Write prompts with their encodings as .npz: the same bytes every time, and nothing that is pickled.

    Arrays: `description` (UTF-8 bytes of JSON), `lengths` (N + 2,) of the prompts, the null caption and what guidance
    moves away from, `tokens` (sum of the lengths, D) and `pooled` (N + 2, P) of the same, both fp16.
    """
    captions = [*map(encoded.caption, range(len(encoded.prompts))), encoded.null, encoded.negative]
    pooled = [caption.pooled_P for caption in captions if caption.pooled_P is not None]
    arrays = {
        "description": np.frombuffer(encoded.describe(), np.uint8),
        "lengths": np.array([len(caption.tokens_TD) for caption in captions], np.int32),
        "tokens": np.concatenate([caption.tokens_TD for caption in captions]),
        "pooled": np.stack(pooled) if pooled else np.empty((len(captions), 0), np.float16),
    }
    np.savez(file, **arrays)  # type: ignore[arg-type]


def open_encoded_prompts(path: str | Path, setting: str = "--prompts") -> EncodedPrompts:
    """Read what `save_encoded_prompts` wrote; `setting` is how the user named it.

    Raises UserError for a file that is damaged or another.
    """
    try:
        arrays = _read_arrays(Path(path))
        description = json.loads(arrays["description"].tobytes())
        if (description["format"], description["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"{description['format']} version {description['version']}")
        return _parse_encoded(description, arrays)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{setting}={path}: cannot be read ({error.strerror}); name a file of prompts") from None
    except _DAMAGE as error:
        raise UserError(
            f"{setting}={path}: is damaged, or not what encode-prompts wrote ({error}); encode the prompts again"
        ) from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a member completely, and with it its checksum, before any of it is believed."""
    with zipfile.ZipFile(refuse_irregular(path)) as file:
        payloads = {
            name: io.BytesIO(file.read(f"{name}.npy")) for name in ("description", "lengths", "tokens", "pooled")
        }
        return {name: np.lib.format.read_array(payload, allow_pickle=False) for name, payload in payloads.items()}


def _parse_encoded(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> EncodedPrompts:
    prompts = [Prompt(entry["text"], entry["metadata"]) for entry in description["prompts"]]
    negative_prompt, max_length = description["negative_prompt"], description["max_length"]
    if not all(isinstance(text, str) for text in (*(prompt.text for prompt in prompts), negative_prompt or "")):
        raise TypeError("a prompt is no string")
    lengths, tokens, pooled = arrays["lengths"], arrays["tokens"], arrays["pooled"]
    expected = {
        "lengths": (lengths, np.int32, (len(prompts) + 2,)),
        "tokens": (tokens, np.float16, (int(lengths.sum()), tokens.shape[-1])),
        "pooled": (pooled, np.float16, (len(prompts) + 2, pooled.shape[-1])),
    }
    for name, (array, dtype, shape) in expected.items():
        if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"{name} holds {array.dtype} {array.shape}, not finite {np.dtype(dtype)} {shape}")
    if lengths.min() < 1 or lengths.max() > max_length:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}, not 1 to {max_length}")
    blank = [*(not prompt.text.strip() for prompt in prompts), True, negative_prompt is None]
    captions = [
        EncodedText(tokens_TD, pooled_P if len(pooled_P) else None, is_null)
        for tokens_TD, pooled_P, is_null in zip(np.split(tokens, lengths.cumsum()[:-1]), pooled, blank, strict=True)
    ]
    return precomputed_prompts(prompts, negative_prompt, description, captions)


def precomputed_prompts(
    prompts: Sequence[Prompt],
    negative_prompt: str | None,
    encoder: Mapping[str, Any],
    captions: Sequence[EncodedText],
) -> EncodedPrompts:
    """Prompts whose encodings are there: of each, of the null caption, and of what guidance moves away from.

    `encoder` has the entries `encoder`, `encoder_sha256` and `max_length`.
    """
    *own, null, negative = captions
    kind, sha256, max_length = encoder["encoder"], encoder["encoder_sha256"], encoder["max_length"]
    negative_prompt = _unless_blank(negative_prompt)
    return EncodedPrompts(prompts, negative_prompt, kind, sha256, max_length, null, negative, own.__getitem__)


def _unless_blank(negative_prompt: str | None) -> str | None:
    """Without a negative prompt, or with a blank one, guidance moves away from the null caption."""
    return negative_prompt if negative_prompt and negative_prompt.strip() else None
