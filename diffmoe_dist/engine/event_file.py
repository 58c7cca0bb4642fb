"""TensorBoard's file of events, without the thread of its `SummaryWriter`.

That thread ends with the first write that fails, with a traceback; every later call of the writer raises, `close` too.
Here the events of a step are one write, which fails where it is called, and may succeed the next time.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from diffmoe_dist.files import AppendedFile


class EventFile:
    """All methods that add raise OSError when the events cannot be written; the file then has none of them."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """
        Args:
            purge_step: from where on what older files of the folder say does not count.
        """
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name)
        begin = SessionLog(status=SessionLog.START)
        self._append(
            Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=purge_step, session_log=begin),
        )

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._add([scalar(name, value) for name, value in values.items()], step)

    def add_images(self, images_HWC: Mapping[str, np.ndarray], step: int) -> None:
        self._add([image(name, image_HWC, dataformats="HWC") for name, image_HWC in images_HWC.items()], step)

    def close(self) -> None:
        self._file.close()

    def _add(self, summaries: list[Summary], step: int) -> None:
        self._append(*(Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries))

    def _append(self, *events: Event) -> None:
        buffer = io.BytesIO()
        for event in events:
            RecordWriter(buffer).write(event.SerializeToString())
        self._file.append(buffer.getvalue())
