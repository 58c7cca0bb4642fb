"""encode-text: what a text encoder makes of every caption, as a side folder of the images.

Shape legend: T tokens of a caption, padding excluded; D hidden size; P size of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.folder import PackedFolder, ShardFolder
from data_tools.parallel import SERIAL, Workers
from data_tools.side import ShardNotes, side_names, worker_device, write_side
from diffmoe_dist.data.encoder_choice import choices_kind, choices_sha256, choose_encoders
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.latents import npy_bytes
from diffmoe_dist.data.text import EncodedText, captions_of, check_captions, pooled_field, text_field
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256, write_atomically

NULL_NAME = "null.npy"
NULL_POOLED_NAME = "null-pooled.npy"
_MAX_CAPTIONS = 32  # of one image; each is a column of the index


@dataclass(frozen=True)
class TextSettings:
    """What decides the bytes of encoded captions, beside the captions and the encoder's weights."""

    encoder: Path  # a folder, or a .json file that names several or a layer
    tokenizer: Path | None = None  # default: beside the encoder's weights
    max_length: int | None = None  # tokens; default: the usual number
    batch_size: int = 32
    device: str = "cpu"  # "cpu" or "cuda"


def encode_text(
    base: ShardIndex,
    out: Path,
    settings: TextSettings,
    *,
    workers: Workers = SERIAL,
    on_shard: Callable[[int], None] = lambda num_samples: None,
) -> PackedFolder:
    """Write `text-000000.tar` ..., one for each shard of `base`, and the index. Run again, it goes on where it was.

    All captions of an image are encoded: `json`'s list, or else `txt`. An image without one has no field, and training
    takes the empty caption, which is encoded once. The vectors are those of the encoder's last layer, after its norm.
    Raises UserError for an encoder that is not known or does not load, and for data without captions.
    """
    if settings.batch_size < 1:
        raise UserError(f"--batch-size={settings.batch_size}: must be at least 1")
    check_captions(base, f"BASE={base.folder}")
    spec: dict[str, Any] = describe_encoder(settings)
    identity = {
        "command": "encode-text",
        "base": base.fingerprint,
        **spec,
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
    folder = ShardFolder(out, side_names("text", base), identity, other_files=(NULL_NAME, NULL_POOLED_NAME))
    folder.claim()
    open_encoder.cache_clear()  # the folder may hold another one since
    (null,) = workers.run(_encode_null, [settings])
    spec |= {
        "hidden_size": null.tokens_TD.shape[1],
        "pooled_size": 0 if null.pooled_P is None else len(null.pooled_P),
        "null": _write_array(out / NULL_NAME, null.tokens_TD),
        "null_pooled": None if null.pooled_P is None else _write_array(out / NULL_POOLED_NAME, null.pooled_P),
    }
    return write_side(folder, base, settings, _samples, {"text": spec}, max_bad=0, workers=workers, on_shard=on_shard)


def describe_encoder(settings: TextSettings) -> dict[str, str | int]:
    """What a folder or a file of encoded captions says of their encoder. Raises UserError for one that cannot be."""
    if settings.max_length is not None and settings.max_length < 2:
        raise UserError(f"--max-length={settings.max_length}: must be at least 2; 77 is usual for CLIP, 120 for T5")
    choices = choose_encoders(settings.encoder, settings.tokenizer, settings.max_length, "--encoder")
    return {
        "encoder": choices_kind(choices),
        "encoder_sha256": choices_sha256(choices),
        "max_length": sum(choice.length for choice in choices),
    }


def _captions(base: ShardIndex, sample_id: int) -> list[str]:
    found = captions_of(base, sample_id)
    if len(found) > _MAX_CAPTIONS:
        problem = f"key {base.key(sample_id)} has {len(found)} captions"
        raise UserError(f"BASE={base.folder}: {problem}; at most {_MAX_CAPTIONS} of an image are encoded")
    return found


def _write_array(path: Path, array: np.ndarray) -> dict[str, str]:
    write_atomically(path, npy_bytes(array))
    return {"name": path.name, "sha256": file_sha256(path)}


def _encode_null(settings: TextSettings) -> EncodedText:
    return open_encoder(settings).encode_alone("")


def _samples(
    base: ShardIndex, shard: int, settings: TextSettings, notes: ShardNotes
) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """No fields where there is no caption."""
    encoder, batch_size = open_encoder(settings), settings.batch_size
    ids = base.samples_of(shard)
    for start in range(0, len(ids), batch_size):
        captions = {sample_id: _captions(base, sample_id) for sample_id in ids[start : start + batch_size]}
        together = [caption for listed in captions.values() for caption in listed]
        notes.num_cut += len(encoder.cuts(together))
        encoded = encoder.encode(together, batch_size)
        for sample_id, listed in captions.items():
            fields: dict[str, bytes] = {}
            for number in range(len(listed)):
                text = next(encoded)
                fields[text_field(number)] = npy_bytes(text.tokens_TD)
                if text.pooled_P is not None:
                    fields[pooled_field(number)] = npy_bytes(text.pooled_P)
            yield base.key(sample_id), fields


@lru_cache(maxsize=1)  # a process opens it once, not for every shard
def open_encoder(settings: TextSettings) -> TextEncoder:
    device = worker_device(settings.device)
    return TextEncoder.open(settings.encoder, settings.tokenizer, settings.max_length, device, "--encoder")
