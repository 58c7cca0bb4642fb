"""The mixture-of-experts layer against dense layers of the same arithmetic: time, peak memory, bytes saved.

What is measured. One forward and backward of `MoELayer` in training: the router with its global pool on one device,
capacity 1, experts of ratio 4, the capacity predictor with its loss, the threshold proposals; the input requires grad
and all gradients start as None. Against it, two dense `Mlp`:

- ratio 4: what the block would have without experts. It does less arithmetic: no router, no capacity predictor.
- widened: the hidden width at which its multiply-accumulates, forward and backward, equal those that the MoE layer
  activates for router, predictor and experts together. This is the fair one.

How. The three layers run in turn (A B C A B C ...) in one process after a warm-up; times are medians, and a time ratio
is the median of the ratios of one round, so that a machine whose speed drifts cancels out. The work column comes from
torch's FLOP counter over forward and backward and shows how equal the arithmetic is.

Memory, beyond the parameters:

- peak: the most that a step has live at one moment, beyond what is there before it (the input, the output gradient).
  Each parameter gradient is freed as soon as it is complete, and counted until then: gradients are the optimizer's to
  keep, they weigh as much as the parameters, and they would hide the layer's own memory. On CUDA it comes from
  torch.cuda.max_memory_allocated; on CPU it is the running sum of the allocations and releases in the profiler's
  memory events, which hold every tensor, but not the scratch space inside a math library.
- saved: bytes that autograd keeps for backward after the forward pass, each storage once, the input among them.

On a CPU, tensors of many megabytes come from the operating system as fresh pages at every allocation, the gradients
of all the experts among them; MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment lets the C
library keep them, as the caching allocator does on CUDA, and shows how much of a ratio that is.

    python -m benchmarks.moe_layer
    python -m benchmarks.moe_layer --device cuda --dtype bf16 --sizes 1152x65536x16
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffmoe_dist.config.routers.global_pool import Settings
from diffmoe_dist.model.mlp import Mlp
from diffmoe_dist.model.moe import Experts, MoELayer
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.model.routing import LocalPool

MLP_RATIO = 4
TOKENS_PER_IMAGE = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Forward = Callable[[Tensor], list[Tensor]]  # the input to what backward starts from: output, and the loss if any


def moe_layer(width: int, num_experts: int) -> MoELayer:
    settings = Settings("global_pool", num_experts, inference="count", threshold_decay=0.95)
    router = PoolChoice(width, settings, LocalPool(), layers=1)
    return MoELayer(router, Experts(num_experts, width, MLP_RATIO * width))


def widened_hidden_size(width: int, num_experts: int) -> int:
    """The hidden size of an MLP whose multiply-accumulates equal the activated ones of the MoE layer.

    Forward and backward are three products of the same size: output, input gradient, weight gradient. The first layer
    of the predictor needs no input gradient, since its input is detached. Per token, with D the width:
    3 * 2 * D * 4D (experts) + 3 * D * N (router) + 2 * D * D + 3 * D * N (predictor) = 3 * 2 * D * hidden.
    """
    return round(MLP_RATIO * width + width / 3 + num_experts)


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


def times_in_turn(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, repeats):
        for name, step in steps.items():
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(candidate: Candidate, device: torch.device) -> int:
    """The most bytes live at one moment of a step, beyond those before it; parameter gradients freed once complete."""
    handles = [p.register_post_accumulate_grad_hook(_free_gradient) for p in candidate.module.parameters()]
    candidate.step()
    candidate.clear()
    peak = _peak_on_cuda(candidate, device) if device.type == "cuda" else _peak_on_cpu(candidate)
    for handle in handles:
        handle.remove()
    return peak


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _peak_on_cuda(candidate: Candidate, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    candidate.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(candidate: Candidate) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        candidate.step()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def saved_bytes(candidate: Candidate) -> int:
    """Bytes that a forward pass leaves for backward, the input included, parameters left out."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in candidate.module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps the storage, so that its address stays its own

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = candidate.forward(candidate.x)
    del outputs
    return sum(storages.values())


def flops(candidate: Candidate) -> int:
    with FlopCounterMode(display=False) as counter:
        candidate.step()
    candidate.clear()
    return counter.get_total_flops()


def measure(width: int, tokens: int, num_experts: int, like: Tensor, repeats: int) -> list[str]:
    """The table rows of one size: the MoE layer, then each dense layer with the MoE layer's ratio to it."""
    layers = candidates(width, tokens, num_experts, like)
    seconds = times_in_turn({name: layer.step for name, layer in layers.items()}, repeats, like.device)
    for layer in layers.values():
        layer.clear()
    figures = {name: (flops(x), peak_bytes(x, like.device), saved_bytes(x)) for name, x in layers.items()}
    rows = []
    for name, (work, peak, saved) in figures.items():
        row = f"{f'{width}x{tokens}x{num_experts}':>16}  {name:8} {statistics.median(seconds[name]) * 1e3:10.2f}"
        row += f" {work / 1e9:9.1f} {peak / 2**20:9.1f} {saved / 2**20:9.1f}"
        if name != "moe":
            time_ratio = statistics.median(a / b for a, b in zip(seconds["moe"], seconds[name], strict=True))
            ratios = [of_moe / own for of_moe, own in zip(figures["moe"], figures[name], strict=True)]
            row += f"   {time_ratio:6.3f} {ratios[0]:6.3f} {ratios[1]:6.2f} {ratios[2]:6.2f}"
        rows.append(row)
    return rows


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


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
    print(f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {machine(device)}")
    for name in arguments.dtype or (["bf16", "fp32"] if on_cuda else ["fp32"]):
        print(f"\n{name}: forward and backward; MiB beyond the parameters; ratios are MoE layer / dense layer")
        print(f"{'size DxTxN':>16}  {'layer':8} {'ms':>10} {'GFLOP':>9} {'peak':>9} {'saved':>9}", end="   ")
        print(f"{'time':>6} {'work':>6} {'peak':>6} {'saved':>6}")
        like = torch.empty(0, device=device, dtype=DTYPES[name])
        for width, tokens, num_experts in arguments.sizes:
            rows = measure(width, tokens, num_experts, like, arguments.repeats or (50 if on_cuda else 11))
            print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
