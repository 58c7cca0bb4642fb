"""The page about a run: what is recorded for it, and that a browser shows it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffmoe_dist.config import build_config
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.diffusion.samplers import Guidance
from diffmoe_dist.engine.checkpoint import find_checkpoint, read_checkpoint_model
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.moe import MoELayer
from diffmoe_dist.report import main
from diffmoe_dist.report_page import figures, samples
from diffmoe_dist.report_page.page import write_report
from diffmoe_dist.report_page.samples import FinishedSamples, sample_for_page
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.generate import SamplerSettings, generate
from diffmoe_dist.sampling.routing_trace import Passes, RoutingTrace, overlap_of_rules, recorded
from diffmoe_dist.sampling.settings import SamplingSettings
from tests.commands import start
from tests.distributed import run_ranks
from tests.engine.runs import TINY, train_all
from tests.report_page.browser import CHROMIUM, open_in_browser

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "global_pool": {"train": {"steps": 60}, "log": {"every": 10}},
    "token_choice": {"moe": {"router": "token_choice", "num_experts": 4}, "train": {"steps": 20}},
    "dense": {"moe": {"router": "dense", "num_experts": None}, "train": {"steps": 5}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(1, train_all, digits, [(folder / kind, settings) for kind, settings in KINDS.items()])
    return folder


def asked(run: Path, **settings: Any) -> SamplingSettings:
    return SamplingSettings(str(run), **{"num": 20, **settings})


def random_model(**moe: Any) -> tuple[DiT, Any]:
    config = build_config(TINY, {"run_dir": "r", "data": {"shards": "s"}, "moe": moe})
    model = DiT(config)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    for layer in model.moe_layers:
        router: Any = layer.router
        if hasattr(router, "threshold"):
            router.threshold.fill_(0.5)
    return model.eval(), config


def trace_of(model: DiT, config: Any, guidance: Guidance, labels: list[int]) -> RoutingTrace:
    objective = build_objective(config)
    with recorded(model, objective) as recorder:
        numbers, sampling = list(range(len(labels))), SamplerSettings("euler", steps=4, guidance=guidance)
        generate(model, objective, numbers, ClassLabels(labels, 10), sampling, recorder)
    return recorder.trace()


@pytest.mark.parametrize("router", ["global_pool", "token_choice", "expert_choice", "prototype"])
def test_what_is_recorded_is_what_the_layers_did(router: str) -> None:
    model, config = random_model(router=router)
    labels = [3, 1, 4]
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def count(layer: MoELayer, inputs: Any, output: Any) -> None:
        """Token by token, expert by expert, in loops."""
        experts_NS, assignments_NE = np.zeros((3, 16), int), np.zeros((3, 4), int)
        for token, expert in zip(output[1].token_index.tolist(), output[1].expert_index.tolist(), strict=True):
            experts_NS[token // 16, token % 16] += 1
            assignments_NE[token // 16, expert] += 1
        seen.append((experts_NS, assignments_NE))

    handle = model.moe_layers[0].register_forward_hook(count)
    trace = trace_of(model, config, Guidance(2.0), labels)
    handle.remove()

    assert trace.conditional.progress_P.tolist() == [0, 0.25, 0.5, 0.75] and trace.null is not None
    for step in range(4):
        experts_NS, assignments_NE = seen[2 * step + 1]  # the null pass is the first of two
        assert np.array_equal(trace.conditional.experts_PLNS[step, 0], experts_NS)
        assert np.array_equal(trace.conditional.assignments_PLNE[step, 0, :, :4], assignments_NE)
        unconditional = 1 if router == "prototype" else 0  # its expert of images without a class
        assert np.array_equal(trace.null.experts_PLNS[step, 0], seen[2 * step][0] + unconditional)
    assert (trace.overlap_PL is not None) == (router == "global_pool")


def test_a_mixed_pass_is_recorded_apart_as_two_passes_are() -> None:
    model, config = random_model()
    two = trace_of(model, config, Guidance(2.0), [3, 1, 4])
    one = trace_of(model, config, Guidance(2.0, one_pass=True), [3, 1, 4])

    assert one.null is not None and two.null is not None
    for mixed, apart in ((one.conditional, two.conditional), (one.null, two.null)):
        assert np.array_equal(mixed.experts_PLNS, apart.experts_PLNS)
        assert np.array_equal(mixed.assignments_PLNE, apart.assignments_PLNE)


def test_the_overlap_of_the_rules_is_their_common_pairs_over_all_their_pairs() -> None:
    model, _ = random_model()
    router: Any = model.moe_layers[0].router
    x_TD = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    null_T = torch.zeros(48, dtype=torch.bool)
    pairs: dict[str, set[tuple[int, int]]] = {}
    for rule in ("count", "threshold"):
        router.inference = rule
        routing = router(x_TD, null_T)
        pairs[rule] = set(zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True))
    router.inference = "static"

    overlap = overlap_of_rules(router, x_TD, null_T)

    assert len(pairs["count"]) == len(pairs["threshold"]), "both take as many tokens"
    assert overlap == len(pairs["count"] & pairs["threshold"]) / len(pairs["count"] | pairs["threshold"])
    assert 0 < overlap < 1 and router.inference == "static"


def test_the_capacity_of_a_trained_model_varies_over_the_sampling_steps(runs: Path) -> None:
    model, config = read_checkpoint_model(find_checkpoint(runs / "global_pool"), CPU)
    trace = trace_of(model, config, Guidance(), [number % 10 for number in range(20)])

    capacity_P = trace.conditional.capacity_by_layer.mean(axis=1)
    assert np.ptp(capacity_P) > 0.05 and capacity_P.min() > 0


@pytest.mark.parametrize(("kind", "images"), [("global_pool", 12), ("token_choice", 12), ("dense", 4)])
def test_the_page_is_complete_in_itself(kind: str, images: int, runs: Path) -> None:
    page = write_report(runs / kind, asked(runs / kind), CPU)
    text = page.read_text()

    assert len(re.findall(r'<img src="data:image/(?:png|svg\+xml);base64,', text)) == images
    without_images = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"<script|https?:|\bsrc=|@import|url\(", without_images)
    assert re.findall(r'href="([^"]*)"', without_images) == ["data:,"]
    assert "config.yaml" in text and "router: " + kind in text
    assert ("it has no experts" in text) == (kind == "dense")
    assert ("Every expert takes the same number of tokens" in text) == (kind == "global_pool")
    assert ("Expert load in training" in text) == (kind != "dense")


def test_samples_of_other_weights_are_refused(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "sampling.json").write_text('{"weights": "0123", "overrides": []}')
    with pytest.raises(UserError, match=r"--samples .*: they are of other weights than"):
        write_report(runs / "dense", FinishedSamples.open(tmp_path, num=4), CPU)
    with pytest.raises(UserError, match=r"--samples .*: no readable sampling\.json there"):
        write_report(runs / "dense", FinishedSamples.open(tmp_path / "nowhere", num=4), CPU)


def test_a_page_samples_as_the_options_of_sampling_say(runs: Path) -> None:
    run = runs / "global_pool"
    settings = asked(run, num=4, cfg_scale=3.0, steps=7, seed=5, classes=(8, 2), overrides=("moe.inference=count",))

    text = write_report(run, settings, CPU).read_text()

    shown = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", text))
    assert (shown["steps"], shown["CFG scale"], shown["seed"], shown["inference rule"]) == ("7", "3.0", "5", "count")
    assert "4 images, sampled for this page in one batch." in text
    assert "Columns are classes: class 8, class 2." in text
    with pytest.raises(UserError, match="--classes 10: this model knows the classes 0 to 9"):
        write_report(run, asked(run, classes=(10,)), CPU)


def test_a_page_shows_the_first_images_of_finished_samples(runs: Path, tmp_path: Path) -> None:
    run = runs / "global_pool"
    ended = start(
        "diffmoe_dist.sample", "--checkpoint", run, "--out", tmp_path / "samples", "--num", "8", "--steps", "3",
        "--seed", "2", "--batch-size", "4", "--recalibrate", "1", "--device", "cpu", "moe.inference=threshold",
        folder=tmp_path,
    )[0]  # fmt: skip
    assert ended.wait() == 0, ended.stderr

    found = sample_for_page(find_checkpoint(run), FinishedSamples.open(tmp_path / "samples", num=5), CPU)

    stored = np.load(tmp_path / "samples" / "samples.npz")
    assert found.labels == stored["arr_1"][:5].tolist()
    assert np.abs(found.images_NHWC.astype(int) - stored["arr_0"][:5]).max() <= 1, "a batch of another size"


def test_a_page_of_several_runs_shows_images_of_one_class_and_noise(runs: Path, tmp_path: Path) -> None:
    folders = [runs / kind for kind in KINDS]
    ended = start(
        "diffmoe_dist.report", "--run", runs, "--out", tmp_path / "page", "--images", "2", "--steps", "3", "--device",
        "cpu", folder=tmp_path,
    )[0]  # fmt: skip
    assert ended.wait() == 0, ended.stderr

    text = (tmp_path / "page" / "comparison.html").read_text()

    shown = re.findall(r'<img src="([^"]*)" alt="class (\d), ([ABC])">', text)
    assert [(label, letter) for _, label, letter in shown] == [(c, letter) for c in "01" for letter in "ABC"]
    assert "The images of a box start from one noise." in text and "Averaged weights of other steps" in text
    dense = sample_for_page(find_checkpoint(folders[2]), asked(folders[2], num=2, steps=3), CPU)
    letter = "ABC"[sorted(folders).index(folders[2])]
    assert [uri for uri, _, of in shown if of == letter] == [figures.image_uri(image) for image in dense.images_NHWC]
    assert re.search(r"<td>C in sampling</td>(<td>[^<]*</td>){3}", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "S", "--steps", "7"), "--steps 7 has no effect with --samples S; leave it out"),
        (("--samples", "S", "moe.inference=count"), "moe.inference=count has no effect with --samples S; leave it out"),
        (("--samples", "S", "--tokenizer", "T"), "--tokenizer T has no effect without --encoder; remove it"),
        (("--encoder", "E"), "--encoder has no effect without --prompts or --prompt; remove it"),
        (("--images", "0"), "--images 0: choose at least 1"),
    ],
)
def test_options_without_effect_are_refused(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "--run", "R", *options])
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        main()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: chromium)")
def test_a_browser_shows_every_figure_without_a_complaint(runs: Path, tmp_path: Path) -> None:
    page = write_report(runs / "global_pool", asked(runs / "global_pool"), CPU)
    widths = "onload = () => { document.title = 'widths ' + [...document.images].map(i => i.naturalWidth).join(' ') }"

    document, log = open_in_browser(page, widths, tmp_path)

    found = re.search(r"<title>widths ([0-9 ]+)</title>", document)
    assert found is not None
    assert len(found[1].split()) == 12 and all(int(width) > 100 for width in found[1].split())
    assert "CONSOLE" not in log
    _, log_of_faulty = open_in_browser(page, "console.error('seen')", tmp_path)
    assert "CONSOLE" in log_of_faulty, "else the line above would tell nothing"


def test_names_with_dollars_are_no_formulas() -> None:
    passes = Passes(np.array([0.0]), np.ones((1, 1, 2, 4), np.uint8), np.ones((1, 1, 2, 3), np.int32))
    name = ["costs $5_$6", "$ \\alp $"].__getitem__
    figures.as_pixels(figures.class_figure(passes, [0, 1], name))
    images = np.zeros((2, 8, 8, 3), np.uint8)
    figures.as_pixels(figures.experts_over_images_figure(passes, images, [0, 1], name))


def test_a_page_is_not_made_of_images_that_are_not_finite() -> None:
    model, config = random_model()
    with torch.no_grad():
        for parameter in model.final_layer.parameters():
            parameter.fill_(3e38)
    job = {"sampler": "euler", "steps": 2, "cfg_scale": 1.0, "cfg_channels": "all", "cfg_interval": None}
    with pytest.raises(
        FloatingPointError, match="report: 3 images are not finite, first image 0 at function evaluation"
    ):
        samples._sample(model, config, ClassLabels([0], 10), {**job, "one_pass": False, "seed": 0}, 3)
