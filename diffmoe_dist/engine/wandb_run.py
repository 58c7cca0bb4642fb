"""A run of Weights & Biases beside TensorBoard: the same numbers, histograms and pictures, and the settings.

Offline, as $WANDB_MODE does not say otherwise: RUN_DIR/wandb is then uploaded by `wandb sync`. The package brings a
process of its own, which ends with this one, also when that is killed.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from diffmoe_dist.config import Config
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import write_atomically

if TYPE_CHECKING:
    from diffmoe_dist.engine.event_file import Histogram

ID_NAME = "wandb-id"  # in the run folder: a run that is resumed goes on there
PACKAGE = "wandb"


def check_installed() -> None:
    """Refuse log.wandb where the package is missing, before any rank computes."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:  # without an origin: a folder of that name
        raise UserError("log.wandb=true: the package wandb is not installed; pip install wandb, or leave it out")


class WandbRun:
    """All methods that add raise OSError where the package fails, whatever its reason: the run must not."""

    def __init__(self, config: Config, command: str) -> None:
        """Raises UserError where the run cannot be started, as online without a login."""
        mode = os.environ.setdefault("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb: Any = importlib.import_module(PACKAGE)
        self.wandb = wandb
        run_dir = Path(config.run_dir)
        settings: Any = OmegaConf.to_container(OmegaConf.structured(config))
        try:
            self.run = wandb.init(
                id=_run_id(run_dir),
                resume="allow",
                name=run_dir.resolve().name,
                dir=str(run_dir),
                config={**settings, "command": command},
                settings=wandb.Settings(
                    console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True
                ),
            )
            # A step that is taken again after a resume is none to wandb's own count, which only rises.
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
        except Exception as error:
            raise UserError(
                f"log.wandb=true: {PACKAGE} cannot start ({_line(error)}); set WANDB_MODE=offline, or leave it out"
            ) from None

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    def add_images(self, images_HWC: Mapping[str, np.ndarray], step: int) -> None:
        with _as_os_error():
            self._log({name: self.wandb.Image(image.squeeze()) for name, image in images_HWC.items()}, step)

    def add_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        with _as_os_error():
            made = {
                name: self.wandb.Histogram(np_histogram=(histogram.counts, histogram.edges))
                for name, histogram in histograms.items()
            }
            self._log(made, step)

    def close(self) -> None:
        with _as_os_error():
            self.run.finish()

    def _log(self, values: dict[str, Any], step: int) -> None:
        with _as_os_error():
            self.run.log({"step": step, **values})


def _run_id(run_dir: Path) -> str:
    path = run_dir / ID_NAME
    if not path.exists():
        write_atomically(path, secrets.token_hex(4) + "\n")
    return path.read_text().strip()


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # the package's own, and those of its connection
        raise OSError(errno.EIO, f"wandb: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
