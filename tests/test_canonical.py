from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.canonical import MAX_SAFE_INTEGER, canonical, derived_id, digest_of

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=5)


@given(OBJECTS)
def test_bytes_read_back_are_the_value_and_have_the_same_bytes(value: dict[str, Any]) -> None:
    data = canonical(value)
    assert json.loads(data) == value
    assert canonical(json.loads(data)) == data
    assert digest_of(value) == hashlib.sha256(data).hexdigest()


@given(OBJECTS)
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert canonical(dict(reversed(list(value.items())))) == canonical(value)


@given(OBJECTS, OBJECTS)
def test_two_values_never_share_bytes(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert (canonical(one) == canonical(two)) == (
        json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    )


def test_the_published_ordering_by_utf_16_is_kept() -> None:
    value = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert list(json.loads(canonical(value)).values()) == [2, 4, 6, 7, 1, 5, 3]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": 1.5}, r"\$\.a: floats"),
        ({"a": [1, {"b": 0.0}]}, r"\$\.a\[1\]\.b: floats"),
        ({"a": (1, 2.0)}, r"\$\.a\[1\]: floats"),
        ({"a": float("nan")}, r"\$\.a: floats"),
        ({"a": MAX_SAFE_INTEGER + 1}, r"\$\.a: integers"),
        ({"a": (-MAX_SAFE_INTEGER - 1,)}, r"\$\.a\[0\]: integers"),
    ],
)
def test_what_other_languages_read_differently_is_refused(value: dict[str, Any], path: str) -> None:
    with pytest.raises(ValueError, match=path):
        canonical(value)


def test_a_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="."):
        canonical({"a": "\ud800"})


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(TEXT, min_size=1, max_size=4))
def test_ids_differ_where_their_parts_do(one: list[str], two: list[str]) -> None:
    assert (derived_id(*one) == derived_id(*two)) == (one == two)
