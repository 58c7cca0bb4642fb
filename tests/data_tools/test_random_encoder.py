"""The random text encoder: it tells all words of a folder's captions apart, and encode-text takes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.pack import pack
from data_tools.random_encoder import write_random_encoder
from data_tools.shapes import ShapesSource, captions, drawings
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.text import TextReader
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from tests.commands import Command, start
from tests.data.folders import png, random_images, write_folder

CAPTIONS = [captions(drawing) for drawing in drawings()[::7]] + [["A cat's hat, RED."]]
WORDS = {
    "a", "at", "the", "in", "red", "green", "blue", "yellow", "magenta", "cyan", "square", "triangle", "cross", "top",
    "bottom", "left", "right", "centre", ":", ",", "cat", "'", "s", "hat", ".",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    samples = [
        {"png": png(image), "txt": listed[0].encode(), "json": json.dumps({"captions": listed}).encode()}
        for image, listed in zip(random_images(len(CAPTIONS), 8), CAPTIONS, strict=True)
    ]
    return write_folder(tmp_path_factory.mktemp("base") / "shards", samples, [len(samples)], class_names=[])


@pytest.fixture(scope="module")
def encoder(base: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "below" / "random"
    assert write_random_encoder(base, out) == len(WORDS)
    return out


def _run(folder: Path, *arguments: object) -> Command:
    return start("data_tools.__main__", *arguments, folder=folder)[0]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_captions_give_the_same_bytes_whatever_numbers_were_taken_before(
    base: ShardIndex, encoder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    write_random_encoder(base, tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert _contents(tmp_path / "again") == _contents(encoder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(_contents(encoder))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_every_word_of_the_captions_has_a_token_of_its_own_and_none_is_unknown(encoder: Path) -> None:
    tokenizer = TextEncoder.open(encoder, None, None, "cpu", "--encoder").tokenizer
    numbers = {word: tokenizer(word)["input_ids"] for word in WORDS}
    assert {len(number) for number in numbers.values()} == {3}  # start, word, end
    assert len({tuple(number) for number in numbers.values()}) == len(WORDS)
    for listed in CAPTIONS:
        for caption in listed:
            assert tokenizer.unk_token_id not in tokenizer(caption)["input_ids"]
    assert tokenizer("Red CROSS")["input_ids"] == tokenizer("red cross")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("a red dog")["input_ids"]


def test_captions_are_told_apart_by_their_tokens_and_by_the_pooled_vector_of_the_end(encoder: Path) -> None:
    texts = ["", *(listed[0] for listed in CAPTIONS)]
    encoded = list(TextEncoder.open(encoder, None, None, "cpu", "--encoder").encode(texts))
    assert encoded[0].tokens_TD.shape == (2, 64)
    pooled = np.stack([text.pooled_P for text in encoded if text.pooled_P is not None]).astype(np.float32)
    for text in encoded:
        assert text.pooled_P is not None and np.array_equal(text.pooled_P, text.tokens_TD[-1])
    distances = np.linalg.norm(pooled[:, None] - pooled[None], axis=2)[~np.eye(len(pooled), dtype=bool)]
    assert distances.min() > 0.1  # of vectors of length 8; fp16 rounds by less than 0.01


@pytest.mark.slow
def test_encode_text_takes_it(tmp_path: Path) -> None:
    shards, model, text = tmp_path / "shapes", tmp_path / "encoder", tmp_path / "text"
    pack(ShapesSource().part(np.arange(90)), shards)  # each combination once
    done = _run(tmp_path, "random-encoder", shards, model)
    said = f"a random CLIP text encoder that knows 20 words: --encoder {model}\n"
    assert (done.wait(), done.stdout, done.stderr) == (0, said, "")
    done = _run(tmp_path, "encode-text", shards, text, "--encoder", model, "--max-length", 10)
    assert done.wait() == 0, done.stderr
    sizes = "model.text_hidden_size=64 model.text_max_length=10 model.text_pooled_size=64"
    assert done.stdout.endswith(f"a model of them: model.condition=text model.num_classes=0 {sizes}\n")
    reader = TextReader(ShardIndex.open(text))
    base = ShardIndex.open(shards)
    encoder = TextEncoder.open(model, None, 10, "cpu", "--encoder")
    (expected,) = encoder.encode([base.read(7)["txt"].decode()])
    assert reader.num_captions(7) == 3
    np.testing.assert_allclose(reader.read(7, 0.0).tokens_TD, expected.tokens_TD, rtol=2**-10, atol=1e-5)
    assert len(expected.tokens_TD) < 10, "no caption was cut"


def test_what_a_user_can_get_wrong_is_one_line(base: ShardIndex, encoder: Path, tmp_path: Path) -> None:
    before = _contents(encoder)
    with pytest.raises(UserError, match=r"OUT=.*random: is there already, .*; name a new folder"):
        write_random_encoder(base, encoder)
    assert _contents(encoder) == before
    silent = write_folder(tmp_path / "silent", [{"png": png(image)} for image in random_images(2, 8)], [2])
    with pytest.raises(UserError, match=r"BASE=.*silent: holds no captions"):
        write_random_encoder(silent, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = _run(tmp_path, "random-encoder", base.folder, tmp_path / "out", "--workers", 2)
    assert done.wait() == 2 and done.stderr.startswith("error: --workers=2") and done.stderr.count("\n") == 1
