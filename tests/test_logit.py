from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.logit import Cell, line, log_odds

counts = st.tuples(st.integers(0, 300), st.integers(0, 300))
places = st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 500), counts), min_size=1, max_size=8)


def cells_of(given):
    return [Cell(at, weight, right, right + wrong) for at, weight, (right, wrong) in sorted(given)]


@settings(max_examples=100, deadline=None)
@given(places, counts)
def test_whatever_the_answers_the_line_never_falls_and_is_a_chance_everywhere(given, alone):
    chances = line(cells_of(given), alone[0], sum(alone))
    assert all(0 < one < 1 for one in chances)
    assert all(low <= high for low, high in pairwise(chances))


def test_without_answers_nothing_is_likelier_than_its_opposite():
    assert line([Cell(-1, 1, 0, 0), Cell(1, 1, 0, 0)]) == [0.5, 0.5]


def test_with_many_answers_the_line_goes_through_them():
    cells = [Cell(-1, 1, 3000, 10_000), Cell(1, 1, 7000, 10_000)]
    assert line(cells) == pytest.approx([0.3, 0.7], abs=0.01)


def test_answers_that_say_it_falls_make_it_level():
    low, high = line([Cell(-1, 1, 80, 100), Cell(1, 1, 60, 100)])
    assert low == high == pytest.approx(0.7, abs=0.01)


def test_answers_without_a_place_count_like_the_others():
    cells = [Cell(-1, 1, 60, 100), Cell(1, 3, 80, 100)]
    low, high = line(cells, 10_000 * 0.9, 10_000)
    assert low < high
    assert (low + 3 * high) / 4 == pytest.approx(0.9, abs=0.01)


def test_no_share_is_endless_in_log_odds():
    assert -5 < log_odds(0, 10_000) < 0 < log_odds(10_000, 10_000) < 5
    assert log_odds(1, 2) == 0
