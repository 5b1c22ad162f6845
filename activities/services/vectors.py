"""Exact nearest-neighbour search over the embeddings in SQL, through one float32 matrix per tenant and model.

SQL is the truth and the matrix follows it: whatever changes about a record or its vector takes the next
position, so that `position > last seen` finds whatever any process committed, deletions included. Nothing is
approximate: the fast float32 pass only discards rows that cannot win.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Column, Connection, Row, func, insert, select, update

from activities.services.database import Database
from models.errors import InvalidInput
from models.tables import NEVER, EmbeddingRow, MemoryRow, table

EMBEDDING = table(EmbeddingRow)
MEMORY = table(MemoryRow)

T = TypeVar("T", bound=np.generic)
Vector = NDArray[np.float32]
LITTLE = np.dtype("<f4")
UNIT_TOLERANCE = 1e-3
"""How far a norm may be from 1: servers that compute in half precision stay within it."""
READ_ROWS = 2048
BLOCK_ROWS = 16_384
CHUNK_ROWS = 4096
SHELVES = 64
TIMES = ("recorded_at", "active_at", "valid_from", "valid_to", "expires_at")
AGENT = "agent:"
"""Before the name of an agent among the codes, so that no kind can be taken for one."""


@dataclass(frozen=True, slots=True)
class Near:
    """A record and its exact cosine."""

    record_id: str
    cosine: float


@dataclass(frozen=True, slots=True)
class When:
    """Whose records count, and when; times in microseconds."""

    now: int = 0
    """What has expired by then is never found, whatever else is asked."""
    at: int = NEVER - 1
    """The time at which a record must have counted."""
    agent: str | None = None
    """This agent's records and everybody's; `None` is all."""


ALWAYS = When()


def unit_vector(values: Sequence[float] | Vector, dimensions: int) -> Vector:
    """Check an embedding and return it at length one in float32.

    Raises:
        InvalidInput: wrong size, NaN, infinity, or not a unit vector.
    """
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput.field("vector", type(values).__name__, "give a list of numbers") from None
    if vector.shape != (dimensions,):
        raise InvalidInput.field("vector", vector.shape, f"give {dimensions} numbers; check the model")
    if not np.isfinite(vector).all():
        raise InvalidInput.field("vector", "NaN or infinity", "give finite numbers; check the model")
    norm = math.hypot(*vector.tolist())
    if abs(norm - 1) > UNIT_TOLERANCE:
        raise InvalidInput.field("vector", f"norm {norm:.6g}", "divide it by its norm")
    return (vector / norm).astype(np.float32)


def next_position(connection: Connection, column: Column[int]) -> int:
    """The position after the highest one, in commit order even between processes.

    There is one writer at a time: if a later position became visible before an earlier one, a reader would
    never look for that one again.
    """
    return int(connection.execute(select(func.coalesce(func.max(column), 0))).scalar_one()) + 1


def put_vectors(connection: Connection, model: str, rows: Iterable[tuple[str, str, Vector]]) -> int:
    """Write (tenant, record id, vector) of records that are still there and have none; returns how many."""
    position = next_position(connection, EMBEDDING.c.position)
    written = 0
    for tenant, record_id, vector in rows:
        data = vector.astype(LITTLE).tobytes()
        if _put_vector(connection, (tenant, record_id, model), position + written, data):
            written += 1
    return written


def _put_vector(connection: Connection, key: tuple[str, str, str], position: int, data: bytes) -> bool:
    m, e = MEMORY.c, EMBEDDING.c
    tenant, record_id, model = key
    live = (m.tenant == tenant, m.record_id == record_id, m.forgotten_at.is_(None), m.standing != "expired")
    mine = (e.tenant == tenant, e.record_id == record_id, e.model == model)
    if connection.execute(select(m.position).where(*live)).first() is None:
        return False
    held = connection.execute(select(func.length(e.vector)).where(*mine)).scalar_one_or_none()
    if held is None:
        values = dict(tenant=tenant, record_id=record_id, model=model, position=position, vector=data)
        connection.execute(insert(EMBEDDING).values(**values))
    elif held == 0:
        # It expired once and was learned again.
        connection.execute(update(EMBEDDING).where(*mine).values(position=position, vector=data))
    return not held


def touch_vectors(connection: Connection, tenant: str, record_id: str) -> None:
    """Let every reader of the vectors notice that something about the record has changed."""
    mine = (EMBEDDING.c.tenant == tenant, EMBEDDING.c.record_id == record_id)
    for model in connection.execute(select(EMBEDDING.c.model).where(*mine)).scalars().all():
        position = next_position(connection, EMBEDDING.c.position)
        connection.execute(
            update(EMBEDDING).where(*mine, EMBEDDING.c.model == model).values(position=position)
        )


def empty_vectors(connection: Connection, tenant: str, record_id: str) -> None:
    """Empty the vectors of a record under every model, in a way that every reader notices."""
    mine = (EMBEDDING.c.tenant == tenant, EMBEDDING.c.record_id == record_id)
    connection.execute(update(EMBEDDING).where(*mine).values(vector=b""))
    touch_vectors(connection, tenant, record_id)


class ExactVectors:
    """Exact cosine search; one matrix in memory per tenant and model, about the size of its data."""

    def __init__(self, database: Database, dimensions: int, block_rows: int = BLOCK_ROWS) -> None:
        """Read nothing yet; a tenant's vectors are loaded by its first search."""
        self._database = database
        self._dimensions = dimensions
        self._block_rows = block_rows
        self._shelves: OrderedDict[tuple[str, str], _Shelf] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""
        return self._dimensions

    async def nearest(
        self,
        tenant: str,
        model: str,
        query: Sequence[float] | Vector,
        kinds: Sequence[str],
        limit: int,
        when: When = ALWAYS,
    ) -> list[Near]:
        """The `limit` records with the highest cosine; equal ones by newer time, then by record id.

        Raises:
            InvalidInput: the query is no unit vector of the right size, or a stored vector is none.
        """
        checked = unit_vector(query, self._dimensions)

        def search() -> list[Near]:
            shelf = self._shelf(tenant, model)
            with shelf.lock:
                self._database.read_now(shelf.refresh)
                view = shelf.view(tuple(kinds), when)
            return _winners(view, checked, limit)

        return await asyncio.to_thread(search)

    def drop(self, tenant: str) -> None:
        """Give back the memory of a tenant's vectors; the next search reads them again."""
        with self._lock:
            for key in [key for key in self._shelves if key[0] == tenant]:
                del self._shelves[key]

    def _shelf(self, tenant: str, model: str) -> _Shelf:
        with self._lock:
            shelf = self._shelves.pop((tenant, model), None)
            shelf = shelf or _Shelf(tenant, model, _Blocks(self._dimensions, self._block_rows))
            self._shelves[tenant, model] = shelf
            if len(self._shelves) > SHELVES:
                self._shelves.popitem(last=False)
            return shelf


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Rows in blocks of one size, of which the last may be shorter."""

    blocks: tuple[Vector, ...]
    block_rows: int

    def times(self, query: Vector) -> NDArray[np.float32]:
        """The product of every row with a vector."""
        scores = np.empty(sum(map(len, self.blocks)), np.float32)
        for number, block in enumerate(self.blocks):
            np.einsum("ij,j->i", block, query, out=scores[number * self.block_rows :][: len(block)])
        return scores

    def row(self, number: int) -> Vector:
        """One row."""
        block, at = divmod(number, self.block_rows)
        return self.blocks[block][at]

    def take(self, rows: NDArray[np.intp]) -> Vector:
        """Some rows, copied; at least one."""
        return np.stack([self.row(number) for number in rows.tolist()])


class _Blocks:
    """A matrix that grows by whole blocks, so that appending never copies what is there."""

    def __init__(self, dimensions: int, block_rows: int) -> None:
        self.dimensions, self.block_rows = dimensions, block_rows
        self._blocks: list[Vector] = []

    def write(self, start: int, rows: Vector) -> None:
        """Put rows from that number on, which follows the last one."""
        while len(rows):
            number, at = divmod(start, self.block_rows)
            part = rows[: self.block_rows - at]
            self._room(number, at, at + len(part))[at : at + len(part)] = part
            start, rows = start + len(part), rows[len(part) :]

    def _room(self, number: int, used: int, needed: int) -> Vector:
        """A block that may be written to; a small tenant's only one starts small."""
        if number == len(self._blocks):
            self._blocks.append(np.empty((0, self.dimensions), np.float32))
        if needed > len(self._blocks[number]):
            capacity = min(self.block_rows, _capacity(needed))
            self._blocks[number] = _grown(self._blocks[number], used, capacity)
        return self._blocks[number]

    def first(self, count: int) -> _Matrix:
        """So many rows, as they are; later ones do not show."""
        whole, rest = divmod(count, self.block_rows)
        last = (self._blocks[whole][:rest],) if rest else ()
        return _Matrix((*self._blocks[:whole], *last), self.block_rows)

    def only(self, keep: NDArray[np.intp], count: int) -> _Blocks:
        """Others that hold some of the first `count` rows."""
        kept, old = _Blocks(self.dimensions, self.block_rows), self.first(count)
        for start in range(0, len(keep), self.block_rows):
            kept.write(start, old.take(keep[start : start + self.block_rows]))
        return kept


@dataclass(frozen=True, slots=True)
class _View:
    """What one search sees; later writes go beyond its end or into new arrays."""

    matrix: _Matrix
    recorded: NDArray[np.int64]
    ids: list[str]
    rows: NDArray[np.intp] | None
    """The rows that may be found; None is all of them."""


class _Shelf:
    """The vectors of one tenant and model; used under its lock."""

    def __init__(self, tenant: str, model: str, blocks: _Blocks) -> None:
        self.lock = threading.Lock()
        self._tenant, self._model = tenant, model
        self._seen = 0
        self._blocks = blocks
        self._times = np.empty((0, len(TIMES)), np.int64)
        self._kinds = np.empty(0, np.int32)
        self._agents = np.empty(0, np.int32)
        self._alive = np.empty(0, np.bool_)
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._codes: dict[str, int] = {}
        self._dead = 0

    def refresh(self, connection: Connection) -> None:
        """Take over what was committed since the last time."""
        mine = (EMBEDDING.c.tenant == self._tenant, EMBEDDING.c.model == self._model)
        same = (MEMORY.c.tenant == EMBEDDING.c.tenant) & (MEMORY.c.record_id == EMBEDDING.c.record_id)
        e, m = EMBEDDING.c, MEMORY.c
        changes = (
            select(e.position, e.record_id, e.vector, m.kind, m.agent, *(m[name] for name in TIMES))
            .join_from(EMBEDDING, MEMORY, same)
            .where(*mine, e.position > self._seen)
            .order_by(e.position)
            .execution_options(yield_per=READ_ROWS)
        )
        with connection.execute(changes) as result:
            for part in result.partitions(READ_ROWS):
                self._bury(row.record_id for row in part)
                self._add([row for row in part if row.vector])
                self._seen = part[-1].position
        if self._dead > max(1024, len(self._ids) // 2):
            self._compact()

    def view(self, kinds: tuple[str, ...], when: When) -> _View:
        """What a search over these kinds sees."""
        count = len(self._ids)
        times = self._times[:count].T
        _, active, begins, ends, expires = times
        wanted = self._alive[:count] & (expires > when.now) & (active <= when.at)
        wanted &= (begins <= when.at) & (ends > when.at)
        if kinds:
            wanted &= np.isin(self._kinds[:count], [self._codes.get(kind, -1) for kind in kinds])
        if when.agent is not None:
            owners = [self._codes.get(AGENT + name, -1) for name in ("", when.agent)]
            wanted &= np.isin(self._agents[:count], owners)
        rows = None if wanted.all() else np.flatnonzero(wanted)
        return _View(self._blocks.first(count), times[0], self._ids, rows)

    def _add(self, rows: Sequence[Row[Any]]) -> None:
        if not rows:
            return
        start, end = len(self._ids), len(self._ids) + len(rows)
        self._blocks.write(start, self._checked(rows))
        self._reserve(end)
        self._times[start:end] = [tuple(row[-len(TIMES) :]) for row in rows]
        self._kinds[start:end] = [self._code(row.kind) for row in rows]
        self._agents[start:end] = [self._code(AGENT + row.agent) for row in rows]
        self._alive[start:end] = True
        self._ids.extend(row.record_id for row in rows)
        self._rows.update((row.record_id, start + number) for number, row in enumerate(rows))

    def _code(self, name: str) -> int:
        return self._codes.setdefault(name, len(self._codes))

    def _checked(self, rows: Sequence[Row[Any]]) -> Vector:
        size = self._blocks.dimensions * LITTLE.itemsize
        for row in rows:
            if len(row.vector) != size:
                raise _unusable(row.record_id, f"{len(row.vector)} bytes instead of {size}")
        block = np.frombuffer(b"".join(row.vector for row in rows), LITTLE).reshape(len(rows), -1)
        norms = np.einsum("ij,ij->i", block, block)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))
        if len(bad):
            raise _unusable(rows[int(bad[0])].record_id, "not a unit vector")
        return block.astype(np.float32, copy=False)

    def _reserve(self, needed: int) -> None:
        if needed <= len(self._alive):
            return
        capacity = _capacity(needed)
        self._times = _grown(self._times, len(self._ids), capacity)
        self._kinds = _grown(self._kinds, len(self._ids), capacity)
        self._agents = _grown(self._agents, len(self._ids), capacity)
        self._alive = _grown(self._alive, len(self._ids), capacity)

    def _bury(self, changed: Iterable[str]) -> None:
        rows = [row for record_id in changed if (row := self._rows.pop(record_id, None)) is not None]
        if rows:
            self._dead += len(rows)
            self._alive[rows] = False

    def _compact(self) -> None:
        keep = np.flatnonzero(self._alive[: len(self._ids)])
        self._blocks, self._times = self._blocks.only(keep, len(self._ids)), self._times[keep]
        self._kinds, self._agents = self._kinds[keep], self._agents[keep]
        self._alive = self._alive[keep]
        self._ids = [self._ids[row] for row in keep.tolist()]
        self._rows = {record_id: row for row, record_id in enumerate(self._ids)}
        self._dead = 0


def _capacity(needed: int) -> int:
    return max(256, 1 << (needed - 1).bit_length())


def _grown(old: NDArray[T], used: int, capacity: int) -> NDArray[T]:
    new = np.empty((capacity, *old.shape[1:]), old.dtype)
    new[:used] = old[:used]
    return new


def _unusable(record_id: str, what: str) -> InvalidInput:
    return InvalidInput.field(f"stored vector of {record_id}", what, "forget the record and keep it anew")


def _winners(view: _View, query: Vector, limit: int) -> list[Near]:
    """Three sieves, each exact about what it lets fall: float32, float64, correctly rounded sums."""
    scores = view.matrix.times(query)
    if view.rows is not None:
        scores = scores[view.rows]
    count = min(limit, len(scores))
    if count < 1:
        return []
    rows = _leaders(scores, count, 2.0**-24, len(query))
    rows = rows if view.rows is None else view.rows[rows]
    wide = query.astype(np.float64)
    rows = rows[_leaders(_doubles(view.matrix, rows, wide), count, 2.0**-53, len(query))]
    return _ranked(view, rows.tolist(), wide, count)


def _leaders(
    scores: NDArray[np.float32] | NDArray[np.float64], count: int, unit: float, terms: int
) -> NDArray[np.intp]:
    """Indices that rounding cannot exclude from the first `count`.

    A dot product of unit vectors is off by less than `terms` units of rounding, in whatever order it is
    summed; a few more units cover the comparison itself.
    """
    error = 1.01 * (terms + 4) * unit
    last = float(np.partition(scores, len(scores) - count)[len(scores) - count])
    return np.flatnonzero(scores >= last - 2 * error)


def _doubles(matrix: _Matrix, rows: NDArray[np.intp], query: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = np.empty(len(rows))
    for start in range(0, len(rows), CHUNK_ROWS):
        part = matrix.take(rows[start : start + CHUNK_ROWS]).astype(np.float64)
        scores[start : start + CHUNK_ROWS] = np.einsum("ij,j->i", part, query)
    return scores


def _ranked(view: _View, rows: list[int], query: NDArray[np.float64], count: int) -> list[Near]:
    """Order by the correctly rounded cosine: products of two float32 are exact, and fsum rounds once."""
    known: dict[bytes, float] = {}

    def cosine(row: int) -> float:
        vector = view.matrix.row(row)
        name = vector.tobytes()
        if name not in known:
            known[name] = math.fsum((vector * query).tolist())
        return known[name]

    keys = ((-cosine(row), -int(view.recorded[row]), view.ids[row]) for row in rows)
    return [Near(record_id, -score) for score, _, record_id in heapq.nsmallest(count, keys)]
