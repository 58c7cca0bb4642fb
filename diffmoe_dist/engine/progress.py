"""How far a run is, as its checkpoints say without their tensors: read before torch is imported."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffmoe_dist.config import Earlier, load_config
from diffmoe_dist.config.elastic import FITTED
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256, read_json_object, refuse_irregular

SUMS = "SHA256SUMS"
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, and what must not change between a checkpoint and its resume."""

    step: int
    images_seen: int
    seed: int
    data_fingerprint: str
    pool_samples: int  # samples that compete in one token pool
    micro_steps: int  # forward passes of an optimizer step, each with pools of its own
    skipped: int = 0  # of the steps, those whose update was left out because something was not finite
    # What the settings said where they were fitted to the ranks (`config.elastic`); None: version 0.1 wrote it.
    asked: dict[str, int | str] | None = None

    @property
    def updates(self) -> int:
        return self.step - self.skipped


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; unfinished ones do not count."""
    found = [path for path in folder.glob("step-*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def read_sums(folder: Path) -> dict[str, str]:
    """File name to SHA-256. Raises OSError and ValueError."""
    lines = refuse_irregular(folder / SUMS).read_text().splitlines()
    return {name: value for value, name in (line.split("  ", 1) for line in lines)}


def read_progress(checkpoint: Path) -> Progress:
    """What state.json holds. Raises UserError where that is damaged, or no progress of this checkpoint."""
    try:
        progress = Progress(**read_json_object(checkpoint / "state.json"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint}: state.json is damaged ({error}); remove that folder") from None
    for name, value in asdict(progress).items():
        if name == "data_fingerprint":
            accepted, rule = isinstance(value, str) and value != "", "text"
        elif name == "asked":
            accepted, rule = value is None or _is_asked(value), f"values of {', '.join(FITTED)}"
        else:
            least = 1 if name in ("pool_samples", "micro_steps") else 0
            accepted, rule = type(value) is int and least <= value < 2**63, f"a whole number from {least}"
        if not accepted:
            raise UserError(
                f"checkpoint {checkpoint}: state.json says {name} {value!r:.40}, not {rule}; remove that folder"
            )
    named = _STEP_FOLDER.fullmatch(checkpoint.name)
    if progress.skipped > progress.step or (named and int(named[1]) != progress.step):
        raise UserError(
            f"checkpoint {checkpoint}: state.json says step {progress.step}, of which {progress.skipped} were skipped; "
            "it is of another checkpoint; remove that folder"
        )
    return progress


def _is_asked(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {*FITTED}
        and all(type(wish) in (int, str) for wish in value.values())
    )


def earlier_ranks(run_dir: Path) -> Earlier | None:
    """How the ranks of a run shared its batch at its newest checkpoint that can be read; None: there is none.

    Of its files only the two small ones are looked at; the others are when the run has started.
    """
    for checkpoint in reversed(complete_checkpoints(run_dir / "checkpoints")):
        try:
            sums = read_sums(checkpoint)
            if any(file_sha256(checkpoint / name) != sums.get(name) for name in ("state.json", "config.yaml")):
                continue
            progress = read_progress(checkpoint)
            config = load_config(checkpoint / "config.yaml", training=False, stored=True)
        except (OSError, ValueError, UserError):
            continue  # a run starts from the one before, and says why
        if not config.train.micro_batch_size:  # edited by hand: no run has saved that
            continue
        return Earlier(checkpoint.name, config, progress.pool_samples, progress.micro_steps, progress.asked)
    return None
