"""What `pip install` gives: an import from any folder, the console scripts, types."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffmoe_dist
from tests.machine import ROOT

SCRIPTS = ("train", "sample", "evaluate", "plan", "convert", "report", "board", "data")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed a wheel into, of the files that the Dockerfile copies."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            *names, place = line.split()[1:]
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / place)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *wheel], check=True)
    (built,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(built)], check=True)
    return target


def run(command: list[str], installed: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_an_installed_package_is_imported_from_any_folder(installed: Path, tmp_path: Path) -> None:
    told = run(
        [sys.executable, "-c", "import data_tools, diffmoe_dist as d; print(d.__version__, d.__file__)"],
        installed,
        tmp_path,
    )

    assert told.stdout.split() == [diffmoe_dist.__version__, str(installed / "diffmoe_dist/__init__.py")], told.stderr


def test_no_module_of_the_package_hides_another_package_from_a_command_that_is_started_by_its_path() -> None:
    """`deepspeed --launcher slurm .../diffmoe_dist/train.py` puts the package's folder first on Python's path."""
    names = {path.stem for path in (ROOT / "diffmoe_dist").iterdir() if not path.stem.startswith("_")} - {"py"}
    found = {name: importlib.util.find_spec(name) for name in names}
    assert not [name for name, spec in found.items() if spec is not None and spec.origin is not None]


def test_every_package_and_its_types_are_in_the_wheel(installed: Path) -> None:
    for package in ("diffmoe_dist", "data_tools"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= {str(path.relative_to(installed)) for path in (installed / package).rglob("*.py")}
        assert (installed / package / "py.typed").is_file()


def test_every_configuration_is_in_the_wheel_and_found_from_any_folder(installed: Path, tmp_path: Path) -> None:
    files = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*")}
    shipped = installed / "diffmoe_dist/configs"
    assert files == {path.relative_to(shipped) for path in shipped.rglob("*.*")} and not shipped.is_symlink()
    plan = (
        "import sys; from diffmoe_dist.config import load_config; print(load_config(sys.argv[1], training=False).seed)"
    )
    for name in ("configs/imagenet256/global_pool_l.yaml", "debug/dense.yaml"):
        told = run([sys.executable, "-c", plan, name], installed, tmp_path)
        assert told.stdout == "0\n", told.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_console_script_answers(name: str, installed: Path, tmp_path: Path) -> None:
    help_text = run([str(installed / f"bin/diffmoe-{name}"), "--help"], installed, tmp_path)

    assert help_text.returncode == 0 and help_text.stdout.startswith("usage: "), help_text.stderr


def test_a_console_script_ends_on_a_mistake_as_the_command_does(installed: Path, tmp_path: Path) -> None:
    refused = run(
        [str(installed / "bin/diffmoe-plan"), "--config", "none.yaml", "--nodes", "1", "--gpus-per-node", "1"],
        installed,
        tmp_path,
    )

    assert refused.returncode == 2
    assert re.fullmatch(r"error: .*none\.yaml.*\n", refused.stderr)


def test_the_recipes_of_containers_run_the_pip_commands_of_the_installation_page() -> None:
    """What pip is given there is what a reader is told to give it; a fresh environment was made of it by hand."""
    page = (ROOT / "docs/install.md").read_text()
    (told,) = re.findall(r"## With pip\n\n```sh\n(.*?)```", page, re.DOTALL)
    docker, apptainer = ((ROOT / name).read_text() for name in ("Dockerfile", "diffmoe.def"))

    assert re.findall(r"(?m)^RUN (pip install .*)$", docker) == told.splitlines()
    assert re.findall(r"(?m)^ +(pip install .*)$", apptainer) == told.splitlines()
    torch = re.findall(r"(?m)^torch==.*$", (ROOT / "requirements.txt").read_text())
    assert told.splitlines()[0] == f"pip install {torch[0]}"


def test_the_recipes_of_containers_have_one_image_the_same_packages_and_the_same_files() -> None:
    docker = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    apptainer = (ROOT / "diffmoe.def").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()

    assert re.findall(r"(?m)^FROM (\S+)$", docker) == re.findall(r"(?m)^From: (\S+)$", apptainer)
    assert re.findall(r"apt-get install ([^&\n]*?) *(?:&&|$)", docker, re.MULTILINE) == re.findall(
        r"apt-get install (.*)$", apptainer, re.MULTILINE
    )
    copied = [name for line in re.findall(r"(?m)^COPY (.*)$", docker) for name in line.split()[:-1]]
    assert copied == re.findall(r"(?m)^    (\S+) /opt/diffmoe_dist/\1$", apptainer)
    assert [f"!{name}" for name in copied] == [line for line in ignored if line.startswith("!")]
    assert re.findall(r"(?m)^USER (\S+)$", docker) == ["diffmoe"]


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {diffmoe_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_begins_with_the_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert versions[0] == diffmoe_dist.__version__
