"""What `train.freeze` keeps as it is, and how far gradients go back where only a part of a model trains.

A frozen parameter has no gradient and no optimizer state; but gradients pass through its layer wherever something that
trains comes before it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from diffmoe_dist.config import Config
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.on_meta import meta_model

_IN_BLOCK = re.compile(r"^blocks\.(\d+)\.(\w+)\.")
_CONDITION = ("t_embedder.", "y_embedder.")


def frozen_parameters(config: Config) -> frozenset[str]:
    """The names that the patterns of `train.freeze` match.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left that trains.
    """
    if not config.train.freeze:
        return frozenset()
    model = meta_model(config)
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in config.train.freeze:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(f"train.freeze: {pattern} {_without_match(pattern, model)}")
        frozen |= matched
    if len(frozen) == len(names):
        raise UserError(f"train.freeze={list(config.train.freeze)} leaves nothing that trains; remove a pattern")
    return frozenset(frozen)


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Edit a model in place: no gradients for these parameters, of experts and cut layers the part at hand."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def told(names: Iterable[str]) -> str:
    """The names, those that are the same in many blocks once."""
    return ", ".join(_once(names)) or "nothing"


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))


def _without_match(pattern: str, model: nn.Module) -> str:
    if any(fnmatchcase(name, pattern) for name, _ in model.named_buffers()):
        return "is no parameter: thresholds and the position table are not trained; remove it"
    names = _once(name for name, _ in model.named_parameters())
    if close := [name for name in names if pattern.rstrip(".*") in name]:
        return f"matches no parameter; did you mean *{pattern.strip('.*')}*, for one {close[0]}?"
    words = sorted({word for name in names for word in name.split(".")})
    meant = [near for word in re.findall(r"\w+", pattern) for near in difflib.get_close_matches(word, words, n=1)]
    close = [name for name in names if meant and set(meant) <= set(name.split("."))] or names
    return f"matches no parameter; names are {', '.join(close[:3])} and such"


class GradientFlow:
    """Which parts of a model gradients reach. A whole model that trains is reached everywhere."""

    def __init__(self, config: Config) -> None:
        self.frozen = frozen_parameters(config)
        self._whole = not self.frozen
        trained = [name for name, _ in meta_model(config).named_parameters() if name not in self.frozen]
        # Their names, and those of the modules around them.
        self._trained = {name[: dot.end()] for name in trained for dot in re.finditer(r"\.|$", name)}
        self._lowest: dict[str, int] = {}  # of the layers of a module that train, the first
        for branch, layer in map(_layer, trained):
            self._lowest[branch] = min(layer, self._lowest.get(branch, layer))
        self._condition = self.trains(*_CONDITION)
        # The first place of the residual stream behind which it has a gradient.
        self._first = min((_place(name) for name in trained if ".capacity_predictor." not in name), default=_END)
        if self._condition:
            self._first = min(self._first, (0, 0))

    def trains(self, *names: str) -> bool:
        """Whether a parameter trains of one of these names, or of a module of one, which ends in a dot."""
        return self._whole or not self._trained.isdisjoint(names)

    def modulates(self, block: int) -> bool:
        """Whether the shifts, scales and gates of a block have gradients."""
        return self._condition or self.trains(f"blocks.{block}.adaLN_modulation.")

    def before(self, block: int, part: str) -> bool:
        """Whether the residual stream has a gradient where it enters the `attn`, `cross_attn` or `mlp` of a block."""
        return self._whole or self._first < (block, _PARTS.index(part))

    def into(self, name: str) -> bool:
        """Whether the input of the layer of this parameter has a gradient."""
        found = _IN_BLOCK.match(name)
        if self._whole:
            return True
        if ".adaLN_modulation." in name:
            return self._condition
        if found is None:
            return name.startswith("final_layer.") and self._first <= _END
        block, part = int(found[1]), found[2]
        if ".cross_attn.kv." in name:
            return self.trains("y_embedder.tokens.")
        if ".capacity_predictor." in name:  # which learns from tokens, not the tokens from it
            return False
        enters = self.before(block, part) or (part != "cross_attn" and self.modulates(block))
        branch, layer = _layer(name)
        return enters or self._lowest.get(branch, layer) < layer

    def reaches(self, name: str) -> bool:
        """Whether backward passes through the layer of this parameter, or makes a gradient for it."""
        return name not in self.frozen or self.into(name)

    def reaches_in(self, module: str) -> bool:
        """Whether what leaves a module has a gradient: its input has one, or a parameter of it trains."""
        return self.trains(module) or self.into(f"{module}w1")


_PARTS = ("attn", "cross_attn", "mlp")  # of a block, in the order in which the residual stream meets them
_END = (2**31, 0)
# Layers of these parts that follow each other; those of one number stand beside each other.
_LAYERS = ("qkv q kv fc1 gate_proj up_proj w1 b1", "q_norm k_norm", "proj fc2 down_proj w2 b2")
_NUMBER = {layer: number for number, layers in enumerate(_LAYERS) for layer in layers.split()}


def _layer(name: str) -> tuple[str, int]:
    """The module whose layers follow each other, and the number of this one among them."""
    parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
    return ".".join(parts[:-1]), _NUMBER.get(parts[-1], 0)


def _place(name: str) -> tuple[int, int]:
    """Where a parameter first acts on the residual stream: block, and part of it."""
    found = _IN_BLOCK.match(name)
    if found is None:
        return _END if name.startswith("final_layer.") else (-1, 0)
    return int(found[1]), _PARTS.index(found[2]) if found[2] in _PARTS else 0  # adaLN acts at attention
