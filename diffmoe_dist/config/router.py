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

    router: str = "dense"  # or a file of config/routers/, whose `Settings` then take the place of this class


@dataclass(frozen=True)
class RouterSettings(MoEConfig):
    """What every router knows; the settings of a router extend it by its own.

    What has no default here follows from other settings: `derived` says how.
    """

    num_experts: int = MISSING  # that tokens are routed to; shared and unconditional ones are not counted
    expert_mlp_ratio: float = MISSING  # hidden width of an expert over the model's; default: model.mlp_ratio
    activation: Literal["gelu", "swiglu"] = "gelu"  # of the experts; SwiGLU experts have three matrices and no biases
    shared_experts: int = 0  # experts that every token passes through, with weight 1

    keeps_fp32_tokens = False  # also one: whether the router keeps the tokens in fp32 for backward, whatever their type
    has_unconditional_expert = False  # a class attribute, no setting: one more expert for images without a condition

    @classmethod
    def derived(cls, given: Any) -> dict[str, Any]:
        """The settings of `moe` that are not given and follow from others.

        Args:
            given: all settings of the run so far, typed, as an OmegaConf container.

        Raises:
            UserError: one is missing that nothing says.
        """
        moe = given.moe
        if OmegaConf.is_missing(moe, "num_experts"):
            raise UserError(f"moe.num_experts is not set; moe.router={moe.router} needs a number, such as 16")
        return {"expert_mlp_ratio": given.model.mlp_ratio} if OmegaConf.is_missing(moe, "expert_mlp_ratio") else {}

    def structure(self) -> dict[str, Any]:
        """The settings that decide which tensors the layer has and what they mean."""
        names = ("router", "num_experts", "expert_mlp_ratio", "activation", "shared_experts")
        return {name: getattr(self, name) for name in names}

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

    def check_top_k(self, top_k: int) -> None:
        """Refuse a token without experts, and more experts than there are; for routers whose tokens choose."""
        if not 1 <= top_k <= self.num_experts:
            raise UserError(f"moe.top_k={top_k} must be from 1 to moe.num_experts={self.num_experts}")

    def check_pool(self, pool_tokens: int) -> None:
        """Refuse a pool that is too small for the experts; for routers whose experts choose tokens."""


def expert_slots(pool_tokens: int, num_experts: int, capacity: float) -> int:
    """Slots of one expert in one pool: int(T / N * C) (DiffMoE Alg. 3)."""
    return min(int(pool_tokens / num_experts * capacity), pool_tokens)
