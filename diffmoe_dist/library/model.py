"""A model as `load_model` gives it: it takes numbers for times and names for classes, and says what is wrong.

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames
from diffmoe_dist.diffusion.objectives import DDPM_STEPS
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.condition import Condition, TextCondition, on_device
from diffmoe_dist.model.dit import DiT, DiTOutput

Label: TypeAlias = int | str  # the number of a class, or its name
_SLACK = 1e-5  # of the times: what rounding may add


class LoadedModel(DiT):
    """A `DiT` that checks what it is given, and brings it into shape.

    Attributes:
        config: its settings, among them `objective`, which says what its times mean, and `model`.
        names: what its classes are called; none where that is not known, or it has no classes.
    """

    config: Config
    names: ClassNames

    @classmethod
    def of(cls, model: DiT, config: Config, names: ClassNames = NO_NAMES) -> LoadedModel:
        """The model with these settings; it shares its modules and tensors."""
        loaded = cls.__new__(cls)
        vars(loaded).update(vars(model))
        loaded.config, loaded.names = config, names
        return loaded

    def unchecked(self) -> DiT:
        """The same model without the checks, for which a GPU has to be waited for."""
        plain = DiT.__new__(DiT)
        vars(plain).update(vars(self))
        return plain

    @property
    def class_names(self) -> list[str]:
        """In the order of their numbers; empty where they are not known."""
        return self.names.shown

    @property
    def device(self) -> torch.device:
        return self.pos_embed.device

    def forward(self, x: Tensor, t: Tensor | float, y: Condition | Label | Sequence[Label]) -> DiTOutput:
        """
        Args:
            x: (N, C, H, W) noisy images or latents, of a floating-point type, on the model's device.
            t: the model's time, from 0 to `objective.time_scale` of a flow, 0 to 999 of DDPM: (N,), or one for all.
            y: the class labels, (N,) or a list of numbers and names, or one for all images; `num_classes` is the null
                label. Of a model that is conditioned on captions: N of them, by `encode_captions`.

        Raises:
            UserError: one of them is not what this model takes.
        """
        self._check_images(x)
        return super().forward(x, self._times(t, len(x)), self._condition(y, len(x)))

    def _check_images(self, x: Any) -> None:
        size = self.grid_size * self.patch_size
        wanted = f"(N, {self.in_channels}, {size}, {size})"
        if not isinstance(x, Tensor):
            raise UserError(f"x is a {type(x).__name__}; give a tensor {wanted}")
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.in_channels, size, size):
            raise UserError(f"x has shape {tuple(x.shape)}; this model takes {wanted}")
        if not x.is_floating_point():
            raise UserError(
                f"x is of type {x.dtype}; give floating-point numbers, of images in [-1, 1] and their noise"
            )
        if x.device != self.device:
            raise UserError(f"x is on {x.device}, the model on {self.device}; move one of them by .to(...)")

    def _times(self, t: Any, images: int) -> Tensor:
        """(N,) fp32."""
        if isinstance(t, Real) and not isinstance(t, bool):
            t = torch.tensor(float(t))
        if not isinstance(t, Tensor) or t.is_complex() or t.dtype == torch.bool:
            raise UserError(f"t is {_kind(t)}; give a number, or a tensor with one for each image")
        if t.ndim > 1 or t.numel() not in (1, images):
            raise UserError(f"t has shape {tuple(t.shape)}; give one number, or one for each of {images} images")
        if not torch.compiler.is_compiling():
            self._check_range(t)
        return t.to(self.device, torch.float32).expand(images)

    def _check_range(self, t: Tensor) -> None:
        objective = self.config.objective
        flow = objective.name == "flow"
        end = objective.time_scale if flow else DDPM_STEPS - 1
        low, high = (float(value) for value in t.detach().aminmax())
        if -_SLACK * end <= low and high <= (1 + _SLACK) * end:
            return
        worst = high if not high <= end else low
        if not flow:
            raise UserError(f"t={worst:g}: the times of this model are DDPM's steps, 0 (least noise) to {end} (noise)")
        noise, data = (0.0, end) if objective.direction == "data_at_one" else (end, 0.0)
        raise UserError(
            f"t={worst:g}: the times of this model go from {noise:g} (noise) to {data:g} (data); they are "
            f"objective.time_scale={objective.time_scale:g} times those of objective.direction={objective.direction}"
        )

    def _condition(self, y: Any, images: int) -> Condition:
        model = self.config.model
        if model.condition == "class":
            if isinstance(y, TextCondition):
                raise UserError(
                    f"y is encoded captions, but this model is conditioned on {_classes(self)}; give labels"
                )
            return self._labels(y, images)
        if not isinstance(y, TextCondition):
            raise UserError(
                f"y is {_kind(y)}, but this model is conditioned on captions; give what encode_captions([...], "
                f"encoder, max_length={model.text_max_length}) returns"
            )
        pooled = 0 if y.pooled is None else y.pooled.shape[1]
        if (y.tokens.shape[2], pooled) != (model.text_hidden_size, model.text_pooled_size):
            raise UserError(
                f"y: captions of width {y.tokens.shape[2]}, pooled {pooled}, but the model's text encoder has "
                f"{model.text_hidden_size} and {model.text_pooled_size}; encode them with that"
            )
        if len(y) != images:
            raise UserError(f"y: {len(y)} captions for {images} images; give one for each")
        return on_device(y, self.device)

    def _labels(self, y: Any, images: int) -> Tensor:
        """(N,) int64."""
        if not isinstance(y, Tensor):
            y = torch.tensor(label_numbers(self, y, "y", null=True))
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise UserError(f"y is of type {y.dtype}; labels are whole numbers: y.long()")
        if y.ndim > 1 or y.numel() not in (1, images):
            raise UserError(f"y has shape {tuple(y.shape)}; give one label, or one for each of {images} images")
        if not torch.compiler.is_compiling():
            for label in y.aminmax():
                _check_label(self, int(label), "y", null=True)
        return y.to(self.device, torch.int64).expand(images)


def label_numbers(model: LoadedModel, given: Any, named: str, null: bool = False) -> list[int]:
    """The numbers of classes: of one or several, each by its number or name.

    Args:
        named: what the caller calls them.
        null: whether the null label counts.

    Raises:
        UserError: the model has no such class.
    """
    if isinstance(given, Tensor):
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.ndim > 1:
            raise UserError(f"{named}: a tensor {tuple(given.shape)} of {given.dtype}; give whole numbers, (N,)")
        given = given.tolist()
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        given = [given]
    return [_label_number(model, label, named, null) for label in given]


def _label_number(model: LoadedModel, label: Any, named: str, null: bool) -> int:
    if isinstance(label, str):
        found = model.names.find(label)
        if len(found) != 1:
            raise UserError(f"{named}: {label!r}: {model.names.why_not(found, label, model.num_classes)}")
        return found[0]
    if not isinstance(label, Integral) or isinstance(label, bool):
        raise UserError(f"{named}: {label!r} is {_kind(label)}; a label is a whole number, or the name of a class")
    _check_label(model, int(label), named, null)
    return int(label)


def _check_label(model: LoadedModel, label: int, named: str, null: bool) -> None:
    last = max(model.num_classes - (0 if null and model.num_classes else 1), 0)
    if not 0 <= label <= last:
        and_null = f", and {last} for none" if last == model.num_classes and last else ""
        raise UserError(f"{named}: {label} is no label of this model, which knows {_classes(model)}{and_null}")


def _classes(model: LoadedModel) -> str:
    return f"the classes 0 to {model.num_classes - 1}" if model.num_classes else "no classes: all labels are 0"


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
