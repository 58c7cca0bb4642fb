"""Draw a run's loss curve: `python -m diffmoe_dist.report --run RUN_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from diffmoe_dist.errors import CommandParser, run_command

DESCRIPTION = """\
Draw the losses and the gradient norm of a run into RUN_DIR/loss.png, and say where to look further.

  python -m diffmoe_dist.report --run runs/demo
"""


def main() -> None:
    parser = CommandParser(prog="diffmoe_dist.report", description=DESCRIPTION)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="the folder of a training run")
    arguments = parser.parse_args()

    from diffmoe_dist.evaluation.loss_curve import draw_loss_curve

    picture = draw_loss_curve(arguments.run)
    sys.stdout.write(f"loss curve:     {picture}\n")
    sys.stdout.write(f"TensorBoard:    tensorboard --logdir {arguments.run / 'tensorboard'}\n")


if __name__ == "__main__":
    run_command(main)
