"""CLIPScore by a tiny CLIP with random weights: against transformers and torchmetrics, on ranks, and as a command."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.clip_score import clip_score, open_clip, prompts_of_images
from diffmoe_dist.evaluation.image_sources import NpzImages
from tests.commands import run, start
from tests.distributed import run_ranks
from tests.evaluation.colours import colours
from tests.machine import free_port

CPU = torch.device("cpu")
COLOURS = f"{colours.__module__}:{colours.__name__}"
PROMPTS = ["a red square", "a blue circle", "green", "circle on red square on green", "", "a" * 40, "squares: one, two"]
SIZE, TOKENS = 16, 16  # what the tiny CLIP sees and reads
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": 60,
        "max_position_embeddings": TOKENS,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    torch.manual_seed(3)  # cosines of both signs
    config = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, "image_size": SIZE, "patch_size": 4}, projection_dim=8,
        initializer_factor=8.0,  # images and prompts far apart
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    # Sizes as plain numbers, as the files of CLIP's authors have them.
    preprocessor = {"crop_size": SIZE, "size": SIZE, "image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    special = ["<pad>", "<|startoftext|>", "<unk>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(PROMPTS[:5], trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(special[1], 1), (special[3], 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        unk_token="<unk>", padding_side="right",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> NpzImages:
    return save_samples(tmp_path, pictures(3), PROMPTS)


def pictures(channels: int) -> np.ndarray:
    """An image for each prompt, of a colour and noise, (N, 20, 30, C) uint8: 16 x 24 with the shorter side resized."""
    generator = np.random.default_rng(0)
    colour = generator.integers(0, 200, (len(PROMPTS), 1, 1, channels))
    return (colour + generator.integers(0, 56, (len(PROMPTS), 20, 30, channels))).astype(np.uint8)


def save_samples(folder: Path, images_NHWC: np.ndarray, prompts: list[str]) -> NpzImages:
    np.savez(folder / "samples.npz", arr_0=images_NHWC, arr_1=np.zeros(len(images_NHWC)))
    lines = [json.dumps({"prompt": prompt, "tag": "single_object"}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return NpzImages(folder / "samples.npz")


def all_cosines(clip_folder: Path, images_NHWC: np.ndarray) -> np.ndarray:
    """Of each image and each prompt, by CLIP's own steps one at a time, (N, N)."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    vectors: list[list[np.ndarray]] = [[], []]
    with torch.no_grad():
        for image in images_NHWC:
            resized = Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC)
            seen = np.asarray(resized.crop((4, 0, 20, 16)), dtype=np.float64) / 255
            pixels = torch.from_numpy((seen - MEAN) / STD).float().permute(2, 0, 1)[None]
            vectors[0].append(model.get_image_features(pixels).pooler_output[0].double().numpy())
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            ids = ids if len(ids) <= TOKENS else [*ids[: TOKENS - 1], 3]  # the end token stays
            vectors[1].append(model.get_text_features(torch.tensor([ids])).pooler_output[0].double().numpy())
    x, y = (np.stack(part) for part in vectors)
    return x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)


@pytest.fixture(scope="module")
def of_ranks(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Score, prompts that were cut and warnings, or the refusal: of two ranks, for several sets of prompts."""
    cosines = all_cosines(clip_folder, pictures(3))
    best = [PROMPTS[row.argmax()] for row in cosines]
    folder = tmp_path_factory.mktemp("ranks")
    orders = {"own": PROMPTS, "best": best, "swapped": [*best[1:], best[0]], "long": ["a" * 40, *PROMPTS[1:]]}
    for name, prompts in orders.items():
        (folder / name).mkdir()
        save_samples(folder / name, pictures(3), prompts)
    return run_ranks(2, score_on_rank, clip_folder, folder, list(orders))


def score_on_rank(rank: int, ranks: int, clip_folder: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    clip, options = open_clip(clip_folder, CPU), {"batch_size": 3, "rank": rank, "ranks": ranks}
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("diffmoe_dist").addHandler(handler)
    for name in names:
        samples = NpzImages(folder / name / "samples.npz")
        prompts = prompts_of_images(folder / name / "prompts.jsonl", samples.num_images)
        of_all = clip_score(samples, prompts, clip, **options)
        found[name] = of_all.score, of_all.cut, list(warnings)
        warnings.clear()
    clip.model.text_projection.weight.fill_(torch.nan)
    with pytest.raises(UserError) as refusal:
        clip_score(samples, prompts, clip, **options)
    return {**found, "nan": str(refusal.value)}


def test_the_score_is_the_mean_of_cosines_computed_one_by_one(
    clip_folder: Path, of_ranks: list[dict[str, Any]]
) -> None:
    cosines = np.diag(all_cosines(clip_folder, pictures(3)))
    assert cosines.min() < -0.1 and cosines.max() > 0.1, "some scores must be cut at 0, each by itself"
    # Sums in fp32 in another order, of padded prompts.
    expected = pytest.approx(100 * cosines.clip(min=0).mean(), abs=1e-4)
    assert [result["own"][0] for result in of_ranks] == [expected, expected]


def test_prompts_that_fit_score_higher_than_the_same_prompts_swapped(
    clip_folder: Path, of_ranks: list[dict[str, Any]]
) -> None:
    cosines = all_cosines(clip_folder, pictures(3))
    best = cosines.argmax(axis=1)
    swapped = cosines[np.arange(len(best)), np.roll(best, -1)]
    for name, expected in (("best", cosines.max(axis=1)), ("swapped", swapped)):
        assert of_ranks[0][name][0] == pytest.approx(100 * expected.clip(min=0).mean(), abs=1e-4)
    assert of_ranks[0]["swapped"][0] < of_ranks[0]["best"][0] - 1e-2


def test_prompts_that_are_too_long_are_counted_in_one_warning_of_the_first_rank(of_ranks: list[dict[str, Any]]) -> None:
    warning = "the prompts of %d of 7 images are longer than the 16 tokens that CLIP reads, and were cut"
    for rank, result in enumerate(of_ranks):
        for name, cut in (("own", 1), ("long", 2)):
            assert result[name][1:] == (cut, [warning % cut] if rank == 0 else [])


def test_weights_that_give_numbers_that_are_not_finite_are_refused_by_every_rank(
    of_ranks: list[dict[str, Any]],
) -> None:
    refusal = "--clip tiny-clip: it returned numbers that are not finite; fetch its weights again"
    assert [result["nan"] for result in of_ranks] == [refusal, refusal]


def test_the_cosines_are_those_of_torchmetrics(clip_folder: Path) -> None:
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from torchmetrics.functional.multimodal.clip_score import clip_score as their_clip_score
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    class BeforeVersion5(CLIPModel):  # torchmetrics 1.9 calls it so
        def get_image_features(self, *arguments: Any, **options: Any) -> Any:
            return super().get_image_features(*arguments, **options).pooler_output

        def get_text_features(self, *arguments: Any, **options: Any) -> Any:
            return super().get_text_features(*arguments, **options).pooler_output

    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(clip_folder),
        tokenizer=AutoTokenizer.from_pretrained(clip_folder),
    )
    images = torch.from_numpy(pictures(3)).permute(0, 3, 1, 2)
    short = [index for index, prompt in enumerate(PROMPTS) if len(prompt) < 40]  # it cuts the end token off others
    model = BeforeVersion5.from_pretrained(clip_folder).eval()
    prompts = [PROMPTS[index] for index in short]
    with torch.no_grad():
        theirs, _ = _clip_score_update(list(images[short]), prompts, model, processor)
    ours = 100 * open_clip(clip_folder, CPU).cosines(images[short], prompts)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)  # of up to 100, in fp32
    whole = their_clip_score(images[0], PROMPTS[0], lambda: (model, processor))
    assert whole.item() == pytest.approx(ours[0].clamp(min=0).item(), abs=1e-4)


def test_gray_images_are_scored_as_if_they_had_three_equal_channels(clip_folder: Path) -> None:
    gray = torch.from_numpy(pictures(1)).permute(0, 3, 1, 2)
    clip = open_clip(clip_folder, CPU)
    assert torch.equal(clip.cosines(gray, PROMPTS), clip.cosines(gray.repeat(1, 3, 1, 1), PROMPTS))


LINES = {
    "has 2 prompts for 3 images": '{"prompt": "a"}\n{"prompt": "b"}\n',
    "line 2: is no object with a string `prompt`; correct the line": '{"prompt": "a"}\n{"tag": "b"}\n{"prompt": "c"}\n',
    "line 3: is no JSON": '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"\n',
    "line 1: is no object with a string `prompt`": '["prompt"]\n{"prompt": "b"}\n{"prompt": "c"}\n',
}


@pytest.mark.parametrize("message", LINES)
def test_prompts_that_are_not_those_of_the_images_are_refused(tmp_path: Path, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(LINES[message])
    with pytest.raises(UserError, match=f"prompts.jsonl:? {message}"):
        prompts_of_images(tmp_path / "prompts.jsonl", 3)


def test_a_prompt_may_hold_any_character(tmp_path: Path) -> None:
    prompts = ["two\nlines", "a line\u2028separator", "größer", ""]
    lines = "\n".join(json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts)
    (tmp_path / "prompts.jsonl").write_text(lines, encoding="utf-8")
    assert prompts_of_images(tmp_path / "prompts.jsonl", 4) == prompts


def test_weights_that_do_not_load_or_fit_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def changed(name: str) -> Path:
        return Path(shutil.copytree(clip_folder, tmp_path / name))

    (changed("broken") / "model.safetensors").write_bytes(b"no")
    (changed("empty") / "tokenizer.json").unlink()
    (tmp_path / "empty" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    weights = load_file(clip_folder / "model.safetensors")
    text_only = {name: tensor for name, tensor in weights.items() if not name.startswith("vision")}
    save_file(text_only, changed("half") / "model.safetensors", {"format": "pt"})
    (changed("larger") / "preprocessor_config.json").write_text('{"size": 24, "crop_size": 24}')
    for tower in ("vision", "text"):
        config = json.loads((changed(f"shallow {tower}") / "config.json").read_text())
        config[f"{tower}_config"]["num_hidden_layers"] = 1
        (tmp_path / f"shallow {tower}" / "config.json").write_text(json.dumps(config))
    refusals = {
        "shallow vision": "config.json says a model without vision_model.encoder.layers.1",
        "shallow text": "config.json says a model without text_model.encoder.layers.1",
        "broken": "model.safetensors is cut or damaged",
        "empty": "the tokenizer in .* knows no words",
        "half": "lacks weights, as vision_model",
        "larger": "its files do not fit each other .*24",
    }
    for name, message in refusals.items():
        with pytest.raises(UserError, match=f"--clip {tmp_path / name}: {message}"):
            open_clip(tmp_path / name, CPU)


@pytest.mark.slow
def test_the_command_scores_prompts_on_two_ranks_alone_and_on_one_beside_a_reference(
    clip_folder: Path, samples: NpzImages, tmp_path: Path
) -> None:
    command = ("diffmoe_dist.evaluate", "--samples", samples.path, "--clip", clip_folder, "--device", "cpu")
    torchrun = ("torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "--")
    scored = run(*torchrun, *command)
    assert scored.returncode == 0, scored.stderr
    alone = json.loads((tmp_path / "scores.json").read_text())
    cosines = np.diag(all_cosines(clip_folder, pictures(3)))
    assert alone["scores"] == {"clip_score_7": pytest.approx(100 * cosines.clip(min=0).mean(), abs=1e-4)}
    assert not {"reference", "extractor", "neighbours"} & set(alone)
    digest = hashlib.sha256()
    for path in sorted(clip_folder.iterdir()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    about = {"model": "tiny-clip", "sha256": digest.hexdigest(), "prompts": str(tmp_path / "prompts.jsonl"), "cut": 1}
    assert alone["clip"] == about
    assert "CLIPScore of 7 samples" in scored.stdout and "do not compare" not in scored.stdout
    assert scored.stderr.count("longer than the 16 tokens that CLIP reads") == 1

    np.savez(tmp_path / "reference.npz", arr_0=pictures(3)[::-1])
    options = ("--reference", tmp_path / "reference.npz", "--features", COLOURS, "--out", tmp_path / "both.json")
    scored = run(sys.executable, "-m", *command, *options)
    assert scored.returncode == 0, scored.stderr
    both = json.loads((tmp_path / "both.json").read_text())
    assert set(both["scores"]) == {"frechet_distance_7", "precision_7", "recall_7", "clip_score_7"}
    assert both["scores"]["clip_score_7"] == pytest.approx(alone["scores"]["clip_score_7"], abs=1e-4)
    assert both["clip"] == about and both["reference"]["images"] == 7
    assert "CLIPScore of 7 samples" in scored.stdout and "do not compare" in scored.stdout


WITHOUT = {  # what is taken away, and what else is given
    "prompts": (
        ("SAMPLES/prompts.jsonl",),
        (),
        "no prompts.jsonl beside it; sample with diffmoe_dist.sample --prompts",
    ),
    "samples": (("SAMPLES/samples.npz",), (), "samples.npz: cannot be read"),
    "a configuration": (
        ("CLIP/config.json",),
        (),
        "no config.json that can be read; give the local folder of",
    ),
    "weights": (("CLIP/model.safetensors",), (), "no *.safetensors; fetch it too"),
    "a tokenizer": (("CLIP/tokenizer.json",), (), "no tokenizer.json or vocab.json; fetch it too"),
    "a preprocessor": (("CLIP/preprocessor_config.json",), (), "no preprocessor_config.json or processor_config.json"),
    "a reference": ((), ("--features", COLOURS), f"--features {COLOURS} has no effect without --reference; leave it"),
    "an extractor": ((), ("--reference", "r.npz"), "give --inception FILE.pth or --features FOLDER|module:callable"),
    "a folder to write": ((), ("--num", "5"), "--num 5 has no effect with --samples"),
    "samples at all": ((), ("--make-reference", "r.npz", "--shards", "s"), "has no effect with --make-reference"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_a_command_that_cannot_score_is_refused_in_one_line(
    case: str, clip_folder: Path, samples: NpzImages, tmp_path: Path
) -> None:
    removed, options, message = WITHOUT[case]
    clip = shutil.copytree(clip_folder, tmp_path / "clip")
    for name in removed:
        Path(name.replace("CLIP", str(clip)).replace("SAMPLES", str(tmp_path))).unlink()
    ended = start(
        "diffmoe_dist.evaluate", "--samples", samples.path, "--clip", clip, "--device", "cpu", *options, folder=tmp_path
    )[0]
    assert (ended.wait(), ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1 and message in ended.stderr


def test_the_text_encoder_of_a_clip_alone_is_refused(samples: NpzImages, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    ended = run(sys.executable, "-m", "diffmoe_dist.evaluate", "--samples", samples.path, "--clip", tmp_path)
    assert ended.returncode == 2
    assert "is clip_text_model; give the local folder of a whole CLIP, both of its towers" in ended.stderr
