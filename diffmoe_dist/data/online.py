"""Images and captions that are encoded as they are read, in the place of side folders: nothing to prepare, but slower.

Every image and every caption is encoded by itself and rounded to fp16, as a side folder holds it: what a sample gives
does not depend on the others of its micro-batch, and so not on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffmoe_dist.config import Config
from diffmoe_dist.data.encoding import model_sha256, reproducible_arithmetic
from diffmoe_dist.data.latents import Autoencoder
from diffmoe_dist.data.text import EncodedText, pad_text
from diffmoe_dist.data.text_encoder import TextEncoder

logger = logging.getLogger("diffmoe_dist.data")

if TYPE_CHECKING:
    from diffmoe_dist.data.batch import Batch


class OnlineEncoders:
    """The encoders that `data.autoencoder` and `data.text_encoder` name, one of them at least. Made by `open`."""

    def __init__(
        self, autoencoder: Autoencoder | None, text: TextEncoder | None, fingerprints: list[str | None]
    ) -> None:
        self.autoencoder, self.text = autoencoder, text
        self.fingerprints = fingerprints  # of the autoencoder and of the text encoder
        self._warned = False
        self._null: EncodedText | None = None if text is None else text.encode_alone("")

    @classmethod
    def open(cls, config: Config, device: torch.device | str) -> OnlineEncoders | None:
        """Load what the settings name to a device; None where they name nothing. Raises UserError."""
        data, autoencoder, text = config.data, None, None
        fingerprints: list[str | None] = [None, None]
        if data.autoencoder is not None:
            autoencoder = Autoencoder.open(data.autoencoder, "data.autoencoder", device)
            fingerprints[0] = model_sha256(Path(data.autoencoder), "config.json", "*.safetensors")
        if data.text_encoder is not None:
            length = config.model.text_max_length
            text = TextEncoder.open(data.text_encoder, data.tokenizer, length, device, "data.text_encoder")
            fingerprints[1] = text.sha256
        return None if autoencoder is None and text is None else cls(autoencoder, text, fingerprints)

    @property
    def downsampling(self) -> int:
        """Pixels of an image to one of what the model is given, along each side."""
        return 1 if self.autoencoder is None else self.autoencoder.downsampling

    @property
    def num_bytes(self) -> int:
        """Of their weights."""
        modules = [encoder.module for encoder in (self.autoencoder, self.text) if encoder is not None]
        return sum(weight.numel() * weight.element_size() for module in modules for weight in module.parameters())

    def encode(self, batch: Batch) -> Batch:
        """Latents in the place of images, vectors in the place of captions."""
        if self.autoencoder is not None:
            assert batch.latent_noise is not None
            with reproducible_arithmetic():
                latents = [
                    self.autoencoder.sample(image[None], noise[None])
                    for image, noise in zip(batch.images, batch.latent_noise, strict=True)
                ]
            batch = replace(batch, images=torch.cat(latents), latent_noise=None)
        if self.text is not None:
            assert batch.captions is not None and self._null is not None
            length = self.text.max_length
            self._warn_once_of_a_cut(batch.captions)
            encoded = [self.text.encode_alone(caption) for caption in batch.captions]
            batch = replace(batch, text=pad_text(encoded, length), null_text=pad_text([self._null], length))
        return batch

    def _warn_once_of_a_cut(self, captions: Sequence[str]) -> None:
        assert self.text is not None
        cuts = [] if self._warned else self.text.cuts(captions)
        if cuts:
            self._warned = True
            longest, left = max(cuts)
            setting = f"model.text_max_length={self.text.max_length}"
            cut = setting if left == self.text.max_length else f"{left}, that encoder's part of {setting}"
            logger.warning("a caption of %d tokens: captions are cut to %s", longest, cut)
