"""Train a diffusion transformer: `python -m diffmoe_dist.train --config FILE [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from diffmoe_dist.command import CommandParser, run_command
from diffmoe_dist.engine.preemption import StopSignals
from diffmoe_dist.errors import STOPPED_EXIT_CODE, UserError
from diffmoe_dist.launch import Launch, detect_launch

if TYPE_CHECKING:
    import torch

    from diffmoe_dist.config import Config
    from diffmoe_dist.data.dataset import TrainingData
    from diffmoe_dist.data.stream import StreamedData
    from diffmoe_dist.engine.trainer import Periodic

DESCRIPTION = """\
Train a (mixture-of-experts) diffusion transformer. Running the same command again, or with more train.steps, on any
number of processes, resumes from run_dir.

  python -m diffmoe_dist.train --config configs/debug/global_pool.yaml data.shards=shards/digits
  deepspeed --num_gpus 8 --module diffmoe_dist.train --config FILE parallel.expert=8
  torchrun --nproc-per-node 8 -m diffmoe_dist.train --config FILE parallel.expert=8
  mpirun -n 8 python -m diffmoe_dist.train --config FILE parallel.expert=8

SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 on any process, or a file RUN_DIR/STOP, make the run save and leave; a second
signal makes the process leave at once. docs/runs.md lists the exit codes.
"""


def main() -> int:
    stop = StopSignals()  # before everything that takes time
    parser = CommandParser(prog="diffmoe_dist.train", description=DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML settings; configs/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--dry-run", action="store_true", help="build it without memory, check it all, train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: for N processes (default: 1)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args()

    from diffmoe_dist.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.log.wandb:
        from diffmoe_dist.engine.wandb_run import check_installed

        check_installed()
    if arguments.dry_run:
        dry_run(config, 1 if arguments.world_size is None else arguments.world_size)
    elif arguments.world_size is not None:
        raise UserError(f"--world-size {arguments.world_size} has no effect without --dry-run; remove it")
    else:
        return train(config, stop)
    return 0


def dry_run(config: Config, world_size: int) -> None:
    if world_size < 1:
        raise UserError(f"--world-size {world_size}: choose at least 1")

    from diffmoe_dist.config import for_ranks, wishes
    from diffmoe_dist.engine.progress import earlier_ranks

    asked, config = wishes(config), for_ranks(config, world_size, earlier_ranks(Path(config.run_dir)))
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed need not look for a GPU

    from diffmoe_dist.engine.dry_run import build_on_meta

    sys.stdout.write(build_on_meta(config, world_size, asked))


def train(config: Config, stop: StopSignals) -> int:
    """Returns the exit code."""
    from diffmoe_dist.config import flat_settings, for_ranks, orders, own_router, wishes
    from diffmoe_dist.engine.progress import earlier_ranks

    launch, earlier = detect_launch(), earlier_ranks(Path(config.run_dir))
    asked, ordered = wishes(config), [] if earlier is None else orders(config, earlier)
    config = for_ranks(config, launch.world_size, earlier)

    # torch and deepspeed take seconds to import; a mistake in the settings ends the run before.
    device = open_device(config, launch)

    from diffmoe_dist.data.open import open_data, with_text_encoder
    from diffmoe_dist.engine.build import build_trainer, fit_device
    from diffmoe_dist.engine.resume import find_start
    from diffmoe_dist.engine.run_folder import claim_run_dir, prepare_run_dir
    from diffmoe_dist.engine.trainer import RunGuards
    from diffmoe_dist.engine.watchdog import SLOW_FACTOR, Watchdog, abort_all_on_failure, collective_timeout
    from diffmoe_dist.files import full_disk_told
    from diffmoe_dist.parallel.agreement import check_agreement
    from diffmoe_dist.parallel.expert_parallel import create_topology
    from diffmoe_dist.parallel.topology import from_first_rank, start_process_group, stop_process_group

    data = open_data(config, device)
    config = with_text_encoder(config, data)
    if earlier is not None and earlier.ranks != launch.world_size:
        config = fit_device(config, data, launch.world_size, device, ordered)
    periodic = open_periodic_jobs(config, data, device)
    prepare_run_dir(config)
    run_dir = Path(config.run_dir)
    watchdog = Watchdog(config.train.hang_timeout, run_dir / "logs" / f"rank-{launch.rank}.log")
    watchdog.set_deadline("start-up", SLOW_FACTOR)
    with stop.leaving_at_once():
        launch = start_process_group(device, collective_timeout(config.train.hang_timeout))
    with abort_all_on_failure(watchdog), full_disk_told(f"run_dir={run_dir}"):
        check_agreement(
            {**flat_settings(config), "the device": device.type, "the data's fingerprint": data.fingerprint},
            "start all ranks with the same settings, code and data",
            own_router(config),
        )
        claim = claim_run_dir(run_dir)
        start = from_first_rank(find_start(config, data, launch.world_size, asked))
        topology = create_topology(launch, device, config.parallel.expert, config.parallel.tensor)
        trainer = build_trainer(config, topology, data, start, periodic, RunGuards(claim, stop.asked, watchdog))
        finished = trainer.train()
        stop.ignore()
        trainer.close()
    stop_process_group()
    watchdog.stop()
    claim.release()
    return 0 if finished else STOPPED_EXIT_CODE


def open_device(config: Config, launch: Launch) -> torch.device:
    """This rank's device, set up as the settings say; to be called before deepspeed is imported."""
    from diffmoe_dist.model.precision import check_device
    from diffmoe_dist.parallel.topology import choose_device, set_deterministic

    if config.parallel.tensor > 1:  # Megatron's exchanges then begin before the products that hide them
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = choose_device(config.device, launch, config.tf32)
    check_device(device, config.precision)
    if config.profile.memory_snapshot and device.type != "cuda":
        raise UserError(f"profile.memory_snapshot=true has no effect on device={device.type}; remove it")
    if config.deterministic:
        set_deterministic(device)
    if config.train.compile:
        from diffmoe_dist.engine.compiling import check_compiler

        check_compiler(device)
    return device


def open_periodic_jobs(config: Config, data: TrainingData | StreamedData, device: torch.device) -> list[Periodic]:
    """What the run does beside its steps, in the order in which it is done.

    Raises:
        UserError: held-out data, decoder or extractor cannot be opened, or do not fit the model.
    """
    from diffmoe_dist.data.dataset import TrainingData
    from diffmoe_dist.data.open import open_held_out
    from diffmoe_dist.engine.trainer import Periodic
    from diffmoe_dist.engine.validation import Validation
    from diffmoe_dist.evaluation.training_scores import open_training_scores
    from diffmoe_dist.sampling.conditions import run_conditions
    from diffmoe_dist.sampling.generate import open_decoder, training_grid

    jobs = []
    held_out = open_held_out(config, data)
    if held_out is not None:
        losses = Validation(config, held_out, device).losses
        jobs.append(Periodic("validation", config.validation.every, losses, in_training_mode=True))
    conditions = run_conditions(config, data)
    if config.sample.every or config.fid.every:
        encoders = data.encoders if isinstance(data, TrainingData) else None
        opened = encoders.autoencoder if encoders else None
        decode = open_decoder(config, config.sample.decoder, "sample.decoder", device, opened)
    if config.fid.every:
        scores = open_training_scores(config, conditions, decode, device)
        jobs.append(Periodic("scoring samples", config.fid.every, scores))
    if config.sample.every:
        grid = partial(training_grid, config=config, conditions=conditions, decode=decode)
        jobs.append(Periodic("sampling", config.sample.every, grid, lambda log, grid, step: log.image(grid, step)))
    if every := config.log.figures_every:
        from diffmoe_dist.report_page.training_figures import training_figures  # imports matplotlib

        figures = partial(training_figures, config=config, conditions=conditions)
        jobs.append(Periodic("drawing figures", every, figures, lambda log, drawn, step: log.figures(drawn, step)))
    return jobs


def run() -> NoReturn:
    """`diffmoe-train`."""
    run_command(main)


if __name__ == "__main__":
    run()
