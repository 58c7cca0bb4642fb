"""A DiT with captions in the place of labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe_dist.config import Config, build_config
from diffmoe_dist.errors import UserError
from diffmoe_dist.model.condition import TextCondition
from diffmoe_dist.model.dit import DiT, initialize
from diffmoe_dist.model.embeddings import TextEmbedder

IMAGES, LENGTH, TEXT_WIDTH, POOLED = 4, 6, 12, 10
ROUTERS: list[dict[str, Any]] = [
    {"router": "dense"},
    {"router": "global_pool", "num_experts": 4},
    {"router": "prototype", "num_experts": 4},
]


def make_config(moe: dict[str, Any], **model: Any) -> Config:
    settings = {
        "depth": 4, "hidden_size": 16, "num_heads": 2, "input_size": 8, "in_channels": 3,
        "condition": "text", "num_classes": 0, "text_hidden_size": TEXT_WIDTH, "text_max_length": LENGTH,
        "text_pooled_size": POOLED, **model,
    }  # fmt: skip
    return build_config({"run_dir": "r", "data": {"shards": "s", "text": "t"}, "model": settings, "moe": moe})


def make_model(moe: dict[str, Any], **model: Any) -> DiT:
    dit = DiT(make_config(moe, **model))
    initialize(dit, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dit.eval()


def make_text(pooled: bool = True) -> TextCondition:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([6, 1, 3, 4])
    return TextCondition(
        tokens=torch.randn(IMAGES, LENGTH, TEXT_WIDTH, generator=generator),
        mask=torch.arange(LENGTH) < lengths[:, None],
        pooled=torch.randn(IMAGES, POOLED, generator=generator) if pooled else None,
        null=torch.tensor([False, True, False, False]),
    )


def make_images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(IMAGES, 3, 8, 8, generator=generator), torch.rand(IMAGES, generator=generator)


@pytest.mark.parametrize("moe", ROUTERS, ids=lambda moe: moe["router"])
def test_padding_never_changes_the_result_whatever_it_holds_and_however_long_it_is(moe: dict[str, Any]) -> None:
    model, text, (x, t) = make_model(moe), make_text(), make_images()
    expected = model(x, t, text).prediction

    garbage = torch.where(text.mask[..., None], text.tokens, torch.full((), 1e4))
    assert torch.equal(model(x, t, replace(text, tokens=garbage)).prediction, expected)
    longer = replace(
        text,
        tokens=torch.cat([text.tokens, torch.randn(IMAGES, 5, TEXT_WIDTH)], dim=1),
        mask=torch.cat([text.mask, torch.zeros(IMAGES, 5, dtype=torch.bool)], dim=1),
    )
    # Sums of another length round differently.
    torch.testing.assert_close(model(x, t, longer).prediction, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moe", ROUTERS, ids=lambda moe: moe["router"])
def test_an_image_does_not_depend_on_the_captions_of_its_batch_mates(moe: dict[str, Any]) -> None:
    model, text, (x, t) = make_model(moe), make_text(), make_images()
    together, pooled = model(x, t, text).prediction, text.pooled
    assert pooled is not None
    for image in range(IMAGES):
        one = slice(image, image + 1)
        caption = TextCondition(text.tokens[one], text.mask[one], pooled[one], text.null[one])
        alone = model(x[one], t[one], caption).prediction
        torch.testing.assert_close(alone, together[one], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["tokens", "pooled"])
def test_the_caption_matters_through_its_tokens_and_through_its_pooled_vector(part: str) -> None:
    model, text, (x, t) = make_model(ROUTERS[0]), make_text(), make_images()
    other = replace(text, **{part: getattr(text, part).roll(1, 0)})
    assert (model(x, t, other).prediction - model(x, t, text).prediction).abs().max() > 1e-3


def test_cross_attention_starts_as_if_it_were_not_there() -> None:
    model, text, (x, t) = DiT(make_config(ROUTERS[0])), make_text(), make_images()
    initialize(model, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross_attn" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    expected = model(x, t, text).prediction
    other = replace(text, tokens=text.tokens.flip(0))
    assert torch.equal(model(x, t, other).prediction, expected)
    (model(x, t, text).prediction.square().sum()).backward()
    learned = [p.grad for name, p in model.named_parameters() if name.endswith("cross_attn.proj.weight")]
    assert len(learned) == 4 and all(grad is not None and grad.any() for grad in learned), "and learns"


def test_prototypes_send_images_with_the_null_caption_to_the_unconditional_expert() -> None:
    model, text, (x, t) = make_model(ROUTERS[2]), make_text(), make_images()
    stats = model(x, t, text).routing[0]
    assert int(stats.tokens_per_expert.sum()) == 3 * 16  # of four images, one has no caption


def test_without_a_pooled_vector_the_mean_of_the_tokens_takes_its_place() -> None:
    model, text, (x, t) = make_model(ROUTERS[0], text_pooled_size=0), make_text(pooled=False), make_images()
    mean = torch.stack([tokens[mask].mean(dim=0) for tokens, mask in zip(text.tokens, text.mask, strict=True)])
    assert isinstance(model.y_embedder, TextEmbedder)
    torch.testing.assert_close(model.y_embedder(text)[1], model.y_embedder.pooled(mean))
    assert model(x, t, text).prediction.isfinite().all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_classes": 10}, r"model\.num_classes=10: with model\.condition=text there are no classes; use 0"),
        ({"num_classes": 10, "text_hidden_size": None}, r"no classes; use 0; model\.text_hidden_size is not set"),
        ({"text_hidden_size": None}, r"model\.text_hidden_size is not set"),
        ({"text_max_length": None}, r"model\.text_max_length is not set; give the number of tokens"),
        ({"condition": "class", "num_classes": 10}, r"model\.text_hidden_size=12 has no effect with model\.condition="),
    ],
)
def test_settings_of_the_other_condition_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config(ROUTERS[0], **model)
