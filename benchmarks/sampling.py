"""Images per second of dynamic capacity against static capacity and against dense models.

What is measured. `generate` with the Euler sampler, without guidance: a DiffMoE (global pool over the batch, C = 1)
under its inference rules `threshold` and `count` (dynamic: how many tokens an expert takes follows from the capacity
predictor) and `static` (always T / N * C), the same weights in all three; and two dense models:

- ratio 4: the same depth and width without experts. It has fewer activated parameters: no router, no predictor.
- equal: the MLPs widened until its parameters equal those that a token of the DiffMoE activates at C = 1, the router
  and the capacity predictor among them. This is the fair one.

Weights are random, thresholds are found from random batches as `--recalibrate` finds them from training data, so the
capacity of the dynamic rules comes out close to 1; it is measured and printed. The expert groups of a trained model are
less even.

How. The models run in turn (A B C D E A B ...) in one process after a warm-up; images per second come from median
times, and a ratio is the median of the ratios of one round, so that a machine whose speed drifts cancels out. On one
CPU thread the clock is the process's own time, which other processes do not run.

    python -m benchmarks.sampling
    python -m benchmarks.sampling --device cuda --size 1152x28x16 --batch 64
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from typing import Any

import torch

from benchmarks.measuring import machine
from diffmoe_dist.config import Config, build_config
from diffmoe_dist.diffusion.objectives import build_objective
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.pool_choice import PoolChoice
from diffmoe_dist.sampling.conditions import ClassLabels
from diffmoe_dist.sampling.generate import Generated, SamplerSettings, generate

RULES = ("threshold", "count", "static")


def config_for(width: int, depth: int, moe: dict[str, Any], mlp_ratio: float = 4.0) -> Config:
    model = {"depth": depth, "hidden_size": width, "num_heads": width // 64, "mlp_ratio": mlp_ratio}
    moe = {**moe, "expert_mlp_ratio": 4.0} if "num_experts" in moe else moe
    return build_config({"run_dir": "-", "data": {"shards": "-"}, "model": model, "moe": moe})


def random_model(config: Config, device: torch.device) -> DiT:
    model = DiT(config)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as initialised, the blocks would do nothing
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def find_thresholds(model: DiT, batch: int, batches: int = 4) -> None:
    """Set the thresholds to the mean of what random batches propose."""
    device, size = model.pos_embed.device, model.grid_size * model.patch_size
    generator = torch.Generator().manual_seed(1)
    proposals = []
    model.train()
    for place in range(batches):
        x = torch.randn(batch, model.in_channels, size, size, generator=generator).to(device)
        t = torch.full((batch,), (place + 0.5) / batches, device=device)
        y = torch.randint(model.num_classes, (batch,), generator=generator).to(device)
        proposals.append([stats.proposed_threshold for stats in model(x, t, y).routing])
    model.eval()
    for layer, of_layer in zip(model.moe_layers, zip(*proposals, strict=True), strict=True):
        layer.router.get_buffer("threshold").copy_(torch.stack(of_layer).mean(dim=0))


def activated_parameters(model: DiT, capacity: float = 1.0) -> int:
    """Parameters that a token meets, of the experts' those of `capacity` of them."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(p.numel() for layer in model.moe_layers for p in layer.experts.parameters())
    experts = len(model.moe_layers[0].experts.w1) if model.moe_layers else 1
    return round(total - routed * (1 - capacity / experts))


def widened_ratio(width: int, depth: int, activated: int, dense: DiT) -> float:
    """The MLP ratio at which a dense model has this many parameters."""
    missing = activated - activated_parameters(dense)
    hidden = 4 * width + round(missing / (depth * (2 * width + 1)))
    return (hidden + 0.5) / width  # rounded down when the model is built


def measure(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    width, depth, experts = arguments.size
    moe_config = config_for(width, depth, {"router": "global_pool", "num_experts": experts})
    moe = random_model(moe_config, device)
    find_thresholds(moe, arguments.batch)
    dense = random_model(config_for(width, depth, {"router": "dense"}), device)
    ratio = widened_ratio(width, depth, activated_parameters(moe), dense)
    equal = random_model(config_for(width, depth, {"router": "dense"}, ratio), device)
    models = {**dict.fromkeys(RULES, moe), "dense, ratio 4": dense, "dense, equal": equal}
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in models}
    capacity: dict[str, float | None] = {}
    for round_ in range(-1, arguments.rounds):
        for name, model in models.items():
            if name in RULES:
                for layer in model.moe_layers:
                    assert isinstance(layer.router, PoolChoice)
                    layer.router.inference = name
            begun = clock()
            sampled = sample(model, moe_config, arguments.batch, arguments.steps)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            capacity[name] = sampled.capacity
            if round_ >= 0:
                seconds[name].append(clock() - begun)
    print(f"{'model':>16} {'activated':>11} {'C':>6} {'images/s':>9} {'/ dense, equal':>15} {'/ dense, ratio 4':>17}")
    for name, model in models.items():
        c = capacity[name]
        rate = arguments.batch / statistics.median(seconds[name])
        ratios = [
            statistics.median(other / own for own, other in zip(seconds[name], seconds[reference], strict=True))
            for reference in ("dense, equal", "dense, ratio 4")
        ]
        activated = activated_parameters(model, 1.0 if c is None else c) / 1e6
        shown = "-" if c is None else f"{c:.3f}"
        print(f"{name:>16} {activated:>9.2f} M {shown:>6} {rate:>9.3f} {ratios[0]:>15.3f} {ratios[1]:>17.3f}")


def sample(model: DiT, config: Config, batch: int, steps: int) -> Generated:
    numbers = list(range(batch))
    conditions = ClassLabels(range(1000), 1000)
    return generate(model, build_objective(config), numbers, conditions, SamplerSettings("euler", steps))


def size(text: str) -> tuple[int, int, int]:
    """'384x12x8' to (384, 12, 8)."""
    try:
        width, depth, experts = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected WIDTHxDEPTHxEXPERTS, such as 384x12x8") from None
    if width % 64 or depth < 2 or experts < 1:
        raise argparse.ArgumentTypeError(f"'{text}': choose a width divisible by 64 and a depth of 2 or more")
    return width, depth, experts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling",
        description="Images per second of dynamic and static capacity and of dense models, measured in turn.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=size, default=(384, 12, 8), metavar="WxLxN", help="default 384x12x8: DiT-S, 8")
    parser.add_argument("--batch", type=int, default=4, help="images sampled together (default 4), 256 tokens each")
    parser.add_argument("--steps", type=int, default=3, help="sampler steps (default 3)")
    parser.add_argument("--rounds", type=int, default=9, help="to take the median of (default 9)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {machine(device)}")
    measure(arguments)


if __name__ == "__main__":
    main()
