"""One set of settings of sampling, and the options by which every command sets them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from diffmoe_dist import evaluate
from diffmoe_dist.command import CommandParser
from diffmoe_dist.diffusion import samplers
from diffmoe_dist.errors import UserError
from diffmoe_dist.sampling.settings import SAMPLERS, SamplingSettings, add_sampling_options, settings_from
from tests.machine import ROOT

EVERY_OPTION = """
--num 3 --steps 4 --cfg-scale 2.5 --seed 5 --sampler heun --batch-size 6 --recalibrate 7 --cfg-channels 3
--cfg-interval 0.1 0.9 --one-pass --labels random --classes 1,2 --expert 8 --png --decoder d --prompts p --prompt q
--negative-prompt n --encoder e --tokenizer t --geneval --precision bf16 --time-shift 3 --ema-decay 0.9 --ema-length 0.1
moe.inference=static
"""


def read(*words: str, **options: Any) -> SamplingSettings:
    parser = CommandParser(prog="test")
    add_sampling_options(parser, **options)
    return settings_from(parser.parse_args(words), "run")


def test_without_an_option_every_setting_has_its_default() -> None:
    assert read() == SamplingSettings("run")


def test_every_setting_has_an_option_and_is_what_was_given() -> None:
    settings = read(*EVERY_OPTION.split())

    assert settings == SamplingSettings(
        "run", num=3, steps=4, cfg_scale=2.5, seed=5, sampler="heun", batch_size=6, overrides=("moe.inference=static",),
        recalibrate=7, cfg_channels=3, cfg_interval=(0.1, 0.9), one_pass=True, labels="random", classes="1,2",
        expert=8, png=True, decoder="d", prompts="p", prompt="q", negative_prompt="n", encoder="e", tokenizer="t",
        geneval=True, precision="bf16", time_shift=3.0, ema_decay=0.9, ema_length=0.1,
    )  # fmt: skip
    plain = SamplingSettings("run")
    same = {field.name for field in fields(plain) if getattr(plain, field.name) == getattr(settings, field.name)}
    assert same == {"checkpoint", "batch_size_option"}, "each is given here"


def test_the_samplers_to_choose_from_are_all_that_there_are() -> None:
    assert set(SAMPLERS) == set(samplers.SAMPLERS)


def test_the_number_of_images_has_a_name_that_launchers_do_not_take_for_their_own() -> None:
    assert read("--num-images", "9").num == read("--num", "9").num == 9


def test_a_command_whose_batch_size_means_something_else_names_its_own_option_in_messages() -> None:
    settings = read("--num", "1", "--sampling-batch-size", "0", batch_size_option="--sampling-batch-size")

    with pytest.raises(UserError, match=r"^--sampling-batch-size 0: choose at least 1$"):
        settings.check()


def test_an_option_that_has_no_effect_in_a_command_is_refused_by_it() -> None:
    with pytest.raises(UserError, match=r"unrecognized arguments: --recalibrate"):
        read("--num", "1", "--recalibrate", "4", leave_out=("recalibrate",))


@pytest.mark.parametrize("case", ["file", "reference"])
@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("--cfg-interval", "0.1", "0.9"), "--cfg-interval 0.1 0.9"),
        (("--classes", "1,2"), "--classes 1,2"),
        (("--one-pass",), "--one-pass"),
        (("--sampling-batch-size", "5"), "--sampling-batch-size 5"),
        (("moe.inference=static",), "moe.inference=static"),
    ],
)
def test_evaluate_refuses_options_of_sampling_where_it_samples_nothing(
    case: str, option: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"file": ["--samples", "x.npz", "--reference", "y.npz"], "reference": ["--make-reference", "y.npz"]}[case]
    shards = ["--shards", "shards"] if case == "reference" else []
    monkeypatch.setattr(sys, "argv", ["evaluate", *words, *shards, *option])

    with pytest.raises(UserError) as refused:
        evaluate.check(evaluate.parse())

    assert str(refused.value).startswith(f"{named} has no effect with --")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("sample", ["--checkpoint", "r", "--out", "o", "--num", "1", "--steps", "0"], "--steps 0: choose at least 1"),
        (
            "sample",
            ["--checkpoint", "r", "--out", "o", "--num", "9" * 12],
            f"--num {'9' * 12}: choose at most 100000000",
        ),
        (
            "sample",
            ["--checkpoint", "r", "--out", "o", "--num", "1", "--cfg-scale=nan"],
            "--cfg-scale nan: choose 0 or more",
        ),
        (
            "sample",
            ["--checkpoint", "r", "--out", "o", "--num", "1", "--cfg-scale=inf"],
            "--cfg-scale inf: choose 0 or more",
        ),
        (
            "sample",
            ["--checkpoint", "r", "--out", "o", "--num", "1", "--cfg-scale=-1"],
            "--cfg-scale -1.0: choose 0 or more",
        ),
        (
            "sample",
            ["--checkpoint", "r", "--out", "o", "--num", "1", "--time-shift=0"],
            "--time-shift 0.0: choose a number above 0",
        ),
        ("evaluate", ["--samples", "tests", "--sampler", "TYPO"], "argument --sampler: invalid choice: 'TYPO'"),
        (
            "interval_search",
            ["--checkpoint", "r", "--thresholds", "0.5", "--out", "o", "moe.inference=count"],
            "moe.inference=count has no effect: the search sets moe.inference",
        ),
    ],
)
def test_a_mistake_in_the_options_is_one_line_before_torch_is_imported(
    command: str, words: list[str], message: str
) -> None:
    program = f"""if True:
        import sys
        from diffmoe_dist.{command} import main
        from diffmoe_dist.errors import UserError
        sys.argv = {["command", *words]!r}
        try:
            main()
        except UserError as error:
            print(error)
        assert "torch" not in sys.modules
    """
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(message)
    assert len(ended.stdout.splitlines()) == 1
