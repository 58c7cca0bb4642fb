"""What a layer asks of the accelerator, exactly: a change that adds a kernel, a wait or a copy fails here.

A change that removes one lowers the number in the table, and a change that must add one says why in its message. A
test that fails shows the row as it is now, and every kernel with its line.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_dist.model.dit import DiT
from diffmoe_dist.model.precision import mixed_precision
from tests.accelerator.cases import MOE, config, host_model, model, part_inputs, train_part
from tests.accelerator.simulator import Log, is_view
from tests.distributed import run_ranks

# Forward and backward in bf16: kernels (aten ops that are no views; collectives among them), times that the host waits
# for the device, in bf16 and in fp32, and copies from the host. "whole": two ranks, each with all experts; "sharded":
# two ranks that share them. Everywhere else one device.
TABLE = """
layer                                   forward backward collectives waits fp32 copies
dense MLP                                     3        7           0     0    0      0
dense block                                  20       40           0     0    0      0
global_pool layer                            38       29           0     0    0      0
global_pool block                            55       65           0     0    0      0
global_pool swiglu layer                     39       31           0     0    0      0
global_pool sample layer                     41       29           0     0    0      0
expert_choice layer                          25       21           0     0    0      0
expert_choice block                          42       57           0     0    0      0
expert_choice predictor layer                41       29           0     0    0      0
token_choice layer                           36       29           0     0    1      0
token_choice block                           53       65           0     0    1      0
token_choice balanced layer                  36       29           0     0    1      0
token_choice swiglu layer                    29       27           0     0    1      0
prototype layer                              79      119           0     1    1      0
prototype block                              96      152           0     1    1      0
prototype expert_choice layer               102      121           0     1    1      0
global_pool layer, whole                     73       33           1     1    1      0
global_pool swiglu layer, whole              66       31           1     1    1      0
global_pool sample layer, whole              41       29           0     0    0      0
expert_choice layer, whole                   25       21           0     0    0      0
token_choice layer, whole                    38       29           1     0    1      0
prototype layer, whole                       81      120           1     1    1      0
prototype expert_choice layer, whole        104      121           1     1    1      0
global_pool layer, sharded                   82       32           5     1    1      0
global_pool swiglu layer, sharded            83       34           5     1    1      0
global_pool sample layer, sharded            46       32           4     0    0      0
expert_choice layer, sharded                 30       24           4     0    0      0
expert_choice predictor layer, sharded       46       32           4     0    0      0
token_choice layer, sharded                  57       32           6     1    1      0
token_choice swiglu layer, sharded           50       30           6     1    1      0
prototype layer, sharded                    100      123           6     1    1      0
prototype expert_choice layer, sharded      123      124           6     1    1      0
"""

# In bf16_mixed, which the simulated device does not know: kernels forward and backward on a CPU, with the roundings of
# weights and of what is multiplied.
MIXED = """
dense MLP                                     9       12
global_pool layer                            38       34
expert_choice layer                          28       26
token_choice layer                           39       32
prototype layer                              90      129
"""


def row(name: str, half: Log, full: Log) -> str:
    forward, backward, waits, copies = half.count(False), half.count(True), len(half.waits), len(half.copies)
    return f"{name:39}{forward:8}{backward:9}{half.collectives:12}{waits:6}{len(full.waits):5}{copies:7}"


def part(made: DiT, name: str) -> nn.Module:
    return made.get_submodule("blocks.1" if name.endswith("block") else "blocks.1.mlp")


def logs(name: str, moe: str, expert: int | None = None) -> tuple[Log, Log]:
    """In bf16 and in fp32."""
    types = (torch.bfloat16, torch.float32)
    half, full = (train_part(part(model(config(moe, expert=expert), t), name), t) for t in types)
    assert half.faults == full.faults == []
    return half, full


def rows_of_one_rank(rank: int, world_size: int, rows: list[str]) -> list[tuple[Log, Log]]:
    return [logs(name, *_moe_and_expert(name)) for name in rows]


def _moe_and_expert(name: str) -> tuple[str, int]:
    moe, _, placement = name.partition(", ")
    return moe.removesuffix(" layer"), {"whole": 1, "sharded": 2}[placement]


ROWS = {line[:39].strip(): line for line in TABLE.splitlines()[2:]}
ON_RANKS = [name for name in ROWS if ", " in name]


@cache
def on_ranks() -> list[list[tuple[Log, Log]]]:
    return run_ranks(2, rows_of_one_rank, ON_RANKS)


@pytest.mark.parametrize("name", [name for name in ROWS if ", " not in name])
def test_a_layer_asks_of_one_device_what_the_table_says(name: str) -> None:
    half, full = logs(name, name.removesuffix(" MLP").removesuffix(" layer").removesuffix(" block"))
    assert row(name, half, full) == ROWS[name], f"\n{half}\nin fp32 {full.waits}"


@pytest.mark.parametrize("name", ON_RANKS)
def test_a_layer_over_two_ranks_asks_of_each_device_what_the_table_says(name: str) -> None:
    for found in on_ranks():
        half, full = found[ON_RANKS.index(name)]
        assert row(name, half, full) == ROWS[name], f"\n{half}\nin fp32 {full.waits}"


def test_the_table_has_every_layer() -> None:
    assert {f"{moe} {'MLP' if moe == 'dense' else 'layer'}" for moe in MOE} <= ROWS.keys()


class Kernels(TorchDispatchMode):
    """Counts forward and backward as the simulator does, on the device that tensors are on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.counts[torch._C._current_graph_task_id() != -1] += name != "_local_scalar_dense" and not is_view(
            func, name
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("line", MIXED.strip().splitlines())
def test_a_layer_in_mixed_precision_asks_for_the_kernels_that_the_table_says(line: str) -> None:
    name = line[:39].strip()
    layer = part(host_model(config(name.removesuffix(" MLP").removesuffix(" layer"))), name)
    given, gradients = part_inputs(layer, torch.float32)
    with mixed_precision(torch.device("cpu"), True), Kernels() as kernels:
        out = layer(*given)
        y, routing = out if isinstance(out, tuple) else (out, None)
        losses = [] if routing is None else list(routing.losses.values())
    with kernels:
        torch.autograd.backward([y, *losses], [gradients[0].to(y.dtype), *gradients[1:] * len(losses)])
    assert f"{name:39}{kernels.counts[0]:8}{kernels.counts[1]:9}" == line
