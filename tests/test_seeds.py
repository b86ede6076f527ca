"""Runs that differ by the seed only: groups, mean and spread."""

from __future__ import annotations

import math

import pytest

from fewstep.seeds import Spread, grouped
from fewstep.texts import shown


def test_items_with_equal_settings_are_one_group_in_the_order_of_their_first():
    items = [({"a": 1, "b": 2}, "x"), ({"a": 2}, "y"), ({"b": 2, "a": 1}, "z")]
    assert [[name for _, name in group] for group in grouped(items, lambda item: item[0])] == [["x", "z"], ["y"]]


def test_scores_of_one_seed_count_once():
    spread = Spread.over([(0, 1.0), (0, 2.0), (1, 3.5)])
    assert (spread.mean, spread.std, spread.seeds) == (2.5, pytest.approx(math.sqrt(2)), 2)
    assert (str(spread), str(Spread.over([(0, 1.0), (0, 2.0)]))) == ("2.5 ± 1.4", "1.5")
    lost = Spread.over([(0, math.inf), (1, 1.0)])
    assert math.isnan(lost.mean) and lost.std is None and lost.seeds == 2


def test_means_are_near_within_the_larger_deviation():
    wide, narrow, single = Spread(1.0, 0.5, 2), Spread(1.5, 0.1, 2), Spread(1.55, None, 1)
    assert wide.near(narrow) and narrow.near(wide) and narrow.near(single) and not wide.near(single)


def test_a_value_is_written_one_way():
    assert [shown(v) for v in (1e-4, 0.1 + 0.2, 1234567, True, None, "a")] == [
        *("0.0001", "0.3", "1234567", "true", "null", "a")
    ]
    assert (shown(2 / 3, 4), shown(2 / 3, 2), shown(math.nan, 4)) == ("0.6667", "0.67", "nan")
