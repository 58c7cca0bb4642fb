from __future__ import annotations

import hashlib
import io
import json
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
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for given, tokenizer, length, problem in (
        (tmp_path / "nowhere", None, None, "nowhere: no config.json that can be read"),
        (tmp_path, None, None, ".*: is vit, which does not encode text alone; give the local folder of CLIP"),
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


def _refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        TextEncoder.open(folder, None, MAX_LENGTH, "cpu", "--encoder")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "tokenizer"), [("clip", "CLIPTokenizer"), ("t5", "T5Tokenizer")])
@pytest.mark.parametrize("described", [True, False])
def test_a_tokenizer_that_transformers_makes_of_missing_files_is_refused(
    tmp_path: Path, kind: str, tokenizer: str, described: bool
) -> None:
    folder = save_encoder(tmp_path / kind, kind)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer}))
    if not described:
        (folder / "tokenizer_config.json").unlink()
    assert "knows no words" in _refusal(folder) or "no tokenizer loads" in _refusal(folder)


def _save_clips_files(folder: Path, merges: str) -> None:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text(merges)


def test_a_file_of_merges_that_is_cut_is_refused(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "clip", "clip")
    whole = "#version: 0.2\nc a\nca t</w>\n"
    _save_clips_files(folder, whole)
    assert TextEncoder.open(folder, None, MAX_LENGTH, "cpu", "--encoder").num_tokens(["cat"]) == [3]
    _save_clips_files(folder, whole[:-9])
    assert "lacks 1 merges; fetch merges.txt again" in _refusal(folder)
    _save_clips_files(folder, whole[:-3])
    assert "no tokenizer loads from" in _refusal(folder)
    (folder / "merges.txt").unlink()
    assert "no tokenizer loads from" in _refusal(folder)


def test_a_t5_that_has_only_a_sentencepiece_model_reads_captions_as_sentencepiece_does(tmp_path: Path) -> None:
    import sentencepiece

    folder = save_encoder(tmp_path / "t5", "t5")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}')
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([caption for caption in ALL_CAPTIONS if len(caption) < 99] * 9), model_writer=content,
        vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=5,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(content.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    encoder = TextEncoder.open(folder, None, MAX_LENGTH, "cpu", "--encoder")
    for caption in ("a red square", "blue circle"):
        assert encoder.tokenizer(caption)["input_ids"] == [*theirs.encode(caption), 1]
    assert not same_bits(encoder.encode_alone("a red square"), encoder.encode_alone("blue circle"))
    for damaged in (content.getvalue()[:-100], b""):
        (folder / "spiece.model").write_bytes(damaged)
        assert "tokenizer" in _refusal(folder)


def test_a_tokenizer_of_a_larger_vocabulary_than_the_encoders_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "other", "clip")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["x"] = 60
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has token 60, the encoder 60 embeddings; give the encoder's own tokenizer"):
        TextEncoder.open(encoder_folder, other, MAX_LENGTH, "cpu", "--encoder")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path: Path, kind: str, name: str) -> None:
    folder = save_encoder(tmp_path / kind, kind)
    (folder / name).write_bytes(POINTER)
    assert f"{name} is a pointer of Git LFS, not the file itself; run git lfs pull" in _refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_weights_that_are_cut_anywhere_are_refused(encoder_folder: Path, tmp_path: Path, kept: int) -> None:
    folder = save_encoder(tmp_path / "cut", "t5")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "model.safetensors is cut or damaged" in _refusal(folder)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"num_hidden_layers": 10**7, "num_layers": 10**7}, "layers 10000000, the weights say"),
        ({"num_hidden_layers": 1, "num_layers": 1}, "config.json says a model without encoder"),
        ({"num_hidden_layers": -1, "num_layers": -1}, "config.json says a model without encoder"),
        ({"vocab_size": 10**12}, "vocab_size 1000000000000, the weights say 60 at most"),
        ({"hidden_size": "wide", "d_model": "wide"}, "does not load"),
        ({"num_attention_heads": 0, "num_heads": 0}, "does not load"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_sizes_that_are_not_those_of_the_weights_are_refused_before_a_model_is_made(
    tmp_path: Path, kind: str, edit: dict[str, object], problem: str
) -> None:
    folder = save_encoder(tmp_path / kind, kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **edit}))
    assert problem in _refusal(folder)


def test_a_weight_of_an_encoder_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_encoder(tmp_path / "clip", "clip")
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "holds numbers that are not finite; fetch it again" in _refusal(folder)
