"""The mixture-of-experts layer of DiffMoE, written from the paper's equations, one token and one expert at a time.

Slow and in fp64, on one device and for one pool. It shares no code with the package; equation numbers are DiffMoE's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class ReferenceResult:
    output: Tensor  # (P, D)
    chosen: list[list[int]]  # the tokens of each expert, ascending
    gates: list[list[Tensor]]  # and their gates
    capacity_loss: Tensor  # ()
    kth_probability: Tensor  # (N,) the K_train-th largest predicted probability, eq. 17


def double_weights(named_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp64 leaves with the names of a MoELayer's parameters, for gradients to be compared by name."""
    return {name: tensor.detach().double().requires_grad_() for name, tensor in named_tensors.items()}


def moe_layer(
    x_PD: Tensor, weights: Weights, capacity: float, rule: str = "training", threshold: Sequence[float] | None = None
) -> ReferenceResult:
    """One pool of tokens through the layer.

    Args:
        weights: `router.gate_weight`, `router.capacity_predictor.{0,2}.{weight,bias}`, `experts.{w1,b1,w2,b2}`.
        capacity: expert slots per token, C.
        rule: `training` or `static` (Alg. 3), `count` (Alg. 4), `threshold` (eq. 14).
        threshold: the probability of each expert that `count` and `threshold` compare with.
    """
    tokens, experts = len(x_PD), len(weights["router.gate_weight"])
    affinity = [_affinity(x, weights) for x in x_PD]
    probability = [_predicted(x.detach(), weights) for x in x_PD]
    slots = math.floor(tokens / experts * capacity)

    chosen: list[list[int]] = []
    for e in range(experts):
        column = [affinity[s][e].item() for s in range(tokens)]
        if rule in ("training", "static"):
            chosen.append(_best(column, slots))
        else:
            assert threshold is not None
            above = [s for s in range(tokens) if probability[s][e].item() > threshold[e]]
            chosen.append(above if rule == "threshold" else _best(column, len(above)))

    rows = [torch.zeros(x_PD.shape[1], dtype=x_PD.dtype) for _ in range(tokens)]
    for e in range(experts):
        for s in chosen[e]:
            rows[s] = rows[s] + affinity[s][e] * _expert(x_PD[s], weights, e)

    loss = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        for s in range(tokens):
            p = probability[s][e]
            loss = loss - (torch.log(p) if s in chosen[e] else torch.log(1 - p))
    kth = [
        sorted((probability[s][e].item() for s in range(tokens)), reverse=True)[max(slots, 1) - 1]
        for e in range(experts)
    ]
    return ReferenceResult(
        output=torch.stack(rows),
        chosen=chosen,
        gates=[[affinity[s][e] for s in chosen[e]] for e in range(experts)],
        capacity_loss=loss / (tokens * experts),
        kth_probability=torch.tensor(kth, dtype=torch.float64),
    )


def pools_of(tokens: int, tokens_per_pool: int) -> list[slice]:
    """Consecutive pools of equal size."""
    return [slice(start, start + tokens_per_pool) for start in range(0, tokens, tokens_per_pool)]


def moe_layer_over_pools(
    x_TD: Tensor,
    weights: Weights,
    capacity: float,
    tokens_per_pool: int,
    rule: str = "training",
    threshold: Sequence[float] | None = None,
) -> ReferenceResult:
    """The layer applied to each pool; losses and probabilities are the means over the pools, tokens keep their ids."""
    pools = pools_of(len(x_TD), tokens_per_pool)
    results = [moe_layer(x_TD[pool], weights, capacity, rule, threshold) for pool in pools]
    experts = range(len(results[0].chosen))
    return ReferenceResult(
        output=torch.cat([result.output for result in results]),
        chosen=[
            [pool.start + s for pool, result in zip(pools, results, strict=True) for s in result.chosen[e]]
            for e in experts
        ],
        gates=[[gate for result in results for gate in result.gates[e]] for e in experts],
        capacity_loss=torch.stack([result.capacity_loss for result in results]).mean(),
        kth_probability=torch.stack([result.kth_probability for result in results]).mean(dim=0),
    )


def _best(column: list[float], count: int) -> list[int]:
    """The `count` tokens with the highest scores; of equal scores the lower token id."""
    return sorted(sorted(range(len(column)), key=lambda s: (-column[s], s))[:count])


def _affinity(x_D: Tensor, weights: Weights) -> list[Tensor]:
    """The softmax over the experts (eq. 5, Alg. 3)."""
    powers = [torch.exp((x_D * weight).sum()) for weight in weights["router.gate_weight"]]
    return [power / sum(powers) for power in powers]


def _predicted(x_D: Tensor, weights: Weights) -> Tensor:
    """The capacity predictor's probability for each expert (eq. 10)."""
    prefix = "router.capacity_predictor"
    h = weights[f"{prefix}.0.weight"] @ x_D + weights[f"{prefix}.0.bias"]
    h = h / (1 + torch.exp(-h))
    logits = weights[f"{prefix}.2.weight"] @ h + weights[f"{prefix}.2.bias"]
    return 1 / (1 + torch.exp(-logits))


def _expert(x_D: Tensor, weights: Weights, expert: int) -> Tensor:
    """A two-layer MLP with a tanh-approximated GELU."""
    h = x_D @ weights["experts.w1"][expert] + weights["experts.b1"][expert]
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    return h @ weights["experts.w2"][expert] + weights["experts.b2"][expert]
