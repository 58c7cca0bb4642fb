"""Checkpoints that know no ranks: saved by any number of them, loaded by any other, at any expert-parallel size.

DeepSpeed's own checkpoints lose stacked experts and do not change shape, so the state goes through
torch.distributed.checkpoint instead. Every tensor is stored flattened; each rank writes the intervals it owns and reads
the intervals it needs (`sharded_state`), without ever gathering a tensor.

    checkpoints/step-00000100/
        state.json     step, images seen, and what a resume is checked against
        config.yaml    the resolved settings
        class_names.json   what the labels of its data are called, where they have names
        .metadata, *.distcp
        SHA256SUMS     of all of them
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from diffmoe_dist.config import CheckpointConfig, Config, EMAConfig, load_config, save_config
from diffmoe_dist.data.class_names import NAMES_NAME, NO_NAMES, ClassNames
from diffmoe_dist.engine.fragment_io import check_files, check_stored, load_fragments, stored_names, write_fragments
from diffmoe_dist.engine.progress import SUMS, Progress, complete_checkpoints, read_sums
from diffmoe_dist.engine.run_folder import Claim
from diffmoe_dist.engine.sharded_state import BUFFER, EMA, EMA_BUFFER, Fragment, buffers, weights
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import file_sha256, flush_directory, write_atomically, write_json
from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.freezing import frozen_parameters
from diffmoe_dist.parallel.topology import from_first_rank, on_first_rank

Spread = Callable[[DiT, Config], None]
_ROOM = 1.02  # of the tensors' bytes: names, metadata, what a file system keeps for itself


class CheckpointError(Exception):
    """A checkpoint could not be written, for lack of space or the like; the ones before are as they were."""


def save_checkpoint(
    folder: Path,
    fragments: Sequence[Fragment],
    progress: Progress,
    config: Config,
    claim: Claim,
    group: dist.ProcessGroup | None = None,
    class_names: ClassNames = NO_NAMES,
) -> None:
    """Write a checkpoint to `folder`/step-N; collective. It is complete when its folder has that name.

    The newest `checkpoint.keep` complete checkpoints are left, and those of every `checkpoint.keep_every`-th step.

    Args:
        fragments: what this rank owns; over all ranks every element of every tensor once.
        claim: the right to publish it, asked on the first rank.
        group: all ranks, on gloo.

    Raises:
        CheckpointError: the disk is full or refuses; on every rank.
        UserError: another attempt has taken the run over; on every rank.
    """
    final = folder / f"step-{progress.step:08d}"
    unfinished = folder / f".unfinished-{final.name}"
    size = torch.tensor(sum(fragment.data.nbytes for fragment in fragments))
    dist.all_reduce(size, group=group)
    on_first_rank(lambda: _make_room(folder, unfinished, int(size), claim), group)
    try:
        written = write_fragments(unfinished, fragments, group)
    except CheckpointException as error:
        on_first_rank(claim.check, group)  # a newer attempt removes what this one has begun
        on_first_rank(lambda: shutil.rmtree(unfinished, ignore_errors=True), group)  # what it holds of a full disk
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise CheckpointError(f"checkpoint {final}: {cause.strerror} ({cause.filename or folder})") from None
        raise
    sums: list[dict[str, str]] | None = [{}] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(written, sums, group=group)
    on_first_rank(lambda: _publish(unfinished, final, progress, config, class_names, claim, sums or []), group)


def _make_room(folder: Path, unfinished: Path, size: int, claim: Claim) -> None:
    """Remove what runs that were killed have left, and see that there is space."""
    claim.check()
    try:
        for remains in (*folder.glob(".unfinished-*"), *folder.glob(".removing-*")):
            shutil.rmtree(remains)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free / 1e9
        needed = size * _ROOM / 1e9
        if free < needed:
            raise CheckpointError(
                f"checkpoint folder {folder}: {free:.3g} GB are free, a checkpoint needs {needed:.3g} GB"
            )
        unfinished.mkdir()
    except OSError as error:
        raise CheckpointError(f"checkpoint folder {folder}: {error.strerror}") from None


def _publish(
    unfinished: Path,
    final: Path,
    progress: Progress,
    config: Config,
    class_names: ClassNames,
    claim: Claim,
    sums: list[dict[str, str]],
) -> None:
    try:
        claim.check()  # first: what a newer attempt has removed would look like a folder that is not shared
        check_files(unfinished)
        save_config(config, unfinished / "config.yaml")
        write_json(unfinished / "state.json", asdict(progress))
        written = [".metadata", "config.yaml", "state.json"]
        if class_names:
            write_json(unfinished / NAMES_NAME, class_names.to_json())
            written.append(NAMES_NAME)
        own = {name: file_sha256(unfinished / name) for name in written}
        write_sums(unfinished, {name: value for part in (*sums, own) for name, value in part.items()})
        claim.check()
        if final.exists():  # torn by hand, or damaged, else the run would have started from it
            _remove(final)
        unfinished.rename(final)
        flush_directory(final.parent)
        # Later ones are damaged, else the run would have started from them: they stand in for none.
        valid = [found for found in complete_checkpoints(final.parent) if _step_of(found) <= progress.step]
        for old in checkpoints_to_delete(valid, config.checkpoint):
            _remove(old)
    except OSError as error:
        raise CheckpointError(f"checkpoint {final}: {error.strerror} ({error.filename})") from None


def checkpoints_to_delete(checkpoints: list[Path], settings: CheckpointConfig) -> list[Path]:
    """Those to remove of complete checkpoints, oldest first."""
    every = settings.keep_every
    return [old for old in checkpoints[: -settings.keep] if not every or _step_of(old) % every]


def newest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with newer ones.

    Collective where a process group exists: each file is read by one rank.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = complete_checkpoints(folder)
    if dist.is_initialized():
        found = from_first_rank(found)
    complaints: list[str] = []
    for checkpoint in reversed(found):
        damage = verify_checkpoint(checkpoint)
        if damage is None:
            return checkpoint, complaints
        complaints.append(f"checkpoint {checkpoint} is damaged ({damage})")
    if complaints:
        raise UserError(f"{complaints[0]}, and no other one is valid; remove {folder} to begin at step 0")
    return None, []


def verify_checkpoint(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, if something is; collective where a process group exists."""
    if not dist.is_initialized():
        return _damage(checkpoint, 0, 1)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _damage(checkpoint, dist.get_rank(), len(found)))
    return next((damage for damage in found if damage is not None), None)


def _damage(checkpoint: Path, rank: int, ranks: int) -> str | None:
    """What is wrong with the files that this rank checks, every `ranks`-th."""
    name = SUMS
    try:
        sums = read_sums(checkpoint)
        for needed in (".metadata", "config.yaml", "state.json"):
            if needed not in sums:
                return f"{SUMS} lacks {needed}"
        for name in sorted(sums)[rank::ranks]:
            if Path(name).name != name or file_sha256(checkpoint / name) != sums[name]:
                return f"{name} is not what was written: another SHA-256 than in {SUMS}"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read: {error}"
    return None


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """SHA256SUMS, which `sha256sum --check` reads too."""
    write_atomically(folder / SUMS, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoint(directory: str | Path) -> Path:
    """The checkpoint meant by a run folder (its newest) or a step folder.

    Raises:
        UserError: there is none.
    """
    directory = Path(directory)
    if (directory / "state.json").is_file():
        return directory
    found = complete_checkpoints(directory / "checkpoints")
    if not found:
        raise UserError(f"checkpoint {directory}: no complete checkpoint there; give a run folder or a step-N folder")
    return found[-1]


def read_checkpoint_model(
    checkpoint: Path,
    device: str | torch.device,
    kind: str | Callable[[EMAConfig], str] = EMA,
    overrides: Sequence[str] = (),
    spread: Spread | None = None,
) -> tuple[DiT, Config]:
    """The model of a checkpoint in eval mode, and the settings it was trained with, `overrides` applied.

    Args:
        kind: EMA or another one of `ema.averages`, or MASTER for the weights themselves; all fp32. A function chooses
            by the settings, once they are known to be what was written.
        spread: edits the model before it has any memory, to hold its rank's experts alone; collective then.

    Raises:
        UserError: it is damaged. Another one is not taken in its place: its images would be another step's.
    """
    damage = verify_checkpoint(checkpoint)
    if damage is not None:
        raise UserError(f"checkpoint {checkpoint} is damaged ({damage}); remove that folder, or give an older step-N")
    config = load_config(checkpoint / "config.yaml", overrides, stored=True)
    if not isinstance(kind, str):
        kind = kind(config.ema)
    with torch.device("meta"):
        model = DiT(config)
        if spread is not None:
            spread(model, config)
    frozen = frozen_parameters(config)
    # Before there is memory for sizes in config.yaml.
    check_stored(checkpoint, stored_tensors(checkpoint, model, kind, frozen))
    model.to_empty(device="cpu")
    # Fills every tensor, the position table too.
    load_fragments(checkpoint, stored_tensors(checkpoint, model, kind, frozen))
    return model.to(device).eval().requires_grad_(False), config


def stored_tensors(checkpoint: Path, model: DiT, kind: str, frozen: Collection[str] = ()) -> list[Fragment]:
    """The weights of a kind, and the buffers with them: the average of a finished run has thresholds of its own."""
    own = stored_names(checkpoint, EMA_BUFFER) if kind == EMA else set()
    found = buffers(model)
    names = [buffer.name.replace(BUFFER, EMA_BUFFER, 1) for buffer in found]
    both = zip(found, names, strict=True)
    renamed = [replace(buffer, name=name) if name in own else buffer for buffer, name in both]
    return weights(model, kind, frozen) + renamed


def has_thresholds_of_average(checkpoint: Path) -> bool:
    """Whether a run ended here, whose last act is to find the capacity thresholds of its average."""
    return bool(stored_names(checkpoint, EMA_BUFFER))


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it: a process that is killed in between leaves no half-deleted `step-N`."""
    hidden = checkpoint.with_name(f".removing-{checkpoint.name}")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)
