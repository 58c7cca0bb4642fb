"""Open the data that a configuration names, and check that they fit its model."""

from __future__ import annotations

from dataclasses import replace

import torch

from diffmoe_dist.config import Config, DataConfig, ModelConfig, data_sets
from diffmoe_dist.data.dataset import DataSet, TrainingData
from diffmoe_dist.data.online import OnlineEncoders
from diffmoe_dist.data.stream import StreamedData
from diffmoe_dist.data.text import check_captions
from diffmoe_dist.errors import UserError


def open_data(config: Config, device: torch.device | str = "cpu") -> TrainingData | StreamedData:
    """Open the data and check that they fit the model.

    Args:
        device: where images and captions are encoded that are read unencoded.

    Raises:
        UserError: an index is missing or damaged, or holds other images, classes or captions than the model is made
            for.
    """
    model, settings = config.model, config.data
    if settings.stream:
        return StreamedData.open(
            settings.shards, allow_pipe=settings.allow_pipe,
            channels=model.in_channels, image_size=model.input_size, num_classes=model.num_classes,
        )  # fmt: skip
    return _open_data(config, OnlineEncoders.open(config, device))


def with_text_encoder(config: Config, data: TrainingData | StreamedData) -> Config:
    """The configuration with the fingerprint of the text encoder that the data's captions are encoded by, if any."""
    sha256 = data.text_encoder_sha256 if isinstance(data, TrainingData) else ""
    return replace(config, model=replace(config.model, text_encoder_sha256=sha256 or config.model.text_encoder_sha256))


def open_held_out(config: Config, data: TrainingData | StreamedData) -> TrainingData | None:
    """Open the images of the validation loss; None where the run has none.

    Raises:
        UserError: as `open_data`, or they are those of the training.
    """
    if not config.validation.every:
        return None
    settings = config.validation
    held_out = DataConfig(shards=settings.shards or "", latents=settings.latents, text=settings.text)
    encoders = data.encoders if isinstance(data, TrainingData) else None
    opened = _open_data(replace(config, data=held_out), encoders, "validation")
    trained = {dataset.base.fingerprint for dataset in data.datasets} if isinstance(data, TrainingData) else set()
    folder = opened.datasets[0].base
    if folder.fingerprint in trained or (isinstance(data, StreamedData) and folder.folder.resolve() in data.folders):
        raise UserError(f"validation.shards={settings.shards} holds the images that are trained on; pack others")
    return opened


def _open_data(config: Config, encoders: OnlineEncoders | None, section: str = "data") -> TrainingData:
    """Open what the section of that name, which lies in `config.data`, names."""
    entries = data_sets(config.data)
    datasets = tuple(
        DataSet.open(
            entry.shards, entry.latents, entry.text,
            f"{section}.mixture[{number}]" if config.data.mixture else section,
        )
        for number, entry in enumerate(entries)
    )  # fmt: skip
    for dataset in datasets:
        _check_fit(config, dataset, encoders)
    if encoders is not None and encoders.text is not None:
        text = encoders.text
        found = (text.sha256, text.hidden_size, text.max_length, text.pooled_size)
        _check_text(config.model, f"data.text_encoder={config.data.text_encoder}", *found)
    return TrainingData(datasets, config.model.input_size, tuple(entry.weight for entry in entries), encoders)


def _check_fit(config: Config, dataset: DataSet, encoders: OnlineEncoders | None) -> None:
    model, base, size, channels = config.model, dataset.base, dataset.image_size, dataset.channels
    if encoders is not None and encoders.autoencoder is not None:
        autoencoder = encoders.autoencoder
        if channels != autoencoder.image_channels:
            raise UserError(
                f"data.autoencoder={config.data.autoencoder}: takes images of {autoencoder.image_channels} channels, "
                f"{dataset.where} has {channels}; give another"
            )
        size, channels = size and size // autoencoder.downsampling, autoencoder.latent_channels
    expected = {
        "input_size": (model.input_size, size or model.input_size),
        "in_channels": (model.in_channels, channels),
    }
    if model.condition == "class":
        expected["num_classes"] = (model.num_classes, dataset.base.num_classes)
    for name, (setting, found) in expected.items():
        if found != setting:
            raise UserError(f"model.{name}={setting}, but {dataset.where} has {found}; set it to {found}")
    spec = dataset.latents.spec if dataset.latents else None
    if spec and spec.width != spec.height:
        raise UserError(f"{dataset.where}: latents of {spec.height}x{spec.width}; the model takes squares")
    if encoders is not None and encoders.text is not None:
        check_captions(base, base.named)
    if dataset.text is not None:
        text = dataset.text.spec
        stored = (text.encoder_sha256, text.hidden_size, text.max_length, text.pooled_size)
        _check_text(model, dataset.text.index.named, *stored)


def _check_text(model: ModelConfig, where: str, sha256: str, hidden_size: int, length: int, pooled_size: int) -> None:
    if model.text_encoder_sha256 not in ("", sha256):
        raise UserError(
            f"{where}: its encoder (SHA-256 {sha256[:12]}...) is not the model's (model.text_encoder_sha256="
            f"{model.text_encoder_sha256[:12]}...); encode the captions with that one"
        )
    found = {"text_hidden_size": hidden_size, "text_max_length": length, "text_pooled_size": pooled_size}
    wrong = [name for name, value in found.items() if getattr(model, name) != value]
    if wrong:
        settings = ", ".join(f"model.{name}={getattr(model, name)}" for name in wrong)
        raise UserError(f"{settings}, but {where} has {', '.join(str(found[name]) for name in wrong)}; set that")
