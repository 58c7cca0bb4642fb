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
from diffmoe_dist.engine.checkpoint import CheckpointError, Progress, save_checkpoint
from diffmoe_dist.engine.run_folder import Claim
from diffmoe_dist.engine.sharded_state import Fragment
from diffmoe_dist.errors import UserError
from diffmoe_dist.logs import logger


class Checkpointer:
    """Writes one checkpoint at a time into run_dir/checkpoints. All methods but `wait_staged` are collective."""

    def __init__(self, config: Config, device: torch.device, claim: Claim, step: int, timeout: timedelta) -> None:
        """
        Args:
            step: of the state that the run begins with, which needs no saving.
            timeout: after which a rank gives up waiting for the others.
        """
        self.folder = Path(config.run_dir) / "checkpoints"
        self.config = config
        self.claim = claim
        self.failed = 0  # checkpoints that could not be written
        self.last = step  # of the newest one that was begun
        # The thread's collectives would otherwise mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: dict[tuple[str, int], Tensor] = {}
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
        staged = [replace(fragment, data=self._host_copy_of(fragment)) for fragment in fragments]
        if self._stream is None or ready is None:
            for here, there in zip(fragments, staged, strict=True):
                there.data.copy_(here.data)
            return staged
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for here, there in zip(fragments, staged, strict=True):
                there.data.copy_(here.data, non_blocking=True)
        self._stream.synchronize()
        return staged

    def _host_copy_of(self, fragment: Fragment) -> Tensor:
        """Memory for it, which is kept: to make it anew would cost more than the copy."""
        key = (fragment.name, fragment.start)
        if key not in self._host:
            pinned = self._stream is not None
            self._host[key] = torch.empty(fragment.data.shape, dtype=fragment.data.dtype, pin_memory=pinned)
        return self._host[key]

    def _write(self, staging: Future[list[Fragment]], progress: Progress) -> None:
        fragments = staging.result()
        path = self.folder / f"step-{progress.step:08d}"
        try:
            save_checkpoint(self.folder, fragments, progress, self.config, self.claim, self._group)
        except CheckpointError as error:
            logger.warning("%s; the checkpoints before are kept", error)
            raise
        logger.info("saved %s", path)
