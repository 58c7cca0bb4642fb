"""What a run needs for `train.compile`, and how long compiling takes."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import torch
from torch._dynamo.callback import callback_handler
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from diffmoe_dist.errors import UserError


def check_compiler(device: torch.device) -> None:
    """
    Raises:
        UserError: what torch.compile generates code with is not installed.
    """
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                "train.compile=true needs a C++ compiler, and torch finds neither $CXX nor g++; install one, or set "
                "train.compile=false"
            ) from None
        headers = Path(sysconfig.get_paths()["include"])
        if not (headers / "Python.h").is_file():
            raise UserError(
                f"train.compile=true needs the headers of Python, and {headers} has no Python.h; install them (Debian: "
                "python3-dev), or set train.compile=false"
            )
    elif not has_triton():
        raise UserError(
            "train.compile=true needs Triton, which torch does not find for this GPU; install it, or set "
            "train.compile=false"
        )


class CompileClock:
    """Seconds that torch.compile takes in this process, from when the clock is made until it is closed."""

    def __init__(self) -> None:
        self.seconds, self.begun = 0.0, 0.0
        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)

    def since_last(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def close(self) -> None:
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)

    def _start(self, _: object) -> None:
        self.begun = time.perf_counter()

    def _end(self, _: object) -> None:
        self.seconds += time.perf_counter() - self.begun
