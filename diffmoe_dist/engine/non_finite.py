"""When a loss or a gradient is not finite: where that began, and which samples were in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.linalg import vector_norm

from diffmoe_dist.data.batch import Batch
from diffmoe_dist.files import write_json
from diffmoe_dist.logs import logger


@dataclass(frozen=True, order=True)
class Origin:
    """The first thing that was not finite; ordered by when it is computed."""

    micro_step: int
    in_backward: bool
    order: int  # in which modules end and gradients arrive
    rank: int
    name: str  # of a module (forward) or a parameter (backward)
    too_large: bool = False  # a gradient of finite numbers whose squares are not

    def __str__(self) -> str:
        what = f"the gradient of {self.name}" if self.in_backward else f"the output of {self.name}"
        return f"{what} on rank {self.rank}{', finite but too large to be squared in fp32' if self.too_large else ''}"


def find_origin(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> Origin | None:
    """Compute the micro-steps of a step again, looking at every output and gradient; collective.

    Gradients are looked at before they are summed over the ranks, so that the rank is known. Each rank computes
    everything, for experts and pools span ranks.

    Args:
        losses: compute the loss of a micro-step, each as it was.

    Returns:
        The same on every rank; None if everything is finite this time: then the hardware has made a mistake, or a
        kernel does not give the same twice.
    """
    rank = dist.get_rank()
    with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
        mine = [origin for micro_step, loss in enumerate(losses) for origin in _look(model, loss, micro_step, rank)]
    found: list[Origin | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, min(mine, default=None))
    return min((origin for origin in found if origin is not None), default=None)


def _look(model: nn.Module, loss: Callable[[], Tensor], micro_step: int, rank: int) -> Iterator[Origin]:
    with _watched_outputs(model) as seen:
        value = loss()
    for order, name, _ in seen[:1]:
        yield Origin(micro_step, False, order, rank, name)
    if not seen and not value.isfinite():
        yield Origin(micro_step, False, 2**31, rank, "the loss")
    with _watched_gradients(model) as seen:
        # This way, not by backward(): that would set off DeepSpeed's reductions.
        torch.autograd.grad(value, [parameter for _, parameter in _trained(model)], allow_unused=True)
    for order, name, too_large in seen[:1]:
        yield Origin(micro_step, True, order, rank, name, too_large)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


class _Lookout:
    """Notes what is not finite, in the order in which it comes by."""

    def __init__(self) -> None:
        self.passed = 0
        self.seen: list[tuple[int, str, bool]] = []  # when, what, and whether only its squares are not finite

    @torch.no_grad()  # looking keeps nothing for backward: what `train.recompute` computes again must keep the same
    def look(self, name: str, value: Any, squared: bool = False) -> None:
        self.passed += 1
        tensors = value if isinstance(value, tuple) else (value,)
        numbers = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
        finite = all(t.isfinite().all() for t in numbers)
        if not finite or (squared and not all(vector_norm(t, dtype=torch.float32).isfinite() for t in numbers)):
            self.seen.append((self.passed, name, finite))


@contextmanager
def _watched_outputs(model: nn.Module) -> Iterator[list[tuple[int, str, bool]]]:
    """Collects the modules whose output is not finite, as they end: the innermost of the earliest comes first."""
    lookout = _Lookout()

    def hook(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: lookout.look(name, output)

    with _removed_afterwards([m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]):
        yield lookout.seen


@contextmanager
def _watched_gradients(model: nn.Module) -> Iterator[list[tuple[int, str, bool]]]:
    """Collects the parameters whose gradient is not finite, or not its norm, in the order of the backward pass."""
    lookout = _Lookout()

    def hook(name: str) -> Callable[[Tensor], None]:
        return lambda gradient: lookout.look(name, gradient, squared=True)

    with _removed_afterwards([parameter.register_hook(hook(name)) for name, parameter in _trained(model)]):
        yield lookout.seen


@contextmanager
def _removed_afterwards(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_sample_ids(folder: Path, step: int, what: str, batches: Sequence[Batch]) -> Path:
    """Write which samples each rank had in optimizer step `step` to folder/step-N.json; collective.

    Args:
        batches: this rank's micro-batches.
    """
    mine = [{"sample_ids": batch.sample_ids.tolist(), "epochs": batch.epochs.tolist()} for batch in batches]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    path = folder / f"step-{step:08d}.json"
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"step": step, "what": what, "micro_steps_of_rank": ranks})
        except OSError as error:
            logger.warning("%s cannot be written (%s); the sample ids are lost", path, error.strerror)
    return path
