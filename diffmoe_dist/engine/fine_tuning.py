"""Which tensors of a run begin anew that starts from weights of another model: all others must fit."""

from __future__ import annotations

from pathlib import Path

from diffmoe_dist.config import Config, model_settings
from diffmoe_dist.engine.weights import is_weights_folder, open_tensors, read_settings
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.on_meta import meta_model

# The settings that may be others than in `train.initial_weights`, and the parts of names that then begin anew.
_ANEW = {
    "model.num_classes": ("y_embedder.",),
    "model.condition": ("y_embedder.", ".cross_attn."),
    "model.input_size": ("pos_embed",),
    "moe.num_experts": (".mlp.experts.", ".mlp.router."),
}


def tensors_anew(config: Config) -> list[str]:
    """The tensors that do not come from `train.initial_weights`, but from the seed as in a run without.

    Raises:
        UserError: the weights are not there, damaged, or of a model that differs in more than classes, condition,
            resolution and number of experts; names the first difference.
    """
    folder = Path(str(config.train.initial_weights))
    if not is_weights_folder(folder):
        raise UserError(
            f"train.initial_weights={folder}: no folder of weights there; make one with python -m diffmoe_dist.convert"
        )
    saved = read_settings(folder)
    changed = changed_settings(config, saved, f"train.initial_weights={folder}")
    ours, theirs = meta_model(config).state_dict(), meta_model(saved).state_dict()
    with open_tensors(folder, theirs):
        pass
    parts = [part for setting in changed for part in _ANEW.get(setting, ())]
    anew = [name for name in ours if any(part in name for part in parts)]
    for name, tensor in ours.items():
        if name not in anew and (name not in theirs or theirs[name].shape != tensor.shape):
            found = list(theirs[name].shape) if name in theirs else "not there"
            raise UserError(
                f"train.initial_weights={folder}: {name} is {found}, this model needs {list(tensor.shape)}; use other "
                "weights"
            )
    return anew


def changed_settings(config: Config, saved: Config, whose: str) -> list[str]:
    """The settings in which two models differ. Raises UserError for one that may not."""
    then = model_settings(saved)
    changed = [setting for setting, value in model_settings(config).items() if then.get(setting) != value]
    of_condition = "model.condition" in changed
    for setting in changed:
        if setting not in _ANEW and not (of_condition and setting.startswith("model.text_")):
            raise UserError(
                f"{setting}={model_settings(config)[setting]}, but {whose} is of another model with {setting}="
                f"{then.get(setting)}; use that value or other weights"
            )
    return changed
