"""Train a diffusion transformer: `python -m diffmoe_dist.train --config FILE [key=value ...]`."""

from __future__ import annotations

import argparse
from functools import partial

from diffmoe_dist.config import check_world, load_config
from diffmoe_dist.errors import CommandParser, run_command
from diffmoe_dist.launch import detect_launch

DESCRIPTION = """\
Train a (mixture-of-experts) diffusion transformer. Running the same command again, or with more train.steps, on any
number of processes, resumes from run_dir.

  python -m diffmoe_dist.train --config configs/debug/global_pool.yaml data.shards=shards/digits
  deepspeed --num_gpus 8 --module diffmoe_dist.train --config FILE parallel.expert=8
  torchrun --nproc-per-node 8 -m diffmoe_dist.train --config FILE parallel.expert=8
  mpirun -n 8 python -m diffmoe_dist.train --config FILE parallel.expert=8
"""


def main() -> None:
    parser = CommandParser(prog="diffmoe_dist.train", description=DESCRIPTION)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML settings; configs/ has examples")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.overrides)
    launch = detect_launch()
    check_world(config, launch.world_size)

    # torch and deepspeed take seconds to import; a mistake in the settings is told before.
    from diffmoe_dist.parallel.topology import choose_device, from_first_rank, start_process_group, stop_process_group

    device = choose_device(config.device, launch)

    from diffmoe_dist.engine.build import build_trainer, find_start, open_data, prepare_run_dir
    from diffmoe_dist.evaluation.generate import check_pixels, training_grid
    from diffmoe_dist.parallel.expert_parallel import create_topology

    index = open_data(config)
    if config.sample.every:
        check_pixels(config)
    prepare_run_dir(config)
    start = find_start(config, index, launch.world_size)
    launch = start_process_group(device)
    start = from_first_rank(start)
    topology = create_topology(launch, device, config.parallel.expert)
    draw_samples = partial(training_grid, config=config, rank=launch.rank, world_size=launch.world_size)
    draw_figures = None
    if config.log.figures_every:
        from diffmoe_dist.evaluation.training_figures import training_figures  # imports matplotlib

        draw_figures = partial(training_figures, config=config, rank=launch.rank, world_size=launch.world_size)
    trainer = build_trainer(config, topology, index, start, draw_samples, draw_figures)
    trainer.train()
    trainer.close()
    stop_process_group()


if __name__ == "__main__":
    run_command(main)
