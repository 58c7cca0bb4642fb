"""Averages of the weights: kept beside each other, by any ranks and resumes, chosen by name, and made after the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffmoe_dist import load_model
from diffmoe_dist.engine.conversion import export_checkpoint
from diffmoe_dist.engine.ema import exponent_of
from diffmoe_dist.engine.post_hoc import Weighting, fit, of_updates, read_average
from diffmoe_dist.engine.progress import complete_checkpoints
from diffmoe_dist.engine.resume import progress_from
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256
from diffmoe_dist.launch import Launch
from diffmoe_dist.sampling.job import sample_to_folder
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.commands import start
from tests.distributed import run_ranks
from tests.engine.runs import curve, empty_model, tiny_config, train_all, whole_state

STEPS = 20
EMA = {"decay": 0.9, "decays": [0.99, 0.5], "lengths": [0.05, 0.1]}
AVERAGED = {"ema": EMA, "checkpoint": {"every": 1, "keep": 100}, "train": {"steps": STEPS}}
SPLIT = {**AVERAGED, "parallel": {"expert": 2}}
DECAYS = {"ema": 0.9, "ema_decay_0_99": 0.99, "ema_decay_0_5": 0.5}
LENGTHS = {"ema_length_0_05": 0.05, "ema_length_0_1": 0.1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks(1, train_all, digits, [(root / "alone", AVERAGED)])
    last = {**SPLIT, "checkpoint": {"every": 10, "keep": 2}}
    half = {**last, "train": {"steps": 10}}
    run_ranks(2, train_all, digits, [(root / "split", last), (root / "resumed", half), (root / "resumed", last)])
    return root


@pytest.fixture(scope="module")
def weights(runs: Path, digits: Path) -> list[dict[str, Tensor]]:
    """In fp64 at the start and after each step."""
    initial: dict[str, Tensor] = dict(empty_model(runs / "alone", digits).named_parameters())
    states = [initial, *(whole_state(runs / "alone", digits, "master", step) for step in range(1, STEPS + 1))]
    return [{name: state[name].detach().double() for name in initial} for state in states]


def weighted(weights: list[dict[str, Tensor]], part: Callable[[int], float]) -> dict[str, Tensor]:
    """The sum of the weights after each update, times their part."""
    return {name: sum(part(k) * weights[k][name] for k in range(STEPS + 1)) for name in weights[0]}  # type: ignore[misc]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert float((got[name].double() - value).abs().max()) < tolerance, name


@pytest.mark.parametrize(("kind", "decay"), DECAYS.items())
def test_an_exponential_average_is_the_sum_of_all_weights_by_its_decay(
    runs: Path, digits: Path, weights: list[dict[str, Tensor]], kind: str, decay: float
) -> None:
    expected = weighted(weights, lambda k: decay ** (STEPS - k) * (1 - decay if k else 1))
    assert_close(whole_state(runs / "alone", digits, kind, STEPS), expected, 1e-6)


@pytest.mark.parametrize(("kind", "length"), LENGTHS.items())
def test_a_power_average_weights_each_step_by_the_integral_of_the_papers_function_over_it(
    runs: Path, digits: Path, weights: list[dict[str, Tensor]], kind: str, length: float
) -> None:
    power = exponent_of(length) + 1  # of the integral of (p / n^p) tau^(p - 1)
    expected = weighted(weights, lambda k: (k**power - max(k - 1, 0) ** power) / STEPS**power)
    assert_close(whole_state(runs / "alone", digits, kind, STEPS), expected, 1e-6)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_gives_the_power_function_the_length_that_was_asked_for(length: float) -> None:
    updates = np.arange(1, 100_001, dtype=np.float64)
    part, times = of_updates(Weighting(100_000, length), updates), updates / 100_000
    assert part.sum() == pytest.approx(1)
    assert np.sqrt((part * times**2).sum() - (part * times).sum() ** 2) == pytest.approx(length, rel=1e-4)
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.01)  # as the paper has them
    assert exponent_of(0.1) == pytest.approx(6.94, abs=0.01)


def test_averages_are_the_same_on_any_ranks_and_bit_for_bit_after_a_resume(runs: Path, digits: Path) -> None:
    assert curve(runs / "split") == pytest.approx(curve(runs / "alone"), abs=1e-6, rel=0)
    for kind in (*DECAYS, *LENGTHS):
        alone, split, resumed = (whole_state(runs / run, digits, kind, STEPS) for run in ("alone", "split", "resumed"))
        assert all(torch.equal(value, split[name]) for name, value in resumed.items()), kind
        alone.pop("blocks.0.attn.qkv.bias"), alone.pop("blocks.1.attn.qkv.bias")  # no gradient but rounding for keys
        assert_close(split, alone, 1e-5)


def test_an_average_is_chosen_by_its_decay_or_its_length(runs: Path, digits: Path, tmp_path: Path) -> None:
    for kind, decay in DECAYS.items():
        assert_is(load_model(runs / "alone", ema_decay=decay).state_dict(), runs, digits, kind)
    export_checkpoint(runs / "alone", tmp_path / "half", ema_decay=0.5)
    assert_is(load_file(tmp_path / "half/model.safetensors"), runs, digits, "ema_decay_0_5")
    assert_is(load_model(runs / "alone", ema_length=0.1).state_dict(), runs, digits, "ema_length_0_1")
    with pytest.raises(UserError, match=r"--ema-decay 0\.7: this run has averages with decay 0\.9, 0\.99, 0\.5; choos"):
        load_model(runs / "alone", ema_decay=0.7)
    with pytest.raises(UserError, match=r"--ema-length 0\.2: this run has averages of length 0\.05, 0\.1; choose"):
        load_model(runs / "alone", ema_length=0.2)
    with pytest.raises(UserError, match=r"--ema-decay 0\.9 has no effect with .*half, one set of weights; leave"):
        load_model(tmp_path / "half", ema_decay=0.9)


def assert_is(tensors: dict[str, Tensor], runs: Path, digits: Path, kind: str) -> None:
    for name, value in whole_state(runs / "alone", digits, kind, STEPS).items():
        if kind == "ema" and name.endswith(".threshold"):
            continue  # that average has its own: tests/engine/test_weights.py
        assert torch.equal(tensors[name.removeprefix("buffer.")].flatten(), value.flatten()), (kind, name)


def sample_both(rank: int, ranks: int, run: Path, out: Path) -> list[str]:
    plain, cpu = SamplingSettings(str(run), num=2, steps=2, batch_size=2), torch.device("cpu")
    launch = Launch(rank, ranks, rank, "environment")
    for name, settings in {"plain": plain, "long": replace(plain, ema_length=0.1)}.items():
        sample_to_folder(settings, out / name, cpu, launch)
    with pytest.raises(UserError) as refused:
        sample_to_folder(plain, out / "long", cpu, launch)
    return [json.loads((out / name / "sampling.json").read_text())["weights"] for name in ("plain", "long")] + [
        str(refused.value)
    ]


def test_samples_are_of_the_average_that_was_chosen_and_their_folder_says_which(runs: Path, tmp_path: Path) -> None:
    [[plain, long, refused]] = run_ranks(1, sample_both, runs / "alone", tmp_path)
    assert plain != long
    assert "its images have ema_length 0.1, not None; give --ema-length 0.1, or another --out" in refused


def test_an_average_of_any_length_is_made_of_the_stored_ones(
    runs: Path, digits: Path, weights: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    ended = start(
        "diffmoe_dist.convert", "--to", "safetensors", "--checkpoint", runs / "alone", "--ema-length", "0.07",
        "--out", tmp_path / "made", folder=tmp_path,
    )[0]  # fmt: skip
    assert ended.wait() == 0, ended.stderr
    assert "step-00000020 (average of length 0.07, of 40 stored ones, 0.00% apart from it) is now in" in ended.stdout
    power = exponent_of(0.07) + 1
    expected = weighted(weights, lambda k: (k**power - max(k - 1, 0) ** power) / STEPS**power)
    got = load_file(tmp_path / "made/model.safetensors")
    assert_close(got, expected, 1e-5)
    source = json.loads((tmp_path / "made/config.json").read_text())["source"]
    assert source["ema_length"] == 0.07 and sum(part["coefficient"] for part in source["averages"]) == pytest.approx(1)
    export_checkpoint(runs / "alone", tmp_path / "stored", ema_length=0.05)
    assert_is(load_file(tmp_path / "stored/model.safetensors"), runs, digits, "ema_length_0_05")


def test_few_checkpoints_make_no_average_far_from_the_stored_ones(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--ema-length 0\.2: the 4 averages in .* give one that is \d+% apart from it"):
        export_checkpoint(runs / "split", tmp_path / "out", ema_length=0.2)
    with pytest.raises(UserError, match=r"--ema-length 0\.4: choose a number above 0, at most 0\.28"):
        export_checkpoint(runs / "split", tmp_path / "out", ema_length=0.4)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_after_skipped_updates_alone_counts_once(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "split/checkpoints", tmp_path / "checkpoints")
    newest = complete_checkpoints(tmp_path / "checkpoints")[-1]
    state, sums = newest / "state.json", newest / "SHA256SUMS"
    before = file_sha256(state)
    state.write_text(json.dumps({**json.loads(state.read_text()), "skipped": 10}))
    sums.write_text(sums.read_text().replace(before, file_sha256(state)))
    made = read_average(newest, 0.07)[2]
    assert {name for name, _ in made.sources} == {newest.name} and sum(made.sources.values()) == pytest.approx(1)


def test_coefficients_are_those_of_the_papers_closed_form_for_a_long_run() -> None:
    updates, lengths, wanted = [2_000 * n for n in range(1, 11)], (0.05, 0.1), Weighting(20_000, 0.07)
    stored = [Weighting(last, length) for last in updates for length in lengths]
    numbers, error = fit(stored, wanted)

    def product(a: Weighting, b: Weighting) -> float:  # of two power functions, EDM2 eq. 150
        first, later = (a, b) if a.updates <= b.updates else (b, a)
        p, q = exponent_of(first.length), exponent_of(later.length)
        return (p + 1) * (q + 1) * (first.updates / later.updates) ** q / ((p + q + 1) * later.updates)

    among = np.array([[product(a, b) for b in stored] for a in stored])
    published = np.linalg.solve(among, [product(a, wanted) for a in stored])
    rows = np.stack([of_updates(weighting, np.arange(1.0, 20_001.0)) for weighting in stored])
    ours, theirs = np.array(numbers) @ rows, published @ rows
    assert 0 < error < 0.02 and sum(numbers) == pytest.approx(1)
    assert np.linalg.norm(ours - theirs) < 0.002 * np.linalg.norm(theirs)


def test_a_resume_may_drop_an_average_but_not_begin_one(runs: Path, digits: Path, tmp_path: Path) -> None:
    from diffmoe_dist.data.open import open_data

    def resume(**ema: Any) -> None:
        config = tiny_config(runs / "alone", digits, {**AVERAGED, "ema": ema, "train": {"micro_batch_size": 16}})
        progress_from(complete_checkpoints(runs / "alone/checkpoints")[-1], config, open_data(config), 1)

    resume(decay=0.9, lengths=[0.1])
    with pytest.raises(
        UserError, match=r"ema\.decay=0\.99, but .* has that average in ema\.decays, beside ema\.decay=0\.9;"
    ):
        resume(decay=0.99)
    with pytest.raises(UserError, match=r"ema\.lengths are 0\.9, \[0\.7\] and \[\], but .* has averages by 0\.9, "):
        resume(decay=0.9, decays=[0.7])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "--to safetensors --checkpoint x --weights model --ema-length 0.1",
            "--weights and --ema-length: each",
        ),
        ("--from dit x --config y --ema-decay 0.9", "--ema-decay has no effect with --from, which names its file"),
        ("--inspect x --ema-decay 0", "--ema-decay has no effect with --inspect"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(tmp_path: Path, words: str, complaint: str) -> None:
    ended = start("diffmoe_dist.convert", *words.split(), "--out", tmp_path / "out", folder=tmp_path)[0]
    assert ended.wait() == 2 and complaint in ended.stderr


@pytest.mark.parametrize(
    ("ema", "complaint"),
    [
        ({"decays": [1.0]}, r"ema\.decays=\[1\.0\] must be different numbers in \[0, 1\)"),
        ({"decays": [0.5, 0.5]}, r"ema\.decays=\[0\.5, 0\.5\] must be different"),
        ({"lengths": [0.3]}, r"ema\.lengths=\[0\.3\] must be different numbers above 0, at most 0\.28"),
    ],
)
def test_impossible_averages_are_refused(tmp_path: Path, ema: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        tiny_config(tmp_path, tmp_path, {"ema": ema})
