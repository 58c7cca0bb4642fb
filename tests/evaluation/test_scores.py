"""Scores of files of images on one rank and on several, and what a result says about itself."""

from __future__ import annotations

import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffmoe_dist.config import build_config
from diffmoe_dist.data.index import ShardIndex
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import Extractor, Features, open_extractor
from diffmoe_dist.evaluation.image_sources import NpzImages, ShardImages, open_images
from diffmoe_dist.evaluation.metrics import Statistics, frechet_distance
from diffmoe_dist.evaluation.reference import REFERENCE_IMAGES, read_reference
from diffmoe_dist.evaluation.scores import (
    CLASS_FACTS,
    SAMPLING_FACTS,
    build_result,
    collect,
    count_name,
    make_reference,
    rows_of_rank,
    score,
    table,
)
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.job import describe_job
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.commands import run, start
from tests.distributed import RankError, run_ranks
from tests.engine.runs import TINY
from tests.evaluation.colours import colours
from tests.machine import free_port

CPU = torch.device("cpu")
COLOURS = "tests.evaluation.colours:colours"
OWN = "tests.evaluation.colours:brightness"


def pictures(num: int, seed: int, channels: int = 3, dark: int = 0) -> np.ndarray:
    """(N, 6, 5, C) uint8."""
    return np.random.default_rng(seed).integers(0, 256 - dark, (num, 6, 5, channels)).astype(np.uint8)


def like_inception(images: Tensor) -> Features:
    """Features of every kind that the Inception network has, by fixed random projections."""
    generator = torch.Generator().manual_seed(0)
    flat = images.double().flatten(1) / 255
    widths = (7, 9, 4)
    pooled, spatial, logits = (flat @ torch.randn(flat.shape[1], w, generator=generator).double() for w in widths)
    return Features(pooled, spatial, logits.softmax(dim=1))


def stand_in() -> Extractor:
    return Extractor("--inception", "inception of the test", CPU, "fid", like_inception)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npz")
    np.savez(folder / "samples.npz", arr_0=pictures(61, seed=0), arr_1=np.zeros(61))
    np.savez_compressed(folder / "reference.npz", arr_0=pictures(37, seed=1, dark=20))
    np.savez(folder / "five.npz", arr_0=pictures(5, seed=2), arr_1=np.zeros(5))
    return folder


def scores_on_rank(rank: int, ranks: int, folder: Path) -> list[Any]:
    extractor = stand_in()
    reference = read_reference(folder / "reference.npz", extractor)
    found: list[Any] = []
    for name, batch_size in (("samples", 8), ("samples", 64), ("five", 2)):
        samples = NpzImages(folder / f"{name}.npz")
        found.append(score(samples, reference, extractor, batch_size=batch_size, rank=rank, ranks=ranks))
    return found


@pytest.fixture(scope="module")
def of_ranks(folder: Path) -> dict[int, list[list[dict[str, float]]]]:
    return {ranks: run_ranks(ranks, scores_on_rank, folder) for ranks in (1, 2)}


def test_scores_are_the_same_on_any_number_of_ranks_and_any_batch_size(
    of_ranks: dict[int, list[list[dict[str, float]]]],
) -> None:
    alone = of_ranks[1][0]
    assert set(alone[0]) == {"fid_61", "sfid_61", "inception_score_61", "precision_61", "recall_61"}
    for results in of_ranks.values():
        for result in results:
            for got, expected in zip(result, alone, strict=True):
                # Five samples of seven features: the roots of zero eigenvalues are rounding.
                assert got == pytest.approx(expected, abs=1e-6 if "fid_5" in got else 1e-9)
    assert alone[1] == pytest.approx(alone[0], abs=1e-9)
    assert 0 < alone[0]["precision_61"] < 1 and 0 < alone[0]["recall_61"] < 1


def test_scores_are_those_of_all_features_at_once(
    folder: Path, of_ranks: dict[int, list[list[dict[str, float]]]]
) -> None:
    ours, theirs = (
        like_inception(torch.from_numpy(np.load(folder / name)["arr_0"]).permute(0, 3, 1, 2))
        for name in ("samples.npz", "reference.npz")
    )
    got = of_ranks[2][1][0]
    for key, x, y in (("fid_61", ours.pooled_NF, theirs.pooled_NF), ("sfid_61", ours.spatial_NF, theirs.spatial_NF)):
        assert x is not None and y is not None
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        shift = (x.mean(dim=0) - y.mean(dim=0)).numpy()
        root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
        assert got[key] == pytest.approx(shift @ shift + np.trace(a) + np.trace(b) - 2 * root, abs=1e-6)
    p = ours.classes_NK
    assert p is not None
    divergence = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean()
    assert got["inception_score_61"] == pytest.approx(math.exp(divergence), rel=1e-9)
    samples, references = ours.pooled_NF.tolist(), theirs.pooled_NF.tolist()
    assert got["precision_61"] == sum(inside(references, samples)) / 61
    assert got["recall_61"] == sum(inside(samples, references)) / 37


def inside(centres: list[list[float]], points: list[list[float]]) -> list[bool]:
    """Which points are at most as far from some centre as its third nearest neighbour, by loops."""
    radii = [sorted(math.dist(a, b) for b in centres)[3] for a in centres]
    pairs = list(zip(centres, radii, strict=True))
    return [any(math.dist(point, centre) <= radius for centre, radius in pairs) for point in points]


def write_images(folder: Path, seed: int, num: int) -> list[Tensor]:
    """PNG files of several sizes in two folders, and as tensors in the order of their paths."""
    generator = np.random.default_rng(seed)
    found = {}
    for number in range(num):
        array = generator.integers(0, 256, (4 + number % 3, 7, 3)).astype(np.uint8)
        place = folder / f"{number % 2}/{number:02d}.PNG"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(place)
        found[place] = torch.from_numpy(array).permute(2, 0, 1)
    (folder / "labels.txt").write_text("no image")
    return [found[place] for place in sorted(found)]


def resized() -> Extractor:
    return Extractor("--features", "of the test", CPU, "fd_dinov2", like_inception, lambda image: image[:, :4, :6])


def score_folders(rank: int, ranks: int, folder: Path) -> dict[str, float]:
    reference = read_reference(folder / "reference", resized())
    samples = open_images(folder / "samples")
    return score(samples, reference, resized(), batch_size=5, rank=rank, ranks=ranks)


def test_a_folder_of_images_of_any_sizes_is_a_reference_for_the_distance_alone(tmp_path: Path) -> None:
    both = write_images(tmp_path / "samples", 0, 13), write_images(tmp_path / "reference", 1, 17)
    (found,) = run_ranks(1, score_folders, tmp_path)
    features = [like_inception(torch.stack([image[:, :4, :6] for image in images])).pooled_NF for images in both]
    ours, theirs = (Statistics(x_NF.mean(dim=0), x_NF.T.cov()) for x_NF in features)
    assert found["fd_dinov2_13"] == pytest.approx(frechet_distance(ours, theirs))
    assert not any(key.startswith(("precision", "recall")) for key in found)
    with pytest.raises(RankError, match=r"images of several sizes \(4 x 7 and 5 x 7\) have no such score"):
        run_ranks(2, score_one_by_one, tmp_path)


def score_one_by_one(rank: int, ranks: int, folder: Path) -> dict[str, float]:
    extractor = replace(resized(), function=like_colours, resize=None)
    reference = read_reference(folder / "reference", extractor)
    return score(open_images(folder / "samples"), reference, extractor, batch_size=1, rank=rank, ranks=ranks)


def like_colours(images: Tensor) -> Features:
    return Features(colours(images))


def test_the_table_names_every_condition_of_a_job() -> None:
    config = build_config(TINY, training=False)
    job = describe_job(SamplingSettings("run", num=1), config, "weights", ClassLabels([0], 10))
    unsaid = {"weights", "num", "reproducible_unit"}  # which checkpoint and how many stand elsewhere
    assert job.keys() - unsaid <= {*SAMPLING_FACTS, *CLASS_FACTS}


def test_every_image_is_one_ranks() -> None:
    for num, ranks in ((10, 3), (2, 4), (50_000, 7)):
        rows = [rows_of_rank(num, rank, ranks) for rank in range(ranks)]
        assert [row for part in rows for row in part] == list(range(num))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize("name", ["samples.npz", "reference.npz"])
def test_an_npz_is_read_a_batch_at_a_time_from_any_place(folder: Path, name: str) -> None:
    whole = np.load(folder / name)["arr_0"].transpose(0, 3, 1, 2)
    for rows in (range(0, len(whole)), range(5, 29), range(7, 7)):
        read = list(NpzImages(folder / name).batches(rows, 10))
        assert [len(batch) for batch in read] == [
            min(10, rows.stop - start) for start in range(rows.start, rows.stop, 10)
        ]
        if read:
            assert np.array_equal(np.concatenate([batch.numpy() for batch in read]), whole[rows.start : rows.stop])


def test_only_fifty_thousand_samples_are_called_50k() -> None:
    assert {num: count_name(num) for num in (50_000, 49_999, 1_000, 61, 10_000)} == {
        50_000: "50k", 49_999: "49999", 1_000: "1k", 61: "61", 10_000: "10k",
    }  # fmt: skip


def result_of(folder: Path, record: dict[str, Any] | None) -> dict[str, Any]:
    if record is not None:
        (folder / "sampling.json").write_text(json.dumps(record))
    extractor = stand_in()
    samples = NpzImages(folder / "samples.npz")
    return build_result({"fid_61": 1.25}, samples, read_reference(folder / "reference.npz", extractor), extractor)


def test_a_result_says_how_the_samples_were_made_and_what_nobody_recorded(folder: Path) -> None:
    record = {"num": 61, "sampler": "euler", "steps": 50, "cfg_scale": 1.5, "labels": "balanced", "batch_size": 100}
    result = result_of(folder, {**record, "capacity": 0.98, "inference": "threshold"})
    sampling = result["sampling"]
    assert (sampling["sampler"], sampling["cfg_scale"], sampling["capacity"]) == ("euler", 1.5, 0.98)
    assert (sampling["decoder"], sampling["parameters"], sampling["activated_parameters"]) == ("not recorded",) * 3
    assert result["samples"]["images"] == 61 and result["reference"]["images"] == 37
    text = table(result)
    assert "FID of 61 " in text and "FID-50K" not in text and "fid_50k" not in text
    assert "scores of 61 samples do not compare with those of 50,000" in text
    assert [line.split()[-2:] for line in text.splitlines() if line.startswith("decoder")] == [["not", "recorded"]]


def test_the_table_rounds_for_people_what_the_result_has_in_full(folder: Path) -> None:
    capacity = 0.8117350243031979
    record = {"num": 61, "capacity": capacity, "cfg_interval": [0.25, 1.0], "classes": [1, 20], "nfe": 50.0}
    result = result_of(folder, {**record, "parameters": 1234567, "one_pass": False, "seed": 7})
    assert result["sampling"]["capacity"] == capacity
    shown = dict(line.split("  ", 1) for line in table(result).splitlines())
    facts = {name: shown[name].strip() for name in ("capacity", "cfg_interval", "classes", "nfe", "parameters")}
    assert facts == {
        "capacity": "0.8117", "cfg_interval": "0.25 1", "classes": "1 20", "nfe": "50", "parameters": "1234567",
    }  # fmt: skip
    assert (shown["one_pass"].strip(), shown["seed"].strip()) == ("no", "7")


@pytest.mark.parametrize("record", [{"num": 62, "sampler": "euler"}, ["euler"], None])
def test_a_record_of_other_samples_is_not_taken_for_theirs(folder: Path, record: Any) -> None:
    (folder / "sampling.json").unlink(missing_ok=True)
    assert set(result_of(folder, record)["sampling"].values()) == {"not recorded"}


def test_a_reference_has_adms_layout_and_the_statistics_of_the_whole_set(tmp_path: Path, digits: Path) -> None:
    (made,) = run_ranks(1, make_on_rank, digits, tmp_path / "one.npz")
    run_ranks(2, make_on_rank, digits, tmp_path / "two.npz")
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert set(one.files) == {"mu", "sigma", "mu_s", "sigma_s", "extractor", "arr_0"}
    index = ShardIndex.open(digits)
    shards = ShardImages(digits)
    everything = torch.cat(list(shards.batches(range(shards.num_images), 100))).expand(-1, 3, -1, -1)
    features = like_inception(everything)
    assert features.spatial_NF is not None
    for mean, covariance, x in (("mu", "sigma", features.pooled_NF), ("mu_s", "sigma_s", features.spatial_NF)):
        np.testing.assert_allclose(one[mean], x.mean(dim=0), rtol=1e-12)
        np.testing.assert_allclose(one[covariance], np.cov(x, rowvar=False), atol=1e-12)
        np.testing.assert_allclose(two[covariance], one[covariance], atol=1e-12)
    assert one["arr_0"].shape == (min(REFERENCE_IMAGES, index.num_samples), 8, 8, 1)
    assert np.array_equal(one["arr_0"], two["arr_0"]) and len(np.unique(one["arr_0"], axis=0)) > 1700
    assert made == pytest.approx(0, abs=1e-6), "the distance of a set from its own reference"


def make_on_rank(rank: int, ranks: int, digits: Path, path: Path) -> float:
    extractor, shards = stand_in(), ShardImages(digits)
    make_reference(path, shards, extractor, batch_size=100, rank=rank, ranks=ranks)
    torch.distributed.barrier()
    found = collect(shards, extractor, batch_size=64, rank=rank, ranks=ranks, what="samples", keep=False)
    stored = read_reference(path, extractor).pooled
    assert stored is not None
    return frechet_distance(found.pooled.statistics(), stored)


def test_a_reference_of_another_extractor_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "adm.npz", mu=np.zeros(12), sigma=np.eye(12))
    np.savez(tmp_path / "ours.npz", mu=np.zeros(12), sigma=np.eye(12), extractor=np.array(COLOURS))
    of_colours = open_extractor(None, COLOURS, CPU)
    assert read_reference(tmp_path / "adm.npz", stand_in()).pooled is not None
    assert read_reference(tmp_path / "ours.npz", of_colours).pooled is not None
    with pytest.raises(UserError, match=f"statistics are of the Inception network, not of {COLOURS}; make one"):
        read_reference(tmp_path / "adm.npz", of_colours)
    with pytest.raises(UserError, match=f"statistics are of {COLOURS}, not of inception of the test"):
        read_reference(tmp_path / "ours.npz", stand_in())


ARRAYS: dict[str, dict[str, Any]] = {
    "arr_0 is float64 \\[5, 4, 4, 3\\]; it must be uint8": {"arr_0": np.zeros((5, 4, 4, 3))},
    "arr_0 is uint8 \\[5, 3, 4, 4\\]": {"arr_0": np.zeros((5, 3, 4, 4), dtype=np.uint8)},
    "it has no array arr_0": {"images": np.zeros((5, 4, 4, 3), dtype=np.uint8)},
    "arr_0 is object": {"arr_0": np.array([{}, 1], dtype=object)},
}


@pytest.mark.parametrize("message", ARRAYS)
def test_a_file_that_holds_no_images_is_refused(tmp_path: Path, message: str) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS[message])
    with pytest.raises(UserError, match=f"--samples {tmp_path}/x.npz: {message}"):
        NpzImages(tmp_path / "x.npz")


def _write_array(path: Path, name: str, header: str, content: bytes = b"") -> None:
    """An npz whose array has a header of its own."""
    prefix = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.npy", prefix + content)


HEADERS = {
    "10^12 entries": "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }\n",
    "nested": "(" * 9000 + "\n",
    "no header": "\n",
    "an odd type": "{'descr': 'what', 'fortran_order': False, 'shape': (1,), }\n",
}


@pytest.mark.parametrize("header", HEADERS)
def test_an_array_whose_header_is_not_true_is_refused_at_once(tmp_path: Path, header: str) -> None:
    text = HEADERS[header]
    filled = "%s" in text
    _write_array(tmp_path / "x.npz", "arr_0", text % ("|u1", f"{10**12}, 4, 4, 3") if filled else text, bytes(48))
    with pytest.raises(UserError, match=f"--samples {tmp_path}/x.npz: "):
        NpzImages(tmp_path / "x.npz")
    _write_array(tmp_path / "y.npz", "mu", text % ("<f8", f"{10**12},") if filled else text, bytes(48))
    with pytest.raises(UserError, match=f"--reference {tmp_path}/y.npz: not an npz file of numbers"):
        read_reference(tmp_path / "y.npz", stand_in())


def test_an_npz_that_is_encrypted_or_damaged_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, mu=np.zeros(2), sigma=np.eye(2))
    content = bytearray(path.read_bytes())
    for flags in (content.find(b"PK\x03\x04") + 6, content.find(b"PK\x01\x02") + 8):
        content[flags] |= 1  # the flag of encryption
    path.write_bytes(content)
    with pytest.raises(UserError, match="not an npz file .*encrypted"):
        NpzImages(path)
    np.savez_compressed(path, arr_0=np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="arr_0 is damaged|not an npz file"):
        list(NpzImages(path).batches(range(4), 4))


REFERENCES: dict[str, dict[str, Any]] = {
    "it has neither statistics \\(mu, sigma\\) nor images \\(arr_0\\)": {"a": np.zeros(3)},
    "mu is \\[3\\] and sigma is \\[2, 2\\]; they do not fit": {"mu": np.zeros(3), "sigma": np.eye(2)},
    "mu is \\[3\\] and sigma is missing": {"mu": np.zeros(3)},
    "mu or sigma holds numbers that are not finite": {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
    "not an npz file of numbers": {"mu": np.array([{}], dtype=object)},
}


@pytest.mark.parametrize("message", REFERENCES)
def test_a_file_that_is_no_reference_is_refused(tmp_path: Path, message: str) -> None:
    np.savez(tmp_path / "x.npz", **REFERENCES[message])
    with pytest.raises(UserError, match=f"--reference {tmp_path}/x.npz: {message}"):
        read_reference(tmp_path / "x.npz", stand_in())


@pytest.mark.slow
def test_the_command_scores_a_file_under_a_launcher_against_a_reference_it_made(tmp_path: Path, digits: Path) -> None:
    evaluate = ("diffmoe_dist.evaluate", "--features", COLOURS, "--device", "cpu")
    reference, samples, out = tmp_path / "reference.npz", tmp_path / "samples.npz", tmp_path / "scores.json"
    made = run(sys.executable, "-m", *evaluate, "--make-reference", reference, "--shards", digits)
    assert made.returncode == 0, made.stderr
    np.savez(samples, arr_0=np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 1), dtype=np.uint8))
    torchrun = ("torchrun", "--nproc-per-node", "2", "--master-port", free_port(), "-m", "--")
    scored = run(*torchrun, *evaluate, "--samples", samples, "--reference", reference, "--score", OWN)
    assert scored.returncode == 0, scored.stderr
    result = json.loads(out.read_text())
    assert set(result["scores"]) == {"frechet_distance_1k", "precision_1k", "recall_1k", f"{OWN}_1k"}
    assert result["scores"][f"{OWN}_1k"] == np.load(samples)["arr_0"].mean()
    x = colours(torch.from_numpy(np.load(samples)["arr_0"]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)).double()
    y = np.load(reference)
    shift = x.mean(dim=0).numpy() - y["mu"]
    covariance = np.cov(x, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(covariance @ y["sigma"]).real.clip(0)).sum()
    expected = shift @ shift + np.trace(covariance) + np.trace(y["sigma"]) - 2 * root
    # Three equal channels: eight of twelve eigenvalues are zero, and their roots are rounding.
    assert result["scores"]["frechet_distance_1k"] == pytest.approx(expected, abs=1e-5)
    assert result["extractor"] == COLOURS and "Frechet distance of 1,000" in scored.stdout and str(out) in scored.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "there is no module none"),
        ("tests.evaluation.colours", "has no callable 'score'"),
        (OWN, "1,000 samples"),
    ],
)
def test_a_metric_of_ones_own_needs_no_reference(tmp_path: Path, name: str, message: str) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((1000, 8, 8, 1), dtype=np.uint8))
    (scored,) = start("diffmoe_dist.evaluate", "--samples", f"{tmp_path}/samples.npz", "--score", name, folder=tmp_path)

    assert scored.wait() == (0 if name == OWN else 2)
    assert message in scored.stdout + scored.stderr


def test_a_metric_of_ones_own_that_fails_leaves_the_other_scores(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8))
    (scored,) = start(
        "diffmoe_dist.evaluate", "--samples", tmp_path / "x.npz", "--reference", tmp_path / "x.npz", "--features",
        COLOURS, "--score", "tests.evaluation.colours:failing", "--device", "cpu", folder=tmp_path,
    )  # fmt: skip
    assert scored.wait() == 1 and "RuntimeError: of the metric" in scored.stderr
    assert "frechet_distance_9" in json.loads((tmp_path / "scores.json").read_text())["scores"]


def test_the_command_samples_from_a_run_first(tmp_path: Path, digits: Path) -> None:
    trained = start(
        "diffmoe_dist.train", "--config", "configs/debug/global_pool.yaml", f"data.shards={digits}",
        f"run_dir={tmp_path / 'run'}", "train.steps=2", "device=cpu", folder=tmp_path,
    )[0]  # fmt: skip
    assert trained.wait() == 0, trained.stderr
    np.savez(tmp_path / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), dtype=np.uint8))
    scored = start(
        "diffmoe_dist.evaluate", "--samples", tmp_path / "run", "--num", "6", "--steps", "2", "--reference",
        tmp_path / "reference.npz", "--features", COLOURS, "--out", tmp_path / "out/scores.json", "--device", "cpu",
        folder=tmp_path,
    )[0]  # fmt: skip
    assert scored.wait() == 0, scored.stderr
    result = json.loads((tmp_path / "out/scores.json").read_text())
    sampled = json.loads((tmp_path / "out/sampling.json").read_text())
    assert set(result["scores"]) == {"frechet_distance_6", "precision_6", "recall_6"}
    assert result["reference"]["statistics"] == "of its images"
    assert (result["sampling"]["steps"], result["sampling"]["capacity"]) == (2, sampled["capacity"])


BAD = {
    "no reference": (("--samples", "a.npz", "--features", COLOURS), "--reference is missing"),
    "no extractor": (("--samples", "a.npz", "--reference", "b.npz"), "give --inception FILE.pth or --features"),
    "no samples": (("--reference", "b.npz", "--features", COLOURS), "--samples is missing"),
    "a number for a file": (
        ("--samples", "a.npz", "--reference", "b.npz", "--features", COLOURS, "--num", "5"),
        "--num 5 has no effect with --samples a.npz (a file); leave it out",
    ),
    "a run without a number": (
        ("--samples", "configs", "--reference", "b.npz", "--features", COLOURS),
        "--num is missing: --samples configs (a folder) needs it",
    ),
    "no such file": (
        ("--samples", "a.npz", "--reference", "nowhere.npz", "--features", COLOURS),
        "--reference nowhere.npz: cannot be read (No such file or directory)",
    ),
    "a folder of samples": (
        ("--samples", "OUT", "--reference", "b.npz", "--features", COLOURS), "give OUT/samples.npz",
    ),
    "no weights": (
        ("--samples", "a.npz", "--reference", "b.npz", "--inception", "nowhere.pth"), "--inception nowhere.pth: cannot",
    ),
    "no shards": (("--make-reference", "OUT/r.npz", "--features", COLOURS), "--shards is missing: --make-reference"),
    "no batch": (
        ("--samples", "a.npz", "--reference", "b.npz", "--features", COLOURS, "--batch-size", "0"),
        "--batch-size 0: choose at least 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(case: str, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    filled = [part.replace("OUT", str(tmp_path)) for part in arguments]
    message = message.replace("OUT", str(tmp_path))
    (tmp_path / "samples.npz").touch()
    ended = start("diffmoe_dist.evaluate", *filled, "--device", "cpu", folder=tmp_path)[0]
    assert (ended.wait(), ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1 and message in ended.stderr
