"""A pipeline of diffusers, with the images of our own sampler.

The scheduler is one of diffusers': `FlowMatchEulerDiscreteScheduler` for a flow, whose times from noise to data are our
Euler sampler's, or `DDPMScheduler` with the times of `ddpm_chain`. Others that predict the same can take its place.

Shape legend: N images, C channels, H = W image size.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo
from PIL import Image
from torch import Tensor

from diffmoe_dist.config import Config
from diffmoe_dist.data.latents import Autoencoder
from diffmoe_dist.data.text import pad_text
from diffmoe_dist.data.text_encoder import TextEncoder, joined_encoder
from diffmoe_dist.diffusion.objectives import DDPM_SCHEDULE, DDPM_STEPS
from diffmoe_dist.diffusion.samplers import Guidance, Prediction, ddpm_chain, with_guidance
from diffmoe_dist.errors import UserError
from diffmoe_dist.files import write_atomically
from diffmoe_dist.library.model import Label, label_numbers
from diffmoe_dist.library.model_card import CARD_NAME, GRID_NAME, model_card
from diffmoe_dist.library.transformer import DiffMoETransformer2DModel
from diffmoe_dist.model.condition import Condition, TextCondition, join, on_device
from diffmoe_dist.sampling.generate import to_uint8

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass
class DiffMoEPipelineOutput(BaseOutput):
    """What a call returns."""

    images: Any  # a list of PIL images; "np": (N, H, W, C) and "pt": (N, C, H, W) in [0, 1]; "latent": the model's own
    capacity: float | None  # measured C, experts a token; None: no experts


class DiffMoEPipeline(DiffusionPipeline):
    """Images of classes, or of prompts.

    The images of a call compete for the experts as one block of `diffmoe_dist.sample` does: with an inference rule
    other than `threshold` each depends on the others of its call. Guidance takes two passes, as there.

    Args:
        scheduler: of a flow, or of DDPM, as the model was trained.
        vae: of a model of latents, an AutoencoderKL or AutoencoderDC; without one the output is latents.
        text_encoder, tokenizer: of a model that is conditioned on captions; `_2` and `_3` of those with several.
        text_lengths: tokens of a caption, for each encoder.
        text_layers: which layer of each is taken; None: the last one, after its norm.
        text_beside: whether the vectors of each stand beside those of the one before it.
        facts: what the model card says of the training and of samples.
    """

    config: Any
    model_cpu_offload_seq: Any = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["vae", *ENCODERS, *TOKENIZERS]  # noqa: RUF012  # as diffusers has it
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    transformer: DiffMoETransformer2DModel
    scheduler: Any
    vae: Any

    def __init__(  # noqa: PLR0913  # diffusers reads the components from it
        self,
        transformer: DiffMoETransformer2DModel,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        text_lengths: list | None = None,  # type: ignore[type-arg]  # diffusers knows plain types alone
        text_layers: list | None = None,  # type: ignore[type-arg]
        text_beside: list | None = None,  # type: ignore[type-arg]
        facts: dict | None = None,  # type: ignore[type-arg]
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae,
            text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )  # fmt: skip
        self.register_to_config(
            text_lengths=text_lengths or [], text_layers=text_layers or [], text_beside=text_beside or [],
            facts=facts or {},
        )  # fmt: skip
        self._guidance_scale = 1.0
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """A callback may set `_interrupt`, and the steps that are left are not taken."""
        return self._interrupt

    @property
    def class_names(self) -> list[str]:
        return self.transformer.model.class_names

    @torch.no_grad()
    def __call__(  # noqa: PLR0913  # the arguments of diffusers' pipelines
        self,
        class_labels: Label | Sequence[Label] | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DiffMoEPipelineOutput | tuple[Any]:
        """Sample an image of each label or prompt, all of them together.

        Args:
            class_labels: numbers or names, or one of them.
            prompt: one or several.
            negative_prompt: what guidance moves away from; default: the empty caption.
            guidance_scale: of classifier-free guidance; 1 is none.
            num_images_per_prompt: of each label or prompt, side by side.
            generator: of the noise; or one for each image.
            latents: (N, C, H, W) standard normal, where the images start; default: drawn from `generator`.
            output_type: "pil", "np", "pt" or "latent"; `DiffMoEPipelineOutput` says what they are.
            callback_on_step_end: is given the pipeline, the step, its time and {"latents": ...}, which it may change.

        Raises:
            UserError: the model does not take that.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type={output_type!r}: choose pil, np, pt or latent")
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise UserError(f"callback_on_step_end_tensor_inputs={callback_on_step_end_tensor_inputs}: only latents")
        self._guidance_scale, self._interrupt = guidance_scale, False
        conditions = self._conditions(class_labels, prompt, negative_prompt, num_images_per_prompt)
        timesteps = self._timesteps(num_inference_steps)
        z = self._noise(len(conditions[0]), generator, latents)
        counts: list[tuple[Tensor, int]] = []
        with self.progress_bar(total=len(timesteps)) as bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                z = self._step(z, timestep, conditions, generator, counts)
                if callback_on_step_end is not None:
                    z = callback_on_step_end(self, step, timestep, {"latents": z}).pop("latents", z)
                bar.update()
        images = self._images(z, output_type)
        self.maybe_free_model_hooks()
        return DiffMoEPipelineOutput(images, _capacity(counts)) if return_dict else (images,)

    def _step(
        self, z: Tensor, timestep: Tensor, conditions: tuple[Condition, Condition], generator: Any, counts: list[Any]
    ) -> Tensor:
        """From the images at this time to those at the next."""
        config = self.transformer.model.config
        conditional, unconditional = conditions
        scaled = self.scheduler.scale_model_input(z, timestep) if hasattr(self.scheduler, "scale_model_input") else z
        denoise = _denoiser(self.transformer, counts)
        guided = with_guidance(
            denoise,
            conditional,
            unconditional,
            lambda: join(conditional, unconditional),
            Guidance(self._guidance_scale),
        )
        time = _model_time(config, float(timestep), self.scheduler)
        prediction, variance = guided(scaled, torch.full((len(z),), time, device=z.device))
        if config.objective.name == "flow" and config.objective.direction == "data_at_one":
            prediction = -prediction  # diffusers' flows go from data to noise
        if variance is not None and str(self.scheduler.config.get("variance_type")).startswith("learned"):
            prediction = torch.cat([prediction, variance], dim=1)
        draws = isinstance(self.scheduler, DDPMScheduler)
        return self.scheduler.step(prediction, timestep, z, **({"generator": generator} if draws else {})).prev_sample

    def _conditions(self, labels: Any, prompt: Any, negative: str | None, copies: int) -> tuple[Condition, Condition]:
        """What the images are conditioned on, and what guidance moves away from."""
        model = self.transformer.model
        if model.config.model.condition == "text":
            if labels is not None or prompt is None:
                raise UserError("this model is conditioned on captions; give prompt, and no class_labels")
            return self._captions([prompt] if isinstance(prompt, str) else list(prompt), negative, copies)
        if prompt is not None or negative is not None or labels is None:
            raise UserError("this model is conditioned on classes; give class_labels, and no prompts")
        if self._guidance_scale != 1.0 and not model.num_classes:
            raise UserError(
                f"guidance_scale={self._guidance_scale:g} has no effect with a model without classes; give 1"
            )
        numbers = label_numbers(model, labels, "class_labels")
        y = torch.tensor(numbers, device=self._execution_device).repeat_interleave(copies)
        return y, torch.full_like(y, model.num_classes)

    def _captions(self, prompts: list[str], negative: str | None, copies: int) -> tuple[Condition, Condition]:
        encoders = [
            TextEncoder(getattr(self, encoder), getattr(self, tokenizer), length, layer, encoder)
            for encoder, tokenizer, length, layer in zip(
                ENCODERS, TOKENIZERS, self.config.text_lengths, self.config.text_layers, strict=False
            )
        ]
        if not encoders or self.text_encoder is None:
            raise UserError("the pipeline has no text_encoder; export it with --encoder, the one it was trained with")
        encoder, length = (
            joined_encoder(encoders, self.config.text_beside),
            self.transformer.model.config.model.text_max_length,
        )
        captions = [encoder.encode_alone(text) for text in prompts for _ in range(copies)]
        away = encoder.encode_alone(negative or "")
        both = (pad_text(captions, length), pad_text([away] * len(captions), length))
        conditional, unconditional = (on_device(of_images, self._execution_device) for of_images in both)
        assert isinstance(conditional, TextCondition)
        return conditional, unconditional

    def _timesteps(self, steps: int) -> Tensor:
        """The scheduler's times, from noise to data; our sampler's where it is of our sampler's kind."""
        scheduler, config = self.scheduler, self.transformer.model.config
        check_scheduler(scheduler, config)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), device=self._execution_device)
        elif isinstance(scheduler, DDPMScheduler):
            if not 2 <= steps <= DDPM_STEPS:
                raise UserError(
                    f"num_inference_steps={steps}: DDPMScheduler takes 2 to {DDPM_STEPS} of a model's times"
                )
            scheduler.set_timesteps(timesteps=ddpm_chain(steps), device=self._execution_device)
        else:
            scheduler.set_timesteps(steps, device=self._execution_device)
        return scheduler.timesteps

    def _noise(self, images: int, generator: Any, given: Tensor | None) -> Tensor:
        """(N, C, H, W) fp32: the sampler's arithmetic is in fp32, whatever type the weights have."""
        model = self.transformer.model
        size = model.grid_size * model.patch_size
        shape = (images, model.in_channels, size, size)
        if given is None:
            given = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(given.shape) != shape:
            raise UserError(f"latents have shape {tuple(given.shape)}; this model takes {shape}")
        return given.to(self._execution_device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _images(self, z: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return z
        if self.vae is not None:
            z = Autoencoder.of(self.vae).decode(z)
        elif z.shape[1] not in (1, 3):
            raise UserError(
                "the pipeline has no vae, and its model makes latents; give it one, or output_type='latent'"
            )
        if output_type == "pil":  # our own rounding
            return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in to_uint8(z)]
        pixels = (z / 2 + 0.5).clamp(0, 1).float()
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()

    def save_pretrained(self, save_directory: Any, *arguments: Any, push_to_hub: bool = False, **options: Any) -> None:
        """As every pipeline, and with a model card where the folder has none."""
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        to_hub = {name: options.pop(name) for name in names if name in options}
        super().save_pretrained(save_directory, *arguments, **options)
        card = Path(save_directory) / CARD_NAME
        if not card.exists():
            facts = {**self.config.facts, "grid": card.with_name(GRID_NAME).exists()}
            text = model_card(self.transformer.model, self.transformer.config["settings"], facts, type(self).__name__)
            write_atomically(card, text)
        if push_to_hub:
            self._push(Path(save_directory), **{"repo_id": Path(save_directory).name, **to_hub})

    def push_to_hub(self, repo_id: str, *arguments: Any, **options: Any) -> str:
        """As every pipeline, and with the model card."""
        given = inspect.signature(super().push_to_hub).bind(repo_id, *arguments, **options).arguments
        saved = {name: given.pop(name) for name in ("safe_serialization", "variant") if name in given}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saved)
            return self._push(Path(folder), **given)

    def _push(
        self,
        folder: Path,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> str:
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return str(
            self._upload_folder(
                str(folder),
                repo_id,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                subfolder=subfolder,
            )
        )


def build_scheduler(config: Config) -> Any:
    """The scheduler whose images are those of our own default sampler."""
    if config.objective.name == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=config.sample.time_shift)
    kind = "learned_range" if config.model.learn_sigma else "fixed_large"
    return DDPMScheduler(**DDPM_SCHEDULE, variance_type=kind, clip_sample=False)


def check_scheduler(scheduler: Any, config: Config) -> None:
    """Refuse a scheduler that takes the model's predictions for others. Raises UserError."""
    name, predicts = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if config.objective.name == "flow":
        if not name.startswith("FlowMatch") and predicts != "flow_prediction":
            raise UserError(
                f"scheduler {name} is not for a flow; take a FlowMatch one, or give it "
                "prediction_type='flow_prediction' and use_flow_sigmas=True"
            )
    elif name.startswith("FlowMatch") or predicts not in (None, "epsilon"):
        raise UserError(
            f"scheduler {name} is not for a model of DDPM, which predicts noise; take DDPMScheduler or DDIM"
        )


def _model_time(config: Config, timestep: float, scheduler: Any) -> float:
    if config.objective.name == "ddpm":
        return timestep
    noise = timestep / scheduler.config.num_train_timesteps
    t = 1 - noise if config.objective.direction == "data_at_one" else noise
    return config.objective.time_scale * t


def _denoiser(
    transformer: DiffMoETransformer2DModel, counts: list[tuple[Tensor, int]]
) -> Callable[[Tensor, Tensor, Condition], Prediction]:
    """Puts down for each layer of each pass its experts a token, and the tokens."""

    def denoise(z: Tensor, t: Tensor, y: Condition) -> Prediction:
        output = transformer(z, t, y)
        tokens = len(z) * transformer.model.grid_size**2
        counts.extend((stats.capacity.double(), tokens) for stats in output.routing)
        return output.prediction, output.variance

    return denoise


def _capacity(counts: list[tuple[Tensor, int]]) -> float | None:
    total = sum(tokens for _, tokens in counts)
    return float(torch.stack([capacity * tokens for capacity, tokens in counts]).sum() / total) if counts else None
