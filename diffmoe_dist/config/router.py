"""What the settings of all routers have in common. None of this needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import MISSING, OmegaConf

from diffmoe_dist.config.require import require
from diffmoe_dist.errors import UserError


@dataclass(frozen=True)
class MoEConfig:
    """A model without experts has no other setting here than the router's name."""

    # Or a file of config/routers/, or the import path of one's own; its `Settings` then take the place of this class.
    router: str = "dense"


@dataclass(frozen=True)
class RouterSettings(MoEConfig):
    """What every router knows; the settings of a router extend it by its own.

    What has no default here follows from other settings: `derived` says how.
    """

    num_experts: int = MISSING  # that tokens are routed to; shared and unconditional ones are not counted
    blocks: Any = "odd"  # which are mixtures of experts: odd (counted from 0), all, or their numbers, as [1, 3]
    expert_mlp_ratio: float = MISSING  # hidden width of an expert over the model's; default: model.mlp_ratio
    activation: Literal["gelu", "swiglu"] = MISSING  # of the experts; default: model.activation
    shared_experts: int = 0  # experts that every token passes through, with weight 1
    # Of a shared expert; default: as wide as a routed one, and swiglu where dense layers or routed experts are.
    shared_mlp_ratio: float = MISSING
    shared_activation: Literal["gelu", "swiglu"] = MISSING

    unconditional_expert = False  # a class attribute, no setting: one more expert for images without a condition
    keeps_fp32_tokens = False  # also one: whether the router keeps the tokens in fp32 for backward, whatever their type

    @classmethod
    def derived(cls, given: Any) -> dict[str, Any]:
        """The settings of `moe` that are not given and follow from others.

        Args:
            given: all settings of the run so far, typed, as an OmegaConf container.

        Raises:
            UserError: one is missing that nothing says.
        """
        model, moe = given.model, given.moe

        def value(name: str, default: Any) -> Any:
            return default if OmegaConf.is_missing(moe, name) else moe[name]

        if OmegaConf.is_missing(moe, "num_experts"):
            raise UserError(f"moe.num_experts is not set; moe.router={moe.router} needs a number, such as 16")
        ratio = value("expert_mlp_ratio", model.mlp_ratio)
        activation = value("activation", model.activation)
        either = "swiglu" if "swiglu" in (model.activation, activation) else "gelu"
        return {
            "blocks": _blocks(moe.blocks),
            "expert_mlp_ratio": ratio,
            "activation": activation,
            "shared_mlp_ratio": value("shared_mlp_ratio", ratio),
            "shared_activation": value("shared_activation", either),
        }

    def structure(self) -> dict[str, Any]:
        """The settings that decide which tensors the layer has and what they mean; `moe.blocks` apart."""
        names = ["router", "num_experts", "expert_mlp_ratio", "activation", "shared_experts"]
        names += ["shared_mlp_ratio", "shared_activation"] if self.shared_experts else []
        return {name: getattr(self, name) for name in names}

    def shared_hidden_size(self, hidden_size: int) -> int:
        """Hidden width of all shared experts together, which are one layer; 0: there are none."""
        return self.shared_experts * int(hidden_size * self.shared_mlp_ratio)

    def pool_kind(self) -> str:
        """Who competes for an expert's slots: global, expert_parallel, rank or sample (nobody beyond the image)."""
        return "sample"

    def shares_batch(self) -> bool:
        """Whether a loss depends on the batch as a whole, across images."""
        return False

    def nominal_capacity(self) -> float:
        """C as the settings mean it: experts per token."""
        return 1.0

    def experts_per_token(self, pool_tokens: int) -> float:
        """Experts per routed token in training, in the mean over a pool of so many tokens."""
        return self.nominal_capacity()

    def capacity_is_constant(self) -> bool:
        """Whether C is the same in every batch of training, by construction."""
        return False

    def load_is_constant(self) -> bool:
        """Whether every expert takes as many tokens as any other in every batch of training, by construction."""
        return False

    def score_kinds(self) -> int:
        """How many scores of each token and expert compete in a pool; 0: experts choose no tokens."""
        return 0

    def has_predictor(self) -> bool:
        """Whether the router learns how many tokens each expert needs, and proposes thresholds."""
        return False

    def batch_sum_bytes(self, hidden_size: int) -> int:
        """What a layer sums over the ranks in a micro-step for losses of the batch."""
        return 0

    def saved_bytes(self, hidden_size: int, element: int) -> int:
        """What the router keeps of each token for the backward pass, beside its scores: an estimate."""
        return 0

    def check(self, tokens_per_sample: int) -> None:
        """Refuse what contradicts itself.

        Raises:
            UserError: a setting is out of range, or without effect.
        """
        require(self, "moe", "num_experts", lambda value: 1 <= value <= 2**14, f"from 1 to {2**14}")
        require(self, "moe", "expert_mlp_ratio", lambda value: 0 < value <= 64, "above 0, and at most 64")
        require(self, "moe", "shared_experts", lambda value: 0 <= value <= 2**10, f"from 0 (none) to {2**10}")
        require(self, "moe", "shared_mlp_ratio", lambda value: 0 < value <= 64, "above 0, and at most 64")
        if not self.shared_experts and self.shared_mlp_ratio != self.expert_mlp_ratio:
            raise UserError(
                f"moe.shared_mlp_ratio={self.shared_mlp_ratio} has no effect with moe.shared_experts=0; remove it"
            )

    def check_top_k(self, top_k: int) -> None:
        """Refuse a token without experts, and more experts than there are; for routers whose tokens choose."""
        if not 1 <= top_k <= self.num_experts:
            raise UserError(f"moe.top_k={top_k} must be from 1 to moe.num_experts={self.num_experts}")

    def check_pool(self, pool_tokens: int) -> None:
        """Refuse a pool that is too small for the experts; for routers whose experts choose tokens."""


def _blocks(given: Any) -> Any:
    """`moe.blocks` with numbers for the text that a list is read as."""
    if given in ("odd", "all"):
        return given
    texts = [str(number) for number in given] if OmegaConf.is_list(given) else []
    if not texts or not all(text.isdecimal() and len(text) < 5 for text in texts):
        shown = f"[{', '.join(texts)}]" if OmegaConf.is_list(given) else given
        raise UserError(f"moe.blocks={shown} must be odd, all, or the numbers of blocks, such as [1, 3]")
    return [int(text) for text in texts]


def expert_slots(pool_tokens: int, num_experts: int, capacity: float) -> int:
    """Slots of one expert in one pool: int(T / N * C) (DiffMoE Alg. 3)."""
    return min(int(pool_tokens / num_experts * capacity), pool_tokens)
