"""Checkpoints that training does not wait for: copied to host memory, and written from there by a thread.

`torch.distributed.checkpoint.async_save` would do the same for a state dict: it copies, and runs `save` in a thread of
one worker. The state here is no state dict but intervals of flat partitions, for which its stagers have no use, and a
checkpoint is not complete before it has its sums and its name, which belong to the same thread; so that thread is here.

The copy too is made by the thread, while the next forward and backward run, since nothing changes before the next
update: that update waits for the copy, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames
from diffmoe_dist.engine.checkpoint import CheckpointError, save_checkpoint
from diffmoe_dist.engine.progress import Progress
from diffmoe_dist.engine.run_folder import Claim
from diffmoe_dist.engine.sharded_state import Fragment
from diffmoe_dist.errors import UserError
from diffmoe_dist.logs import logger


class Checkpointer:
    """Writes one checkpoint at a time into run_dir/checkpoints. All methods but `wait_staged` are collective."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        claim: Claim,
        step: int,
        timeout: timedelta,
        class_names: ClassNames = NO_NAMES,
    ) -> None:
        """
        Args:
            step: of the state that the run begins with, which needs no saving.
            timeout: after which a rank gives up waiting for the others.
        """
        self.folder = Path(config.run_dir) / "checkpoints"
        self.config, self.class_names = config, class_names
        self.claim = claim
        self.failed = 0  # checkpoints that could not be written
        self.last = step  # of the newest one that was begun
        # The thread's collectives would otherwise mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread = ThreadPoolExecutor(1, "checkpoint", _use_device, (device,))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: list[Tensor] = []
        self._staging: Future[list[Fragment]] | None = None
        self._writing: Future[None] | None = None

    def save(self, fragments: Sequence[Fragment], progress: Progress) -> None:
        """Begin a checkpoint, once the one before is written."""
        self.wait()
        self.last = progress.step
        ready = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._staging = staging = self._thread.submit(self._stage, fragments, ready)
        self._writing = self._thread.submit(self._write, staging, progress)

    def wait_staged(self) -> None:
        """Return when the state may change again."""
        if self._staging is not None:
            self._staging.result()
            self._staging = None

    def wait(self, must_succeed: bool = False) -> None:
        """Return when nothing is being written any more.

        Raises:
            UserError: another attempt has taken the run over, or `must_succeed` and the checkpoint is not written.
        """
        self.wait_staged()
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointError as error:
            self.failed += 1
            if must_succeed:
                raise UserError(f"{error}; make space and run the same command again") from None

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _stage(self, fragments: Sequence[Fragment], ready: torch.cuda.Event | None) -> list[Fragment]:
        """Copy each flat tensor of the state at once; the fragments are intervals of few of them."""
        flats = _flat_tensors(fragments)
        for flat in list(flats.values())[len(self._host) :]:  # kept: to make it anew would cost more than the copy
            self._host.append(torch.empty(len(flat), dtype=torch.uint8, pin_memory=self._stream is not None))
        copies = dict(zip(flats, self._host, strict=True))
        if self._stream is None or ready is None:
            for storage, flat in flats.items():
                copies[storage].copy_(flat)
        else:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                for storage, flat in flats.items():
                    copies[storage].copy_(flat, non_blocking=True)
            self._stream.synchronize()
        return [replace(fragment, data=_same_place(fragment.data, flats, copies)) for fragment in fragments]

    def _write(self, staging: Future[list[Fragment]], progress: Progress) -> None:
        fragments = staging.result()
        path = self.folder / f"step-{progress.step:08d}"
        try:
            save_checkpoint(self.folder, fragments, progress, self.config, self.claim, self._group, self.class_names)
        except CheckpointError as error:
            logger.warning("%s; the checkpoints before are kept", error)
            raise
        logger.info("saved %s", path)


def _use_device(device: torch.device) -> None:
    """In a new thread: else what it does with CUDA would open a context on the first GPU, whatever the rank's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _storage(view: Tensor) -> int:
    return view.untyped_storage().data_ptr()


def _begin(view: Tensor) -> int:
    """In bytes, within its storage."""
    return int(view.storage_offset()) * view.element_size()


def _flat_tensors(fragments: Sequence[Fragment]) -> dict[int, Tensor]:
    """The bytes of each storage from its first fragment to its last, by storage."""
    views: dict[int, list[Tensor]] = {}
    for fragment in fragments:
        views.setdefault(_storage(fragment.data), []).append(fragment.data)
    flats = {}
    for storage, of_storage in views.items():
        begin, end = min(map(_begin, of_storage)), max(_begin(view) + view.nbytes for view in of_storage)
        flat = torch.empty(0, dtype=torch.uint8, device=of_storage[0].device)
        flats[storage] = flat.set_(of_storage[0].untyped_storage(), begin, (end - begin,), (1,))
    return flats


def _same_place(view: Tensor, flats: dict[int, Tensor], copies: dict[int, Tensor]) -> Tensor:
    """Of the copies what `view` is of the flat tensors."""
    storage = _storage(view)
    begin = _begin(view) - flats[storage].storage_offset()
    return copies[storage][begin : begin + view.nbytes].view(view.dtype)
