from __future__ import annotations

from pathlib import Path

import pytest

from diffmoe_dist.data.text_encoder import TextEncoder
from tests.data.encoders import MAX_LENGTH, save_encoder


@pytest.fixture(scope="module", params=["clip", "t5"])
def encoder_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp(request.param) / "encoder", request.param)


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return TextEncoder.open(encoder_folder, None, MAX_LENGTH, "cpu", "--encoder")
