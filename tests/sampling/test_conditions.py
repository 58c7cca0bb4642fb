"""What images are conditioned on: which label each has, and which noise."""

from __future__ import annotations

from diffmoe_dist.data.prompts import Prompt
from diffmoe_dist.sampling.conditions import PromptConditions, choose_labels


def test_balanced_labels_go_through_the_classes_in_turn() -> None:
    assert choose_labels("balanced", 7, [3, 1, 4], seed=0) == [3, 1, 4, 3, 1, 4, 3]


def test_a_random_label_is_a_function_of_the_seed_and_the_number_of_the_image() -> None:
    many = choose_labels("random", 3000, [3, 1, 4], seed=5)

    assert choose_labels("random", 10, [3, 1, 4], seed=5) == many[:10]
    assert choose_labels("random", 3000, [3, 1, 4], seed=6) != many
    # A thousand of each, with a deviation of sqrt(3000 * 2 / 9) = 26.
    assert all(abs(many.count(label) - 1000) < 4 * 26 for label in (3, 1, 4))


def test_a_prompt_that_stands_there_twice_gives_two_images() -> None:
    class Encoded:
        prompts = (Prompt("a"), Prompt("b"), Prompt("a"))

    names = [PromptConditions(Encoded(), 4).noise_key(number) for number in range(6)]  # type: ignore[arg-type]
    assert len(set(names)) == 6
