"""The statistics of the study, by numbers worked out by hand."""

from __future__ import annotations

import pytest

from studies.routing.statistics import Estimate, common_spread, mean_of, paired_difference, t_quantile


def test_the_quantiles_are_those_of_students_table() -> None:
    assert [t_quantile(n) for n in (1, 2, 4, 16)] == pytest.approx([12.706, 4.303, 2.776, 2.120], abs=5e-4)


def test_a_difference_is_taken_seed_by_seed_so_that_what_a_seed_does_to_both_drops_out() -> None:
    first, second = {0: 1.0, 1: 5.0, 2: 9.0}, {0: 0.0, 1: 3.0, 2: 6.0, 3: 100.0}

    found = paired_difference(first, second)

    # Differences 1, 2, 3: mean 2, deviation 1, so 4.303 / sqrt(3).
    assert found is not None and (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(2.4841, abs=1e-4)
    assert not found.is_clear


def test_one_seed_has_a_difference_without_an_interval_and_no_common_seed_has_none() -> None:
    assert paired_difference({0: 3.0, 1: 0.0}, {0: 1.0}) == Estimate(2.0, None, 1)
    assert not Estimate(2.0, None, 1).is_clear
    assert paired_difference({0: 3.0}, {1: 1.0}) is None


def test_a_mean_of_two_values_has_the_interval_of_one_degree_of_freedom() -> None:
    assert mean_of([1.0, 3.0]).half_width == pytest.approx(12.706, abs=1e-3)  # deviation sqrt(2), over sqrt(2)


def test_the_common_spread_is_what_systems_and_seeds_do_not_explain() -> None:
    # Means of systems 2, 4, 6 and of seeds 3, 5. Residuals 0, 0 / -1, 1 / 1, -1: squares 4, degrees of freedom 2.
    systems = [{0: 1.0, 1: 3.0}, {0: 2.0, 1: 6.0, 7: 9.0}, {0: 6.0, 1: 6.0}]

    spread = common_spread(systems)

    assert spread is not None and spread.degrees_of_freedom == 2
    assert spread.deviation == pytest.approx(2**0.5)
    assert spread.half_width(2) == pytest.approx(4.303 * 2**0.5, abs=1e-3)


def test_there_is_no_common_spread_without_two_common_seeds() -> None:
    assert common_spread([{0: 1.0, 1: 2.0}, {0: 1.0}]) is None
    assert common_spread([]) is None
