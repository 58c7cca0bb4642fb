"""What the pages show is run: every command, every Python example, the output of the planner. Every path exists.

`COMMANDS` says of each command how it is tested, and so what is not. The commands that are run here share one folder
and the order of the pages, as they do for a reader; they are the page's words, with fewer steps.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffmoe_dist.library.export import Parts, export_pipeline
from tests.commands import Command, start
from tests.machine import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Runs:
    """It is run here and ends well."""

    fewer: tuple[str, ...] = ()  # appended to it
    values: tuple[tuple[str, str], ...] = ()  # what stands for the page's FILE


@dataclass(frozen=True)
class Refuses:
    """It is run here, where its input is not, and complains of that alone: so its options are right."""

    complaint: str


@dataclass(frozen=True)
class Elsewhere:
    """A test of another file runs it."""

    test: str


@dataclass(frozen=True)
class NotRun:
    because: str


How = Runs | Refuses | Elsewhere | NotRun
SECONDS = 60.0
TINY = (("FILE", "configs/debug/global_pool.yaml"),)
LAUNCHERS = Elsewhere("tests/test_commands.py::test_training_runs_and_ends_cleanly_under")
DEEPSPEED_ON_NODES = (
    "tests/slurm/test_slurm.py::test_the_deepspeed_launcher_trains_on_a_hostfile_through_its_slurm_runner"
)
SLURM = Elsewhere("tests/slurm/test_slurm.py::test_two_nodes_train_until_the_run_is_marked_as_done")
PREPARATION = Elsewhere(
    "tests/slurm/test_slurm.py::test_the_shards_of_mpi_processes_on_two_nodes_have_the_bytes_of_one_process"
)
SCORES = "tests/evaluation/test_scores.py::test_the_command_scores_a_file_under_a_launcher_against_a_reference_it_made"

# The first pattern that fits the whole command counts.
COMMANDS: dict[str, How] = {
    # environment
    r"git clone REPOSITORY .*|cd diffmoe_dist": NotRun("the place of the repository is the reader's"),
    r"make venv": NotRun("it is how the environment of this test was made"),
    r"\. \.venv/bin/activate": NotRun("it changes the reader's shell alone"),
    r"pre-commit install": NotRun("it changes the reader's clone; its hooks are the commands of make lint"),
    r"make (test|test-fast|lint|site|demo|demo-text)": NotRun("too long for a test; .ci/run runs it"),
    r"make bench": NotRun("takes ten minutes; tests/test_benchmarks.py runs each of its benchmarks at a tiny size"),
    r"make gpu.*": NotRun("needs a GPU; tests/test_benchmarks.py and tests/gpu run what a CPU can of it"),
    r"pip wheel .*|rm wheels/.*|pip install --no-index .*": NotRun("for a machine without network"),
    r"pip install .*": NotRun("needs a package index; tests/test_packaging.py installs the wheel"),
    r"(conda|uv|docker|apptainer) .*": NotRun("needs conda, uv or an engine of containers; see docs/install.md"),
    r"hf download .*": NotRun("needs the Hugging Face Hub"),
    r".* diffmoe_dist.board .*": Elsewhere(
        "tests/test_board.py::test_tensorboard_shows_runs_by_their_names_and_its_server_ends_with_the_command"
    ),
    r"tail -n 1 .*": NotRun("they look at what a run of the reader's writes"),
    # data
    r"python -m data_tools pack digits .*": Runs(),
    # docs/finetuning.md, all of it
    r"cat > .*": Runs(),
    r"python -m write_digits": Runs(),
    r"python -m data_tools pack digits/\S+ .*": Runs(),
    r"python -m data_tools (random-encoder|encode-text) shards/ten.*": Runs(),
    r"python -m diffmoe_dist\.train --config (small|captions)\.yaml .*": Runs(
        ("train.steps=1", "train.global_batch_size=8", "validation.every=1", "validation.images=8", "device=cpu")
    ),
    r"python -m diffmoe_dist\.sample --checkpoint runs/(ten|three|captions|plain) .*": Runs(
        ("--num", "2", "--steps", "1", "--recalibrate", "1", "--device", "cpu")
    ),
    r"python -m data_tools (plan|pack) ILSVRC2012_img_train\.tar .*": Refuses(r"SOURCE=ILSVRC2012_img_train\.tar"),
    r"python -m data_tools pack annotations/captions_train2017\.json .*": Refuses(r"captions_train2017\.json"),
    r"python -m data_tools pack ILSVRC2012_img_val\.tar .*": Refuses(r"SOURCE=ILSVRC2012_img_val\.tar"),
    r"python -m data_tools pack ILSVRC shards/.*": Refuses("SOURCE=ILSVRC"),
    r"python -m data_tools (verify|stats|encode-latents) shards/imagenet256.*": Refuses(r"shards/imagenet256"),
    r"mpirun .*data_tools encode-latents .*": Elsewhere(
        "tests/slurm/test_slurm.py::test_the_latents_of_two_nodes_have_the_bytes_of_one_process"
    ),
    r"python -m data_tools encode-(latents|text) shards/coco .*": Refuses(r"shards/coco"),
    # training
    r"python -m diffmoe_dist\.train --config configs/debug/\S+ .*": Runs(("train.steps=2", "device=cpu")),
    r"python -m diffmoe_dist\.train --config configs/t2i/\S+ .*": Refuses(r"(shards/coco|models/sd-vae-ft-ema)"),
    r"python -m diffmoe_dist\.train --config \S+ --dry-run --world-size 8 .*": Refuses(r"shards/imagenet256"),
    r"python -m diffmoe_dist\.train --config FILE --dry-run .*": Runs(
        ("data.shards=shards/digits", "train.global_batch_size=64", "run_dir=runs/dry"), TINY
    ),
    r"(deepspeed --num_gpus|torchrun --nproc-per-node|mpirun -n) [28] .*diffmoe_dist\.train .*": LAUNCHERS,
    r"torchrun --nnodes 2 .*diffmoe_dist\.train .*": NotRun("needs a second node; tried by hand, see docs/cluster.md"),
    r"(.*\S )?sbatch .*slurm/train_\S+.*": SLURM,
    r"(.*\S )?sbatch slurm/prepare_shards\.sh .*": PREPARATION,
    r"(.*\S )?sbatch slurm/sample\.sh .*": Elsewhere(
        "tests/slurm/test_slurm.py::test_the_sampling_script_draws_images_on_two_nodes_and_keeps_them_from_other_options"
    ),
    r"(.*\S )?sbatch .*slurm/encode\.sh .*": Elsewhere(
        "tests/slurm/test_slurm.py::test_the_latents_of_two_nodes_have_the_bytes_of_one_process"
    ),
    r"\$EDITOR .*|cat hostfile|node\d slots=8": NotRun("the reader's editor and file"),
    r"deepspeed --hostfile hostfile --launcher pdsh .*": NotRun("needs ssh; tried by hand, see docs/cluster.md"),
    r"scontrol show hostnames .*|deepspeed --hostfile hostfile --no_ssh_check .*": Elsewhere(DEEPSPEED_ON_NODES),
    # planning, sampling, looking
    r"python -m diffmoe_dist\.plan .*": Runs(),
    r"python -m benchmarks\.planned": Elsewhere(
        "tests/test_benchmarks.py::test_a_page_shows_what_the_planner_says_now"
    ),
    r"python -m diffmoe_dist\.sample --checkpoint runs/demo .*": Runs(("--steps", "2", "--device", "cpu")),
    r"torchrun .* diffmoe_dist\.sample .*": Elsewhere(
        "tests/test_commands.py::test_sampling_gives_the_same_images_on_one_process_and_on_two"
    ),
    r"python -m diffmoe_dist\.sample --checkpoint (RUN|runs/t2i/\S+) .*": Refuses(
        r"checkpoint (RUN|runs/t2i/\S+): no complete checkpoint"
    ),
    r"python -m diffmoe_dist\.report --run runs/imagenet256/.*": Refuses("run runs/imagenet256/global_pool_l"),
    r"python -m diffmoe_dist\.report --run runs/demo .*": Runs(("--device", "cpu")),
    r"python -m diffmoe_dist\.report --run runs/dense .*": Refuses(r"runs/dense/metrics\.jsonl: no such file"),
    r"python -m diffmoe_dist\.report --run 'runs/\*-seed\?' .*": Refuses(r"fits no training run"),
    r"python -m diffmoe_dist\.interval_search .*": Runs(("--num", "4", "--steps", "2", "--device", "cpu")),
    r"python -m diffmoe_dist\.convert --(to|from) diffusers .*": Runs(),
    r"python -m diffmoe_dist\.convert --to safetensors --checkpoint RUN .*": Elsewhere(
        "tests/engine/test_averages.py::test_an_average_of_any_length_is_made_of_the_stored_ones"
    ),
    # evaluation
    r"python -m diffmoe_dist\.evaluate --samples \S+ .*": Refuses(
        r"--(inception|clip|features) \S+: (cannot be read|no config\.json|neither the local folder)"
    ),
    r"python -m diffmoe_dist\.evaluate --make-reference .*": Refuses(r"--inception FILE\.pth: cannot be read"),
    r"torchrun .* diffmoe_dist\.evaluate .*": Elsewhere(SCORES),
    # the study
    r"python -m studies\.routing run .*": NotRun("takes ten hours; tests/studies/test_driver.py tests the driver"),
    r"python -m studies\.routing report": Elsewhere(
        "tests/studies/test_report.py::test_the_page_shows_what_the_committed_results_say"
    ),
    # conversion
    r"python -m diffmoe_dist\.convert --(inspect|from promoe) ckpt_step_500000\.pth .*": Refuses(
        r"(ckpt_step_500000\.pth|promoe-l\.yaml)"
    ),
    r"python -m diffmoe_dist\.convert --(to safetensors|from dit weights/dense/) ?.*": Runs(),
}


@dataclass(frozen=True)
class Shown:
    page: Path
    command: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.command.splitlines()[0]}"


def commands_of(page: Path) -> Iterator[Shown]:
    """The commands of the page's sh blocks: continuation lines joined, comments gone, `a && b` two."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        text = re.sub(r"\\\n\s*", "", block)
        for command in re.findall(r"^cat > [^\n]*<<'END'\n.*?^END$|^[^\n]+$", text, re.DOTALL | re.MULTILINE):
            if "<<" in command:
                yield Shown(page, command)
                continue
            for part in re.sub(r"\s+#.*", "", command).split(" && "):
                yield Shown(page, part.strip())


SHOWN = [shown for page in PAGES for shown in commands_of(page)]


def how_of(command: str) -> tuple[str, How]:
    for pattern, how in COMMANDS.items():
        if re.fullmatch(pattern, command, re.DOTALL):
            return pattern, how
    raise AssertionError(f"{command!r} is in no row of COMMANDS: say there how it is tested, or why it is not")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it after `make demo` and `make demo-text`, of two steps each."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my_metrics.py").write_text("def fid(images_NHWC):\n    return float(images_NHWC.mean())\n")
    for command in (
        "python -m data_tools pack digits shards/digits",
        "python -m diffmoe_dist.train --config configs/digits.yaml data.shards=shards/digits device=cpu train.steps=2 "
        "sample.every=0",
        "python -m data_tools pack shapes shards/shapes",
        "python -m data_tools random-encoder shards/shapes models/random-clip",
        "python -m data_tools encode-text shards/shapes shards/shapes-text --encoder models/random-clip "
        "--max-length 10",
        "python -m diffmoe_dist.train --config configs/t2i/debug.yaml device=cpu train.steps=2 sample.every=0",
    ):
        ended = run(command, folder)
        assert ended.wait(SECONDS) == 0, ended.stderr
    return folder


def run(command: str, folder: Path) -> Command:
    """Start `python -m module ...` in the folder."""
    python, option, module, *words = shlex.split(command)
    assert (python, option) == ("python", "-m"), command
    module = "data_tools.__main__" if module == "data_tools" else module
    outputs = folder / "outputs"
    outputs.mkdir(exist_ok=True)
    (started,) = start(module, *words, folder=outputs, prepare=partial(go_to, folder))
    return started


def go_to(folder: Path, _rank: int) -> None:
    """As `python -m` does: the folder is where modules are found, too."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_a_command_of_a_page_does_what_the_table_says(shown: Shown, clone: Path) -> None:
    _, how = how_of(shown.command)
    if isinstance(how, Runs) and shown.command.startswith("cat > "):
        first, *lines, _ = shown.command.splitlines()
        (clone / first.split()[2]).write_text("\n".join(lines))
    elif isinstance(how, Runs):
        command = shown.command
        for name, value in how.values:
            command = command.replace(name, value)
        ended = run(" ".join([command, *how.fewer]), clone)
        assert ended.wait(SECONDS) == 0, ended.stderr
    elif isinstance(how, Refuses):
        ended = run(shown.command.partition(" > ")[0], clone)
        assert ended.wait(SECONDS) == 2, ended.stderr
        assert re.fullmatch(rf"error: .*{how.complaint}.*\n", ended.stderr)
    elif isinstance(how, Elsewhere):
        path, name = how.test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text()
    else:
        assert how.because


def test_the_table_has_no_row_that_no_page_needs() -> None:
    assert set(COMMANDS) == {how_of(shown.command)[0] for shown in SHOWN}


def test_the_planner_prints_what_the_readme_shows(clone: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (shown,) = re.findall(
        r"^```sh\n(python -m diffmoe_dist\.plan .*?)^```.*?^```text\n(.*?)^```", text, re.DOTALL | re.M
    )
    ended = run(shown[0].replace("\\\n", " "), clone)
    assert ended.wait(SECONDS) == 0, ended.stderr
    printed = ended.stdout.splitlines()
    assert [line for line in shown[1].splitlines() if line.strip() not in ("", "...") and line not in printed] == []


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def names_after(page: str, **given: Any) -> dict[str, Any]:
    """Run the page's Python examples, one after the other; the names they have made."""
    for example in examples(page):
        exec(compile(example, page, "exec"), given)
    return given


def test_the_python_example_of_the_sampling_page_samples_ten_digits(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    made = names_after("docs/sampling.md")

    assert made["made"].images.shape == made["z"].shape == (10, 1, 8, 8)
    strip = np.asarray(Image.open(clone / "digits.png"))
    assert strip.shape == (64, 640) and strip.std() > 10


def test_the_python_example_of_the_readme_runs(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    assert names_after("README.md")["velocity"].shape == (4, 1, 8, 8)


def test_the_python_example_of_the_text_page_samples_two_prompts(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    z = names_after("docs/text.md")["z"]
    assert z.shape == (2, 3, 16, 16) and z.isfinite().all() and not torch.equal(z[0], z[1])


def test_the_python_example_of_the_diffusers_page_samples_three_digits(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    if not Path("pipelines/demo").exists():  # the page's own command has not been run
        export_pipeline("runs/demo", Path("pipelines/demo"), None, Parts())
    made = names_after("docs/diffusers.md")["made"]
    assert len(made.images) == 3 and Image.open(clone / "zero.png").size == (8, 8)


def test_every_python_example_of_the_pages_is_run() -> None:
    """The router of docs/architecture.md: test_own_router.py; the reader of docs/data.md: test_readers.py."""
    with_examples = {str(page.relative_to(ROOT)) for page in PAGES if examples(str(page.relative_to(ROOT)))}
    run_here = {"README.md", "docs/sampling.md", "docs/text.md", "docs/diffusers.md"}
    assert with_examples == run_here | {"docs/architecture.md", "docs/data.md"}


def test_every_page_is_in_the_contents_of_the_site_and_of_the_readme() -> None:
    """Whether the site's links hold, `make site` says."""
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert pages | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} == set(
        re.findall(r"(?m)^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    )
    assert pages <= set(re.findall(r"\((docs/\w+\.md)\)", (ROOT / "README.md").read_text()))


# GenEval's, a run's, and the router that the reader may write
NOT_OURS = re.compile(r"evaluation/evaluate_images\.py|config(-until-step-N)?\.yaml|(.*/)?(NAME|by_place)\.py")


def test_every_source_that_a_page_names_is_there() -> None:
    folders = ("diffmoe_dist", "data_tools", "tests", "benchmarks", "slurm", "configs", "docs", ".github", "studies")
    there = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*")]
    named = {
        (page.name, name)
        for page in PAGES
        if page.name != "log.md"  # a record of what was there then
        for name in re.findall(r"`([\w./-]+\.(?:py|sh|yaml|yml))`", page.read_text())
    }
    assert len(named) > 20
    missing = [pair for pair in sorted(named) if not any(path.endswith(f"/{pair[1]}") for path in there)]
    assert [pair for pair in missing if not NOT_OURS.fullmatch(pair[1])] == []
