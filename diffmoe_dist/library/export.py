"""A model as a folder that diffusers opens, with everything it needs and a model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffmoe_dist.config import Config
from diffmoe_dist.data.class_names import label_texts
from diffmoe_dist.data.text_encoder import parts_of
from diffmoe_dist.diffusion.objectives import DDPM_SCHEDULE
from diffmoe_dist.engine.conversion import read_weights
from diffmoe_dist.engine.weights import complete_folder, portable_settings, read_class_names
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import read_json_object, write_atomically, write_json
from diffmoe_dist.library.model import LoadedModel
from diffmoe_dist.library.model_card import CARD_NAME, GRID_NAME, SAMPLED, Facts, model_card
from diffmoe_dist.library.pipeline import ENCODERS, TOKENIZERS, DiffMoEPipeline, build_scheduler
from diffmoe_dist.library.transformer import DiffMoETransformer2DModel
from diffmoe_dist.logs import logger
from diffmoe_dist.model.diffusers_names import diffusers_settings, not_of_dit, to_diffusers
from diffmoe_dist.sampling.generate import find_autoencoder, makes_latents
from diffmoe_dist.sampling.model import weights_fingerprint
from diffmoe_dist.sampling.prompts import open_encoder


@dataclass(frozen=True)
class Parts:
    """Local folders of what belongs to the pipeline beside the model."""

    decoder: str | None = None  # default: the run's own
    encoder: str | None = None
    tokenizer: str | None = None
    samples: str | None = None  # of diffmoe_dist.sample and evaluate: what the card says


def export_pipeline(directory: str | Path, out: Path, weights: str | None, parts: Parts) -> tuple[Path, str]:
    """Write the weights of a checkpoint, or of a folder of weights, as a folder that diffusers opens.

    A dense model of latents that was trained by DDPM is one of diffusers' own `DiTPipeline`, every other one of
    `DiffMoEPipeline`.

    Args:
        weights: "ema" (default) or "model", of a checkpoint.

    Returns:
        The folder that was read, and the class that opens what was written.

    Raises:
        UserError: there are no weights, a part is not the model's, or `out` is not empty.
    """
    source, model, config, facts = read_weights(directory, weights)
    loaded = LoadedModel.of(model, config, read_class_names(source))
    vae = _decoder(config, parts)
    facts |= _facts_of_samples(parts.samples, loaded)
    refused = not_of_dit(config)
    with complete_folder(out) as folder:
        if refused is None and vae is not None and type(vae).__name__ == "AutoencoderKL":
            kind = "DiTPipeline"
            _refuse_text(parts)
            _save_dit_pipeline(loaded, vae, folder)
        else:
            kind = "DiffMoEPipeline"
            _pipeline(loaded, vae, facts, parts).save_pretrained(folder)
        if facts.get("grid"):
            shutil.copyfile(Path(str(parts.samples)) / "grid.png", folder / GRID_NAME)
        write_atomically(folder / CARD_NAME, model_card(loaded, portable_settings(config), facts, kind))
    return source, kind


def _pipeline(model: LoadedModel, vae: Any, facts: Facts, parts: Parts) -> DiffMoEPipeline:
    names = model.names.to_json() if model.names else {}
    transformer = DiffMoETransformer2DModel(portable_settings(model.config), **names)
    transformer.model.load_state_dict(model.state_dict())
    return DiffMoEPipeline(transformer, build_scheduler(model.config), vae, **_text(model.config, parts), facts=facts)


def _save_dit_pipeline(model: LoadedModel, vae: Any, folder: Path) -> None:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer: Any = DiTTransformer2DModel(**diffusers_settings(model.config))
    transformer.load_state_dict(to_diffusers(model.state_dict(), model.config))
    scheduler = DDIMScheduler(**DDPM_SCHEDULE, clip_sample=False)
    pipeline: Any = DiTPipeline(transformer, vae, scheduler)
    pipeline.save_pretrained(folder)
    names = label_texts(model.names, model.num_classes)
    index = json.loads((folder / "model_index.json").read_text())  # which the pipeline reads names from, but saves none
    write_json(folder / "model_index.json", {**index, "id2label": dict(enumerate(names))})
    logger.warning(
        "diffusers' DiT has other time frequencies than DiT's own code and this one (it divides by 127, not 128), so "
        "the images of DiTPipeline differ from those of diffmoe_dist.sample"
    )


def _decoder(config: Config, parts: Parts) -> Any:
    """The autoencoder of a model of latents; None where there is none to put in."""
    folder = parts.decoder or config.sample.decoder or config.data.autoencoder
    if folder is not None:
        return find_autoencoder(config, folder, "--decoder", torch.device("cpu")).module
    if makes_latents(config):
        logger.warning("no --decoder was given: the pipeline has no vae, and gives latents")
    return None


def _refuse_text(parts: Parts) -> None:
    for name in ("encoder", "tokenizer"):
        if getattr(parts, name) is not None:
            raise UserError(f"--{name} has no effect with a model that is conditioned on classes; leave it out")


def _text(config: Config, parts: Parts) -> dict[str, Any]:
    """The text encoders and tokenizers, by the names of the pipeline's arguments."""
    if config.model.condition == "class":
        _refuse_text(parts)
        return {}
    folder = parts.encoder or config.data.text_encoder
    if folder is None:
        raise UserError("--encoder is missing: the folder of the text encoder that the model was trained with")
    tokenizer = parts.tokenizer or (config.data.tokenizer if parts.encoder is None else None)
    parted = parts_of(open_encoder(folder, tokenizer, config, "cpu"))
    encoders = [encoder for encoder, _ in parted]
    if len(encoders) > len(ENCODERS):
        raise UserError(f"--encoder {folder}: {len(encoders)} encoders, but a pipeline has up to {len(ENCODERS)}")
    text: dict[str, Any] = {
        "text_lengths": [encoder.max_length for encoder in encoders],
        "text_layers": [encoder.layer for encoder in encoders],
        "text_beside": [is_beside for _, is_beside in parted],
    }
    text |= {name: encoder.module for name, encoder in zip(ENCODERS, encoders, strict=False)}
    return text | {name: encoder.tokenizer for name, encoder in zip(TOKENIZERS, encoders, strict=False)}


def _facts_of_samples(folder: str | None, model: LoadedModel) -> Facts:
    """What sampling.json and, where it is there, scores.json say. Raises UserError."""
    if folder is None:
        return {}
    record = _read(Path(folder) / "sampling.json", folder)
    if record.get("weights") not in (None, weights_fingerprint(model, is_sharded=False)):
        raise UserError(f"--samples {folder}: its images are of other weights than these; sample from them first")
    scores = Path(folder) / "scores.json"
    found = _read(scores, folder).get("scores", {}) if scores.is_file() else {}
    told = {name: record[name] for name in (*SAMPLED, "capacity", "activated_parameters") if name in record}
    return {"samples": told, "scores": found, "grid": (Path(folder) / "grid.png").is_file()}


def _read(path: Path, folder: str) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except (OSError, ValueError):
        raise UserError(
            f"--samples {folder}: no {path.name} that can be read; give a folder of diffmoe_dist.sample"
        ) from None
