"""slurm/train_xl.sh as it ships, on a real Slurm cluster of three virtual nodes, meets what ends a run of weeks.

A disturbed run must end with the loss curve of the undisturbed one, bit for bit on the same ranks and experts.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from data_tools.latents import LatentSettings, encode_latents
from diffmoe_dist.config import load_config
from tests.data.folders import png, random_images, write_folder
from tests.data.test_latents import save_autoencoder
from tests.machine import ROOT
from tests.slurm.cluster import PATH, Cluster, missing

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

STEPS, ENDLESS = 60, 1_000_000
CPU_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")


class Run:
    """A job of a training script on CPU nodes."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        shards: Path,
        *options: str,
        nodes: Sequence[str] = CPU_NODES,
        script: Sequence[str] = ("slurm/train_xl.sh",),
        steps: int = ENDLESS,
        overrides: Sequence[str] = (),
        scratch: str = "",
    ) -> None:
        self.cluster = cluster
        self.folder = folder
        self.output = folder.with_suffix(".out")
        self.config = folder.with_suffix(".yaml")
        self.set_steps(steps)
        self.job = cluster.submit(
            *nodes, f"--output={self.output}", *options, *script, "checkpoint.every=10", "log.every=1", *overrides,
            DEVICE="cpu", CONFIG=self.config, RUN_DIR=folder, SHARDS=shards, PYTHON=sys.executable,
            LOCAL_SCRATCH=scratch, LATENTS="",
        )  # fmt: skip

    def set_steps(self, steps: int) -> None:
        """For attempts that start from now on.

        An attempt that is to be disturbed has no last step: however late the disturbance comes, it finds it running.
        """
        settings = OmegaConf.load(ROOT / "configs/debug/global_pool.yaml")
        settings.train.steps = steps
        OmegaConf.save(settings, self.config)

    def wait_for_step(self, step: int) -> None:
        """Wait until the first attempt has taken a step; the next one is to end at step STEPS."""
        self.wait_for_log(f"step {step}/{ENDLESS} ")
        self.set_steps(STEPS)

    def log(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for_log(self, text: str) -> None:
        self.cluster.wait_until(lambda: text in self.log(), f"'{text}' in the log")

    def steps(self) -> list[int]:
        """As the log has them, in their order."""
        return [int(step) for step in re.findall(r"step (\d+)/\d+ ", self.log())]

    def end(self) -> tuple[str, int]:
        """Wait for the job's end: its state, and how often it was restarted."""
        state = self.cluster.wait(self.job)
        return state, int(self.cluster.job(self.job)["Restarts"])

    def curve(self) -> list[tuple[int, float]]:
        """The first STEPS steps and their losses."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines][:STEPS]

    def checkpoints(self) -> list[int]:
        """Their steps."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(lab: Cluster) -> Iterator[Cluster]:
    """With an empty queue and all nodes idle."""
    yield lab
    lab.reset()


@pytest.fixture(scope="module")
def undisturbed(lab: Cluster, tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Run:
    run = Run(lab, tmp_path_factory.mktemp("undisturbed") / "run", digits, steps=STEPS)
    run.end()
    return run


def test_two_nodes_train_until_the_run_is_marked_as_done(undisturbed: Run) -> None:
    assert undisturbed.end() == ("COMPLETED", 0), undisturbed.log()
    assert [step for step, _ in undisturbed.curve()] == list(range(1, STEPS + 1))
    assert json.loads((undisturbed.folder / "DONE").read_text())["step"] == STEPS
    assert "2 x cpu" in undisturbed.log()


def test_all_processes_share_one_set_of_experts_and_shards_are_read_from_the_nodes_own_disk(
    cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path
) -> None:
    scratch = "/dev/shm" if cluster.namespaces else ""  # without namespaces the nodes have one disk
    run = Run(
        cluster, tmp_path / "run", digits, "--nodes=2", "--ntasks-per-node=2", script=("slurm/train.sh", "S"), steps=3,
        scratch=scratch,
    )  # fmt: skip
    assert run.end() == ("COMPLETED", 0), run.log()
    config = load_config(run.folder / "config.yaml")
    assert config.parallel.expert == 4
    assert "4 x cpu" in run.log()
    assert "precision fp32, 4 GPUs share one set of experts" in run.log()
    assert str(config.data.shards).startswith(scratch)
    losses, expected = [[loss for _, loss in one.curve()[:3]] for one in (run, undisturbed)]
    assert losses == pytest.approx(expected, abs=1e-6)  # other ranks sum in another order


@pytest.mark.parametrize("moment", ["training", "import"])
def test_a_signal_before_the_time_limit_costs_no_step_while_in(
    moment: str, cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path
) -> None:
    run = Run(cluster, tmp_path / "run", digits)
    if moment == "training":
        run.wait_for_step(5)
    else:
        run.wait_for_log("share one set of experts")  # and the processes are about to start
        time.sleep(0.5)
    # What `--signal=B:USR1@300` does, without Slurm's clock, which looks at time limits every 30 s.
    cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    run.wait_for_log("requeued after exit code 75")
    run.set_steps(STEPS)  # not before: ranks that read the settings at two moments would disagree
    cluster.restart(run.job)
    assert run.end() == ("COMPLETED", 1), run.log()
    assert run.curve() == undisturbed.curve(), run.log()
    saved = r"step-\d+" if moment == "training" else "none"  # by a process that finds STOP before its first step
    assert re.findall(f"requeued after exit code 75, newest checkpoint: {saved}", run.log())
    assert run.steps() == list(range(1, run.steps()[-1] + 1)), "no step was taken twice"


def test_a_preempted_job_comes_back(cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path) -> None:
    run = Run(cluster, tmp_path / "run", digits, "--partition=preemptible")
    run.wait_for_step(5)
    urgent = cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.restart(run.job)
    assert cluster.wait(urgent) == "COMPLETED"
    assert run.end() == ("COMPLETED", 1), run.log()
    assert run.curve() == undisturbed.curve(), run.log()


@pytest.mark.parametrize(
    ("lost", "notice"), [("of the batch script and rank 0", False), ("of rank 1", True)], ids=["rank 0", "rank 1"]
)
def test_a_run_goes_on_elsewhere_after_the_loss_of_the_node(
    lost: str, notice: bool, cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path
) -> None:
    run = Run(cluster, tmp_path / "run", digits)
    run.wait_for_step(15)
    node = cluster.nodes_of(run.job)[["of the batch script and rank 0", "of rank 1"].index(lost)]
    cluster.power_off(node, notice)
    cluster.restart(run.job)
    assert run.end() == ("COMPLETED", 1), run.log()
    assert node not in cluster.nodes_of(run.job)
    assert run.curve() == undisturbed.curve(), run.log()


def test_a_run_that_loses_a_node_for_good_goes_on_with_one_and_with_two_again(
    cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path
) -> None:
    # The batch's half is the pool, so that the micro-batch that the command names fits two ranks only.
    half, last = ("train.micro_batch_size=8",), 40
    expected = Run(cluster, tmp_path / "whole", digits, overrides=half, steps=last)
    assert expected.end() == ("COMPLETED", 0), expected.log()
    run = Run(
        cluster,
        tmp_path / "run",
        digits,
        nodes=("--nodes=1-2", "--cpus-per-task=1", "--gpus-per-node=0"),
        overrides=half,
    )
    run.wait_for_log(f"step 12/{ENDLESS} ")
    first, lost = cluster.nodes_of(run.job)
    [spare] = {*cluster.names} - {first, lost}
    cluster.drain(spare)
    cluster.power_off(lost)
    cluster.restart(run.job)
    run.wait_for_log(
        "on 1 rank, after 2: train.micro_batch_size 8 -> 16 (asked for: 8), parallel.expert 2 -> 1, 2 micro"
    )
    run.wait_for_log(f"step {run.steps()[-1] + 3}/")
    assert cluster.nodes_of(run.job) == [first]
    cluster.resume(spare)
    cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    run.wait_for_log("requeued after exit code 75")
    run.set_steps(last)
    cluster.restart(run.job, times=2)
    assert run.end() == ("COMPLETED", 2), run.log()
    assert cluster.nodes_of(run.job) == sorted([first, spare])
    assert "on 2 ranks, after 1: train.micro_batch_size 16 -> 8, parallel.expert 1 -> 2, 2 micro" in run.log()
    steps, losses = zip(*run.curve()[:last], strict=True)
    expected_steps, expected_losses = zip(*expected.curve(), strict=True)
    assert steps == expected_steps and losses == pytest.approx(expected_losses, abs=1e-6), run.log()


def test_a_cancelled_job_stays_cancelled_and_has_saved(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    run = Run(cluster, tmp_path / "run", digits)
    run.wait_for_step(5)
    cluster.run("scancel", run.job)
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader").strip(), "the queue is empty")
    assert run.end() == ("CANCELLED", 0), run.log()
    assert run.checkpoints()[-1] == run.steps()[-1]
    assert "requeued" not in run.log()


def test_a_program_that_crashes_twice_at_the_same_checkpoint_is_not_requeued(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    run = Run(cluster, tmp_path / "run", digits, overrides=("optim.lr=1e30", "checkpoint.every=1"))
    cluster.restart(run.job)
    assert run.end() == ("FAILED", 1), run.log()
    assert re.findall(r"requeued after exit code 1, newest checkpoint: step-\d+", run.log())
    assert "exit code 1: not requeued" in run.log()


def test_a_mistake_in_the_settings_is_not_requeued(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    run = Run(cluster, tmp_path / "run", digits, overrides=("moe.num_experts=7.5",))
    assert run.end() == ("FAILED", 0), run.log()
    assert run.log().count("error: moe.num_experts") == 1, "told once, before the processes start"
    assert "a mistake in the settings: not requeued" in run.log()


def test_the_deepspeed_launcher_trains_on_a_hostfile_through_its_slurm_runner(
    cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path
) -> None:
    if not cluster.namespaces:
        pytest.skip("no network namespaces here, so no host has a node's name")
    train = (
        "deepspeed --hostfile hostfile --no_ssh_check --master_addr $(head -n 1 hostfile | cut -d ' ' -f 1) "
        f"--launcher slurm --launcher_args=--ntasks-per-node=1 {ROOT}/diffmoe_dist/train.py "
        f"--config {ROOT}/configs/debug/global_pool.yaml data.shards={digits} run_dir=run device=cpu "
        "train.steps=3 log.every=1"
    )
    script = f"scontrol show hostnames $SLURM_JOB_NODELIST | sed 's/$/ slots=1/' >hostfile; exec {train}"
    environment: dict[str, str | Path] = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "PYTHONPATH": ROOT}
    output = tmp_path / "out"
    job = cluster.submit(*CPU_NODES, f"--chdir={tmp_path}", f"--output={output}", f"--wrap={script}", **environment)
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    assert "2 x cpu" in output.read_text()
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [loss for _, loss in undisturbed.curve()[:3]]


def test_the_sampling_script_draws_images_on_two_nodes_and_keeps_them_from_other_options(
    cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    output, out = tmp_path / "out", tmp_path / "samples"

    def sample(*options: str) -> str:
        job = cluster.submit(
            *CPU_NODES, f"--output={output}", "slurm/sample.sh", *options,
            DEVICE="cpu", CHECKPOINT=undisturbed.folder, OUT=out, NUM="4", PYTHON=sys.executable,
        )  # fmt: skip
        return cluster.wait(job)

    assert sample("--steps", "2") == "COMPLETED", output.read_text()
    assert np.load(out / "samples.npz")["arr_0"].shape == (4, 8, 8, 1)
    assert '"precision": "fp32"' in output.read_text()
    drawn = (out / "samples.npz").stat()
    assert sample("--steps", "2") == "COMPLETED", output.read_text()
    assert "has these 4 images already" in output.read_text()
    assert sample("--steps", "3") == "FAILED"
    assert f"error: --out {out}: its images have steps 2, not 3" in output.read_text()
    assert (out / "samples.npz").stat() == drawn


def _mpi(cluster: Cluster) -> dict[str, str]:
    # Without namespaces the nodes have one host name and one /dev/shm: OpenMPI's shared memory would collide.
    launcher = "mpirun" if cluster.namespaces else "mpirun --mca btl tcp,self"
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {"LAUNCHER": launcher, "PYTHON": sys.executable, **as_root}


def test_the_shards_of_mpi_processes_on_two_nodes_have_the_bytes_of_one_process(
    cluster: Cluster, tmp_path: Path, digits: Path
) -> None:
    output, out = tmp_path / "out", tmp_path / "shards"
    options = (*CPU_NODES, "--ntasks-per-node=2", f"--output={output}")
    job = cluster.submit(
        *options, "slurm/prepare_shards.sh", "--samples-per-shard", "512",
        SOURCE="digits", OUT=out, **_mpi(cluster),
    )  # fmt: skip
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    names = sorted(path.name for path in digits.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert all((out / name).read_bytes() == (digits / name).read_bytes() for name in names)
    assert Image.open(f"{out}.png").size[0] > 100


def test_the_latents_of_two_nodes_have_the_bytes_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", [{"png": png(image)} for image in random_images(4, 16)], [1, 2, 1])
    vae, output = save_autoencoder(tmp_path / "vae"), tmp_path / "out"
    encode_latents(base, tmp_path / "one", LatentSettings(vae, base.image_size or 16, batch_size=2))
    job = cluster.submit(
        *CPU_NODES, f"--output={output}", "slurm/encode.sh", "latents", "--vae", vae, "--batch-size", "2",
        "--size", "16", BASE=base.folder, DEVICE="cpu", **_mpi(cluster),
    )  # fmt: skip
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    assert "encode-latents on 2 processes (cpu)" in output.read_text()
    one, two = (
        {path.name: path.read_bytes() for path in tmp_path.glob(f"{name}/*")} for name in ("one", "base-latents")
    )
    assert one == two and len(one) > 4


def test_a_node_that_was_cut_off_and_goes_on_running_publishes_no_checkpoint(
    cluster: Cluster, undisturbed: Run, tmp_path: Path, digits: Path
) -> None:
    if not cluster.namespaces:
        pytest.skip("no network namespaces here, so no cable to pull")
    # All ranks on that node: they lack nothing, and write to the same disk as the newer attempt.
    run = Run(cluster, tmp_path / "run", digits, "--nodes=1", "--ntasks-per-node=2", overrides=("parallel.expert=1",))
    run.wait_for_step(12)
    [node] = cluster.nodes_of(run.job)
    cluster.cut(node)
    cluster.signal_all(node, "STOP")
    frozen_at = run.steps()[-1]
    cluster.declare_down(node)
    cluster.restart(run.job)
    claim = run.folder / "attempt"
    cluster.wait_until(lambda: claim.read_text().strip() == f"{run.job}.1", "the newer attempt has taken over")
    cluster.signal_all(node, "CONT")
    run.wait_for_log("another attempt has taken over")
    assert run.end() == ("COMPLETED", 1), run.log()
    cluster.cut(node, "up")
    steps, losses = zip(*run.curve(), strict=True)
    expected_steps, expected = zip(*undisturbed.curve(), strict=True)
    # Every rank has all experts here, and sums their gradients in another order.
    assert steps == expected_steps and losses == pytest.approx(expected, abs=1e-6), run.log()
    assert run.checkpoints()[-1] == max(STEPS, *range(10, frozen_at + 1, 10)), "the older attempt would have gone on"
    assert claim.read_text().strip() == f"{run.job}.1"
