"""What is gone was ordered to go: by both verifiers, in the database and in an export."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, text, update

from activities.services.checkpoints import Checkpoints, load_key
from activities.services.content import BLOB, guard, put_blob
from activities.services.database import Database, to_micros
from activities.services.erasure import Erasure
from activities.services.keeping import take
from activities.services.ledger_export import of_database, of_lines, to_lines
from activities.services.ledger_store import add_in
from activities.services.regions import Home, bind
from activities.services.vault import KEY, Keys
from activities.services.verifier import Report, Verifier, check_database
from models.errors import KeyMissing
from models.ledger import Draft, EventType
from models.loop import Ref
from models.memory import Cause, Kept, Memo
from scripts import verify_ledger
from tests.databases import migrated
from tests.ledgers import NOW, TENANT, fill

ORIGIN = f"countersign/{TENANT}"
ANN = "ann@example.test"


class Place:
    """A signed log of a run that rests on a text about Ann, and of two others."""

    def __init__(self, folder: Path, sealed: bool) -> None:
        url = migrated(f"sqlite:///{folder / 'ledger.db'}")
        self.folder, self.sealed = folder, sealed
        self.database = guard(Database(url), Keys("k1", {"k1": b"k" * 32}) if sealed else None)
        self.checkpoints = Checkpoints(self.database, load_key(folder), "countersign")
        self.digest = ""

    async def fill(self) -> None:
        def work(link: Connection) -> None:
            ref = put_blob(link, TENANT, b"Ann lives in Zanzibar", "text/plain", subject=ANN)
            self.digest = ref.digest
            add_in(link, TENANT, draft("told", EventType.REQUEST, {"body": ref.model_dump(mode="json")}), NOW)
            memo = Memo(
                tenant=TENANT, kind="fact", title="Ann", text=ref, source="told", subject=ANN, event="told"
            )
            take(link, memo, NOW, Cause())

        await self.database.write(work)
        await fill(self.database, 2)

    async def sign(self) -> None:
        await self.checkpoints.write(TENANT)

    def ours(self) -> Report:
        with self.database.engine.connect() as link:
            return check_database(link, TENANT, ORIGIN, [self.checkpoints.key(TENANT)], [])

    def lines(self) -> list[str]:
        with self.database.engine.connect() as link:
            return list(to_lines(of_database(link, TENANT, ORIGIN)))

    def exported(self) -> tuple[Report, int, dict[str, Any]]:
        """An export, read by our verifier and by the one that is one file."""
        key = self.checkpoints.key(TENANT)
        file = self.folder / "export"
        file.write_text("".join(f"{line}\n" for line in self.lines()), "utf-8", newline="\n")
        code, said = verify_ledger.check_export(str(file), [verify_ledger.Key(str(key))], [])
        return Verifier([key]).check(of_lines(self.lines())), code, said


def draft(name: str, kind: EventType, body: dict[str, Any], stream: str = "about") -> Draft:
    return Draft(
        event_id=name,
        stream=stream,
        type=kind,
        actor_kind="person",
        actor_ref="dpo",
        correlation_id=stream,
        body=body,
    )


@pytest.fixture(params=[False, True], ids=["clear", "sealed"])
async def place(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    made = Place(tmp_path, request.param)
    await made.fill()
    yield made
    made.database.close()


async def judged(place: Place) -> tuple[set[int], str]:
    """Exit codes of all three checks, and what they say first."""
    await place.sign()
    ours, (ours_of_export, code, said) = place.ours(), place.exported()
    told = [*(one.what for one in ours.findings), *said["findings"]]
    assert [one.seq for one in ours.findings[:1]] == [said["first_bad_event"]] * bool(ours.findings)
    return {ours.exit_code, ours_of_export.exit_code, code}, "; ".join(told)


async def test_what_was_erased_on_an_order_leaves_a_sound_log(place: Place) -> None:
    assert await judged(place) == ({0}, "")
    await Erasure(place.database, lambda: NOW).forget(TENANT, ANN, by="dpo")
    gone = [json.loads(line) for line in place.lines() if line.startswith('{"at"')]
    assert place.digest in [one["gone"] for one in gone]
    assert await judged(place) == ({0}, "")


Work = Callable[[Connection, Place], None]


def _blob(link: Connection, place: Place) -> None:
    link.execute(delete(BLOB).where(BLOB.c.digest == place.digest))


def _intent(link: Connection, place: Place) -> None:
    link.execute(delete(BLOB).where(BLOB.c.media_type == "application/json"))


def _receipt(link: Connection, place: Place) -> None:
    add_in(link, TENANT, draft("r", EventType.ERASURE, {"order": "none"}, "erasure/ann"), NOW)


def _order(name: str, **body: Any) -> Work:
    def work(link: Connection, place: Place) -> None:
        named = {"payloads": [place.digest], "subject": "ann"} | body
        add_in(link, TENANT, draft(name, EventType.ERASURE_ORDER, named, "erasure/ann"), NOW)

    return work


def _answer(order: str, stream: str = "erasure/ann") -> Work:
    def work(link: Connection, place: Place) -> None:
        add_in(link, TENANT, draft(f"r-{order}", EventType.ERASURE, {"order": order}, stream), NOW)

    return work


def _again(link: Connection, place: Place) -> None:
    add_in(link, TENANT, draft("second", EventType.ERASURE, {"order": "o"}, "erasure/ann"), NOW)


@pytest.mark.parametrize(
    ("works", "what"),
    [
        ((_blob,), "nobody"),
        ((_intent,), "nobody"),
        ((_receipt,), "no order"),
        ((_order("o", payloads=["f" * 64]), _blob), "nobody"),
        ((_answer("o"), _order("o"), _blob), "no order"),
        ((_order("o"), _blob, _answer("o", "erasure/bob")), "no order"),
        ((_order("o"), _blob, _answer("o"), _again), "no order"),
    ],
    ids=["payload", "intent", "receipt", "other payload", "order after", "other subject", "answered twice"],
)
async def test_what_is_gone_without_an_order_is_found(
    place: Place, works: tuple[Work, ...], what: str
) -> None:
    for work in works:
        await place.database.write(lambda link, work=work: work(link, place))
    codes, said = await judged(place)
    assert codes == {1} and what in said


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE blob SET data = x'' WHERE digest = :digest",
        "UPDATE blob SET data = x'00112233445566778899aabbccddeeff001122334455667788' WHERE digest = :digest",
        "UPDATE blob SET sealed_by = 'nobody' WHERE digest = :digest",
        "UPDATE blob SET sealed_by = NULL, data = x'00' WHERE digest = :digest",
        "DELETE FROM subject_key WHERE subject_key_id = (SELECT sealed_by FROM blob WHERE digest = :digest)",
        "UPDATE subject_key SET wrapped = x'' "
        "WHERE subject_key_id = (SELECT sealed_by FROM blob WHERE digest = :digest)",
    ],
    ids=["emptied", "changed", "under no key", "in clear", "key gone", "key emptied"],
)
async def test_a_payload_that_nobody_can_read_any_more_is_found_as_gone(place: Place, change: str) -> None:
    def work(link: Connection) -> None:
        link.execute(text(change), {"digest": place.digest})

    await place.database.write(work)
    if "nobody" in change and not place.sealed:
        with pytest.raises(KeyMissing, match="encryption.enabled"):
            await judged(place)
        return
    codes, said = await judged(place)
    if "subject_key" in change and not place.sealed:
        assert codes == {0}
    else:
        assert codes == {1} and f"{place.digest} is gone, and nobody" in said


async def test_an_order_and_its_receipt_in_their_order_are_sound(place: Place) -> None:
    for work in (_order("o"), _blob, _answer("o")):
        await place.database.write(lambda link, work=work: work(link, place))
    assert await judged(place) == ({0}, "")


@pytest.mark.parametrize("micros", [None, -1, 0])
async def test_a_key_is_destroyed_on_an_order_and_not_before(tmp_path: Path, micros: int | None) -> None:
    place = Place(tmp_path, sealed=True)
    await place.fill()

    def work(link: Connection) -> None:
        mine = KEY.c.subject_key_id != "tenant"
        key = link.execute(KEY.select().where(mine)).one().subject_key_id
        if micros is not None:
            _order("o", payloads=[], key=key)(link, place)
        when = to_micros(NOW) + (micros or 0)
        link.execute(update(KEY).where(mine).values(wrapped=b"", destroyed_at=when))

    await place.database.write(work)
    codes, said = await judged(place)
    assert codes == ({0} if micros == 0 else {1}), said
    place.database.close()


async def test_a_region_s_process_erases_what_the_region_holds(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("centre", "eu")]
    for url in urls:
        migrated(url)
    home = guard(Database(urls[1]), Keys("eu1", {"eu1": b"e" * 32}))
    centre = bind(Database(urls[0]), Home("eu", home))

    def told(link: Connection) -> Ref:
        ref = put_blob(link, TENANT, b"Ann lives in Zanzibar", "text/plain", subject=ANN)
        add_in(link, TENANT, draft("told", EventType.REQUEST, {"body": ref.model_dump(mode="json")}), NOW)
        return ref

    ref = await centre.write(told)
    memo = Memo(tenant=TENANT, kind="fact", title="Zanzibar", text=ref, source="told", subject=ANN)
    assert (await home.write(lambda link: take(link, memo, NOW, Cause()))).what is Kept.KEPT
    checkpoints = Checkpoints(centre, load_key(tmp_path), "countersign")
    key = checkpoints.key(TENANT)
    receipt = await Erasure(centre, lambda: NOW).forget(TENANT, ANN, by="dpo")
    assert receipt.removed["records"] == receipt.removed["texts"] == 1
    await checkpoints.write(TENANT)
    report = await centre.read(lambda link: check_database(link, TENANT, key.name, [key], []))
    assert (report.status, report.findings) == ("sound", ())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files if b"zanzibar" in path.read_bytes().lower()] == []
    for one in (centre, home):
        one.close()


@given(st.lists(st.sampled_from(("order", "order other", "erase", "receipt", "receipt other")), max_size=6))
@settings(max_examples=12, deadline=None)
def test_both_verifiers_agree_on_any_story_of_erasures(story: list[str]) -> None:
    async def run(folder: Path) -> tuple[set[int], bool]:
        place = Place(folder, sealed=False)
        await place.fill()
        steps: dict[str, Work] = {
            "order": _order("o"),
            "order other": _order("p", payloads=["f" * 64]),
            "erase": _blob,
            "receipt": _answer("o"),
            "receipt other": _answer("p"),
        }
        for name in story:
            await place.database.write(lambda link, name=name: steps[name](link, place))
        codes, _ = await judged(place)
        await asyncio.to_thread(place.database.close)
        return codes, _is_right(story)

    with tempfile.TemporaryDirectory() as folder:
        codes, right = asyncio.run(run(Path(folder)))
    assert codes == ({0} if right else {1})


def _is_right(story: list[str]) -> bool:
    """What the rule says: no erasure without its order, no receipt before its own."""
    first = {name: story.index(name) for name in reversed(story)}
    ordered = "erase" not in first or "order" in first
    pairs = (("receipt", "order"), ("receipt other", "order other"))
    # An event stands once, however often it is written.
    return ordered and all(first.get(order, 99) < first[one] for one, order in pairs if one in first)
