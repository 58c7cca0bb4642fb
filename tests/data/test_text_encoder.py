from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from data_tools.text import TextSettings, encode_text
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.text import EncodedText, TextReader
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from tests.data.encoders import CAPTIONS, MAX_LENGTH, same_bits, save_encoder
from tests.data.folders import png, random_images, write_folder

ALL_CAPTIONS = [caption for captions in CAPTIONS for caption in captions]


def test_captions_are_bit_for_bit_what_the_model_gives_for_their_batch(
    encoder: TextEncoder, encoder_folder: Path
) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    model = (CLIPTextModel if encoder.kind == "clip" else T5EncoderModel).from_pretrained(
        encoder_folder, dtype=torch.float32
    )
    encoded = list(encoder.encode(ALL_CAPTIONS, 3))
    assert len(encoded) == len(ALL_CAPTIONS) == 7
    for start in range(0, 7, 3):
        together = ALL_CAPTIONS[start : start + 3]
        tokens = tokenizer(
            together, max_length=MAX_LENGTH, truncation=True, padding="max_length", return_tensors="pt"
        )  # fmt: skip
        with torch.no_grad():
            output = model.eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        for row, mask in enumerate(tokens["attention_mask"].bool()):
            pooled = output.pooler_output[row].half().numpy() if encoder.kind == "clip" else None
            expected = EncodedText(output.last_hidden_state[row][mask].half().numpy(), pooled)
            assert same_bits(encoded[start + row], expected)


def test_a_caption_alone_is_the_same_whatever_was_encoded_before(encoder: TextEncoder) -> None:
    forward = [encoder.encode_alone(caption) for caption in ALL_CAPTIONS]
    list(encoder.encode(ALL_CAPTIONS))
    backward = [encoder.encode_alone(caption) for caption in reversed(ALL_CAPTIONS)]
    assert all(map(same_bits, forward, reversed(backward)))
    assert not same_bits(forward[0], forward[1])


def test_training_with_tf32_does_not_reach_the_encoder(encoder: TextEncoder) -> None:
    found = []
    hook = encoder.module.register_forward_pre_hook(lambda *_: found.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        encoder.encode_alone("a circle")
        assert found == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        hook.remove()
        torch.set_float32_matmul_precision("highest")


def test_a_blank_caption_is_the_null_caption_of_a_side_folder(
    encoder: TextEncoder, encoder_folder: Path, tmp_path: Path
) -> None:
    (image,) = random_images(1, 8)
    base = write_folder(tmp_path / "base", [{"png": png(image), "txt": b"a circle"}], [1], class_names=[])
    encode_text(base, tmp_path / "text", TextSettings(encoder_folder, max_length=MAX_LENGTH))
    null = TextReader(ShardIndex.open(tmp_path / "text")).null
    for blank in ("", "  ", "\n\t"):
        assert same_bits(encoder.encode_alone(blank), null)
    assert [text.is_null for text in encoder.encode(["", "a", " "])] == [True, False, True]


def test_a_caption_that_is_too_long_is_that_of_its_first_tokens(encoder: TextEncoder) -> None:
    words = ["green"] * 40
    (fitting,) = [
        " ".join(words[:count])
        for count in range(1, 40)
        if encoder.num_tokens([" ".join(words[:count])]) == [MAX_LENGTH]
    ]
    assert encoder.num_tokens([" ".join(words)])[0] > 40
    assert same_bits(encoder.encode_alone(" ".join(words)), encoder.encode_alone(fitting))


def test_tokens_are_counted_with_start_and_end_before_the_cut(encoder: TextEncoder) -> None:
    start_and_end = 2 if encoder.kind == "clip" else 1
    assert encoder.num_tokens(["", "a"])[0] == start_and_end
    assert encoder.num_tokens([]) == []
    assert len(encoder.encode_alone("").tokens_TD) == start_and_end


def test_an_encoder_tells_its_sizes(encoder: TextEncoder) -> None:
    encoded = encoder.encode_alone("a circle")
    assert encoded.tokens_TD.shape[1] == encoder.hidden_size == 16
    assert (encoded.pooled_P is None) == (encoder.kind == "t5")
    assert encoder.pooled_size == (0 if encoded.pooled_P is None else len(encoded.pooled_P))


def test_the_fingerprint_is_of_the_files_of_encoder_and_tokenizer(encoder_folder: Path, tmp_path: Path) -> None:
    def sha256(path: Path) -> str:
        digest = hashlib.sha256()
        for file in sorted(path.iterdir()):
            digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
        return digest.hexdigest()

    other = save_encoder(tmp_path / "other", "clip")
    (other / "config.json").unlink()
    own, others = sha256(encoder_folder), sha256(other)
    assert TextEncoder.open(encoder_folder, None, MAX_LENGTH, "cpu", "--encoder").sha256 == own
    assert TextEncoder.open(encoder_folder, other, MAX_LENGTH, "cpu", "--encoder").sha256 == own[:32] + others[:32]


def test_an_encoder_that_cannot_be_is_refused_by_the_name_of_the_setting(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for given, tokenizer, length, problem in (
        (tmp_path / "nowhere", None, None, "nowhere: no config.json that can be read"),
        (tmp_path, None, None, ".*: is bert; give the local folder of a CLIP or T5 text encoder"),
        (encoder_folder, tmp_path / "nowhere", None, ".*: no tokenizer loads from .*nowhere"),
        (encoder_folder, None, 1, ".*: takes captions of 2 to .* tokens, not of 1"),
    ):
        with pytest.raises(UserError, match=f"data.text_encoder=.*{problem}"):
            TextEncoder.open(given, tokenizer, length, "cpu", "data.text_encoder")


def test_clip_has_a_longest_caption(tmp_path: Path) -> None:
    encoder_folder = save_encoder(tmp_path / "clip", "clip")
    with pytest.raises(UserError, match=r"--encoder=.*clip: takes captions of 2 to 16 tokens, not of 17"):
        TextEncoder.open(encoder_folder, None, 17, "cpu", "--encoder")
    assert TextEncoder.open(encoder_folder, None, 16, "cpu", "--encoder").max_length == 16
