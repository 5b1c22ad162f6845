"""A subject's marked datum is put everywhere, forgotten by the command line, and looked for everywhere."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from activities.services import cache
from activities.services.beliefs import Beliefs
from activities.services.checkpoints import Checkpoints, load_key
from activities.services.content import ContentStore, guard, put_blob
from activities.services.database import Database
from activities.services.erasure import Erasure
from activities.services.ledger_store import LedgerStore
from activities.services.memory_store import MemoryStore
from activities.services.notices import Noticing, Terminal
from activities.services.short_term import Key, ShortTerm
from activities.services.vault import load_keys
from activities.services.vectors import ExactVectors
from models.beliefs import Change
from models.errors import InvalidInput, MemoryUnavailable
from models.inference import Answered, DataClass, Message, Prompt
from models.ledger import Draft, EventType
from models.loop import GateRule, Ref, Reversibility
from models.memory import Kept, Memo, Recall, Search
from models.notices import NoticeOrder
from models.settings import EncryptionSettings, Settings
from scripts import verify_ledger
from scripts.cli import app
from tests.databases import migrated
from tests.ledgers import TENANT, fill, intent_of
from tests.test_erasure import Hashed
from workers import config

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ANN = "customer-ann"
MARK = "Zwiebelkuchen4711"
SAID = f"{MARK} is what Ann said"


def shapes(mark: str) -> list[bytes]:
    """A mark as it may stand somewhere: raw, in JSON, and in Base64 at each of its three alignments."""
    found = [mark.encode(), mark.lower().encode(), json.dumps(mark)[1:-1].encode(), mark.encode("utf-16-le")]
    for before in range(3):
        whole = base64.b64encode(b"-" * before + mark.encode() + b"--")
        # The letters at either end depend on what stands beside the mark.
        found.append(whole[4 if before else 0 : -4])
    return found


def hits(mark: str, *texts: bytes) -> int:
    """How often it stands there; case does not matter, as the index of words knows none."""
    return sum(
        text.count(shape) + text.lower().count(shape.lower()) for text in texts for shape in shapes(mark)
    )


class Place:
    """Everything that can hold something about somebody, in one data folder."""

    def __init__(self, folder: Path, sealed: bool) -> None:
        encryption = EncryptionSettings(enabled=sealed)
        self.settings = Settings(data=folder, embeddings=None, approver="dpo", encryption=encryption)
        migrated(self.settings.database_url)
        self.folder = folder
        self.database = guard(Database(self.settings.database_url), load_keys(encryption, folder))
        self.content = ContentStore(self.database)
        vectors = ExactVectors(self.database, 8)
        self.memory = MemoryStore(self.database, self.content, Hashed(), vectors, lambda: NOW)
        self.short = ShortTerm(10, timedelta(hours=1), lambda: NOW)
        self.checkpoints = Checkpoints(self.database, load_key(folder), "countersign")

    async def fill(self) -> None:
        """The mark by every path, beside others' data and whole runs."""
        await fill(self.database, 2)
        await self.remember()
        await self.log()
        await self.answer()
        await self.notify()
        await self.recall()

    async def remember(self) -> None:
        for subject, text in ((ANN, SAID), ("customer-bob", "likes tea")):
            ref = await self.content.put(TENANT, text.encode(), subject=subject)
            memo = Memo(
                tenant=TENANT,
                kind="preference",
                title=f"Title: {text}",
                text=ref,
                source="event",
                subject=subject,
                why=f"since {text}",
                links=(f"https://example.test/{text.split()[0]}",),
            )
            await self.memory.keep(memo, NOW)
        change = Change(tenant=TENANT, agent="support", subject=ANN, event="e1", sets={"said": SAID})
        await Beliefs(self.database, lambda: NOW).change(change)
        while await self.memory.index_pending():
            pass

        async def told() -> str:
            return SAID

        await self.short.get(Key(TENANT, ANN, 1, "what"), told)

    async def log(self) -> None:
        """A request and a comment, whose texts the ledger names."""
        bodies: dict[str, Ref] = {
            "body": await self.content.put(TENANT, f"body: {SAID}".encode(), subject=ANN, plainly=True),
            "comment": await self.content.put(TENANT, f"comment: {SAID}".encode(), subject=ANN),
        }
        draft = Draft(
            event_id="asked",
            stream="run-ann",
            type=EventType.REQUEST,
            actor_kind="system",
            actor_ref="intake",
            correlation_id="run-ann",
            body={name: ref.model_dump(mode="json") for name, ref in bodies.items()},
        )
        await LedgerStore(self.database, lambda: NOW).add(TENANT, draft)

    async def answer(self) -> None:
        """A model's answer, kept for identical calls."""
        scope = cache.Scope(
            tenant=TENANT,
            data_class=DataClass.PERSONAL,
            region=None,
            policy="p",
            tier="large",
            model="m",
            task="draft",
            subject=ANN,
        )
        key = cache.key_of(scope, Prompt(messages=(Message(role="user", content=SAID),)))
        text = await self.content.put(TENANT, f"answer: {SAID}".encode(), subject=ANN)
        made = Answered(text=text, tier="large", model="m", problems=(f"it lacks {MARK}",))
        until = NOW + timedelta(days=1)
        await self.database.write(lambda link: cache.put_in(link, key, made, "draft", until))

    async def notify(self) -> None:
        """An intent whose card speaks of it, told to a terminal."""

        def put(link: Any) -> str:
            intent, _ = intent_of(link, "run-ann", GateRule(), Reversibility.REVERSIBLE)
            card = put_blob(link, TENANT, f"card: {SAID}".encode(), "text/markdown", ANN, plainly=True)
            bound = intent.model_copy(update={"card_digest": card.digest})
            data = bound.model_dump_json().encode()
            return put_blob(link, TENANT, data, "application/json").digest, card.digest

        digest, card = await self.database.write(put)
        body = {"digest": digest, "number": 1, "card": card, "short_card": card}
        draft = Draft(
            event_id="put",
            stream="run-ann",
            type=EventType.INTENT,
            actor_kind="agent",
            actor_ref="external",
            correlation_id="run-ann",
            body=body,
        )
        await LedgerStore(self.database, lambda: NOW).add(TENANT, draft)
        terminal = Terminal(self.folder / "notices" / "desk")
        order = NoticeOrder(tenant=TENANT, workflow_id="run-ann", digest=digest, channel="desk", round=0)
        await Noticing(self.database, {"desk": terminal}, lambda: NOW).notify(order)

    async def recall(self) -> None:
        """An agent's searches, whose query is stored, and one at the command line, whose query is not."""
        query = await self.content.put(TENANT, f"query: {SAID}".encode(), subject=ANN)
        for by in Search:
            asked = Recall(tenant=TENANT, query=query, by=by, run="run-ann")
            found = await self.memory.recall(asked)
            assert any(MARK in hit.title for hit in found.hits), by
        ran = await asyncio.to_thread(self.run, "memory", "search", SAID, "--by", "words", "--json")
        assert MARK in json.loads(ran.stdout)["hits"][0]["title"]

    def run(self, *arguments: str) -> Any:
        kept = self.folder / "run" / "settings.json"
        kept.parent.mkdir(exist_ok=True)
        config.snapshot(self.settings, kept)
        return CliRunner().invoke(app, list(arguments), env={config.SNAPSHOT: str(kept)})

    def files(self) -> dict[str, bytes]:
        """Every file of the data folder: database, write-ahead log, shared memory, notices, witnesses."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


@pytest.fixture(params=[False, True], ids=["clear", "sealed"])
async def place(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    made = Place(tmp_path, request.param)
    await made.fill()
    yield made
    made.database.close()


async def test_nothing_of_a_forgotten_subject_is_found_anywhere_and_the_receipt_is_proved(
    place: Place, log: io.StringIO
) -> None:
    assert hits(MARK, *place.files().values()) > 0
    ran = await asyncio.to_thread(place.run, "memory", "forget", "--subject", ANN, "--yes", "--json")
    assert ran.exit_code == 0, ran.output
    receipt = json.loads(ran.stdout)
    assert receipt["removed"] == {
        **{"records": 1, "beliefs": 1, "texts": 6, "answers": 1, "cached": 0, "notices": 1}
    }
    assert set(receipt["left"].values()) == {0}
    place.short.drop(TENANT, ANN)
    written = await place.checkpoints.write(TENANT)
    assert written is not None
    out = place.folder / "export.jsonl"
    assert (await asyncio.to_thread(place.run, "ledger", "export", "--out", str(out))).exit_code == 0
    proof = await asyncio.to_thread(place.run, "ledger", "prove", receipt["event_id"])
    assert {name: hits(MARK, data) for name, data in place.files().items() if hits(MARK, data)} == {}
    assert hits(MARK, log.getvalue().encode(), ran.stdout.encode(), proof.stdout.encode()) == 0
    await proved(place, out, proof.stdout)


async def proved(place: Place, export: Path, proof: str) -> None:
    """The receipt's proof holds, and so does the whole ledger, by our verifier and by the one file."""
    keys = [verify_ledger.Key(str(place.checkpoints.key(TENANT)))]
    file = place.folder / "proof.json"
    file.write_text(proof)
    code, said = verify_ledger.check_proof(str(file), keys)
    assert (code, said["event"]["type"]) == (0, "erasure")
    assert verify_ledger.check_export(str(export), keys, [])[0] == 0
    for more in ((), ("--export", str(export), "--key", str(place.checkpoints.key(TENANT)))):
        verified = await asyncio.to_thread(place.run, "ledger", "verify", *more)
        assert verified.exit_code == 0, verified.output


async def test_with_encryption_on_no_table_had_it_in_clear_before(tmp_path: Path) -> None:
    place = Place(tmp_path, sealed=True)
    await place.fill()
    await asyncio.to_thread(lambda: place.database.engine.dispose())
    standing = set()
    with place.database.engine.connect() as link:
        names = link.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
        for name in names:
            rows = link.exec_driver_sql(f'SELECT * FROM "{name}"').all()
            cells = [str(cell).encode() if isinstance(cell, str) else cell for row in rows for cell in row]
            if hits(MARK, *(cell for cell in cells if isinstance(cell, bytes))):
                standing.add(name)
    assert standing == set()
    place.database.close()


async def test_a_run_that_ends_after_its_subject_was_erased_remembers_nothing(place: Place) -> None:
    ref = await place.content.put(TENANT, b"told late", subject=ANN)
    late = Memo(tenant=TENANT, kind="fact", title=SAID, text=ref, source="event", subject=ANN)
    await asyncio.to_thread(place.run, "memory", "forget", "--subject", ANN, "--yes")
    kept = await place.memory.take(late, NOW)
    assert (kept.what, kept.reason) == (Kept.JUNK, "its subject was erased")
    with pytest.raises(InvalidInput, match="no such content"):
        await place.memory.take(late.model_copy(update={"subject": "nobody"}), NOW)
    assert hits(MARK, *place.files().values()) == 0


async def test_others_keep_what_is_theirs(place: Place) -> None:
    await asyncio.to_thread(place.run, "memory", "forget", "--subject", ANN, "--yes")
    ran = await asyncio.to_thread(place.run, "memory", "search", "tea", "--by", "words", "--json")
    assert [hit["title"] for hit in json.loads(ran.stdout)["hits"]] == ["Title: likes tea"]


async def test_a_text_that_two_subjects_have_stays_with_the_other(tmp_path: Path) -> None:
    place = Place(tmp_path, sealed=False)
    for subject in (ANN, "customer-bob"):
        ref = await place.content.put(TENANT, b"the same words", subject=subject)
    await place.content.put(TENANT, b"only Ann's", subject=ANN)
    await Erasure(place.database, lambda: NOW).forget(TENANT, ANN, by="dpo")
    assert await place.content.text(TENANT, ref) == "the same words"
    place.database.close()


async def test_a_reader_of_an_old_state_keeps_the_receipt_back_until_it_is_gone(tmp_path: Path) -> None:
    place = Place(tmp_path, sealed=False)
    await place.remember()
    erasure = Erasure(place.database, lambda: NOW, patience=10)
    with place.database.engine.connect() as reader:
        reader.exec_driver_sql("SELECT count(*) FROM memory").all()
        with pytest.raises(MemoryUnavailable, match="write_ahead_log"):
            await erasure.forget(TENANT, ANN, by="dpo")
    receipt = await erasure.forget(TENANT, ANN, by="dpo")
    assert receipt.left["write_ahead_log"] == 0
    assert hits(MARK, *place.files().values()) == 0
    place.database.close()
