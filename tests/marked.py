"""Marked personal data, and every form in which it could stand in a file."""

from __future__ import annotations

import base64
import json
import sqlite3
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

MARKS = {
    "e-mail": "quasselstrippe.4711@example.test",
    "name": "Änneliese-Süßmüller-4712",
    "phone": "+49-30-47134713",
    "iban": "DE02471447144714471447",
}
EMAIL, NAME, PHONE, IBAN = MARKS.values()
ALL = " ".join(MARKS.values())


def said(place: str) -> str:
    """A text for one place that holds all of it, so that what is found says where it came from."""
    return f"{place}: {ALL}"


def shapes(mark: str) -> frozenset[bytes]:
    """A mark as it may stand somewhere: as text in several spellings, encoded, and in Base64."""
    escaped = json.dumps(mark)[1:-1]
    texts = {mark, mark.lower(), unicodedata.normalize("NFD", mark), escaped, json.dumps(escaped)[1:-1]}
    texts |= {quote(mark), quote(mark, safe=""), quote(quote(mark, safe=""), safe=""), mark.encode().hex()}
    whole = {text.encode() for text in texts} | {mark.encode("utf-16-le"), mark.encode("latin-1")}
    inside = {mark.encode(), escaped.encode(), mark.encode("utf-16-le")}
    return frozenset(whole | {found for data in inside for found in _in_base64(data)})


def _in_base64(data: bytes) -> Iterable[bytes]:
    for before in range(3):
        coded = base64.b64encode(b"-" * before + data + b"--")
        # The letters at either end depend on what stands beside the mark.
        inner = coded[4 if before else 0 : -4]
        yield from (inner, inner.replace(b"+", b"-").replace(b"/", b"_"))


SHAPES = {name: shapes(mark) for name, mark in MARKS.items()}


def found(data: bytes) -> dict[str, str]:
    """Which marks stand in it, each with what stands around it."""
    places = {name: _first(data, SHAPES[name]) for name in SHAPES}
    return {name: _around(data, place) for name, place in places.items() if place is not None}


def _first(data: bytes, wanted: Iterable[bytes]) -> int | None:
    lower = data.lower()
    for shape in wanted:
        for text, look in ((data, shape), (lower, shape.lower())):
            if (at := text.find(look)) >= 0:
                return at
    return None


def _around(data: bytes, at: int) -> str:
    return data[max(0, at - 150) : at + 150].decode("utf-8", "replace")


def columns(file: Path) -> dict[str, str]:
    """Tables and columns of an SQLite database with a mark in any row."""
    with sqlite3.connect(file) as link:
        link.text_factory = bytes
        names = [row[0].decode() for row in link.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        hit = {place: around for name in names for place, around in _in_table(link, name).items()}
    link.close()
    return hit


def _in_table(link: sqlite3.Connection, table: str) -> dict[str, str]:
    rows = link.execute(f'SELECT * FROM "{table}"')
    titles = [one[0].decode() if isinstance(one[0], bytes) else one[0] for one in rows.description]
    hit: dict[str, str] = {}
    for row in rows:
        for title, cell in zip(titles, row, strict=True):
            if isinstance(cell, bytes) and (marks := found(cell)):
                hit[f"{table}.{title}"] = next(iter(marks.values()))
    return hit
