from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.pack import pack
from data_tools.sources import SourceOptions, open_source
from data_tools.text import TextSettings, encode_text
from diffmoe_dist.data.batch import Batch
from diffmoe_dist.data.captions import captions_in
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.index import CorruptShardError, ShardIndex
from diffmoe_dist.data.loader import TrainingDataset
from diffmoe_dist.data.text import EncodedText, TextReader, pad_text
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from tests.data.encoders import CAPTIONS, save_encoder
from tests.data.folders import png, random_images, write_folder

MAX_LENGTH = {"clip": 16, "t5": 12}


@pytest.fixture(scope="module", params=["clip", "t5"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def encoder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp(kind) / "encoder", kind)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    samples = []
    for image, captions in zip(random_images(len(CAPTIONS), 8), CAPTIONS, strict=True):
        sample = {"png": png(image)}
        if captions:
            sample |= {"txt": captions[0].encode(), "json": json.dumps({"captions": captions}).encode()}
        samples.append(sample)
    folder = tmp_path_factory.mktemp("base") / "shards"
    return write_folder(folder, samples, [2, 0, 3], class_names=[])


@pytest.fixture(scope="module")
def text(kind: str, base: ShardIndex, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / kind
    encode_text(base, out, TextSettings(encoder, max_length=MAX_LENGTH[kind], batch_size=2))
    return out


def _encode_alone(encoder: Path, kind: str, caption: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What the encoder makes of one caption without any padding."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    model = (CLIPTextModel if kind == "clip" else T5EncoderModel).from_pretrained(encoder).eval()
    tokens = AutoTokenizer.from_pretrained(encoder)(
        caption, return_tensors="pt", truncation=True, max_length=MAX_LENGTH[kind]
    )
    with torch.no_grad():
        output = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    pooled = output.pooler_output[0].numpy() if kind == "clip" else None
    return output.last_hidden_state[0].numpy(), pooled


def test_every_caption_is_what_the_encoder_makes_of_it_alone(
    text: Path, base: ShardIndex, encoder: Path, kind: str
) -> None:
    reader = TextReader(ShardIndex.open(text))
    found = 0
    for sample, captions in enumerate(CAPTIONS):
        assert reader.num_captions(sample) == len(captions)
        for number, caption in enumerate(captions):
            encoded = reader.read(sample, (number + 0.5) / len(captions))
            tokens, pooled = _encode_alone(encoder, kind, caption)
            # fp16 rounds by 2^-11; padding changes the order of sums in fp32.
            np.testing.assert_allclose(encoded.tokens_TD, tokens, rtol=2**-10, atol=1e-5)
            assert (encoded.pooled_P is None) == (pooled is None)
            if encoded.pooled_P is not None and pooled is not None:
                np.testing.assert_allclose(encoded.pooled_P, pooled, rtol=2**-10, atol=1e-5)
            found += 1
    assert found == 7


def test_a_sample_without_a_caption_has_the_empty_one(text: Path, encoder: Path, kind: str) -> None:
    reader = TextReader(ShardIndex.open(text))
    tokens, _ = _encode_alone(encoder, kind, "")
    np.testing.assert_allclose(reader.null.tokens_TD, tokens, rtol=2**-10, atol=1e-5)
    assert reader.read(2, 0.7) is reader.null


def test_the_index_says_what_encoded_the_captions(text: Path, kind: str, base: ShardIndex) -> None:
    index = ShardIndex.open(text)
    index.check_base(base)
    spec = index.text
    assert spec is not None
    assert (spec.encoder, spec.max_length, spec.hidden_size) == (kind, MAX_LENGTH[kind], 16)
    assert spec.pooled_size == (16 if kind == "clip" else 0)
    assert spec.null.sha256 == file_sha256(text / "null.npy")


def test_a_long_caption_is_cut_and_keeps_its_end_token(text: Path, kind: str) -> None:
    assert TextReader(ShardIndex.open(text)).read(4, 0.0).tokens_TD.shape == (MAX_LENGTH[kind], 16)


def test_captions_that_were_cut_are_counted_also_over_an_interruption(
    base: ShardIndex, encoder: Path, kind: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer, longest = AutoTokenizer.from_pretrained(encoder), MAX_LENGTH[kind]
    lengths = [len(tokenizer(caption)["input_ids"]) for captions in CAPTIONS for caption in captions]
    expected = sum(length > longest for length in lengths)
    assert 0 < expected < len(lengths)
    settings, done = TextSettings(encoder, max_length=longest), []

    def stop(num_samples: int) -> None:
        done.append(num_samples)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_text(base, tmp_path / "out", settings, on_shard=stop)
    assert len(done) == 1
    assert encode_text(base, tmp_path / "out", settings).num_cut == expected


def test_encoding_again_gives_the_same_bytes(
    text: Path, base: ShardIndex, encoder: Path, kind: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(text, tmp_path / "copy"))
    (copy / "text-000000.tar").unlink()
    (copy / "null.npy").unlink()
    encode_text(base, copy, TextSettings(encoder, max_length=MAX_LENGTH[kind], batch_size=2))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in text.iterdir()
    }


def _batches(base: ShardIndex, text: Path, splits: list[range]) -> list[Batch]:
    data = TrainingData((DataSet.open(base.folder, None, text),), 8)
    dataset = TrainingDataset(data, 3, True)
    return [dataset[positions] for positions in splits]


def test_a_batch_holds_padded_captions_chosen_by_sample_and_epoch_alone(
    text: Path, base: ShardIndex, kind: str
) -> None:
    (whole,) = _batches(base, text, [range(40)])
    assert whole.text is not None and whole.text.tokens.shape == (40, MAX_LENGTH[kind], 16)
    assert whole.text.mask.shape == (40, MAX_LENGTH[kind])
    assert (whole.text.pooled is None) == (kind == "t5")
    assert (whole.text.tokens[~whole.text.mask] == 0).all()
    for start, part in zip(
        range(0, 40, 8), _batches(base, text, [range(i, i + 8) for i in range(0, 40, 8)]), strict=True
    ):
        assert part.text is not None
        assert torch.equal(part.text.tokens, whole.text.tokens[start : start + 8])
        assert torch.equal(part.text.mask, whole.text.mask[start : start + 8])
    lengths = {int(mask.sum()) for mask, sample in zip(whole.text.mask, whole.sample_ids, strict=True) if sample == 0}
    assert len(lengths) == 2  # both captions of sample 0 came in eight epochs
    assert whole.to("cpu").text is not None and (whole.labels == 0).all()


def test_images_are_the_same_with_and_without_text(text: Path, base: ShardIndex) -> None:
    (with_text,) = _batches(base, text, [range(10)])
    without = TrainingDataset(TrainingData((DataSet.open(base.folder),), 8), 3, True)[range(10)]
    assert torch.equal(with_text.images, without.images) and torch.equal(with_text.noise, without.noise)
    assert without.text is None


def test_padding_by_hand() -> None:
    one = EncodedText(np.ones((1, 2), np.float16), np.array([5, 6], np.float16))
    two = EncodedText(np.full((2, 2), 2, np.float16), np.array([7, 8], np.float16))
    batch = pad_text([one, two], 3)
    assert batch.tokens.tolist() == [[[1, 1], [0, 0], [0, 0]], [[2, 2], [2, 2], [0, 0]]]
    assert batch.mask.tolist() == [[True, False, False], [True, True, False]]
    assert batch.pooled is not None and batch.pooled.tolist() == [[5, 6], [7, 8]]


def test_an_exchanged_null_embedding_is_refused(text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(text, tmp_path / "copy"))
    np.save(copy / "null.npy", np.zeros((2, 16), np.float16))
    with pytest.raises(UserError, match="data.text=.*copy: null.npy is missing or another"):
        TextReader(ShardIndex.open(copy, f"data.text={copy}"))


def test_captions_of_another_width_than_the_index_says_are_damage(text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(text, tmp_path / "copy"))
    meta = json.loads((copy / "index.json").read_text())
    meta["text"]["hidden_size"] = 8
    (copy / "index.json").write_text(json.dumps(meta))
    with pytest.raises(CorruptShardError, match=r"text-000000.tar, key 000000001: 0.text.npy has shape"):
        TextReader(ShardIndex.open(copy)).read(1, 0.0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (TextSettings(Path("nowhere")), "--encoder=nowhere: no config.json"),
        (TextSettings(Path("{encoder}"), max_length=1), "--max-length=1: must be at least 2"),
        (TextSettings(Path("{encoder}"), batch_size=0), "--batch-size=0"),
        (TextSettings(Path("{encoder}"), tokenizer=Path("nowhere")), "--encoder=.*: no tokenizer loads from nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    base: ShardIndex, encoder: Path, tmp_path: Path, settings: TextSettings, problem: str
) -> None:
    if str(settings.encoder) == "{encoder}":
        settings = TextSettings(encoder, settings.tokenizer, settings.max_length, settings.batch_size)
    with pytest.raises(UserError, match=problem):
        encode_text(base, tmp_path / "out", settings)


def test_data_without_captions_are_refused(encoder: Path, tmp_path: Path) -> None:
    samples = [{"png": png(image), "cls": b"0"} for image in random_images(2, 8)]
    base = write_folder(tmp_path / "base", samples, [2])
    with pytest.raises(UserError, match=r"holds no captions \(png, cls\)"):
        encode_text(base, tmp_path / "out", TextSettings(encoder))


def test_data_whose_captions_are_all_empty_are_refused(encoder: Path, tmp_path: Path) -> None:
    samples = [{"png": png(image), "txt": text} for image, text in zip(random_images(2, 8), (b"", b" "), strict=True)]
    base = write_folder(tmp_path / "base", samples, [2])
    with pytest.raises(UserError, match="none of 2 samples has a caption"):
        encode_text(base, tmp_path / "out", TextSettings(encoder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"json": b'{"caption": "a cat", "url": "x"}'}, ["a cat"]),  # img2dataset without a txt
        ({"json": b'{"caption": "a cat"}', "txt": b"\xef\xbb\xbfa dog"}, ["a dog"]),
        ({"json": b'{"captions": ["a", 3, "b", " "]}', "txt": b"c"}, ["a", "b"]),
        ({"json": b'{"captions": [], "caption": NaN}', "txt": b"c"}, ["c"]),
        ({"json": b'{"captions": "one"}'}, ["one"]),
        ({"json": b'{"caption": null}', "txt": b""}, []),
    ],
)
def test_captions_are_found_wherever_their_origin_put_them(fields: dict[str, bytes], captions: list[str]) -> None:
    assert [caption.strip() for caption in captions_in(fields)] == captions


def test_a_model_that_is_no_text_encoder_is_refused(base: ShardIndex, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="is vit, which does not encode text alone; give the local folder of CLIP"):
        encode_text(base, tmp_path / "out", TextSettings(tmp_path))


def test_one_folder_with_classes_and_captions_serves_a_model_of_either(
    encoder: Path, kind: str, tmp_path: Path
) -> None:
    for number, image in enumerate(random_images(4, 8)):
        folder = tmp_path / "in" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(image))
        (folder / f"{number}.txt").write_text(CAPTIONS[0][number % 2])
    pack(open_source(str(tmp_path / "in"), None, SourceOptions()), tmp_path / "base")
    base = ShardIndex.open(tmp_path / "base")
    encode_text(base, tmp_path / "text", TextSettings(encoder, max_length=MAX_LENGTH[kind]))
    of_classes = TrainingData((DataSet.open(base.folder),), 8)
    of_captions = TrainingData((DataSet.open(base.folder, text=tmp_path / "text"),), 8)
    labelled, captioned = (TrainingDataset(data, 5, False)[range(4)] for data in (of_classes, of_captions))
    assert sorted(labelled.labels.tolist()) == [0, 0, 1, 1] and labelled.text is None
    assert captioned.text is not None and torch.equal(labelled.images, captioned.images)
    alone = [_encode_alone(encoder, kind, caption)[0] for caption in CAPTIONS[0]]
    for row, label in enumerate(labelled.labels.tolist()):
        found = captioned.text.tokens[row][captioned.text.mask[row]]
        np.testing.assert_allclose(found.numpy(), alone[label], atol=2e-3)
