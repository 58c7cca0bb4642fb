"""Extractors other than ADM's: of local folders, against what each score's authors do, and a user's functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from diffmoe_dist.errors import UserError
from diffmoe_dist.evaluation.extractors import (
    open_extractor,
    position_table_as_published,
    resize_as_clean_fid,
)
from diffmoe_dist.evaluation.inception import Inception
from tests.evaluation.colours import colours

CPU = torch.device("cpu")
HERE = "tests.evaluation.colours"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP


def images(num: int, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2, whose position table is for 20 x 20 patches, and a tiny CLIP without its text tower."""
    root = tmp_path_factory.mktemp("models")
    tower: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    dinov2 = Dinov2Model(Dinov2Config(**tower, mlp_ratio=2, image_size=280, patch_size=14))
    torch.nn.init.normal_(dinov2.embeddings.position_embeddings)
    dinov2.save_pretrained(root / "dinov2-tiny")
    clip = CLIPVisionConfig(**tower, intermediate_size=32, image_size=16, patch_size=4, projection_dim=5)
    CLIPVisionModelWithProjection(clip).save_pretrained(root / "clip-tiny")
    preprocessor = {"crop_size": 16, "size": 16, "image_mean": MEAN, "image_std": STD, "resample": 3}
    (root / "clip-tiny/preprocessor_config.json").write_text(json.dumps(preprocessor))
    return root


def normalized(pixels: np.ndarray, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) fp32."""
    x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    return x.permute(2, 0, 1)[None]


def test_fd_dinov2_takes_the_class_token_as_dgm_eval_does(folders: Path) -> None:
    extractor = open_extractor(None, str(folders / "dinov2-tiny"), CPU)
    assert extractor.distance == "fd_dinov2" and extractor.identity.startswith("dinov2 ")
    wide, small = images(1, size=300)[0][:, :200], images(1, channels=1, size=30)[0]
    got = extractor([wide, small]).pooled_NF

    model: Dinov2Model = Dinov2Model.from_pretrained(folders / "dinov2-tiny").eval()
    # As published: the table for 518 pixels is resized by a scale factor that is a little more than the quotient.
    table = model.embeddings.position_embeddings.detach()
    places = table[:, 1:].view(1, 20, 20, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(places, scale_factor=(16.1 / 20,) * 2, mode="bicubic")
    model.embeddings.position_embeddings.data = torch.cat([table[:, :1], grid.flatten(2).mT], dim=1)
    for image, features in zip((wide, small.expand(3, -1, -1)), got, strict=True):
        pixels = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        with torch.no_grad():
            token = model(normalized(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).last_hidden_state[0, 0]
        torch.testing.assert_close(features, token, atol=1e-5, rtol=0)
    plain = F.interpolate(places, size=(16, 16), mode="bicubic")
    ours = position_table_as_published(table, 16)[:, 1:]
    assert (ours - plain.flatten(2).mT).abs().max() > 0.01, "what transformers would make of it"


def test_clip_fd_takes_the_image_embedding_before_it_is_normalised_as_clean_fid_does(folders: Path) -> None:
    extractor = open_extractor(None, str(folders / "clip-tiny"), CPU)
    assert extractor.distance == "clip_fd"
    image = images(1, size=32)[0][:, :24]  # 24 x 32: the shorter side becomes 16, then the middle of 16 x 21 is taken
    model: CLIPVisionModelWithProjection = CLIPVisionModelWithProjection.from_pretrained(folders / "clip-tiny").eval()
    resized = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((21, 16), Image.Resampling.BICUBIC))
    with torch.no_grad():
        expected = model(normalized(resized[:, 2:18], MEAN, STD)).image_embeds
    torch.testing.assert_close(extractor([image]).pooled_NF, expected, atol=1e-5, rtol=0)


def test_clean_fid_resizes_each_channel_in_floats_and_leaves_them_clipped_and_unrounded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Inception().eval()
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    extractor = open_extractor(str(tmp_path / "inception.pth"), None, CPU, clean=True)
    assert extractor.distance == "clean_fid" and extractor.identity.startswith("clean-fid 0.1.35 inception ")
    image = images(1, size=40)[0][:, :30]
    resized = resize_as_clean_fid(image)
    for channel, plane in zip(image.numpy(), resized, strict=True):
        floats = Image.fromarray(channel.astype(np.float32), mode="F").resize((299, 299), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(floats).clip(0, 255), plane.numpy())
    assert resized.min() == 0 and resized.max() == 255 and (resized != resized.round()).any()
    with torch.no_grad():
        expected = model.of_inputs(resized[None]).pooled
    torch.testing.assert_close(extractor([image]).pooled_NF, expected)
    with_adms = open_extractor(str(tmp_path / "inception.pth"), None, CPU)
    with pytest.raises(UserError, match=r"images of several sizes \(8 x 8 and 30 x 40\) have no such score"):
        with_adms([image, images(1)[0]])


def test_a_function_of_the_users_own_gives_the_features() -> None:
    extractor = open_extractor(None, f"{HERE}:colours", CPU)
    grey = images(3, channels=1)
    assert torch.equal(extractor(images(3)).pooled_NF, colours(images(3)))
    assert torch.equal(extractor(grey).pooled_NF, colours(grey.repeat(1, 3, 1, 1))), (
        "grey images have three equal channels"
    )
    assert extractor.identity == f"{HERE}:colours" and extractor.distance == "frechet_distance"


BAD = {
    "nowhere.pt2": "nowhere.pt2: neither the local folder of a DINOv2 or CLIP nor a module:callable",
    "README.md": "README.md: neither the local folder",
    "docs": "docs: no config.json that can be read; give the local folder of a DINOv2 or a CLIP",
    "nowhere:f": "nowhere:f: there is no module nowhere",
    f"{HERE}:nothing": f"{HERE} has no callable .nothing.",
    f"{HERE}:too_many_axes": "it returned \\[2, 3, 8, 8\\] for 2 images; return \\(N, F\\)",
    f"{HERE}:broken": "features that are not finite",
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=BAD[name]):
        open_extractor(None, name, CPU)(images(2))


def test_a_folder_that_is_damaged_or_of_another_model_is_refused_in_one_line(folders: Path, tmp_path: Path) -> None:
    def refusal(name: str, **settings: str) -> str:
        folder = tmp_path / name
        text = (folder / "config.json").read_text()
        for old, new in settings.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError) as caught:
            open_extractor(None, str(folder), CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in ("a", "b", "c"):
        shutil.copytree(folders / "dinov2-tiny", tmp_path / name)
    assert "is vit; give the local folder of a DINOv2 or a CLIP" in refusal("a", dinov2="vit")
    tensors = load_file(tmp_path / "b/model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "b/model.safetensors", {"format": "pt"})
    assert "lacks weights, as layernorm.weight" in refusal("b")
    (tmp_path / "c/model.safetensors").unlink()
    assert "no *.safetensors" in refusal("c")


@pytest.mark.parametrize(("inception", "features"), [(None, None), ("a.pth", "models/dinov2")])
def test_one_extractor_is_named_and_no_more(inception: str | None, features: str | None) -> None:
    with pytest.raises(UserError, match="one of them"):
        open_extractor(inception, features, CPU)
