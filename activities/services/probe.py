"""What a model server really is and does, found out before the first request depends on it.

Asks for facts where a server publishes them and tries the rest: a schema the model would not keep by itself,
logprobs, usage, and whether it stops working when nobody listens any more. A server that is away is a
finding, never an error, so that a worker starts without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from activities.services.routes import Sensing
from activities.tiers.heard import Unreadable
from activities.tiers.stream import TooMuch
from activities.tiers.wire import ChatEndpoint
from models.errors import CountersignError, IdentityChanged, OutputInvalid
from models.inference import Completion, Message, Probed, Prompt, attempt_of
from models.routing import Telemetry
from models.settings import TierSettings

log = logging.getLogger(__name__)
T = TypeVar("T")

CANARY = {
    "type": "object",
    "properties": {"canary": {"enum": ["k7-violet-anvil", "q2-amber-sextant"]}},
    "required": ["canary"],
    "additionalProperties": False,
}
PROBE_SECONDS = 120.0
AGAIN_SECONDS = 30.0
LOOK_SECONDS = 0.05
STOP_LOOKS = 40
"""After two seconds a server that still works on a closed request has not noticed."""


class Away(Exception):
    """It does not answer; it never leaves this module."""


async def probe(server: ChatEndpoint, seconds: float = PROBE_SECONDS) -> Probed:
    """Look at one server and try it; what could not be established in time stays unknown."""
    findings = _Findings(server)
    with suppress(TimeoutError, Away):
        async with asyncio.timeout(seconds):
            await findings.look()
    return findings.told()


async def keep_probed(
    servers: Iterable[ChatEndpoint],
    found: Callable[[Probed], None],
    stop: asyncio.Event,
    again: float = AGAIN_SECONDS,
) -> None:
    """Probe each server once, as soon as it is there, until `stop`."""
    tasks = [asyncio.create_task(_until_there(server, found, again)) for server in servers]
    tasks.append(asyncio.create_task(_cancel_after(stop, tuple(tasks))))
    for task in tasks[:-1]:
        with suppress(asyncio.CancelledError):
            await task
    tasks[-1].cancel()


@dataclass(slots=True)
class _Findings:
    server: ChatEndpoint
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    reachable: bool = False
    other: str | None = None
    """The model that answers instead of the accepted one."""

    async def look(self) -> None:
        await self._identity()
        for name, question in (("context_tokens", self.server.context), ("slots", self.server.slots)):
            self.facts[name] = await _tried(question())
        counted = await _tried(self.server.prompt_tokens(saying("Hello.")))
        self.facts["tokenizer"] = counted is not None and counted > 0
        self.facts["structured"] = await self._structured()
        await self._accounts()
        self.facts["cancel"] = await self._cancel()

    def told(self) -> Probed:
        tier = self.server.settings
        held = self.other is not None
        probed = Probed(tier=tier.name, reachable=self.reachable, held=held, **self.facts)
        return probed.model_copy(update={"false": tuple(_false(tier, probed, self.other))})

    async def _identity(self) -> None:
        try:
            self.facts["model"] = await self.server.identity()
        except IdentityChanged as error:
            attempt = attempt_of(error)
            self.other = attempt.model if attempt else None
            self.facts["model"] = self.other
            self.reachable = True
            # Nothing may be asked of a model that nobody accepted.
            raise Away from None
        except (CountersignError, Unreadable, TooMuch, httpx.HTTPError):
            raise Away from None
        self.reachable = True

    async def _structured(self) -> bool | None:
        try:
            answer = await self.server.complete(
                saying("Say hello in one sentence.", 48, answer_schema=CANARY)
            )
        except OutputInvalid:
            return False
        except CountersignError:
            return None
        return answer.holds

    async def _accounts(self) -> None:
        asked = saying("Name a colour.", 4)
        answer = await _tried(self.server.complete(asked.model_copy(update={"logprobs": True})))
        self.facts["logprobs"] = bool(answer.chances) if answer else None
        answer = answer or await _tried(self.server.complete(asked))
        if answer is not None:
            # An answer without logprobs after a refusal says that it was they who were refused.
            self.facts["logprobs"] = bool(answer.chances)
            self.facts["usage"] = answer.usage == "reported"

    async def _cancel(self) -> bool | None:
        if await _tried(self.server.running()) != 0:
            return None
        long = saying("Count from one to five hundred in words.", 400)
        task: asyncio.Task[Completion] = asyncio.create_task(self.server.complete(long))
        try:
            began = await self._comes_to(lambda running: running > 0, task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return await self._comes_to(lambda running: running == 0) if began else None

    async def _comes_to(
        self, wanted: Callable[[int], bool], task: asyncio.Task[Completion] | None = None
    ) -> bool:
        for _ in range(STOP_LOOKS):
            running = await _tried(self.server.running())
            if task is not None and task.done():
                return False
            if running is not None and wanted(running):
                return True
            await asyncio.sleep(LOOK_SECONDS)
        return False


class Probes:
    """Telemetry with what probes found laid over it; `found` goes to `keep_probed`."""

    def __init__(self, sensing: Sensing) -> None:
        """Take where telemetry comes from otherwise."""
        self._sensing = sensing
        self._found: dict[str, Probed] = {}
        self._held: set[str] = set()

    def found(self, probed: Probed) -> None:
        """Remember a probe."""
        self._found[probed.tier] = probed
        if probed.held:
            self._held.add(probed.tier)

    async def of(self, task: str) -> Mapping[str, Telemetry]:
        """Telemetry by tier, for one task."""
        known = await self._sensing.of(task)
        names = known.keys() | self._found.keys() | self._held
        return {name: self._laid_over(name, known.get(name, Telemetry())) for name in names}

    def fell(self, tier: str, kind: str) -> None:
        """A tier failed a call; one whose model changed is held from now on."""
        if kind == IdentityChanged.__name__:
            self._held.add(tier)
        self._sensing.fell(tier, kind)

    def _laid_over(self, name: str, known: Telemetry) -> Telemetry:
        probed = self._found.get(name)
        change: dict[str, Any] = {"held": known.held or name in self._held}
        if probed is not None:
            names = ("context_tokens", "structured", "logprobs")
            seen = {key: getattr(probed, key) for key in names}
            change |= {key: value for key, value in seen.items() if value is not None}
            # A call on record is later than the probe.
            change["model"] = known.model or probed.model
        return known.model_copy(update=change)


def saying(text: str, tokens: int = 16, **more: Any) -> Prompt:
    """A short prompt without chance in it."""
    turn = Message(role="user", content=text)
    return Prompt(messages=(turn,), max_tokens=tokens, temperature=0, **more)


async def _tried(question: Awaitable[T]) -> T | None:
    try:
        return await question
    except (CountersignError, Unreadable, TooMuch, httpx.HTTPError):
        return None


def _false(tier: TierSettings, probed: Probed, other: str | None) -> Iterable[str]:
    if other is not None:
        yield f"model is {tier.model!r}, but its server runs {other!r}; held until the settings accept it"
    if tier.structured and probed.structured is False:
        yield "structured is true, but it holds no answer to a schema; set structured = false"
    if probed.context_tokens is not None and probed.context_tokens < tier.context_tokens:
        yield f"context_tokens is {tier.context_tokens}, but it takes {probed.context_tokens}"
    if probed.slots is not None and probed.slots < tier.concurrency:
        yield f"concurrency is {tier.concurrency}, but it takes {probed.slots} at once"


async def _until_there(server: ChatEndpoint, found: Callable[[Probed], None], again: float) -> None:
    probed = await probe(server)
    while not probed.reachable:
        await asyncio.sleep(again)
        probed = await probe(server)
    for each in probed.false:
        log.warning("tier %s: %s", probed.tier, each)
    found(probed)


async def _cancel_after(stop: asyncio.Event, tasks: Iterable[asyncio.Task[None]]) -> None:
    await stop.wait()
    for task in tasks:
        task.cancel()
