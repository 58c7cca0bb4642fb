"""encode-prompts: what a text encoder makes of a sampler's prompts, as one file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.parallel import SERIAL, Workers
from data_tools.text import TextSettings, describe_encoder, open_encoder
from diffmoe_dist.data.prompts import (
    ENCODED_SUFFIX,
    Prompt,
    encode_prompt,
    precomputed_prompts,
    save_encoded_prompts,
)
from diffmoe_dist.data.text import EncodedText
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import atomic_file

_TOGETHER = 32  # in a job; each is encoded alone


@dataclass(frozen=True)
class _Job:
    start: int
    texts: Sequence[str]
    settings: TextSettings


def write_prompts(
    prompts: Sequence[Prompt],
    negative_prompt: str | None,
    out: Path,
    settings: TextSettings,
    *,
    workers: Workers = SERIAL,
    on_prompts: Callable[[int], None] = lambda num_prompts: None,
) -> None:
    """Encode prompts, the negative one and the empty one, each alone, into the file `out`.

    Bit for bit what a sampler would encode from them on the same kind of device, whoever does the work. Raises
    UserError for an encoder that is not known or does not load, and for a file that cannot be written.
    """
    if out.suffix != ENCODED_SUFFIX or not out.parent.is_dir():
        raise UserError(f"OUT={out}: must be a file {ENCODED_SUFFIX} in a folder that exists")
    encoder = describe_encoder(settings)
    texts = [*(prompt.text for prompt in prompts), "", negative_prompt or ""]
    jobs = [_Job(start, texts[start : start + _TOGETHER], settings) for start in range(0, len(texts), _TOGETHER)]
    captions: dict[int, EncodedText] = {}
    open_encoder.cache_clear()  # the folder may hold another one since
    for start, encoded in workers.run(_encode, jobs):
        captions |= dict(enumerate(encoded, start))
        on_prompts(len(encoded))
    found = precomputed_prompts(prompts, negative_prompt, encoder, [captions[number] for number in range(len(texts))])
    try:
        with atomic_file(out) as file:
            save_encoded_prompts(file, found)
    except OSError as error:
        raise UserError(f"OUT={out}: cannot be written ({error.strerror}); name another file") from error


def _encode(job: _Job) -> tuple[int, list[EncodedText]]:
    encoder = open_encoder(job.settings)
    return job.start, [encode_prompt(text, encoder) for text in job.texts]
