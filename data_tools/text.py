"""encode-text: what a text encoder makes of every caption, as a side folder of the images.

Shape legend: T tokens of a caption, padding excluded; D hidden size; P size of the pooled vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.folder import PackedFolder, ShardFolder, ShardSlot
from data_tools.latents import model_sha256, reproducible_arithmetic, to_fp16, worker_device, write_side
from data_tools.parallel import SERIAL, Workers
from data_tools.shards import ShardRecord, atomic_file, write_shard
from diffmoe_dist.data.format import CAPTION_FIELD, METADATA_FIELD
from diffmoe_dist.data.index import ShardIndex, file_sha256
from diffmoe_dist.data.latents import npy_bytes
from diffmoe_dist.data.text import EncodedText, pooled_field, text_field
from diffmoe_dist.errors import UserError

NULL_NAME = "null.npy"
NULL_POOLED_NAME = "null-pooled.npy"
_MAX_CAPTIONS = 32  # of one image; each is a column of the index
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
_ENCODERS = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}  # by the model_type of config.json
_USUAL_LENGTH = {"clip": 77, "t5": 120}


@dataclass(frozen=True)
class TextSettings:
    """What decides the bytes of encoded captions, beside the captions and the encoder's weights."""

    encoder: Path
    tokenizer: Path | None = None  # default: beside the encoder's weights
    max_length: int | None = None  # tokens; default: 77 for CLIP, 120 for T5
    batch_size: int = 32
    device: str = "cpu"  # "cpu" or "cuda"


@dataclass(frozen=True)
class _Job:
    slot: ShardSlot
    base: ShardIndex
    shard: int
    settings: TextSettings


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
    if not {CAPTION_FIELD, METADATA_FIELD} & set(base.fields):
        raise UserError(
            f"BASE={base.folder}: holds no captions ({', '.join(base.fields)}); pack a source that has some"
        )
    kind = encoder_kind(settings.encoder)
    length = settings.max_length or _USUAL_LENGTH[kind]
    if settings.max_length is not None and settings.max_length < 2:
        raise UserError(f"--max-length={settings.max_length}: must be at least 2; {_USUAL_LENGTH[kind]} is usual")
    if settings.batch_size < 1:
        raise UserError(f"--batch-size={settings.batch_size}: must be at least 1")
    identity = {
        "command": "encode-text",
        "base": base.fingerprint,
        "encoder": kind,
        "encoder_sha256": _fingerprint(settings),
        "max_length": length,
        "batch_size": settings.batch_size,
        "device": settings.device,
    }
    names = [f"text-{shard:06d}.tar" for shard in range(len(base.shards))]
    folder = ShardFolder(out, names, identity, other_files=(NULL_NAME, NULL_POOLED_NAME))
    folder.claim()
    (null,) = workers.run(_encode_null, [settings])
    spec = {name: identity[name] for name in ("encoder", "encoder_sha256", "max_length")}
    spec |= {
        "hidden_size": null.tokens_TD.shape[1],
        "pooled_size": 0 if null.pooled_P is None else len(null.pooled_P),
        "null": _write_array(out / NULL_NAME, null.tokens_TD),
        "null_pooled": None if null.pooled_P is None else _write_array(out / NULL_POOLED_NAME, null.pooled_P),
    }
    jobs = [_Job(slot, base, shard, settings) for shard, slot in enumerate(folder.slots)]
    return write_side(folder, base, _encode_shard, jobs, {"text": spec}, 0, workers, on_shard)


def encoder_kind(folder: Path) -> str:
    """`clip` or `t5`. Raises UserError for any other folder."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        raise UserError(f"--encoder={folder}: no config.json that can be read; give a model's local folder") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in _ENCODERS:
        raise UserError(f"--encoder={folder}: is {found}; CLIP and T5 text encoders are known")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"--encoder={folder}: no .safetensors weights; fetch the weights in that format")
    return _ENCODERS[found]


class TextEncoder:
    """A CLIP or T5 text encoder with its tokenizer, from local folders, in fp32."""

    def __init__(self, settings: TextSettings) -> None:
        kind = encoder_kind(settings.encoder)
        self.device = worker_device(settings.device)
        self.model = _load_model(settings.encoder, kind).requires_grad_(False).eval().to(self.device)
        self.tokenizer = _load_tokenizer(settings)
        self.max_length, self.batch_size = settings.max_length or _USUAL_LENGTH[kind], settings.batch_size
        limit = getattr(self.model.config, "max_position_embeddings", None)  # T5 has none
        if limit is not None and self.max_length > limit:
            raise UserError(f"--max-length={self.max_length}: the encoder takes {limit} tokens at most")

    def encode(self, captions: Sequence[str]) -> Iterator[EncodedText]:
        """The captions in order, `batch_size` of them at a time."""
        for start in range(0, len(captions), self.batch_size):
            yield from self._encode_batch(captions[start : start + self.batch_size])

    @torch.no_grad()
    def _encode_batch(self, captions: Sequence[str]) -> Iterator[EncodedText]:
        tokens = self.tokenizer(
            list(captions), max_length=self.max_length, truncation=True, padding="max_length", return_tensors="pt"
        )
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        with reproducible_arithmetic():
            output = self.model(input_ids=ids, attention_mask=mask)
        hidden_BTD = to_fp16(output.last_hidden_state.cpu().numpy(), "--encoder")
        pooled = getattr(output, "pooler_output", None)
        pooled_BP = None if pooled is None else to_fp16(pooled.cpu().numpy(), "--encoder")
        valid_BT = mask.cpu().numpy().astype(bool)
        for row in range(len(captions)):
            yield EncodedText(hidden_BTD[row, valid_BT[row]], None if pooled_BP is None else pooled_BP[row])


def _load_model(folder: Path, kind: str) -> Any:
    try:
        from transformers import CLIPTextModel, T5EncoderModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torchvision of another torch
        raise UserError(
            f"--encoder={folder}: transformers does not import ({error}); pip install transformers"
        ) from error
    architecture: Any = CLIPTextModel if kind == "clip" else T5EncoderModel
    try:
        model, report = architecture.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--encoder={folder}: does not load ({error}); fetch it again") from error
    if report["missing_keys"]:  # would be random numbers
        raise UserError(f"--encoder={folder}: lacks weights, as {sorted(report['missing_keys'])[0]}; fetch it again")
    return model


def _load_tokenizer(settings: TextSettings) -> Any:
    from transformers import AutoTokenizer

    folder = settings.tokenizer or settings.encoder
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer={folder}: no tokenizer loads from there ({error}); name its folder") from error


def captions_of(base: ShardIndex, sample_id: int) -> list[str]:
    """All captions of a sample, of which there may be none. Raises CorruptShardError for a `json` that is none."""
    payloads = base.read(sample_id, (CAPTION_FIELD, METADATA_FIELD))
    try:
        described = json.loads(payloads.get(METADATA_FIELD, b"{}"))
        listed = described.get("captions") if isinstance(described, dict) else None
        captions = listed if isinstance(listed, list) else [payloads.get(CAPTION_FIELD, b"").decode()]
    except ValueError as error:
        raise base.corrupt(sample_id, f"its captions cannot be read ({error})") from error
    found = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
    if len(found) > _MAX_CAPTIONS:
        problem = f"key {base.key(sample_id)} has {len(found)} captions"
        raise UserError(f"BASE={base.folder}: {problem}; at most {_MAX_CAPTIONS} of an image are encoded")
    return found


def _fingerprint(settings: TextSettings) -> str:
    own = model_sha256(settings.encoder, *_MODEL_FILES)
    return own if settings.tokenizer is None else own[:32] + model_sha256(settings.tokenizer, *_MODEL_FILES)[:32]


def _write_array(path: Path, array: np.ndarray) -> dict[str, str]:
    with atomic_file(path) as file:
        file.write(npy_bytes(array))
    return {"name": path.name, "sha256": file_sha256(path)}


def _encode_null(settings: TextSettings) -> EncodedText:
    (null,) = _open_encoder(settings).encode([""])
    return null


def _encode_shard(job: _Job) -> ShardRecord:
    """Write the captions of one shard, unless an earlier run did."""
    record = job.slot.finished()
    if record is None:
        record = write_shard(job.slot.begin(), _samples(job))
        job.slot.save(record)
    job.base.close()
    return record


def _samples(job: _Job) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """(key, fields) of every sample of the shard, in order."""
    encoder = _open_encoder(job.settings)
    ids = job.base.samples_of(job.shard)
    for start in range(0, len(ids), encoder.batch_size):
        captions = {
            sample_id: captions_of(job.base, sample_id) for sample_id in ids[start : start + encoder.batch_size]
        }
        encoded = encoder.encode([caption for listed in captions.values() for caption in listed])
        for sample_id, listed in captions.items():
            fields: dict[str, bytes] = {}
            for number in range(len(listed)):
                text = next(encoded)
                fields[text_field(number)] = npy_bytes(text.tokens_TD)
                if text.pooled_P is not None:
                    fields[pooled_field(number)] = npy_bytes(text.pooled_P)
            yield job.base.key(sample_id), fields


@lru_cache(maxsize=1)  # a process opens it once, not for every shard
def _open_encoder(settings: TextSettings) -> TextEncoder:
    return TextEncoder(settings)
