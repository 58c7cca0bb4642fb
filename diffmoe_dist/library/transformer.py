"""A model as a component of diffusers' pipelines: one folder with config.json and safetensors.

Shape legend: N images, C channels, H = W input size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffmoe_dist.config import build_config
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames
from diffmoe_dist.library.model import LoadedModel
from diffmoe_dist.model.condition import Condition
from diffmoe_dist.model.dit import DiT, DiTOutput


class DiffMoETransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as diffusers' own
    """A `DiT` with its settings.

    Args:
        settings: those of a run that decide what the model is, as `config.json` of a converted folder has them.
        class_names, other_class_names: of a model that is conditioned on classes, where they are known.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        settings: dict[str, Any],
        class_names: list[str] | None = None,
        other_class_names: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        config = build_config(settings, overrides=["precision=fp32"], training=False, stored=True)
        names = NO_NAMES
        if class_names is not None:
            names = ClassNames.from_json({"class_names": class_names, "other_class_names": other_class_names})
        self.model = LoadedModel.of(DiT(config).float(), config, names)  # whatever torch's default type is

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> DiffMoETransformer2DModel:
        """As every model of diffusers; of a folder with safetensors alone, and another type is that of the weights."""
        kinds = [options.pop(name, None) for name in ("torch_dtype", "dtype")]
        options = {"use_safetensors": True, **options}
        model: DiffMoETransformer2DModel = super().from_pretrained(pretrained_model_name_or_path, **options)
        for kind in kinds:
            if isinstance(kind, torch.dtype):
                nn.Module.to(model, kind)
        return model

    def forward(self, x: Tensor, t: Tensor, y: Condition) -> DiTOutput:
        """As a `DiT`, which checks nothing.

        Args:
            x: (N, C, H, W).
            t: (N,) the model's time.
            y: N labels or encoded captions.
        """
        return self.model.unchecked()(x, t, y)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffMoETransformer2DModel:
        """Another type is that of the weights alone, as in a run: capacity thresholds and positions stay exact."""
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in list(self.named_buffers()):
            if buffer.dtype != exact[name].dtype:
                owner, _, own_name = name.rpartition(".")
                self.get_submodule(owner)._buffers[own_name] = exact[name].to(buffer.device)
        return self
