"""Tiny text encoders with random weights, and the captions that their tokenizers were made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffmoe_dist.data.text import EncodedText

MAX_LENGTH = 12
CAPTIONS = [["a red square", "a square"], ["blue circle on a red square"], [], ["a circle"] * 3, ["green " * 40]]


def save_tokenizer(folder: Path, kind: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"clip": ["<pad>", "<|startoftext|>", "<|endoftext|>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}[kind]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    texts = [caption for captions in CAPTIONS for caption in captions]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    end = "<|endoftext|>" if kind == "clip" else "</s>"
    template = "<|startoftext|> $A <|endoftext|>" if kind == "clip" else "$A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in special]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=end, unk_token="<unk>", padding_side="right"
    ).save_pretrained(folder)


def save_encoder(folder: Path, kind: str) -> Path:
    """A tiny one with random weights, and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    if kind == "clip":
        config = CLIPTextConfig(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        CLIPTextModel(config).save_pretrained(folder)
    else:
        T5EncoderModel(
            T5Config(
                vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
            )
        ).save_pretrained(folder)
    save_tokenizer(folder, kind)
    return folder


def same_bits(first: EncodedText, second: EncodedText) -> bool:
    assert first.tokens_TD.dtype == second.tokens_TD.dtype == np.float16
    pooled = [b"" if text.pooled_P is None else text.pooled_P.tobytes() for text in (first, second)]
    tokens = [(text.tokens_TD.shape, text.tokens_TD.tobytes()) for text in (first, second)]
    return tokens[0] == tokens[1] and pooled[0] == pooled[1] and first.is_null == second.is_null
