"""Weaviate beside SQL: a projection of the embeddings that follows them and may be rebuilt at any time.

SQL is the truth. What Weaviate answers is only a list of ids; whether a record counts is looked up again.
One process at a time follows, under a lease, and the cursor moves only after Weaviate has taken a batch, so
that a crash of either side repeats writes, which are upserts under ids that derive from the records.
"""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from sqlalchemy import Row

from activities.services.database import Database
from activities.services.index_rows import (
    NUMBERS,
    STORE,
    behind,
    beyond,
    changed_since,
    move,
    positions,
    rows_of,
    start_over,
)
from activities.services.leases import Leases
from activities.services.vectors import ALWAYS, LITTLE, Near, Vector, When, unit_vector
from models.canonical import derived_id, sha256
from models.errors import LedgerConflict, MemoryUnavailable
from models.memory import WeaviateSettings

with warnings.catch_warnings():
    # It warns about its own dependencies when it is imported.
    warnings.simplefilter("ignore")
    import weaviate
    from weaviate.classes.config import Configure, DataType, Property, Tokenization, VectorDistances
    from weaviate.classes.data import DataObject
    from weaviate.classes.init import AdditionalConfig, Auth, Timeout
    from weaviate.classes.query import Filter, MetadataQuery
    from weaviate.exceptions import WeaviateBaseError

BATCH = 500
LEASE_SECONDS = 30
TEXTS = ("record_id", "kind", "agent")


@dataclass(frozen=True, slots=True)
class Gap:
    """Where the index and SQL disagree about one tenant: record ids."""

    missing: tuple[str, ...] = ()
    """No search finds them, whether the object is there or not."""
    surplus: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether they disagree at all."""
        return bool(self.missing or self.surplus or self.changed)


@asynccontextmanager
async def connected(settings: WeaviateSettings) -> AsyncGenerator[weaviate.WeaviateAsyncClient]:
    """A client for as long as the block lasts; Weaviate need not be there yet."""
    key = settings.api_key.get_secret_value() if settings.api_key else None
    client = weaviate.use_async_with_custom(
        http_host=settings.host,
        http_port=settings.port,
        http_secure=settings.secure,
        grpc_host=settings.grpc_host or settings.host,
        grpc_port=settings.grpc_port,
        grpc_secure=settings.secure,
        auth_credentials=Auth.api_key(key) if key else None,
        additional_config=AdditionalConfig(timeout=Timeout(init=15, query=30, insert=90)),
        skip_init_checks=True,
    )
    try:
        yield client
    finally:
        await client.close()


class WeaviateVectors:
    """Search by meaning in Weaviate: one collection per model, one Weaviate tenant per tenant."""

    def __init__(
        self, database: Database, client: weaviate.WeaviateAsyncClient, leases: Leases, dimensions: int
    ) -> None:
        """Ask nothing yet."""
        self._database = database
        self._client = client
        self._leases = leases
        self._dimensions = dimensions
        self._ready: set[str] = set()
        self._lost = False
        self._following = asyncio.Lock()

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
        """The records with the highest cosine, as far as the index has followed SQL.

        Raises:
            InvalidInput: the query is no unit vector of the right size.
            MemoryUnavailable: Weaviate is away.
        """
        checked, mine = unit_vector(query, self._dimensions), shard_name(tenant)
        async with self._asking():
            # First of all, for where the index is not there any more there is everything to follow again.
            collection = await self._of(model)
        await self.follow(model)
        async with self._asking():
            if not await collection.tenants.exists(mine):
                return await self._nothing(tenant, model)
            answer = await collection.with_tenant(mine).query.near_vector(
                near_vector=checked.tolist(),
                limit=limit,
                filters=_filters(kinds, when),
                return_metadata=MetadataQuery(distance=True),
                return_properties=["record_id", "recorded_at"],
            )
        found = [(1 - float(one.metadata.distance or 0.0), one.properties) for one in answer.objects]
        found.sort(key=lambda one: (-one[0], -int(one[1]["recorded_at"]), str(one[1]["record_id"])))
        return [Near(str(properties["record_id"]), cosine) for cosine, properties in found]

    async def follow(self, model: str) -> int:
        """Take over what SQL has beyond the cursor, unless another process is at it; how many changes.

        Raises:
            MemoryUnavailable: Weaviate is away or refused part of a batch; the cursor stays before it.
        """
        async with self._following:
            if not await self._database.read(lambda link: beyond(link, model, 1)):
                return 0
            name, lasting = f"index:{STORE}:{model}", timedelta(seconds=LEASE_SECONDS)
            done = 0
            while (epoch := await self._leases.take(name, lasting)) is not None:
                rows = await self._database.read(lambda link: beyond(link, model, BATCH))
                if not rows:
                    await self._leases.give_back(name, epoch)
                    break
                await self._write(model, rows)
                try:
                    await self._database.write(lambda link, e=epoch, r=rows: move(link, model, r, name, e))
                except LedgerConflict:
                    await self._set_right(model, rows)
                    break
                done += len(rows)
            return done

    async def _set_right(self, model: str, rows: Sequence[Row[Any]]) -> None:
        """Whoever took over may have removed what was written again here, behind their back."""
        while rows := await self._database.read(lambda link, r=rows: changed_since(link, model, r)):
            await self._write(model, rows)

    async def behind(self, model: str) -> int:
        """How many changes the index has not followed yet."""
        return await self._database.read(lambda link: behind(link, model))

    async def diff(self, tenant: str, model: str) -> Gap:
        """Compare every record of a tenant with SQL, and ask whether a search finds it.

        Raises:
            MemoryUnavailable: Weaviate is away.
        """
        wanted = await self._database.read(lambda link: positions(link, tenant, model))
        there = await self._there(tenant, model)
        found = await self._found(tenant, model, sorted(there.values()))
        both = wanted.keys() & there.keys()
        return Gap(
            missing=tuple(sorted(wanted.keys() - (there.keys() & found))),
            surplus=tuple(sorted(there.keys() - wanted.keys())),
            changed=tuple(sorted(one for one in both if wanted[one] != there[one])),
        )

    async def repair(self, tenant: str, model: str) -> Gap:
        """Make the index of a tenant what SQL says; what had differed.

        Raises:
            MemoryUnavailable: Weaviate is away.
        """
        await self.follow(model)
        gap = await self.diff(tenant, model)
        if gap:
            wanted = (*gap.missing, *gap.changed)
            for start in range(0, len(wanted), BATCH):
                ids = wanted[start : start + BATCH]
                rows = await self._database.read(lambda link, i=ids: rows_of(link, tenant, model, i))
                await self._write(model, rows)
            await self.delete(tenant, model, gap.surplus)
        return gap

    async def rebuild(self, model: str) -> int:
        """Drop the collection of a model and fill it anew from SQL; how many changes that took.

        Raises:
            MemoryUnavailable: Weaviate is away.
        """
        async with self._following, self._asking():
            await self._connect()
            await self._client.collections.delete(collection_name(model))
            self._ready.discard(model)
            await self._of(model)
        return await self.follow(model)

    async def delete(self, tenant: str, model: str, record_ids: Iterable[str]) -> None:
        """Remove records of a tenant from the index, waking the tenant if it sleeps.

        Raises:
            MemoryUnavailable: Weaviate is away or did not remove all of them.
        """
        ids, shard = list(record_ids), shard_name(tenant)
        async with self._asking():
            collection = await self._of(model)
            if not ids or not await collection.tenants.exists(shard):
                return
            await collection.tenants.activate(shard)
            mine = collection.with_tenant(shard)
            for start in range(0, len(ids), BATCH):
                part = [_object_id(tenant, one) for one in ids[start : start + BATCH]]
                answer = await mine.data.delete_many(where=Filter.by_id().contains_any(part))
                if answer.failed:
                    raise MemoryUnavailable(
                        f"weaviate kept {answer.failed} of {len(part)} records; try again"
                    )

    async def held(self, tenant: str, model: str, record_ids: Iterable[str]) -> int:
        """How many of these records the index still holds.

        Raises:
            MemoryUnavailable: Weaviate is away.
        """
        there = await self._there(tenant, model)
        return sum(one in there for one in record_ids)

    async def _nothing(self, tenant: str, model: str) -> list[Near]:
        """What a tenant finds that Weaviate does not know."""
        if await self._database.read(lambda link: positions(link, tenant, model)):
            raise MemoryUnavailable("weaviate: it holds nothing of a tenant that has records; rebuild it")
        return []

    async def _write(self, model: str, rows: Sequence[Row[Any]]) -> None:
        full: dict[str, list[Row[Any]]] = defaultdict(list)
        gone: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if row.vector:
                full[row.tenant].append(row)
            else:
                gone[row.tenant].append(row.record_id)
        for tenant, these in full.items():
            await self._upsert(model, tenant, these)
        for tenant, ids in gone.items():
            await self.delete(tenant, model, ids)

    async def _upsert(self, model: str, tenant: str, rows: Sequence[Row[Any]]) -> None:
        # An object that came to the disk without its vector, in a crash, is skipped when it comes again.
        await self.delete(tenant, model, [row.record_id for row in rows])
        async with self._asking():
            collection = (await self._of(model)).with_tenant(shard_name(tenant))
            answer = await collection.data.insert_many([_object(row) for row in rows])
            # A batch that failed in part raises nothing.
            if answer.has_errors:
                first = next(iter(answer.errors.values())).message
                raise MemoryUnavailable(
                    f"weaviate refused {len(answer.errors)} of {len(rows)}: {first[:200]}"
                )
            await _settle(collection, _object_id(tenant, rows[-1].record_id))

    async def _found(self, tenant: str, model: str, at: Sequence[int]) -> set[str]:
        """Which records a search finds; a filter that leaves few has every vector in the index compared."""
        found: set[str] = set()
        async with self._asking():
            collection = (await self._of(model)).with_tenant(shard_name(tenant))
            for start in range(0, len(at), BATCH):
                part = at[start : start + BATCH]
                answer = await collection.query.near_vector(
                    near_vector=[1.0, *[0.0] * (self._dimensions - 1)],
                    limit=len(part),
                    filters=Filter.by_property("position").greater_or_equal(part[0])
                    & Filter.by_property("position").less_or_equal(part[-1]),
                    return_properties=["record_id"],
                )
                found.update(str(one.properties["record_id"]) for one in answer.objects)
        return found

    async def _there(self, tenant: str, model: str) -> dict[str, int]:
        async with self._asking():
            collection, mine = await self._of(model), shard_name(tenant)
            if not await collection.tenants.exists(mine):
                return {}
            objects = collection.with_tenant(mine).iterator(return_properties=["record_id", "position"])
            return {
                str(one.properties["record_id"]): int(str(one.properties["position"]))
                async for one in objects
            }

    async def _of(self, model: str) -> Any:
        await self._connect()
        if model not in self._ready:
            if not await self._client.collections.exists(collection_name(model)):
                await self._create(model)
                # Whoever lost it, whatever was followed into it is lost too.
                await self._database.write(lambda link: start_over(link, model))
            self._ready.add(model)
        return self._client.collections.use(collection_name(model))

    async def _connect(self) -> None:
        if self._lost:
            # A channel that lost its server waits longer and longer before it looks again.
            await self._client.close()
            self._lost = False
        if not self._client.is_connected():
            await self._client.connect()
        # The client would try again for 15 seconds; who asks has words to fall back on meanwhile.
        if not await self._client.is_live():
            raise MemoryUnavailable("weaviate: it does not answer; records wait in SQL")

    @asynccontextmanager
    async def _asking(self) -> AsyncGenerator[None]:
        """Whatever its client raises means one thing to us."""
        try:
            yield
        except (WeaviateBaseError, OSError, MemoryUnavailable) as error:
            self._lost = True
            # It may come back without what was there.
            self._ready.clear()
            if isinstance(error, MemoryUnavailable):
                raise
            text = str(error).splitlines()[0][:200] if str(error) else ""
            raise MemoryUnavailable(
                f"weaviate: {type(error).__name__}: {text}; records wait in SQL"
            ) from None

    async def _create(self, model: str) -> None:
        texts = [
            Property(name=name, data_type=DataType.TEXT, tokenization=Tokenization.FIELD) for name in TEXTS
        ]
        numbers = [Property(name=name, data_type=DataType.INT, index_range_filters=True) for name in NUMBERS]
        index = Configure.VectorIndex.hnsw(distance_metric=VectorDistances.COSINE, ef=256)
        await self._client.collections.create(
            collection_name(model),
            description=f"Countersign memory under {model}",
            properties=[*texts, *numbers],
            multi_tenancy_config=Configure.multi_tenancy(
                enabled=True, auto_tenant_creation=True, auto_tenant_activation=True
            ),
            vector_config=Configure.Vectors.self_provided(vector_index_config=index),
        )


async def _settle(collection: Any, one: uuid.UUID) -> None:
    """Have Weaviate write out the vectors of the batch that it has just acknowledged.

    It flushes its index before the batch's vectors are in it (1.35.2, `objectsBatcher.Objects`), so that a
    crash would lose them while the objects stay. A deletion flushes too, even one that only pretends.
    """
    answer = await collection.data.delete_many(where=Filter.by_id().equal(one), dry_run=True)
    if answer.matches != 1:
        raise MemoryUnavailable("weaviate does not have what it has just acknowledged; try again")


def collection_name(model: str) -> str:
    """The collection that holds the vectors of a model."""
    return f"Memory_{sha256(model.encode())[:16]}"


def shard_name(tenant: str) -> str:
    """What a tenant is called in Weaviate, which takes no dots; no other tenant begins with a capital."""
    return tenant if "." not in tenant else f"T{sha256(tenant.encode())[:32]}"


def _object_id(tenant: str, record_id: str) -> uuid.UUID:
    return uuid.UUID(derived_id("weaviate", tenant, record_id))


def _object(row: Row[Any]) -> Any:
    values = {name: getattr(row, name) for name in (*TEXTS, *NUMBERS)}
    vector = np.frombuffer(row.vector, LITTLE).tolist()
    return DataObject(properties=values, vector=vector, uuid=_object_id(row.tenant, row.record_id))


def _filters(kinds: Sequence[str], when: When) -> Any:
    parts: list[Any] = [
        Filter.by_property("expires_at").greater_than(when.now),
        Filter.by_property("active_at").less_or_equal(when.at),
        Filter.by_property("valid_from").less_or_equal(when.at),
        Filter.by_property("valid_to").greater_than(when.at),
    ]
    if kinds:
        parts.append(Filter.by_property("kind").contains_any(list(kinds)))
    if when.agent is not None:
        parts.append(Filter.by_property("agent").contains_any(["", when.agent]))
    return Filter.all_of(parts)
