"""A simulated accelerator: what a GPU would be asked to do, found out on a CPU.

    layer = to_device(layer, torch.bfloat16)
    x, null = on_device(torch.randn(2, 64, 128)), on_device(torch.zeros(2, dtype=torch.bool))
    with simulate() as log:
        y, routing = layer(x, null)
        y.sum().backward()
    assert log.faults == [] and log.waits == []
    print(log)  # every kind of kernel with its line

A tensor on the simulated device says that its device is `meta`, which stands for cuda, but holds values, so that
autograd and shapes that depend on values work. `simulate` records what happens to such tensors:

- `kernels`: aten ops that are no views, one launch each, and collectives. Attention is 1 forward and 3 backward.
- `waits`: the host waits for the device: it reads a value, or a size that depends on values, or copies to the host.
- `copies`: from the host to the device.
- `faults`: what CUDA refuses: devices mixed in one op, operands of grouped_mm, a topk of no rows.

Collectives work on the values, so ranks of tests.distributed.run_ranks can each simulate their own device. Nothing is
timed. A branch that asks for `device.type == "cuda"` is not taken. What a test finds is where torch's Python sees it:
kernels that one aten op launches on its own count once.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

_PACKAGE = str(Path(__file__).parents[2] / "diffmoe_dist") + "/"
_VIEWS_BY_NAME = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach", "alias",
    "_reshape_alias", "lift_fresh", "is_same_size", "sym_size", "view", "expand",
}  # fmt: skip
_WAITS = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_dim",
    "unique_consecutive",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COLLECTIVES = (
    "all_reduce", "all_to_all_single", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor",
    "broadcast", "reduce",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    op: str
    backward: bool
    where: str  # the innermost lines of the package, innermost first


@dataclass
class Log:
    """What happened on the simulated device."""

    kernels: list[Kernel] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def count(self, backward: bool) -> int:
        return sum(kernel.backward == backward for kernel in self.kernels)

    @property
    def collectives(self) -> int:
        return sum(kernel.op in _COLLECTIVES for kernel in self.kernels)

    def __str__(self) -> str:
        kinds = Counter(self.kernels)
        lines = [f"{n:4} {'backward' if k.backward else 'forward'} {k.op} {k.where}" for k, n in kinds.items()]
        for what in ("waits", "copies", "faults"):
            lines += [f"{what}: {line}" for line in getattr(self, what)]
        return "\n".join(lines)

    def add_kernel(self, op: str, times: int = 1) -> None:
        backward = torch._C._current_graph_task_id() != -1
        self.kernels += [Kernel(op, backward, _where())] * times

    def add(self, event: str, what: str) -> None:
        getattr(self, event).append(f"{what} at {_where()}")


_logs: list[Log] = []  # of the simulations in progress, of which there is one at most


@contextmanager
def simulate() -> Iterator[Log]:
    """Record what happens on the simulated device, and let attention, collectives and torch.tensor know it."""
    log = Log()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _maker(getattr(torch, name))))
        for name in _COLLECTIVES:
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, _collective(name, getattr(dist, name))))
        _logs.append(log)
        stack.callback(_logs.pop)
        stack.enter_context(_Mode())
        yield log


def on_device(values: Tensor) -> Tensor:
    """A tensor of the host as one on the simulated device; both have the same memory."""
    return DeviceTensor(values.detach()).requires_grad_(values.requires_grad)


def values_of(tensor: Tensor) -> Tensor:
    """The values of a tensor on the simulated device, seen by the test and so without a wait."""
    assert isinstance(tensor, DeviceTensor)
    return tensor.values_here


def to_device(module: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Move a module there in place: its parameters, which change to `dtype`, and its buffers, which keep theirs."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            moved = DeviceTensor(parameter.detach().to(dtype or parameter.dtype))
            setattr(part, name, nn.Parameter(moved, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, DeviceTensor(buffer.detach()))
    return module


class DeviceTensor(Tensor):
    """A tensor on the simulated device. Everything but its values is what torch knows of a `meta` tensor."""

    values_here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> DeviceTensor:
        wrapper: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device=DEVICE,
        )  # fmt: skip
        wrapper.values_here = values
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        _log_wait("tolist")
        return self.values_here.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor on the simulated device to numpy; use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what makes tensors on the device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    here = [value for value in given if isinstance(value, DeviceTensor)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not here and device != DEVICE:
        return func(*args, **kwargs)
    if _logs:
        _record(_logs[-1], func, args, kwargs)
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    if device is not None and device.type == "cpu":
        return result
    arguments = {id(_unwrap(value)): value for value in given} if func._schema.is_mutable else {}  # in place

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return arguments[id(value)] if id(value) in arguments else DeviceTensor(value)

    return tree_map(wrap, result)


def _unwrap(value: Any) -> Any:
    return value.values_here if isinstance(value, DeviceTensor) else value


def _record(log: Log, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = func._schema.name.split("::")[1]
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    host = [value for value in given if not isinstance(value, DeviceTensor)]
    if name in ("_to_copy", "copy_"):
        _record_copy(log, name, args, kwargs)
    elif any(value.dim() for value in host) and len(host) < len(given):
        log.add("faults", f"{name} mixes devices, with {[tuple(value.shape) for value in host]} on the host")
    if name in _WAITS or (name in _INDEXING and _has_mask(args)):
        _log_wait(name)
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        _log_wait("repeat_interleave without output_size")
    if name == "topk" and not args[0].shape[:-1].numel():
        log.add("faults", f"topk of no rows, {tuple(args[0].shape)}")
    if name == "_grouped_mm":
        _record_grouped_mm(log, *args[:2])
    if name != "_local_scalar_dense" and not is_view(func, name):
        log.add_kernel(name)


def _record_copy(log: Log, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A copy is asynchronous only where it says so."""
    if name == "copy_":
        to_host, from_host = (not isinstance(value, DeviceTensor) for value in args[:2])
        non_blocking = len(args) > 2 and args[2]
    else:
        to_host = str(kwargs.get("device") or DEVICE) == "cpu"
        from_host = not isinstance(args[0], DeviceTensor)
        non_blocking = kwargs.get("non_blocking", False)
    if from_host and not to_host:
        log.add("copies", f"{tuple(args[-1 if name == 'copy_' and len(args) == 2 else 0].shape)} from the host")
    elif to_host and not from_host and not non_blocking:
        _log_wait("copy to the host")


def _has_mask(args: tuple[Any, ...]) -> bool:
    """Indexing by a mask asks where it is true. A single one with a single value is filled without."""
    fills = len(args) > 2 and args[2].dim() == 0
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not fills


def is_view(func: Any, name: str) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return name in _VIEWS_BY_NAME or any(alias is not None and not alias.is_write for alias in aliases)


def _log_wait(what: str) -> None:
    if _logs:
        _logs[-1].add("waits", what)


def _where() -> str:
    """The innermost three lines of the package."""
    frame: FrameType | None = sys._getframe(1)
    lines: list[str] = []
    while frame is not None and len(lines) < 3:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            lines.append(f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "(autograd)"


def _record_grouped_mm(log: Log, a: DeviceTensor, b: DeviceTensor) -> None:
    """What CUDA asks of operands beyond what a CPU asks too (GroupMMCommon.cuh), and what its fallback costs."""
    if a.dtype != torch.bfloat16:
        _log_wait("grouped_mm in another type than bf16, a loop over groups whose ends are copied to the host,")
        return
    for which, operand in (("first", a), ("second", b)):
        if operand.values_here.data_ptr() % 16:
            log.add("faults", f"grouped_mm: the {which} operand's memory is not aligned to 16 bytes")
    if a.dim() == b.dim() == 2 and (
        a.stride(1) == 1 or b.stride(0) == 1
    ):  # the groups are parts of the inner dimension
        log.add("faults", f"grouped_mm: groups along a contiguous dimension, strides {a.stride()} and {b.stride()}")


class _Attention(torch.autograd.Function):
    """Flash attention: one kernel forward, three backward, and its own layout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.mask = None if mask is None else values_of(mask)
        _logs[-1].add_kernel("attention")
        result = _torch_attention(values_of(q).float(), values_of(k).float(), values_of(v).float(), ctx.mask)
        return DeviceTensor(_flash_layout(result.to(q.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v = (values_of(tensor).detach().float().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            result = _torch_attention(q, k, v, ctx.mask)
        grads = torch.autograd.grad(result, (q, k, v), values_of(grad).float())
        _logs[-1].add_kernel("attention", times=3)
        return *(DeviceTensor(_flash_layout(g.to(grad.dtype))) for g in grads), None


_torch_attention = F.scaled_dot_product_attention


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
    if isinstance(q, DeviceTensor):
        assert not settings, settings
        return _Attention.apply(q, k, v, attn_mask)
    return _torch_attention(q, k, v, attn_mask, **settings)


def _flash_layout(x: Tensor) -> Tensor:
    """In memory (images, tokens, heads, D), seen as (images, heads, tokens, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _maker(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor for the device: made on the host and copied, which torch itself leaves out for `meta`."""

    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device) != DEVICE:
            return function(data, *args, device=device, **kwargs)
        if isinstance(data, DeviceTensor):
            return data.to(kwargs.get("dtype", data.dtype))
        return function(data, *args, **kwargs).to(DEVICE)

    return make


def _collective(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, DeviceTensor) for value in tree_flatten((args, kwargs))[0]):
            _logs[-1].add_kernel(name)
        return function(*map(_unwrap, args), **{key: _unwrap(value) for key, value in kwargs.items()})

    return run
