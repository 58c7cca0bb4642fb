"""DeepSpeed's ZeRO 1 and 2 with a way of its own from gradients to new weights: few bytes, and no host waits.

DeepSpeed flattens the parameters of a group, gives each rank of the group one partition of them, and calls a hook for
each gradient. What it would do then copies a gradient four times, all-reduces it though one rank needs it, and on CUDA
waits for the device; here each *chunk* of the parameters, which one rank owns, is reduced to that rank while backward
goes on, and AdamW reads the gradients where they lie. A group of one rank copies nothing.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from diffmoe_dist.engine.adamw import AdamW, squares
from diffmoe_dist.logs import logger
from diffmoe_dist.parallel.topology import all_gather

IN_FLIGHT = 2  # chunks that are being reduced while backward fills the next one


class Piece(NamedTuple):
    """Elements `start` to `stop` of a flattened parameter; in its owner's partition they begin at `place`."""

    parameter: nn.Parameter
    start: int
    stop: int
    place: int


@dataclass(eq=False)
class Chunk:
    """Pieces of one parameter group that follow each other, and that one rank owns."""

    group: int  # of parameters
    owner: int  # rank within the process group
    pieces: list[Piece] = field(default_factory=list)
    missing: int = 0  # gradients that backward has not made yet
    reduced: Tensor | None = None  # (elements,) fp32, of the owner, once the ranks have summed their gradients

    @property
    def sizes(self) -> list[int]:
        return [piece.stop - piece.start for piece in self.pieces]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Each once: the pieces of one lie in different chunks."""
        return [piece.parameter for piece in self.pieces]


class ReducingZero(DeepSpeedZeroOptimizer):
    """Made of a DeepSpeed optimizer that is built: `take_over` changes its class."""

    @classmethod
    def take_over(cls, engine: Any, wire: torch.dtype, chunk_elements: int) -> None:
        """
        Args:
            engine: DeepSpeed's, of which `optimizer` is its ZeRO 1 or 2 around a fused torch AdamW. DeepSpeed's hooks
                hold that object, so it stays the same one.
            wire: in which gradients are summed over ranks.
            chunk_elements: at most, of a chunk.
        """
        engine.optimizer.__class__ = cls
        engine.optimizer._prepare(engine, wire, chunk_elements)

    def _prepare(self, engine: Any, wire: torch.dtype, chunk_elements: int) -> None:
        # The optimizer itself is told only after backward, where outputs are no plain tensors.
        self._is_last_micro_step = engine.is_gradient_accumulation_boundary
        self.wire = wire
        self.norm, self.skip = 0.0, False
        self._ranks = [dist.get_rank(group) for group in self.real_dp_process_group]
        self._keep_fp32_weights_once()
        self.chunks = [
            chunk for group in range(len(self.bit16_groups)) for chunk in self._cut_group(group, chunk_elements)
        ]
        order = {parameter: place for place, parameter in enumerate(engine.module.parameters())}
        # One order for all groups and ranks: collectives must not pass each other.
        self._reductions = sorted(
            (chunk for chunk in self.chunks if self._group_size(chunk) > 1),
            key=lambda chunk: -min(order[parameter] for parameter in chunk.parameters),
        )
        self._chunks_of: dict[nn.Parameter, list[Chunk]] = defaultdict(list)
        for chunk in self._reductions:
            for parameter in chunk.parameters:
                self._chunks_of[parameter].append(chunk)
        self._in_flight: deque[tuple[Chunk, Tensor, dist.Work]] = deque()
        self._begin_backward()
        self._tables: list[Any] = []  # of the groups' pieces, where one kernel takes them all
        if self.single_partition_of_fp32_groups[0].is_cuda and _can_compile_kernels():
            self._tables = [self._table(group) for group in range(len(self.bit16_groups))]

    def _table(self, group: int) -> Any:
        from diffmoe_dist.engine.adamw_kernels import PieceTable

        chunks = list(self._owned(group))
        sizes = [size for chunk in chunks for size in chunk.sizes]
        places = [piece.place for chunk in chunks for piece in chunk.pieces]
        return PieceTable(sizes, places, self.single_partition_of_fp32_groups[group].device)

    def _keep_fp32_weights_once(self) -> None:
        """Where the model is in fp32, the optimizer's weights are the model's, not a copy."""
        for master, partitions, rank in zip(
            self.single_partition_of_fp32_groups, self.parallel_partitioned_bit16_groups, self._ranks, strict=True
        ):
            if partitions[rank].dtype == master.dtype:
                master.data = partitions[rank]
        self._link_all_hp_params()  # its views would keep the copy alive

    def _cut_group(self, group: int, chunk_elements: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        partition = self.partition_size[group]
        for parameter, offset in zip(
            self.round_robin_bit16_groups[group], self.round_robin_bit16_offsets[group], strict=True
        ):
            start, end = 0, parameter.numel()
            while start < end:
                owner, place = divmod(offset + start, partition)
                stop = min(end, start + partition - place, start + chunk_elements)
                last = chunks[-1] if chunks else None
                if last is None or last.owner != owner or sum(last.sizes) + stop - start > chunk_elements:
                    last = Chunk(group, owner)
                    chunks.append(last)
                last.pieces.append(Piece(parameter, start, stop, place))
                start = stop
        return chunks

    def _group_size(self, chunk: Chunk) -> int:
        return dist.get_world_size(self.real_dp_process_group[chunk.group])

    def _owned(self, group: int | None = None) -> Iterator[Chunk]:
        for chunk in self.chunks:
            if chunk.owner == self._ranks[chunk.group] and group in (None, chunk.group):
                yield chunk

    # From the loss to gradients, each on the rank that owns it. DeepSpeed calls these.

    def scale_if_loss(self, value: Tensor) -> Tensor:
        """So that sums over ranks are means; dividing the gradients would be one more pass over them."""
        return value / dist.get_world_size(self.dp_process_group)

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """The gradient of a parameter is there."""
        if not (self.partition_gradients or self._is_last_micro_step()):
            return
        for chunk in self._chunks_of.get(param, ()):
            chunk.missing -= 1
        while self._next < len(self._reductions) and not self._reductions[self._next].missing:
            self._reduce_next()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The backward pass is over. With ZeRO 1, that of the last micro-step."""
        while self._next < len(self._reductions):
            self._reduce_next()
        while self._in_flight:
            self._receive()
        self._begin_backward()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """The same, with ZeRO 2 after every micro-step."""
        self.reduce_gradients()

    def _begin_backward(self) -> None:
        self._next = 0
        self._uncopied = {parameter: len(chunks) for parameter, chunks in self._chunks_of.items()}
        for chunk in self._reductions:
            chunk.missing = len(chunk.pieces)

    @torch.no_grad()
    def _reduce_next(self) -> None:
        chunk = self._reductions[self._next]
        self._next += 1
        buffer = torch.empty(sum(chunk.sizes), dtype=self.wire, device=chunk.pieces[0].parameter.device)
        torch._foreach_copy_(buffer.split(chunk.sizes), _made(chunk))
        for parameter in chunk.parameters:
            self._uncopied[parameter] -= 1
            if not self._uncopied[parameter]:
                parameter.grad = None
        group = self.real_dp_process_group[chunk.group]
        # On CUDA the device waits for the copy, not the host, and backward goes on beside it.
        work = dist.reduce(buffer, group=group, group_dst=chunk.owner, async_op=True)
        self._in_flight.append((chunk, buffer, work))
        if len(self._in_flight) > IN_FLIGHT:
            self._receive()

    def _receive(self) -> None:
        """Wait for the oldest reduction: on CUDA the device alone does."""
        chunk, buffer, work = self._in_flight.popleft()
        work.wait()
        if chunk.owner == self._ranks[chunk.group]:
            chunk.reduced = buffer.float() if chunk.reduced is None else chunk.reduced.add_(buffer)

    # From gradients to new weights.

    def gradient_squares(self) -> Tensor:
        """The sum of the squares of the gradients that this rank owns, () fp64 on the device.

        Added up over all ranks it is the square of the global norm. DeepSpeed would make an fp64 copy of each gradient
        (35 times as slow on a CPU) and wait for the value twice.
        """
        # A rank may own nothing but the padding at the end of the flat groups.
        found = [torch.zeros(1, dtype=torch.float64, device=self.single_partition_of_fp32_groups[0].device)]
        for group in range(len(self.bit16_groups)):
            gradients = self._gradients(group)
            if self._tables:
                found.append(self._tables[group].squares(gradients).double())
            else:
                found += [squares(gradient) for gradient in gradients]
        return torch.cat(found).sum()

    def _gradients(self, group: int) -> list[Tensor]:
        """Of each piece that this rank owns, (n,): fp32 if ranks have been summed, else as backward has made them."""
        return [gradient for chunk in self._owned(group) for gradient in _gradients(chunk)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update the weights with gradients clipped by `norm`, or, with `skip`, forget the gradients; collective."""
        if not self.skip:
            for group, process_group in enumerate(self.real_dp_process_group):
                self._update(group)
                if dist.get_world_size(process_group) > 1:
                    own = self.parallel_partitioned_bit16_groups[group][self._ranks[group]]
                    all_gather(self.bit16_groups_flat[group], own, group=process_group)
        for chunk in self.chunks:
            chunk.reduced = None
        self._global_grad_norm = self.norm

    def _update(self, group: int) -> None:
        settings = self.optimizer.param_groups[group]
        master = settings["params"][0]
        state = self.optimizer.state[master]
        state["step"] += 1
        own = self.parallel_partitioned_bit16_groups[group][self._ranks[group]]
        weights = None if own.dtype == master.dtype else own
        excess = (self.norm + 1e-6) / self.clip_grad if self.clip_grad else 0.0
        flats = master, state["exp_avg"], state["exp_avg_sq"]
        adamw = AdamW(
            settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"], grad_scale=max(excess, 1.0)
        )
        if self._tables:
            self._tables[group].update(self._gradients(group), *flats, weights, state["step"], adamw)
            return
        for chunk in self._owned(group):
            weight, exp_avg, exp_avg_sq = (
                [flat.narrow(0, piece.place, piece.stop - piece.start) for piece in chunk.pieces] for flat in flats
            )
            adamw.update(_gradients(chunk), weight, exp_avg, exp_avg_sq, state["step"])
            chunk.reduced = None
        if weights is not None:
            weights.copy_(master)


def _can_compile_kernels() -> bool:
    """Whether Triton is installed, and has the C compiler that it asks for at the first kernel."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    missing = "Triton" if find_spec("triton") is None else "a C compiler" if compiler is None else None
    if missing is not None:
        logger.warning("AdamW takes torch's slower kernels: %s is not installed", missing)
    return missing is None


def _gradients(chunk: Chunk) -> list[Tensor]:
    """Of each piece of a chunk that this rank owns: summed over the ranks, or as made where it is alone."""
    return _made(chunk) if chunk.reduced is None else list(chunk.reduced.split(chunk.sizes))


def _made(chunk: Chunk) -> list[Tensor]:
    """Of each piece, as backward has made them; a parameter that the loss did not need has none, so zeros."""
    return [
        parameter.new_zeros(stop - start) if parameter.grad is None else parameter.grad.view(-1)[start:stop]
        for parameter, start, stop, _ in chunk.pieces
    ]
