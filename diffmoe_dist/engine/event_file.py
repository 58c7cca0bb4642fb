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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import histogram_raw, image, scalar, text

from diffmoe_dist.files import AppendedFile


@dataclass(frozen=True)
class Histogram:
    """Counts, and the edges between them, one more."""

    counts: list[float]
    edges: list[float]


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

    def add_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Text in Markdown."""
        self._add([text(name, value) for name, value in texts.items()], step)

    def add_histograms(self, histograms: Mapping[str, Histogram], step: int) -> None:
        self._add([_summary(name, histogram) for name, histogram in histograms.items()], step)

    def close(self) -> None:
        self._file.close()

    def _add(self, summaries: list[Summary], step: int) -> None:
        self._append(*(Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries))

    def _append(self, *events: Event) -> None:
        buffer = io.BytesIO()
        for event in events:
            RecordWriter(buffer).write(event.SerializeToString())
        self._file.append(buffer.getvalue())


def _summary(name: str, histogram: Histogram) -> Summary:
    counts, edges = np.array(histogram.counts), np.array(histogram.edges)
    middles = (edges[1:] + edges[:-1]) / 2
    # TensorBoard's buckets have upper ends alone, and the first one begins at the least value.
    return histogram_raw(
        name, edges[0], edges[-1], counts.sum(), (counts * middles).sum(), (counts * middles**2).sum(),
        edges.tolist(), [0.0, *counts.tolist()],
    )  # fmt: skip
