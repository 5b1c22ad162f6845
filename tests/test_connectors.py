"""One suite over every connector. A new one is a row: a name and a bench that opens it on a fresh target."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from activities.connectors.base import Connector, Work
from activities.connectors.git_site import GitSite
from activities.connectors.null import Null
from activities.services.git import Git
from activities.services.site_server import SiteServer
from models.errors import (
    ConnectorRejected,
    ConnectorUnavailable,
    InvalidInput,
    PreconditionLost,
    UnknownName,
)
from models.loop import Guarantee
from models.settings import SiteSettings

KEY = "ab" * 32 + ".0"
OTHER = "cd" * 32 + ".1"
UNDO = f"{KEY}.undo"


def now() -> datetime:
    return datetime.now(UTC)


def soon() -> datetime:
    return now() + timedelta(seconds=60)


def past() -> datetime:
    return now() - timedelta(seconds=1)


@dataclass(frozen=True)
class Bench:
    """A connector on a target of its own."""

    connector: Connector
    sample: Callable[[int], Work]
    """Work number n; different numbers do not disturb each other."""
    state: Callable[[], Awaitable[Any]]
    """All that stands at the target, comparable."""
    effects: Callable[[], Awaitable[int]]
    """How often something was done there."""
    disturb: Callable[[], Awaitable[None]]
    """Changes what sample 0 reads, from outside."""
    refused: tuple[tuple[str, object], ...]
    """Arguments, by field, that must be refused."""


@dataclass(frozen=True)
class Row:
    name: str
    open: Callable[[Path], AbstractAsyncContextManager[Bench]]


@asynccontextmanager
async def git_site(folder: Path) -> AsyncIterator[Bench]:
    server = SiteServer(folder / "public")
    await server.start()
    site = SiteSettings(
        name="blog",
        repository=Path("site.git"),
        build=Path("public"),
        address=f"http://127.0.0.1:{server.port}",
    )
    git = Git(folder / "site.git", now)
    ref = "refs/heads/main"

    async def state() -> object:
        head = await git.head(ref) if git.repository.exists() else None
        return await git.entries(head) if head else None

    async def effects() -> int:
        head = await git.head(ref) if git.repository.exists() else None
        return int(await git.run("rev-list", "--count", head)) - 1 if head else 0

    async def disturb() -> None:
        head = await git.head(ref)
        assert head
        text = await git.store(b"# written by somebody else\n")
        commit = await git.commit(head, {"content/posts/post-0.md": text}, "By hand\n", now())
        assert await git.swap(ref, commit, head)

    def sample(number: int) -> Work:
        return Work(
            "publish",
            {
                "slug": f"post-{number}",
                "title": f"Post {number}",
                "description": "About it",
                "tags": ["one", "two"],
                "date": "2026-01-31T09:00:00Z",
                "draft": False,
                "body": f"Text of post {number}.\n",
            },
        )

    refused: tuple[tuple[str, object], ...] = (
        ("slug", "../../etc/passwd"),
        ("slug", "a\0b"),
        ("slug", "a--b"),
        ("slug", "line\n"),
        ("slug", "index"),
        ("slug", "x" * 81),
        ("title", "two\nlines"),
        ("title", " "),
        ("title", "lone \ud800 surrogate"),
        ("description", "\x1b[2J"),
        ("tags", ["../up"]),
        ("date", "2026-01-31T09:00:00"),
        ("date", "yesterday"),
        ("draft", "perhaps"),
        ("body", "{{< include secret >}}"),
        ("body", ""),
        ("body", "nul \0"),
        ("layout", "evil"),
    )
    async with httpx.AsyncClient() as client:
        connector = GitSite(site, folder, client, now, engine="plain")
        yield Bench(connector, sample, state, effects, disturb, refused)
    await server.close()


@asynccontextmanager
async def null(folder: Path) -> AsyncIterator[Bench]:
    connector = Null(folder / "null", now)

    async def state() -> object:
        return connector.standing()

    async def effects() -> int:
        return len(list((folder / "null" / "notes").iterdir()))

    async def disturb() -> None:
        (folder / "null" / "targets" / "thing-0").write_text("changed")

    def sample(number: int) -> Work:
        return Work("note", {"text": f"note {number}", "target": f"thing-{number}"})

    refused: tuple[tuple[str, object], ...] = (
        ("text", ""),
        ("target", "../up"),
        ("fail", "sometimes"),
        ("surplus", 1),
    )
    yield Bench(connector, sample, state, effects, disturb, refused)


ROWS = (Row("git_site", git_site), Row("null", null))


@pytest.fixture(params=ROWS, ids=lambda row: row.name)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    async with request.param.open(tmp_path) as opened:
        yield opened


async def version(bench: Bench, work: Work) -> str:
    return (await bench.connector.plan(work)).version


async def test_plan_has_no_effect_and_names_version_diff_and_undo(bench: Bench):
    await bench.connector.plan(bench.sample(1))
    before = await bench.state()
    dry = await bench.connector.plan(bench.sample(0))
    assert await bench.state() == before
    assert await bench.effects() == 0
    assert dry.diff and dry.undo and dry.version
    assert len(dry.target) <= 300 and len(dry.undo) <= 300 and len(dry.version) <= 200
    assert (await bench.connector.plan(bench.sample(0))) == dry


async def test_a_key_is_found_only_after_it_was_applied(bench: Bench):
    work = bench.sample(0)
    assert await bench.connector.find(KEY, work) is None
    applied = await bench.connector.apply(KEY, work, await version(bench, work), soon())
    found = await bench.connector.find(KEY, work)
    assert found is not None
    assert (found.reference, found.version) == (applied.reference, applied.version)
    assert await bench.connector.find(KEY[:-1], work) is None
    assert await bench.connector.find(OTHER, work) is None


async def test_applying_a_key_twice_has_one_effect(bench: Bench):
    work = bench.sample(0)
    expected = await version(bench, work)
    first = await bench.connector.apply(KEY, work, expected, soon())
    second = await bench.connector.apply(KEY, work, expected, soon())
    assert (second.reference, second.version) == (first.reference, first.version)
    assert await bench.effects() == 1


async def test_the_receipts_version_is_what_a_next_plan_finds(bench: Bench):
    work = bench.sample(0)
    applied = await bench.connector.apply(KEY, work, await version(bench, work), soon())
    assert await version(bench, work) == applied.version


async def test_what_was_applied_is_verified_as_a_reader_sees_it(bench: Bench):
    work = bench.sample(0)
    applied = await bench.connector.apply(KEY, work, await version(bench, work), soon())
    seen = await bench.connector.verify(work, applied)
    assert (seen.reference, seen.version) == (applied.reference, applied.version)
    assert seen.detail


async def test_drift_is_detected_and_sends_nothing(bench: Bench):
    work = bench.sample(0)
    expected = await version(bench, work)
    await bench.disturb()
    before = await bench.state()
    assert await version(bench, work) != expected
    with pytest.raises(PreconditionLost, match="changed"):
        await bench.connector.apply(KEY, work, expected, soon())
    assert await bench.state() == before
    assert await bench.connector.find(KEY, work) is None


async def test_drift_after_the_effect_does_not_hide_the_effect(bench: Bench):
    work = bench.sample(0)
    expected = await version(bench, work)
    applied = await bench.connector.apply(KEY, work, expected, soon())
    await bench.disturb()
    again = await bench.connector.apply(KEY, work, expected, soon())
    assert again.reference == applied.reference


async def test_other_pending_work_is_not_disturbed(bench: Bench):
    works = [bench.sample(number) for number in range(3)]
    versions = [await version(bench, work) for work in works]
    for number, work in enumerate(works):
        await bench.connector.apply(f"{KEY}{number}", work, versions[number], soon())
    assert await bench.effects() == 3


async def test_an_expired_deadline_sends_nothing(bench: Bench):
    work = bench.sample(0)
    expected = await version(bench, work)
    before = await bench.state()
    with pytest.raises(ConnectorUnavailable, match="deadline"):
        await bench.connector.apply(KEY, work, expected, past())
    assert await bench.state() == before
    assert await bench.connector.find(KEY, work) is None


async def test_undo_restores_what_stood_before_once_per_key(bench: Bench):
    work = bench.sample(0)
    expected = await version(bench, work)
    before = await bench.state()
    applied = await bench.connector.apply(KEY, work, expected, soon())
    assert await bench.state() != before
    undone = await bench.connector.undo(UNDO, work, applied, soon())
    assert await bench.state() == before
    assert undone.version == expected
    effects = await bench.effects()
    again = await bench.connector.undo(UNDO, work, applied, soon())
    assert again.reference == undone.reference
    assert await bench.effects() == effects


async def test_undo_may_carry_the_actions_own_key(bench: Bench):
    work = bench.sample(0)
    before = await bench.state() if await version(bench, work) else None
    applied = await bench.connector.apply(KEY, work, await version(bench, work), soon())
    await bench.connector.undo(KEY, work, applied, soon())
    await bench.connector.undo(KEY, work, applied, soon())
    assert await bench.state() == before
    found = await bench.connector.find(KEY, work)
    assert found is not None and found.reference == applied.reference


async def test_undo_is_refused_when_somebody_changed_it_since(bench: Bench):
    work = bench.sample(0)
    applied = await bench.connector.apply(KEY, work, await version(bench, work), soon())
    await bench.disturb()
    before = await bench.state()
    with pytest.raises(ConnectorRejected, match="changed"):
        await bench.connector.undo(UNDO, work, applied, soon())
    assert await bench.state() == before


async def test_an_expired_deadline_undoes_nothing(bench: Bench):
    work = bench.sample(0)
    applied = await bench.connector.apply(KEY, work, await version(bench, work), soon())
    before = await bench.state()
    with pytest.raises(ConnectorUnavailable, match="deadline"):
        await bench.connector.undo(UNDO, work, applied, past())
    assert await bench.state() == before


async def test_bad_arguments_are_refused_by_field_and_remedy(bench: Bench):
    good = bench.sample(0)
    for field, value in bench.refused:
        with pytest.raises(InvalidInput, match=rf"^InvalidInput: {field}\b.* is not accepted; \w"):
            await bench.connector.plan(Work(good.operation, {**good.arguments, field: value}))
    for field in ("title", "slug", "date", "body", "text"):
        if field in good.arguments:
            short = {name: value for name, value in good.arguments.items() if name != field}
            with pytest.raises(InvalidInput, match=rf"^InvalidInput: {field}: .*required"):
                await bench.connector.apply(KEY, Work(good.operation, short), "0", soon())
    assert await bench.effects() == 0


async def test_an_unknown_operation_is_refused(bench: Bench):
    with pytest.raises(UnknownName, match="operation: 'explode' .* known: "):
        await bench.connector.plan(Work("explode", {}))


@pytest.mark.parametrize("key", ["", "a b", "../up", "line\nCountersign-Action: other", "x" * 201])
async def test_a_key_that_could_break_out_is_refused(bench: Bench, key: str):
    work = bench.sample(0)
    with pytest.raises(InvalidInput, match="^InvalidInput: key: "):
        await bench.connector.apply(key, work, await version(bench, work), soon())
    assert await bench.effects() == 0


async def test_concurrent_different_keys_all_land(bench: Bench):
    works = [bench.sample(number) for number in range(4)]
    versions = [await version(bench, work) for work in works]
    applied = await asyncio.gather(
        *(
            bench.connector.apply(f"{KEY}{number}", work, versions[number], soon())
            for number, work in enumerate(works)
        )
    )
    assert len({one.reference for one in applied}) == 4
    assert await bench.effects() == 4


async def test_concurrent_uses_of_one_key_land_once(bench: Bench):
    work = bench.sample(0)
    expected = await version(bench, work)
    applied = await asyncio.gather(*(bench.connector.apply(KEY, work, expected, soon()) for _ in range(4)))
    assert len({one.reference for one in applied}) == 1
    assert await bench.effects() == 1


async def test_it_says_what_its_target_guarantees(bench: Bench):
    assert isinstance(bench.connector.guarantee, Guarantee)
    assert bench.connector.settle >= timedelta(0)
    assert bench.connector.name


@pytest.mark.parametrize(
    ("fail", "error"), [("unavailable", ConnectorUnavailable), ("rejected", ConnectorRejected)]
)
async def test_null_fails_as_it_was_told_and_keeps_nothing(tmp_path: Path, fail: str, error: type[Exception]):
    target = Null(tmp_path, now)
    work = Work("note", {"text": "x", "fail": fail})
    dry = await target.plan(work)
    assert dry.version == "0"
    with pytest.raises(error):
        await target.apply(KEY, work, dry.version, soon())
    assert target.standing() == ()


async def test_null_shares_its_notes_with_another_process(tmp_path: Path):
    first, second = Null(tmp_path, now), Null(tmp_path, now, fsync=True)
    work = Work("note", {"text": "x"})
    applied = await first.apply(KEY, work, "0", soon())
    assert (await second.apply(KEY, work, "0", soon())).reference == applied.reference
    assert second.standing() == (KEY,)


async def test_null_counts_a_note_whose_writer_was_killed_half_way(tmp_path: Path):
    target = Null(tmp_path, now)
    (tmp_path / "notes" / KEY).touch()
    found = await target.find(KEY, Work("note", {"text": "x"}))
    assert found is not None and found.reference == KEY
