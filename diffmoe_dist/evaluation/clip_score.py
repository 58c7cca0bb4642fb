"""CLIPScore: how well images fit the prompts that they were sampled from, by the cosine of CLIP's two embeddings.

The score is the mean over images of 100 * max(cos(image, prompt), 0), as torchmetrics defines it. (Its code takes the
maximum of the mean, which is the same where no cosine is negative.) Hessel et al. (2021) define 2.5 * max(cos, 0): this
divided by 40, with "A photo depicts" before each caption, where nothing is put before a prompt here.

Shape legend: N images, C channels, H, W image size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe_dist.data.encoding import load_in_fp32, model_sha256, one_line
from diffmoe_dist.data.prompts import read_prompts
from diffmoe_dist.data.text_encoder import load_tokenizer, without_loading_bar
from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.image_sources import ImageSource
from diffmoe_dist.evaluation.scores import add_up, rows_of_rank
from diffmoe_dist.logs import logger


@dataclass(frozen=True)
class ClipScore:
    score: float
    cut: int  # prompts that are longer than what CLIP reads


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP from transformers on `device` in fp32, with what prepares their inputs."""

    name: str
    sha256: str
    device: torch.device
    model: Any
    tokenizer: Any
    image_processor: Any
    max_tokens: int

    @torch.no_grad()
    def cosines(self, images: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Of each image, (C, H, W) uint8 with one channel or three, and its prompt: (N,) fp64."""
        arrays = [image.expand(3, -1, -1).numpy() for image in images]
        pixels = self.image_processor(arrays, input_data_format="channels_first", return_tensors="pt")
        tokens = self.tokenizer(
            list(prompts), truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
        )
        inputs = {**pixels, **{name: tokens[name] for name in ("input_ids", "attention_mask")}}
        output = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return (output.image_embeds.double() * output.text_embeds.double()).sum(dim=1)  # both have length 1

    def count_cut(self, prompts: Sequence[str]) -> int:
        """How many have more tokens than CLIP reads."""
        return sum(len(ids) > self.max_tokens for ids in self.tokenizer(list(prompts), verbose=False)["input_ids"])


def open_clip(folder: Path, device: torch.device) -> Clip:
    """A CLIP from a local folder.

    Raises:
        UserError: it does not load, lacks weights, or its images are of another size than its weights are for.
    """
    try:
        # Pillow's resizing is that of CLIP's authors; the processor of the plain name would need torchvision.
        from transformers import CLIPImageProcessorPil, CLIPModel
    except (ImportError, RuntimeError) as error:  # RuntimeError: beside a torchvision of another torch
        raise UserError(f"--clip {folder}: transformers does not import ({error}); pip install transformers") from error
    architecture: Any = CLIPModel
    named = f"--clip {folder}"
    with without_loading_bar():
        model = load_in_fp32(architecture, folder, named, dtype=torch.float32).to(device)
    tokenizer = load_tokenizer(folder, named, model.config.text_config.vocab_size)
    try:
        image_processor = CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files make it fail in any way
        raise UserError(f"{named}: does not load ({one_line(error)}); fetch the folder again") from error
    clip = Clip(
        name=folder.resolve().name,
        sha256=model_sha256(folder, "*.json", "*.txt", "*.safetensors"),
        device=device,
        model=model,
        tokenizer=tokenizer,
        image_processor=image_processor,
        max_tokens=model.config.text_config.max_position_embeddings,
    )
    try:
        clip.cosines(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [""])
    except Exception as error:  # of sizes or settings that do not belong together, in any way
        raise UserError(
            f"--clip {folder}: its files do not fit each other ({one_line(error)}); fetch the folder again"
        ) from error
    return clip


def prompts_of_images(path: Path, num_images: int) -> list[str]:
    """The prompt of each image, from the `prompts.jsonl` that sampling writes.

    Raises:
        UserError: a line has no prompt, or there are more or fewer prompts than images.
    """
    prompts = read_prompts(path, "prompts of --samples")
    if len(prompts) != num_images:
        raise UserError(f"{path}: has {len(prompts)} prompts for {num_images} images; sample the images again")
    return [prompt.text for prompt in prompts]


def clip_score(
    samples: ImageSource, prompts: Sequence[str], clip: Clip, *, batch_size: int, rank: int, ranks: int
) -> ClipScore:
    """The mean score of all images with their prompts; collective. The first rank warns of prompts that were cut.

    Raises:
        UserError: CLIP returned numbers that are not finite.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=clip.device)  # of the scores, and prompts that were cut
    rows = rows_of_rank(samples.num_images, rank, ranks)
    done = rows.start
    hidden = rank != 0 or not sys.stderr.isatty()
    with tqdm(total=len(rows), unit="image", desc=f"CLIPScore (1 of {ranks} ranks)", disable=hidden) as bar:
        for images in samples.batches(rows, batch_size):
            of_batch = prompts[done : done + len(images)]
            sums[0] += 100 * clip.cosines(images, of_batch).clamp(min=0).sum()
            sums[1] += clip.count_cut(of_batch)
            done += len(images)
            bar.update(len(images))
    add_up([sums])
    if not sums.isfinite().all():
        raise UserError(f"--clip {clip.name}: it returned numbers that are not finite; fetch its weights again")
    cut = round(sums[1].item())
    if cut and rank == 0:
        logger.warning(
            "the prompts of %d of %d images are longer than the %d tokens that CLIP reads, and were cut",
            cut, samples.num_images, clip.max_tokens,
        )  # fmt: skip
    return ClipScore(sums[0].item() / samples.num_images, cut)
