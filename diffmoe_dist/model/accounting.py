"""The parameters and multiply-accumulates (MACs) of a model, part by part, from its settings alone.

The model is built on torch's meta device, which allocates nothing, so the counts are those of the modules that train. A
token activates only some parameters of a mixture of experts. C, the capacity, is the mean number of routed experts per
token (DiffMoE eq. 8-9); the unconditional expert counts as one of them. N is the number of routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.model.freezing import GradientFlow
from diffmoe_dist.model.on_meta import meta_model

# The part that a parameter belongs to, by a pattern in its name; the first match counts.
_PARTS = {
    "_embedder.": "embedders",
    "pos_embed": "position table",
    ".attn.": "attention",
    ".cross_attn.": "cross-attention",
    "final_layer.": "final layer",
    ".adaLN_modulation.": "adaLN",
    ".mlp.router.capacity_predictor.": "capacity predictor",
    ".mlp.router.": "router",
    ".mlp.experts.": "routed experts",
    ".mlp.shared.": "shared experts",
    ".mlp.unconditional.": "unconditional expert",
    ".mlp.": "dense MLP",
}
PARTS = (
    "attention", "cross-attention", "adaLN", "dense MLP", "routed experts", "shared experts", "unconditional expert",
    "router", "capacity predictor", "embedders", "position table", "final layer",
)  # fmt: skip
ATTENTION_PRODUCTS = "attention products"
_FEED_FORWARD = ("dense MLP", "routed experts", "router", "capacity predictor")


@dataclass(frozen=True)
class Accounting:
    """The counts of one model. MACs are those of the forward pass of one image. A dense model does not depend on C."""

    parameters: dict[str, int]  # of each part in `PARTS`; the frozen position table is one
    fixed_macs: dict[str, int]  # of linear layers, by part; all but those of the routed experts
    expert_macs: int  # of linear layers, where every token goes to one routed expert (C = 1)
    attention_macs: int  # of the products of queries with keys and of weights with values
    num_experts: int  # N; 0: a dense model
    nominal_capacity: float  # C of the settings: `moe.capacity` or `moe.top_k`; 0: a dense model
    # By part, and of attention's products, how much of backward's two passes is made; not given: all of it.
    backward: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All parameters, the position table included."""
        return sum(self.parameters.values())

    def activated(self, capacity: float | None = None) -> float:
        """Activated parameters of a token at C (default: the nominal one): C routed experts and everything else.

        Router, capacity predictor, shared experts and embedders count whole: every token passes through them.
        """
        idle = self.parameters["routed experts"] + self.parameters["unconditional expert"]
        return self.total - idle + self._capacity(capacity) * self._one_expert

    def activated_eq40(self, capacity: float | None = None) -> float | None:
        """Activated parameters as DiffMoE's tables count them: (1 + C) / (1 + N) * FFN + attention + adaLN + other.

        FFN is dense MLPs, experts, router and capacity predictor together. So the formula counts only a part of the
        predictor, though every token passes through it. None for models with shared or unconditional experts, which the
        formula does not have.
        """
        if self.parameters["shared experts"] or self.parameters["unconditional expert"]:
            return None
        if not self.num_experts:
            return float(self.total)
        feed_forward = sum(self.parameters[part] for part in _FEED_FORWARD)
        # DiffMoE eq. 40
        activated = (1 + self._capacity(capacity)) / (1 + self.num_experts)
        return activated * feed_forward + self.total - feed_forward

    def macs(self, capacity: float | None = None) -> dict[str, float]:
        """MACs of a forward pass of one image at C, by part; of linear layers only, as the papers count."""
        return {**self.fixed_macs, "routed experts": self._capacity(capacity) * self.expert_macs}

    def training_flops(self, capacity: float | None = None) -> float:
        """Floating-point operations of a training step for one image at C.

        Two for each MAC of linear layers and of attention's products; backward is twice forward. It is less where
        parameters are frozen: they have no gradient, and what lies before all that trains has no backward pass.
        """
        macs = {**self.macs(capacity), ATTENTION_PRODUCTS: self.attention_macs}
        return sum(2 * number * (1 + 2 * self.backward.get(part, 1.0)) for part, number in macs.items())

    @property
    def _one_expert(self) -> float:
        return self.parameters["routed experts"] / max(self.num_experts, 1)

    def _capacity(self, capacity: float | None) -> float:
        return self.nominal_capacity if capacity is None else capacity


def account(config: Config) -> Accounting:
    """Count the model of a configuration."""
    model = meta_model(config)
    tokens = config.tokens_per_sample
    parameters = dict.fromkeys(PARTS, 0)
    macs = dict.fromkeys(PARTS, 0)
    for name, parameter in [*model.named_parameters(), ("pos_embed", model.pos_embed)]:
        parameters[part_of(name)] += parameter.numel()
        macs[part_of(name)] += _macs_of(name, parameter, tokens, config.model.text_max_length or 0)
    experts = config.experts
    num_experts = 0 if experts is None else int(experts.num_experts or 0)
    routed_macs = macs.pop("routed experts")  # as if every token went to every expert
    macs.pop("unconditional expert")  # C counts it as a routed one
    keys = tokens + (config.model.text_max_length or 0)  # of self-attention and of cross-attention
    return Accounting(
        parameters=parameters,
        fixed_macs=macs,
        expert_macs=routed_macs // max(num_experts, 1),
        attention_macs=config.model.depth * 2 * tokens * keys * config.model.num_heads * config.model.head_dim,
        num_experts=num_experts,
        nominal_capacity=0.0 if experts is None else experts.nominal_capacity(),
        backward=_backward(config) if config.train.freeze else {},
    )


def _backward(config: Config) -> dict[str, float]:
    """By part, how much of backward is made of what it is where everything trains: a mean over the part's MACs."""
    flow = GradientFlow(config)
    whole: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    made = dict(whole)
    for name, parameter in meta_model(config).named_parameters():
        macs = _macs_of(name, parameter, config.tokens_per_sample, config.model.text_max_length or 0)
        whole[part_of(name)] += macs
        made[part_of(name)] += macs * (1.0 if name not in flow.frozen else 0.5 if flow.reaches(name) else 0.0)
    kept = {part: made[part] / total for part, total in whole.items() if total}
    attends = [flow.into(f"blocks.{block}.attn.proj.weight") for block in range(config.model.depth)]
    return {**kept, ATTENTION_PRODUCTS: sum(attends) / len(attends)}


def part_of(name: str) -> str:
    """The part in `PARTS` that a parameter belongs to, by its name in the model."""
    for pattern, part in _PARTS.items():
        if pattern in name:
            return part
    raise AssertionError(f"{name} belongs to no part; add it to _PARTS")


def _macs_of(name: str, parameter: Tensor, tokens: int, text_tokens: int) -> int:
    """MACs of one image: each weight of a linear layer is used once for each input vector.

    These are the image's tokens, the caption's tokens with their padding, or the one vector of time and condition.
    """
    if parameter.ndim < 2 or _is_bias_of_experts(name) or name in ("pos_embed", "y_embedder.embedding_table.weight"):
        return 0
    if ".cross_attn.kv." in name or name.startswith("y_embedder.tokens."):
        return parameter.numel() * text_tokens
    sees_condition = ".adaLN_modulation." in name or name.startswith(("t_embedder.", "y_embedder."))
    return parameter.numel() * (1 if sees_condition else tokens)


def _is_bias_of_experts(name: str) -> bool:
    return name.endswith((".experts.b1", ".experts.b2"))
