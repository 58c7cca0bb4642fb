"""random-encoder: a small CLIP text encoder with random weights, for trying things out without a pretrained one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.text import captions_of
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import PARTIAL

_PAD, _UNKNOWN, _START, _END = _SPECIAL = ("<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>")
_MAX_LENGTH = 77  # tokens, as of every CLIP
_SEED = 0


def write_random_encoder(base: ShardIndex, out: Path) -> int:
    """Write a folder that `encode-text` takes; a token is a word, of which it knows those in the captions of `base`.

    Returns the number of words. The same captions give the same bytes with the same versions of the libraries.
    Raises UserError for data without captions, and for a folder that is there already.
    """
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    if out.exists():
        raise UserError(f"OUT={out}: is there already, and captions may be encoded with it; name a new folder")
    words = _words(base)
    if not words:
        raise UserError(f"BASE={base.folder}: holds no captions; pack a source that has some")
    config = CLIPTextConfig(
        vocab_size=len(_SPECIAL) + len(words), hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=_MAX_LENGTH, pad_token_id=_SPECIAL.index(_PAD),
        bos_token_id=_SPECIAL.index(_START), eos_token_id=_SPECIAL.index(_END),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = CLIPTextModel(config)
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    config.save_pretrained(partial)
    save_file(model.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    _save_tokenizer(words, partial)
    partial.rename(out)
    return len(words)


def _words(base: ShardIndex) -> list[str]:
    """The words and punctuation marks of all captions, sorted."""
    tokenizer = _split_into_words([])
    words: set[str] = set()
    for sample_id in range(base.num_samples):
        for caption in captions_of(base, sample_id):
            normal = tokenizer.normalizer.normalize_str(caption)
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    return sorted(words)


def _split_into_words(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    numbers = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # and splits punctuation off
    return tokenizer


def _save_tokenizer(words: list[str], folder: Path) -> None:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = _split_into_words(words)
    ends = [(token, _SPECIAL.index(token)) for token in (_START, _END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, unk_token=_UNKNOWN, bos_token=_START, eos_token=_END,
        model_max_length=_MAX_LENGTH,
    ).save_pretrained(folder)  # fmt: skip
