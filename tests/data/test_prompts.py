from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.parallel import Workers
from data_tools.prompts import write_prompts
from data_tools.text import TextSettings
from diffmoe_dist.data.prompts import (
    EncodedPrompts,
    Prompt,
    encode_prompts,
    open_encoded_prompts,
    read_prompts,
    save_encoded_prompts,
)
from diffmoe_dist.data.text_encoder import TextEncoder
from diffmoe_dist.errors import UserError
from tests.commands import start
from tests.data.encoders import MAX_LENGTH, same_bits, save_encoder

PROMPTS = [Prompt("a red square"), Prompt("", {"prompt": "", "tag": "none"}), Prompt("blue circle"), Prompt("gr" * 30)]


@pytest.fixture(scope="module")
def written(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "prompts.npz"
    write_prompts(PROMPTS, "a green circle", out, TextSettings(encoder_folder, max_length=MAX_LENGTH))
    return out


def saved(prompts: EncodedPrompts) -> bytes:
    file = io.BytesIO()
    save_encoded_prompts(file, prompts)
    return file.getvalue()


def test_prompts_of_a_text_file_are_its_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa café\r\n\n  \n a cat, \u2028 two dogs \nlast".encode())
    assert read_prompts(tmp_path / "p.txt") == [Prompt("a café"), Prompt("a cat, \u2028 two dogs"), Prompt("last")]


def test_prompts_of_a_jsonl_file_keep_the_whole_object(tmp_path: Path) -> None:
    objects: list[dict[str, Any]] = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
        {"prompt": " "},
    ]
    (tmp_path / "p.jsonl").write_text("\n\n".join(map(json.dumps, objects)) + "\n")
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("two dogs", objects[0]), Prompt(" ", objects[1])]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.csv", b"a cat", "p.csv: is neither .txt nor .jsonl"),
        ("p.txt", b"\n \n", "p.txt: holds no prompt"),
        ("p.txt", b"a cat\n\xff\n", "p.txt: line 2: 'utf-8' codec"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "p.jsonl: line 2: is no JSON .*; correct the line"),
        ("p.jsonl", b'\n["prompt"]', "p.jsonl: line 2: is no object with a string `prompt`"),
        ("p.jsonl", b'{"prompt": 3}', "p.jsonl: line 1: is no object with a string `prompt`"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "p.jsonl: line 1: 'utf-8' codec"),
        ("p.txt", None, "p.txt: cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--prompts=.*{problem}") as raised:
        read_prompts(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_prompt_has_the_same_bits_in_any_company_and_order(encoder: TextEncoder) -> None:
    forward = encode_prompts(PROMPTS, None, encoder)
    backward = encode_prompts(PROMPTS[::-1], "a circle", encoder)
    single = encode_prompts(PROMPTS[2:3], None, encoder)
    for number in range(4):
        assert same_bits(forward.caption(number), backward.caption(3 - number))
    assert same_bits(forward.caption(2), single.caption(0))
    assert not same_bits(forward.caption(2), forward.caption(0))


def test_a_prompt_is_encoded_when_it_is_asked_for_and_once(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = encode_prompts(PROMPTS, None, encoder)
    asked: list[str] = []
    encode_alone = encoder.encode_alone

    def recorded(caption: str) -> Any:
        asked.append(caption)
        return encode_alone(caption)

    monkeypatch.setattr(encoder, "encode_alone", recorded)
    assert prompts.caption(2) is prompts.caption(2)
    assert asked == ["blue circle"]


def test_guidance_moves_away_from_the_negative_prompt_or_else_the_null_caption(encoder: TextEncoder) -> None:
    null = encoder.encode_alone("")
    for none in (None, "", "  "):
        prompts = encode_prompts(PROMPTS, none, encoder)
        assert prompts.negative_prompt is None and prompts.negative.is_null
        assert same_bits(prompts.negative, null) and same_bits(prompts.caption(1), null)
    prompts = encode_prompts(PROMPTS, "a circle", encoder)
    assert same_bits(prompts.negative, encoder.encode_alone("a circle")) and not prompts.negative.is_null
    assert same_bits(prompts.null, null)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_of_one_line(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    long = "green\n" * 20 + "square " * 20
    (length,) = encoder.num_tokens([long])
    prompts = encode_prompts([Prompt("a circle"), Prompt(long)], None, encoder)
    with caplog.at_level(logging.WARNING):
        prompts.caption(0)
        assert caplog.messages == []
        prompts.caption(1)
        prompts.caption(1)
    (message,) = caplog.messages
    assert message == f'prompt "{("green " * 20)[:60]}...": {length} tokens, cut to {MAX_LENGTH}'
    assert len(prompts.caption(1).tokens_TD) == MAX_LENGTH


def test_precomputed_prompts_are_bit_for_bit_those_encoded_at_once(written: Path, encoder: TextEncoder) -> None:
    at_once, before = encode_prompts(PROMPTS, "a green circle", encoder), open_encoded_prompts(written)
    assert before.prompts == PROMPTS and before.negative_prompt == "a green circle"
    for number in range(4):
        assert same_bits(before.caption(number), at_once.caption(number))
    assert same_bits(before.null, at_once.null) and same_bits(before.negative, at_once.negative)
    for name in ("kind", "encoder_sha256", "max_length", "hidden_size", "pooled_size", "fingerprint"):
        assert getattr(before, name) == getattr(at_once, name)
    assert saved(before) == saved(at_once) == written.read_bytes()
    with pytest.raises(IndexError):
        before.caption(4)


class _Backwards(Workers):
    def run(self, function: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        yield from reversed([function(job) for job in jobs])


def test_the_file_has_the_same_bytes_in_whatever_order_the_work_is_done(encoder_folder: Path, tmp_path: Path) -> None:
    prompts = [Prompt(f"{number} circles") for number in range(40)]  # two jobs
    settings = TextSettings(encoder_folder, max_length=MAX_LENGTH)
    write_prompts(prompts, None, tmp_path / "one.npz", settings)
    write_prompts(prompts, "", tmp_path / "two.npz", settings, workers=_Backwards())
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


def test_the_fingerprint_changes_with_all_that_an_image_could_depend_on(
    encoder: TextEncoder, encoder_folder: Path
) -> None:
    shorter = TextEncoder.open(encoder_folder, None, MAX_LENGTH - 1, "cpu", "--encoder")
    other_files = TextEncoder.open(encoder_folder, encoder_folder, MAX_LENGTH, "cpu", "--encoder")
    found = {
        encode_prompts(PROMPTS, None, encoder).fingerprint,
        encode_prompts(PROMPTS, "a circle", encoder).fingerprint,
        encode_prompts(PROMPTS[:3], None, encoder).fingerprint,
        encode_prompts(PROMPTS[::-1], None, encoder).fingerprint,
        encode_prompts(PROMPTS, None, shorter).fingerprint,
        encode_prompts(PROMPTS, None, other_files).fingerprint,
    }
    assert len(found) == 6
    assert encode_prompts(list(PROMPTS), " ", encoder).fingerprint in found


def test_a_damaged_file_is_refused_in_one_line(written: Path, tmp_path: Path) -> None:
    whole, path = written.read_bytes(), tmp_path / "damaged.npz"
    before = saved(open_encoded_prompts(written))
    refused = 0
    damaged = [whole[:cut] for cut in range(0, len(whole), 97)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 5)]
    for content in damaged:
        path.write_bytes(content)
        try:
            assert saved(open_encoded_prompts(path)) == before  # a date, say: nothing that is read
        except UserError as error:
            assert str(error).startswith(f"--prompts={path}: is damaged, or not what encode-prompts wrote (")
            refused += 1
    assert refused > 0.8 * len(damaged)


class _Trap:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pytest.fail, ("unpickled",)


def _changed(written: Path, path: Path, **changes: np.ndarray) -> None:
    with np.load(written) as file:
        np.savez(path, **{**file, **changes})


def test_another_file_is_refused_in_one_line(written: Path, tmp_path: Path) -> None:
    with np.load(written) as file:
        arrays = dict(file)
    description = json.loads(arrays["description"].tobytes())
    trap = np.empty(1, object)
    trap[0] = _Trap()

    def described(**changes: Any) -> dict[str, np.ndarray]:
        return {"description": np.frombuffer(json.dumps({**description, **changes}).encode(), np.uint8)}

    for number, changes in enumerate(
        [
            {"tokens": trap},
            {"tokens": arrays["tokens"].astype(np.float32)},
            {"tokens": arrays["tokens"][:-1]},
            {"tokens": np.full_like(arrays["tokens"], np.nan)},
            {"tokens": np.float16(0)},
            {"pooled": arrays["pooled"][1:]},
            {"lengths": arrays["lengths"][::-1][:3]},
            {"lengths": arrays["lengths"] * 0},
            described(version=2),
            described(prompts=description["prompts"][1:]),
            described(prompts=[{"text": 3, "metadata": None}] * 4),
            described(max_length=3),
            described(format="another"),
            {"description": np.frombuffer(b"[]", np.uint8)},
        ]
    ):
        path = tmp_path / f"{number}.npz"
        _changed(written, path, **changes)
        with pytest.raises(UserError, match=r"--prompts=.*npz: is damaged, or not what encode-prompts wrote \(.+\)"):
            open_encoded_prompts(path)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros(3))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(_Trap()))
    for name in ("samples.npz", "pickle.npz"):
        with pytest.raises(UserError, match=f"{name}: is damaged, or not what encode-prompts wrote"):
            open_encoded_prompts(tmp_path / name)
    with pytest.raises(UserError, match="nowhere.npz: cannot be read"):
        open_encoded_prompts(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("out", ["prompts.txt", "nowhere/prompts.npz"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    encoder_folder: Path, tmp_path: Path, out: str
) -> None:
    with pytest.raises(UserError, match="OUT=.*: must be a file .npz in a folder that exists"):
        write_prompts(PROMPTS, None, tmp_path / out, TextSettings(encoder_folder))
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match="OUT=.*folder.npz: cannot be written"):
        write_prompts(PROMPTS, None, tmp_path / "folder.npz", TextSettings(encoder_folder, max_length=MAX_LENGTH))


def test_the_command_encodes_a_file(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder", "t5")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a circle", "tag": "one"}\n')
    out = tmp_path / "p.npz"
    options = ("--encoder", encoder, "--max-length", "9", "--negative-prompt", "a square", "--device", "cpu")
    done = start("data_tools.__main__", "encode-prompts", tmp_path / "p.jsonl", out, *options, folder=tmp_path)[0]
    assert done.wait() == 0, done.stderr
    assert done.stdout == f"encoded 1 prompts, {out.stat().st_size} bytes: --prompts {out}\n"
    encoded = open_encoded_prompts(out)
    assert encoded.prompts == [Prompt("a circle", {"prompt": "a circle", "tag": "one"})]
    assert (encoded.negative_prompt, encoded.max_length) == ("a square", 9)
