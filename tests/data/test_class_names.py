"""What classes are called, and how a user names some of them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from diffmoe_dist.config import build_config
from diffmoe_dist.data.class_names import NO_NAMES, ClassNames, names_of_data
from diffmoe_dist.errors import UserError
from diffmoe_dist.sampling.conditions import ClassLabels, open_conditions
from diffmoe_dist.sampling.settings import SamplingSettings

WORDS = """\
n01440764 tench, Tinca tinca
n02012849 crane
n02099601 golden retriever
n03126707 crane
n02099712 Labrador retriever
"""
WNIDS = [line.split()[0] for line in WORDS.splitlines()]


@pytest.fixture
def imagenet(tmp_path: Path) -> ClassNames:
    (tmp_path / "class_words.txt").write_text(WORDS)
    return names_of_data(WNIDS, tmp_path)


def test_words_for_people_are_shown_in_the_place_of_codes_and_two_that_are_one_word_are_told_apart(
    imagenet: ClassNames, tmp_path: Path
) -> None:
    shown = ["tench", "crane (n02012849)", "golden retriever", "crane (n03126707)", "Labrador retriever"]
    assert imagenet.shown == shown
    assert ClassNames.from_json(imagenet.to_json()) == imagenet
    assert names_of_data(["cat", "dog"], tmp_path / "none").shown == ["cat", "dog"]
    with pytest.raises(UserError, match="class_words.txt: has words for none of the 1 classes"):
        names_of_data(["cat"], tmp_path)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("golden retriever,4", (2, 4)),
        ("Golden_Retriever , tench", (2, 0)),
        ("n03126707,2", (3, 2)),
        ("tench, Tinca tinca,1", (0, 1)),
        ("tench,Tinca tinca,1", (0, 1)),
        ("1,Tench ,  tinca_tinca", (1, 0)),
        ("Tinca tinca,crane (n02012849)", (0, 1)),
    ],
)
def test_classes_are_found_by_number_by_any_of_their_names_and_by_names_with_commas(
    imagenet: ClassNames, text: str, labels: tuple[int, ...]
) -> None:
    assert imagenet.numbers(text, 5) == labels


def test_a_class_that_is_given_twice_is_taken_once_and_told(
    imagenet: ClassNames, caplog: pytest.LogCaptureFixture
) -> None:
    for text, labels in {"3,3": (3,), "2,n03126707,3": (2, 3), "Tinca tinca,4,tench": (0, 4), "3,2": (3, 2)}.items():
        caplog.clear()
        assert imagenet.numbers(text, 5) == labels
        assert ("given more than once, and taken once: class" in caplog.text) == (text != "3,2")
    settings = SamplingSettings("run", num=4, classes=(3, 1, 3))
    config = build_config({"model": {"size": "S", "num_classes": 5}}, training=False)
    conditions = open_conditions(settings, config, torch.device("cpu"))
    assert isinstance(conditions, ClassLabels) and conditions.labels == [3, 1, 3, 1]
    assert "--classes: given more than once, and taken once: class 3" in caplog.text


def test_a_number_is_a_number_and_a_class_that_is_called_so_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    names = ClassNames((("1",), ("2",), ("70",)))
    with caplog.at_level(logging.WARNING):
        assert names.numbers("1", 3) == (1,)
    assert (
        "taken for the number of a class, which is called '2'; the class that is called so has number 0" in caplog.text
    )
    assert names.numbers("70", 3) == (2,)  # there is no such number


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "golden retreiver",
            "--classes golden retreiver: .* no class of that name; the nearest are 'golden retriever'",
        ),
        ("0,retriever", "--classes retriever: .*the nearest are '(golden|Labrador) retriever', '"),
        ("zzz", "--classes zzz: .*it has 'tench', 'crane .n02012849.', 'golden retriever' ..."),
        ("crane", r"--classes crane: several classes are called so: 1 \(crane \(n02012849\)\), 3 .*; give the number"),
        ("5", "--classes 5: this model knows the classes 0 to 4"),
        ("-1", "--classes -1: this model knows the classes 0 to 4"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest(imagenet: ClassNames, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        imagenet.numbers(text, 5)


def test_names_are_refused_where_the_model_has_none() -> None:
    with pytest.raises(UserError, match="--classes cat: the names of this model's classes are not known; give numbers"):
        NO_NAMES.numbers("0,cat", 10)
    assert NO_NAMES.numbers("0, 9", 10) == (0, 9)
