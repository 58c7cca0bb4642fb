"""The mixture-of-experts layer against dense layers of the same arithmetic: time, peak memory, bytes saved.

What is measured. One forward and backward of `MoELayer` in training: the router with its global pool on one device,
capacity 1, experts of ratio 4, the capacity predictor with its loss, the threshold proposals; the input requires grad
and all gradients start as None. Against it, two dense `Mlp`:

- ratio 4: what the block would have without experts. It does less arithmetic: no router, no capacity predictor.
- widened: the hidden width at which its multiply-accumulates, forward and backward, equal those that the MoE layer
  activates for router, predictor and experts together. This is the fair one.

How. The three layers run in turn (A B C A B C ...) in one process after a warm-up; times are medians, on one CPU thread
of the process's own time, and a time ratio is the median of the ratios of one round, so that a machine whose speed
drifts cancels out. The work column comes from torch's FLOP counter over forward and backward and shows how equal the
arithmetic is.

Memory, beyond the parameters:

- peak: the most that a step has live at one moment, beyond what is there before it (the input, the output gradient).
  Each parameter gradient is freed as soon as it is complete, and counted until then: gradients are the optimizer's to
  keep, they weigh as much as the parameters, and they would hide the layer's own memory. On CUDA it comes from
  torch.cuda.max_memory_allocated; on CPU it is the running sum of the allocations and releases in the profiler's
  memory events, which hold every tensor, but not the scratch space inside a math library.
- saved: bytes that autograd keeps for backward after the forward pass, each storage once, the input among them.

On a CPU the C library keeps freed memory, as it does for a trainer: tensors of many megabytes, the gradients of all the
experts among them, would else come from the operating system as fresh pages at every allocation.

    python -m benchmarks.moe_layer
    python -m benchmarks.moe_layer --device cuda --dtype bf16 --sizes 1152x65536x16
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import circumstances, free_gradients, in_turn, ratio, saved_bytes, seconds_of, told
from benchmarks.measuring import peak_bytes as peak_of
from diffmoe_dist.config.routers.global_pool import Settings
from diffmoe_dist.model.mlp import Mlp
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.routing import LocalPool
from diffmoe_dist.parallel.topology import keep_freed_memory

MLP_RATIO = 4
TOKENS_PER_IMAGE = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Forward = Callable[[Tensor], list[Tensor]]  # the input to what backward starts from: output, and the loss if any


def moe_layer(width: int, num_experts: int) -> MoELayer:
    settings = Settings("global_pool", num_experts, inference="count", threshold_decay=0.95)
    router = PoolChoice(width, settings, LocalPool(), layers=1)
    return MoELayer(router, Experts(num_experts, width, MLP_RATIO * width))


def widened_hidden_size(width: int, num_experts: int) -> int:
    """The hidden size of an MLP whose multiply-accumulates equal the activated ones of the MoE layer, but for rounding.

    It is a multiple of 8: in bf16 a GPU needs three times as long for other sizes.

    Forward and backward are three products of the same size: output, input gradient, weight gradient. The first layer
    of the predictor needs no input gradient, since its input is detached. Per token, with D the width:
    3 * 2 * D * 4D (experts) + 3 * D * N (router) + 2 * D * D + 3 * D * N (predictor) = 3 * 2 * D * hidden.
    """
    return 8 * round((MLP_RATIO * width + width / 3 + num_experts) / 8)


class Candidate:
    """A layer with its input and output gradient; `step` is one forward and backward."""

    def __init__(self, module: nn.Module, forward: Forward, images: int, width: int, like: Tensor) -> None:
        self.module = module.to(like)
        self.forward = forward
        generator = torch.Generator().manual_seed(0)
        shape = (images, TOKENS_PER_IMAGE, width)
        self.x = torch.randn(shape, generator=generator).to(like).requires_grad_()
        self.grad = torch.randn(shape, generator=generator).to(like)
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * width**-0.5)

    def step(self) -> None:
        self.clear()
        outputs = self.forward(self.x)
        torch.autograd.backward(outputs, [self.grad, *[torch.ones_like(loss) for loss in outputs[1:]]])

    def clear(self) -> None:
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None


def candidates(width: int, tokens: int, num_experts: int, like: Tensor) -> dict[str, Candidate]:
    images = tokens // TOKENS_PER_IMAGE
    layer = moe_layer(width, num_experts)
    modules: dict[str, tuple[nn.Module, Forward]] = {"moe": (layer, lambda x: _moe_outputs(layer, x))}
    hidden_sizes = {"ratio 4": MLP_RATIO * width, "widened": widened_hidden_size(width, num_experts)}
    for name, hidden in hidden_sizes.items():
        modules[name] = _dense(Mlp(width, hidden))
    return {name: Candidate(module, forward, images, width, like) for name, (module, forward) in modules.items()}


def _dense(mlp: Mlp) -> tuple[nn.Module, Forward]:
    return mlp, lambda x: [mlp(x)]


def _moe_outputs(layer: MoELayer, x: Tensor) -> list[Tensor]:
    y, routing = layer(x, torch.zeros(len(x), dtype=torch.bool, device=x.device))
    return [y, *routing.losses.values()]


def peak_bytes(candidate: Candidate, device: torch.device) -> int:
    """The most bytes live at one moment of a step, beyond those before it; parameter gradients freed once complete."""
    handles = free_gradients(candidate.module)
    candidate.step()
    candidate.clear()
    peak = peak_of(candidate.step, device)
    for handle in handles:
        handle.remove()
    return peak


def flops(candidate: Candidate) -> int:
    with FlopCounterMode(display=False) as counter:
        candidate.step()
    candidate.clear()
    return counter.get_total_flops()


def measure(width: int, tokens: int, num_experts: int, like: Tensor, repeats: int) -> list[dict[str, Any]]:
    """The rows of one size: the MoE layer, then each dense layer with the MoE layer's ratio to it."""
    layers = candidates(width, tokens, num_experts, like)
    steps = {name: partial(seconds_of, layer.step, like.device) for name, layer in layers.items()}
    seconds = in_turn(steps, repeats)
    for layer in layers.values():
        layer.clear()
    rows: list[dict[str, Any]] = []
    for name, layer in layers.items():
        row: dict[str, Any] = {
            "size": f"{width}x{tokens}x{num_experts}",
            "layer": name,
            "seconds": seconds[name],
            "flops": flops(layer),
            "peak_bytes": peak_bytes(layer, like.device),
            "saved_bytes": saved_bytes(layer.module, partial(layer.forward, layer.x)),
        }
        if name != "moe":
            row["moe_over_this"] = {"time": ratio(seconds["moe"], seconds[name])}
            row["moe_over_this"] |= {key: rows[0][key] / row[key] for key in ("flops", "peak_bytes", "saved_bytes")}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown; ratios are those of the mixture of experts to the layer of the row."""
    lines = [
        "| type | width x tokens x experts | layer | ms | GFLOP | peak (MiB) | saved (MiB) "
        "| ratios: time | work | peak | saved |",
        f"|{'---|' * 11}",
    ]
    for row in rows:
        cells = [row["dtype"], row["size"], row["layer"], f"{statistics.median(row['seconds']) * 1e3:.2f}"]
        cells += [f"{row['flops'] / 1e9:.1f}", f"{row['peak_bytes'] / 2**20:.1f}", f"{row['saved_bytes'] / 2**20:.1f}"]
        ratios = row.get("moe_over_this", {})
        cells += [f"{ratios[key]:.3f}" if ratios else "" for key in ("time", "flops", "peak_bytes", "saved_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def size(text: str) -> tuple[int, int, int]:
    """'384x8192x16' to (384, 8192, 16)."""
    try:
        width, tokens, num_experts = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected WIDTHxTOKENSxEXPERTS, such as 384x8192x16") from None
    if min(width, tokens, num_experts) < 1 or tokens % TOKENS_PER_IMAGE or tokens < num_experts:
        raise argparse.ArgumentTypeError(
            f"'{text}': choose a multiple of {TOKENS_PER_IMAGE} tokens, at least as many as experts"
        )
    return width, tokens, num_experts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe_layer",
        description="Time and memory of the mixture-of-experts layer, forward and backward, as ratios to dense layers "
        "measured in turn with it in the same run.",
        epilog="Read the ratios, not the milliseconds: other work on the machine moves both layers alike. The target "
        "against 'widened', the dense layer of the same arithmetic: time at most 1.15, memory at most 2.",
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="%(default)s here")
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        nargs="+",
        help="precision of layer and input; default: fp32, on CUDA bf16 too",
    )
    parser.add_argument("--repeats", type=int, help="rounds to take the median of; default: 11, on CUDA 50")
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        metavar="DxTxN",
        default=[(384, 8192, 16), (768, 8192, 16), (1024, 4096, 8)],
        help="width x tokens x experts; default: 384x8192x16 768x8192x16 1024x4096x8",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there, too")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not cuda:
        parser.error("--device cuda: torch finds no CUDA device; choose --device cpu")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats}: choose at least 1")
    return arguments


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    if not on_cuda:
        keep_freed_memory()
    found: dict[str, Any] = {"benchmark": "moe_layer", **circumstances(device), "rows": []}
    print(f"{told(found)}; forward and backward; memory beyond the parameters\n")
    for name in arguments.dtype or (["bf16", "fp32"] if on_cuda else ["fp32"]):
        like = torch.empty(0, device=device, dtype=DTYPES[name])
        for width, tokens, num_experts in arguments.sizes:
            measured = measure(width, tokens, num_experts, like, arguments.repeats or (50 if on_cuda else 11))
            rows = [{"dtype": name, **row} for row in measured]
            print("\n".join(table(rows)[2 if found["rows"] else 0 :]), flush=True)
            found["rows"] += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
