"""Text encoders beside CLIP and T5: causal models, other encoders, a layer, and several at once as in SD3."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.text import TextSettings, encode_text
from diffmoe_dist.data.encoder_choice import choose_encoders
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.data.prompts import Prompt, encode_prompts, open_encoded_prompts, save_encoded_prompts
from diffmoe_dist.data.text import TextReader
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from tests.data.encoders import CAPTIONS, same_bits, save_encoder, save_tokenizer
from tests.data.folders import png, random_images, write_folder

TEXTS = ["a red square", "", "blue circle on a red square", "green " * 40]
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
}  # fmt: skip


def _save(folder: Path, kind: str) -> Path:
    """A tiny one with random weights; that of a causal model with its head, and a tokenizer without start, end, pad."""
    import transformers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    torch.manual_seed(1)
    heads = {"num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 64}
    configs: dict[str, tuple[str, str, dict[str, Any]]] = {
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **heads}),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**SIZES, **heads, "pad_token_id": 0}),
        "bert": ("BertConfig", "BertModel", {**SIZES, "max_position_embeddings": 64}),
        "clip": (
            "CLIPTextConfig", "CLIPTextModelWithProjection",
            {**SIZES, "max_position_embeddings": 16, "projection_dim": 10, "bos_token_id": 1, "eos_token_id": 2,
             "pad_token_id": 0},
        ),
        "umt5": (
            "UMT5Config", "UMT5ForConditionalGeneration",
            {"vocab_size": 60, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2},
        ),
        "bart": ("BartConfig", "BartModel", {"vocab_size": 60, "d_model": 16}),
    }  # fmt: skip
    config, model, sizes = configs[kind]
    module: Any = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    module.save_pretrained(folder)
    save_tokenizer(folder, "clip" if kind == "clip" else "t5")
    if kind == "qwen3":
        whole = json.loads((folder / "tokenizer.json").read_text())
        whole["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(whole))
        PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", padding_side="left"
        ).save_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).pad_token is None
    return folder


def _file(path: Path, *entries: Any) -> Path:
    path.write_text(json.dumps(entries))
    return path


def _open(path: Path, length: int | None = None) -> TextEncoder:
    return TextEncoder.open(path, None, length, "cpu", "--encoder")


def _hidden(folder: Path, text: str, length: int, layer: int | None, class_name: str) -> tuple[np.ndarray, Any]:
    """(T, D) hidden states of a caption without padding, and all outputs, by transformers alone."""
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, truncation=True, max_length=length)["input_ids"] or [tokenizer.eos_token_id]
    module: Any = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = module(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = output.last_hidden_state if layer is None else output.hidden_states[layer]
    return states[0].numpy(), output


@pytest.mark.parametrize(
    ("kind", "class_name", "layer"),
    [
        ("qwen3", "AutoModel", None), ("qwen3", "AutoModel", -2), ("qwen3", "AutoModelForCausalLM", 3),
        ("gemma2", "AutoModel", None), ("bert", "AutoModel", 0), ("umt5", "UMT5EncoderModel", None),
        ("clip", "CLIPTextModelWithProjection", -2),
    ],
)  # fmt: skip
def test_captions_are_the_hidden_states_that_transformers_gives_without_padding(
    tmp_path: Path, kind: str, class_name: str, layer: int | None
) -> None:
    folder = _save(tmp_path / kind, kind)
    given = {"folder": kind} | ({} if layer is None else {"layer": layer})
    encoder = _open(_file(tmp_path / "encoder.json", given), 12)
    assert (encoder.kind, encoder.hidden_size, encoder.max_length) == (kind, 24, 12)
    for text in TEXTS:
        expected, output = _hidden(folder, text, 12, layer, class_name)
        found = encoder.encode_alone(text)
        np.testing.assert_allclose(found.tokens_TD, expected, rtol=2**-10, atol=2e-3)
        assert (found.pooled_P is None) == (kind != "clip") and found.is_null == (not text)
        if found.pooled_P is not None:
            assert encoder.pooled_size == len(found.pooled_P) == 10
            np.testing.assert_allclose(found.pooled_P, output.text_embeds[0], atol=2e-3)
    (first, second) = (list(encoder.encode(TEXTS, size)) for size in (1, 1))
    assert all(map(same_bits, first, second))


def test_the_fingerprint_tells_layers_and_projections_apart_and_a_plain_folder_keeps_its_own(tmp_path: Path) -> None:
    _save(tmp_path / "qwen3", "qwen3")
    plain, clip = _save(tmp_path / "clip", "clip"), save_encoder(tmp_path / "unprojected", "clip")

    def sha256(path: Path) -> str:
        (choice,) = choose_encoders(path, None, None, "--encoder")
        return choice.sha256

    files = [_file(tmp_path / f"{layer}.json", {"folder": "qwen3", "layer": layer}) for layer in (-1, -2)]
    assert len({sha256(tmp_path / "qwen3"), *map(sha256, files)}) == 3
    assert sha256(_file(tmp_path / "same.json", {"folder": "qwen3"})) == sha256(tmp_path / "qwen3")
    config = json.loads((plain / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModelWithProjection"]
    assert sha256(plain) != sha256(clip) == _open(clip, 12).sha256


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As in SD3: a layer of CLIP before the last, and T5 of another width, their tokenizers elsewhere."""
    root = tmp_path_factory.mktemp("sd3")
    _save(root / "text_encoder", "clip")
    save_encoder(root / "text_encoder_3", "t5")
    for number, kind in (("", "clip"), ("_3", "t5")):
        save_tokenizer(root / f"tokenizer{number}", kind)
    return _file(
        root / "encoders.json",
        {"folder": "text_encoder", "tokenizer": "tokenizer", "max_length": 8, "layer": -2},
        {"folder": "text_encoder_3", "tokenizer": "tokenizer_3", "max_length": 12},
    )


def test_two_encoders_follow_each_other_and_the_narrower_is_filled_up_with_zeros(joined: Path) -> None:
    encoder = _open(joined)
    assert (encoder.kind, encoder.max_length, encoder.hidden_size, encoder.pooled_size) == ("clip+t5", 20, 24, 10)
    for text in TEXTS:
        first, output = _hidden(joined.parent / "text_encoder", text, 8, -2, "CLIPTextModelWithProjection")
        second, _ = _hidden(joined.parent / "text_encoder_3", text, 12, None, "T5EncoderModel")
        found = encoder.encode_alone(text)
        expected = np.concatenate([first, np.pad(second, ((0, 0), (0, 8)))])
        np.testing.assert_allclose(found.tokens_TD, expected, atol=2e-3)
        assert found.pooled_P is not None and found.is_null == (not text)
        np.testing.assert_allclose(found.pooled_P, output.text_embeds[0], atol=2e-3)


def test_the_vectors_of_two_encoders_stand_side_by_side_before_those_of_a_third(joined: Path) -> None:
    """SD3's three: CLIP-L and CLIP-G in width, T5 after them; pooled vectors of both CLIPs."""
    second = save_encoder(joined.parent / "text_encoder_2", "clip")
    clip, t5 = json.loads(joined.read_text())
    other = {"folder": "text_encoder_2", "max_length": 8, "layer": 1}
    file = _file(joined.parent / "three.json", [clip, other], t5)
    encoder = _open(file)
    assert (encoder.kind, encoder.max_length) == ("clip|clip+t5", 20)
    assert (encoder.hidden_size, encoder.pooled_size) == (24 + 16, 10 + 16)
    for text in TEXTS:
        left, pooled = _hidden(joined.parent / "text_encoder", text, 8, -2, "CLIPTextModelWithProjection")
        right, pooled_2 = _hidden(second, text, 8, 1, "CLIPTextModel")
        after, _ = _hidden(joined.parent / "text_encoder_3", text, 12, None, "T5EncoderModel")
        found = encoder.encode_alone(text)
        expected = np.concatenate([np.concatenate([left, right], axis=1), np.pad(after, ((0, 0), (0, 24)))])
        np.testing.assert_allclose(found.tokens_TD, expected, atol=2e-3)
        assert found.pooled_P is not None
        np.testing.assert_allclose(
            found.pooled_P, np.concatenate([pooled.text_embeds[0], pooled_2.pooler_output[0]]), atol=2e-3
        )
    assert [encoder.num_tokens(TEXTS[:1]), encoder.cuts(["green " * 40])] == [[5 + 4], [(43, 8)]]
    flat = _open(_file(joined.parent / "after.json", clip, other, t5))
    assert flat.sha256 != encoder.sha256 and flat.max_length == 28


def test_encoders_that_do_not_split_a_caption_alike_do_not_stand_side_by_side(joined: Path) -> None:
    clip, t5 = json.loads(joined.read_text())
    beside = _open(_file(joined.parent / "beside.json", [clip, {**t5, "max_length": 8}]))
    with pytest.raises(UserError, match=r"make 5 and 4 tokens of 'a red square'; only encoders with the same tokens"):
        beside.encode_alone("a red square")
    with pytest.raises(UserError, match=r"stands beside text_encoder with 12 tokens, not 8; give both the same max_l"):
        _open(_file(joined.parent / "lengths.json", [clip, t5]))


def test_side_folder_prompts_and_sampling_of_two_encoders_are_one_encoders(
    joined: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [
        {"png": png(image), "json": json.dumps({"captions": captions}).encode()}
        for image, captions in zip(random_images(len(CAPTIONS), 8), CAPTIONS, strict=True)
    ]
    base = write_folder(tmp_path / "base", samples, [2, 0, 3], class_names=[])
    packed = encode_text(base, tmp_path / "text", TextSettings(joined, batch_size=1))
    assert packed.num_cut == 1  # "green", by both of them, counts once
    reader, encoder = TextReader(ShardIndex.open(tmp_path / "text")), _open(joined, 20)
    assert reader.spec.encoder == "clip+t5" and reader.spec.encoder_sha256 == encoder.sha256
    assert (reader.spec.max_length, reader.spec.hidden_size, reader.spec.pooled_size) == (20, 24, 10)
    assert same_bits(reader.null, encoder.encode_alone(""))
    assert same_bits(reader.read(3, 0.5), encoder.encode_alone("a circle"))
    with caplog.at_level(logging.WARNING, "diffmoe_dist.data"):
        prompts = encode_prompts([Prompt("green " * 40)], None, encoder)
        prompts.caption(0)
    assert [record.getMessage().rpartition(" ")[2] for record in caplog.records] == ["8"]
    with (tmp_path / "prompts.npz").open("wb") as file:
        save_encoded_prompts(file, prompts)
    stored = open_encoded_prompts(tmp_path / "prompts.npz")
    assert stored.fingerprint == prompts.fingerprint and same_bits(stored.caption(0), prompts.caption(0))


def test_the_lengths_of_two_encoders_are_part_of_their_fingerprint(joined: Path) -> None:
    entries = json.loads(joined.read_text())
    entries[0]["max_length"], entries[1]["max_length"] = 9, 11  # the same number of tokens together
    other = _open(_file(joined.parent / "other.json", *entries), 20)
    assert other.max_length == 20 and other.sha256 != _open(joined).sha256
    assert _open(_file(joined.parent / "turned.json", *entries[::-1])).sha256 != other.sha256


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "cannot be read as JSON"),
        ("{}", "holds no list of encoders"),
        ("[]", "holds no list of encoders"),
        ("[[]]", "holds a list without encoders"),
        ('[[{"layer": 1}]]', "is no encoder; write"),
        ('["clip"]', '"clip" is no encoder; write'),
        ('[{"layer": 1}]', "is no encoder; write"),
        ('[{"folder": "clip", "depth": 1}]', "depth is not known of an encoder; there are folder, tokenizer, layer"),
        ('[{"folder": "clip", "layer": "1"}]', 'layer="1" must be a number'),
        ('[{"folder": "clip", "layer": true}]', "layer=true must be a number"),
        ('[{"folder": "clip", "max_length": 1}]', "max_length=1 must be at least 2"),
        ('[{"folder": "clip", "max_length": 17}]', "clip: takes captions of 2 to 16 tokens, not of 17"),
        ('[{"folder": "clip", "max_length": 9}]', "its captions have 9 tokens together, not 12; set that"),
        ('[{"folder": "clip", "layer": 4}]', r"clip: has layers 0 \(embeddings\) to 3, or -4 to -1, not 4"),
        ('[{"folder": "clip", "layer": -5}]', r"clip: has layers 0 \(embeddings\) to 3, or -4 to -1, not -5"),
        ('[{"folder": "nowhere"}]', "nowhere: no config.json that can be read"),
        ('[{"folder": "bart"}]', "bart: is bart, which does not encode text alone"),
    ],
)
def test_a_file_of_encoders_that_cannot_be_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    for kind in ("clip", "bart"):
        if kind in content:
            _save(tmp_path / kind, kind)
    (tmp_path / "encoders.json").write_text(content)
    length = None if '"max_length": 17' in content else 12
    with pytest.raises(UserError, match=f"--encoder=.*{said}") as caught:
        _open(tmp_path / "encoders.json", length)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_beside_a_file_that_names_its_own_is_refused(joined: Path) -> None:
    with pytest.raises(UserError, match="--encoder=.*: names tokenizers itself, but one is given .*; leave that out"):
        TextEncoder.open(joined, joined.parent / "tokenizer", None, "cpu", "--encoder")
    with pytest.raises(UserError, match="--encoder=.*: its captions have 20 tokens together, not 16; set that"):
        _open(joined, 16)
