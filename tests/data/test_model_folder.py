from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffmoe_dist.data.model_folder import check_model_folder
from diffmoe_dist.errors import UserError


def _check(folder: Path) -> str:
    files = (("*.safetensors",), ("tokenizer.json", "vocab.json"))
    return check_model_folder(folder, f"--encoder={folder}", "a CLIP", ("clip", "clip_text_model"), files=files)


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.json"])
def test_the_kind_of_a_model_is_read_from_its_folder(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    for name in ("model.safetensors", tokenizer):
        (tmp_path / name).touch()
    assert _check(tmp_path) == "clip_text_model"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "no config.json that can be read; give the local folder of a CLIP"),
        ("{", "no config.json that can be read; give the local folder of a CLIP"),
        ("[" * 100_000, "no config.json that can be read; give the local folder of a CLIP"),
        ('{"model_type": ["clip"]}', "is ['clip']; give the local folder of a CLIP"),
        ("[]", "no config.json that can be read; give the local folder of a CLIP"),
        ('{"model_type": "bert"}', "is bert; give the local folder of a CLIP"),
        ('{"model_type": "clip"}', "no tokenizer.json or vocab.json; fetch it too"),
    ],
)
def test_what_is_wrong_with_a_models_folder_is_named(tmp_path: Path, config: str | None, problem: str) -> None:
    (tmp_path / "model.safetensors").touch()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as caught:
        _check(tmp_path)
    assert str(caught.value) == f"--encoder={tmp_path}: {problem}"


def test_a_models_folder_is_checked_without_torch() -> None:
    program = "import sys, diffmoe_dist.data.model_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
