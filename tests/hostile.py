"""Puts marked personal data wherever a person, a program, a model or a target can put anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.client import Client, WorkflowFailureError, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.service import RPCError
from typer.testing import CliRunner

from activities.connectors.base import Applied, Dry, Work
from activities.services.beliefs import Beliefs
from activities.services.memory_store import MemoryStore
from activities.services.vectors import ExactVectors
from activities.tiers.scripted import Scripted
from models.beliefs import Change, Mail, owner_id
from models.content import ContentSettings
from models.errors import ConnectorRejected, InvalidInput, TierUnavailable
from models.inference import DataClass, Prompt
from models.loop import GateRule, Guarantee, Outcome, Request, Reversibility
from models.memory import Memo
from models.policy import AgentPolicy, Policy
from models.settings import (
    EncryptionSettings,
    ScheduleSettings,
    Settings,
    SiteSettings,
    TemporalSettings,
    TierSettings,
)
from models.visibility import Role
from scripts.cli import app
from temporal.beliefs import settle, tell
from temporal.telemetry import Telemetry
from tests.conftest import ROLES, Stack, a_key, settings_for, stack_of
from tests.marked import EMAIL, IBAN, NAME, PHONE, said
from tests.test_agents_content import BRIEF
from tests.test_calendar import editor
from workers import config
from workers.compose import Parts, utc_now

LIMIT = 60
SUBJECT = NAME
EVERY_CLASS = tuple(DataClass)


class Leaky:
    """A target that says what it was given in whatever it answers, and in every error."""

    name = "leaky"
    guarantee = Guarantee.KEYED
    settle = timedelta(0)

    async def plan(self, work: Work) -> Dry:
        if work.arguments.get("fail") == "plan":
            raise InvalidInput.field("recipient", EMAIL, f"{said('plan error')} is not known")
        kind = Reversibility.REVERSIBLE
        return Dry(said("target"), said("version"), said("diff"), kind, said("undo"))

    async def find(self, key: str, work: Work) -> Applied | None:
        return None

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        if work.arguments.get("fail") == "apply":
            raise ConnectorRejected(said("apply error"))
        return Applied(said("reference"), said("new version"), (f"https://x.test/{PHONE}",), said("detail"))

    async def verify(self, work: Work, applied: Applied) -> Applied:
        return applied

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        raise ConnectorRejected(said("undo error"))


def writer(prompt: Prompt) -> str:
    """Repeats what must not be kept, besides what it is asked."""
    answer = editor(prompt)
    return answer if prompt.answer_schema else f"{answer} {said('answer')}"


def failing(prompt: Prompt) -> Exception:
    return TierUnavailable(said("tier error"))


PARTS = Parts(
    endpoints={"small": Scripted("small", failing), "large": Scripted("large", writer)},
    connectors=lambda known: {**known, "leaky": Leaky()},
)


def leaky(**arguments: Any) -> dict[str, Any]:
    given = {"text": said("argument"), said("argument name"): PHONE} | arguments
    return {"connector": "leaky", "operation": "send", "arguments": given, "title": said("action")}


def marked_settings(temporal: TemporalSettings, folder: Path, sealed: bool) -> Settings:
    tiers = tuple(
        TierSettings(name=name, kind="llama_cpp", url="http://127.0.0.1:9", data_classes=EVERY_CLASS)
        for name in ("small", "large")
    )
    site = SiteSettings(
        name="site",
        repository=Path("site.git"),
        build=Path("site"),
        address="http://127.0.0.1:9",
        engine="plain",
        serve=False,
    )
    gate = GateRule(remind_seconds=None, notify=("desk",))
    agents = {
        name: AgentPolicy(connectors=("null", "site", "leaky"), gate=gate)
        for name in ("external", "content", "calendar")
    }
    weekly = ScheduleSettings(
        name="weekly",
        agent="external",
        cron="0 8 * * 1",
        body={"title": said("scheduled"), "actions": [leaky()]},
        requester=EMAIL,
        note=said("note"),
    )
    return settings_for(
        temporal,
        folder,
        tiers=tiers,
        sites=(site,),
        content=ContentSettings(min_words=10),
        policy=Policy(agents=agents),
        channels=({"name": "desk", "kind": "terminal"},),
        schedules=(weekly,),
        encryption=EncryptionSettings(enabled=sealed),
        probe=False,
    )


@dataclass
class Hostile:
    """Puts marks wherever a person, a program or a target can put anything."""

    stack: Stack
    folder: Path

    @property
    def client(self) -> Client:
        return self.stack.client

    async def command(self, *arguments: str, code: int | None = 0) -> Any:
        """The command line, as a person uses it."""
        kept = self.folder / "run" / "settings.json"
        ran = await asyncio.to_thread(
            CliRunner().invoke, app, list(arguments), env={config.SNAPSHOT: str(kept)}
        )
        assert code is None or ran.exit_code == code, ran.output
        return ran

    async def started(self, agent: str, data: str, *more: str) -> WorkflowHandle[Any, Outcome]:
        file = self.folder / f"{a_key()}.request"
        file.write_text(data)
        ran = await self.command("start", agent, str(file), "--as", EMAIL, "--json", *more)
        file.unlink()
        is_warned = self.stack.settings.encryption.enabled and "--key" in more
        assert ("opaque" in ran.stderr) is is_warned
        run = json.loads(ran.stdout)["workflow_id"]
        return self.client.get_workflow_handle(run, result_type=Outcome)

    async def digest(self, run: WorkflowHandle[Any, Any], number: int = 1) -> str:
        async with asyncio.timeout(LIMIT):
            while True:
                status = await run.query("status")
                assert status["outcome"] is None, status
                if status["intents"] >= number and status["state"] == "waiting":
                    return str(status["intent"])
                await asyncio.sleep(0.02)

    async def ended(self, run: WorkflowHandle[Any, Any]) -> Any:
        async with asyncio.timeout(LIMIT):
            with suppress(WorkflowFailureError):
                return await run.result()

    # The ways in.

    async def proposal(self) -> None:
        """A program's proposal, every answer to it, and a target that fails with it in its words."""
        body = {
            "title": said("title"),
            "actions": [leaky(), leaky(fail="apply")],
            "reasons": said("reasons"),
            "evidence": [
                {"reference": f"belief:{SUBJECT}", "version": "0"},
                {"reference": said("evidence"), "version": said("evidence version")},
            ],
        }
        key = ("--key", said("key"), "--subject", SUBJECT)
        run = await self.started("external", json.dumps(body, ensure_ascii=False), *key)
        first = await self.digest(run)
        await self.command("show", run.id)
        words = ("--digest", first, "--as", IBAN)
        await self.command("revise", run.id, *words, "--comment", said("feedback"))
        second = await self.digest(run, 2)
        words = ("--digest", second, "--as", IBAN)
        await self.command("delegate", run.id, "--to", NAME, *words, "--comment", said("delegation"))
        await self.badly(run, second)
        words = ("--digest", second, "--as", NAME)
        await self.command("approve", run.id, *words, "--comment", said("approval"))
        await self.ended(run)

    async def badly(self, run: WorkflowHandle[Any, Any], digest: str) -> None:
        """Messages that are refused: of no shape, for another digest, by unknown names, too many."""
        bad = {"digest": "0" * 64, "approver": EMAIL, "comment": said("refused"), said("field"): PHONE}
        await run.signal("approve", bad)
        await run.signal("approve", args=[said("first of two"), said("second of two")])
        await run.signal("nonsense", said("unknown signal"))
        for name, sent in (
            ("decide_approve", {"approver": [said("wrong type")], "digest": digest}),
            ("decide_approve", {"approver": said("spaces"), "digest": digest}),
            ("decide_reject", said("no object")),
            ("nonsense", said("unknown update")),
        ):
            with suppress(WorkflowUpdateFailedError, RPCError):
                await run.execute_update(name, sent)
        with suppress(Exception):
            await run.query("nonsense", said("unknown query"))

    async def cancelled(self) -> None:
        body = {"title": said("to be cancelled"), "actions": [leaky()]}
        run = await self.started("external", json.dumps(body))
        await self.digest(run)
        await self.command("cancel", run.id, "--as", EMAIL, "--comment", said("cancellation"))
        await self.ended(run)

    async def refused(self) -> None:
        """Requests that cannot be read, or whose dry run fails."""
        run = await self.started(
            "external", json.dumps({"title": said("dry run"), "actions": [leaky(fail="plan")]})
        )
        await self.ended(run)
        for kind, sent in (
            ("external", {"tenant": said("tenant"), "agent": "external", "key": 5}),
            ("external", said("no request")),
            ("external", Request(agent="external", key=said("direct"), body=said("direct body"))),
            ("nonesuch", {"agent": said("unknown agent")}),
        ):
            await self.ended(await self.client.start_workflow(kind, sent, id=a_key(), task_queue="decide"))
        body = json.dumps({"title": said("x"), "actions": "none", EMAIL: PHONE})
        request = Request(agent="external", key=a_key(), body=body, requester=EMAIL)
        run = await self.client.start_workflow("external", request, id=a_key(), task_queue="decide")
        await self.ended(run)

    async def article(self) -> None:
        """A brief about somebody, drafted by models of which one fails, and rejected."""
        brief = BRIEF.replace("In winter people", f"{said('brief')} said so. In winter people")
        brief = brief.replace("Winter hours of", f"Winter hours of {NAME} at").replace("sourdough", EMAIL)
        run = await self.started("content", brief, "--subject", SUBJECT)
        digest = await self.digest(run)
        await self.command(
            "reject", run.id, "--digest", digest, "--as", PHONE, "--comment", said("rejection")
        )
        await self.ended(run)

    async def week(self) -> None:
        """Ideas about somebody become articles, each of which is a run of its own."""
        text = "\n\n".join((f"{NAME} bakery {said('idea')}", f"- {said('idea fact')}"))
        ref = await self.stack.content.put("default", text.encode())
        memo = Memo(
            record_id="idea-1", tenant="default", kind="idea", title=said("idea title"), text=ref, source="t"
        )
        store = MemoryStore(
            self.stack.database, self.stack.content, None, ExactVectors(self.stack.database, 384)
        )
        assert await store.keep(memo, utc_now())
        body = {"themes": [NAME, "bakery"], "site": "site", "audience": said("audience"), "tone": "warm"}
        run = await self.started("calendar", json.dumps(body))
        outcome = await self.ended(run)
        child = self.client.get_workflow_handle(outcome.receipts[0].reference, result_type=Outcome)
        await self.digest(child)
        await self.command("cancel", child.id, "--as", EMAIL)
        await self.ended(child)

    async def beliefs(self) -> None:
        mail = Mail(agent="support", event=said("event"), sets={"said": said("belief")}, memories=(EMAIL,))
        store = Beliefs(self.stack.database, utc_now)
        called = await store.called("default", SUBJECT)
        assert (await settle(self.client, "default", SUBJECT, mail, called=called)).won
        other, last = await store.called("default", EMAIL), mail.model_copy(update={"event": "e2"})
        await tell(self.client, "default", EMAIL, mail, called=other)
        assert (await settle(self.client, "default", EMAIL, last, called=other)).version == 2
        owner = self.client.get_workflow_handle(owner_id("default", called))
        with suppress(WorkflowUpdateFailedError):
            await owner.execute_update("settle", {"agent": said("bad agent"), EMAIL: said("bad mail")})

    async def memory(self) -> None:
        ref = await self.stack.content.put("default", said("memory").encode(), subject=SUBJECT)
        memo = Memo(
            tenant="default",
            kind="preference",
            title=said("memory title"),
            text=ref,
            source="event",
            subject=SUBJECT,
            why=said("why"),
            links=(f"https://example.test/{EMAIL}",),
        )
        store = MemoryStore(
            self.stack.database, self.stack.content, None, ExactVectors(self.stack.database, 384)
        )
        await store.keep(memo, utc_now())
        change = Change(
            tenant="default", agent="external", subject=SUBJECT, event="e1", sets={"a": said("b")}
        )
        await Beliefs(self.stack.database, utc_now).change(change)
        assert NAME in (await self.command("memory", "search", NAME, "--by", "words")).stdout
        await self.command("memory", "search", said("query"), "--json", code=None)
        await self.command("story", SUBJECT)
        await self.command("beliefs", "show", SUBJECT, "--agent", "external")

    async def scheduled(self) -> None:
        await self.command("schedules", "apply")
        assert said("note") in (await self.command("schedules", "list", "--json")).stdout
        await self.command("schedules", "pause", "weekly", "--as", EMAIL)
        await self.command("schedules", "list")
        await self.command("schedules", "resume", "weekly", "--as", NAME)
        handle = self.client.get_schedule_handle("countersign-default:weekly")
        await handle.trigger()
        async with asyncio.timeout(LIMIT):
            while not (ran := (await handle.describe()).info.recent_actions):
                await asyncio.sleep(0.02)
        run = self.client.get_workflow_handle(ran[0].action.workflow_id)
        await self.digest(run)
        await self.command("cancel", run.id, "--as", EMAIL)
        await self.ended(run)
        await handle.delete()

    async def begin(self) -> None:
        """What the command line reads."""
        config.snapshot(self.stack.settings, self.folder / "run" / "settings.json")

    async def everything(self) -> None:
        await self.begin()
        for way in (self.proposal, self.refused, self.cancelled, self.article, self.week, self.scheduled):
            await way()
        await self.beliefs()
        await self.memory()

    async def histories(self) -> bytes:
        """Every run's history as it is exported."""
        ids = [(run.id, run.run_id) async for run in self.client.list_workflows()]
        handles = [self.client.get_workflow_handle(name, run_id=run) for name, run in ids]
        return "\n".join([(await one.fetch_history()).to_json() for one in handles]).encode()


@asynccontextmanager
async def hostile(
    temporal: TemporalSettings, folder: Path, sealed: bool, telemetry: Telemetry | None = None
) -> AsyncGenerator[Hostile]:
    settings = marked_settings(temporal, folder, sealed)
    async with stack_of(settings, PARTS, (*ROLES, Role.DESK), telemetry) as stack:
        yield Hostile(stack, folder)
