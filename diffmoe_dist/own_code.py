"""Routers, readers and metrics of the user's own, by import path. Modules of the working folder count."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from diffmoe_dist.errors import UserError


def is_import_path(name: str) -> bool:
    """Whether this may be one: `my_package.my_module`, or a module outside of Python's library, found or not."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    _see_working_folder()
    return len(parts) > 1 or (
        name not in sys.stdlib_module_names and name != "__main__" and importlib.util.find_spec(name) is not None
    )


def import_module(name: str, named: str, remedy: str) -> ModuleType:
    """The module with this import path.

    Args:
        named: how the user named it, for the message: `moe.router=my_package.my_router`.
        remedy: what to do where it is not there.

    Raises:
        UserError: there is no such module. What its own code raises is raised as it is.
    """
    _see_working_folder()
    missing: str | None = "without a name"
    try:
        if all(name.split(".")):  # neither empty nor relative
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise  # an import of the module's own
    raise UserError(f"{named}: there is no module {missing} that Python can import; {remedy}")


def import_callable(name: str, named: str, default: str | None = None) -> Callable[..., Any]:
    """What `module:callable` names, a function of the user's.

    Args:
        named: how the user named it, for the message: `--score module:callable`.
        default: the callable where the module alone is named.

    Raises:
        UserError: there is no such module, or no such callable in it.
    """
    module_name, _, attribute = name.partition(":")
    attribute = attribute or default or ""
    module = import_module(module_name, named, "give module:callable, as my_module:my_function")
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{named}: {module_name} has no callable {attribute!r}; give module:callable")
    return found


def import_score(name: str) -> Callable[[Any], float]:
    """The metric that `--score module:callable` names, a function of images, (N, H, W, C) uint8.

    Raises:
        UserError: as `import_callable`; and when it is called, for what is no finite number.
    """
    named = f"--score {name}"
    function = import_callable(name, named, "score")

    def score(images_NHWC: Any) -> float:
        value = function(images_NHWC)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{named}: it returned a {type(value).__name__}; return a number") from None
        if not math.isfinite(number):
            raise UserError(f"{named}: it returned {number}; return a finite number")
        return number

    return score


def _see_working_folder() -> None:
    if os.getcwd() not in sys.path:  # a launcher's -m may leave it out
        sys.path.append(os.getcwd())
