"""What the constraints benchmark asks, and where its answers are kept, without a database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

from activities.services.cache import Cache, Key
from activities.services.database import Database
from models.inference import Answered, Message, Prompt, Task
from models.loop import Ref
from models.redaction import HINT

NOW = datetime(2026, 5, 4, tzinfo=UTC)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


class Kept(Cache):
    """The cache with its rules and keys, but without a database."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        super().__init__(Database("sqlite://"), lambda: NOW)
        self.answers: dict[Key, Answered] = {}

    async def get(self, key: Key) -> Answered | None:
        """As kept."""
        kept = self.answers.get(key)
        return kept.model_copy(update={"cached": True}) if kept is not None else None

    async def once(self, key: Key, make: Callable[[], Awaitable[Answered]]) -> Answered:
        """Keep what is made."""
        made = await super().once(key, make)
        if not made.unsure:
            self.answers[key] = made
        return made


class Shelf:
    """A content store of references."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self.texts: dict[str, str] = {}

    async def text(self, tenant: str, ref: Ref) -> str:
        """Texts travel as params here."""
        raise KeyError(ref.digest)

    async def put(
        self, tenant: str, data: bytes, media_type: str = "text/plain", subject: str | None = None
    ) -> Ref:
        """Every answer gets a name of its own."""
        digest = f"{len(self.texts):064x}"
        self.texts[digest] = data.decode()
        return Ref(digest=digest, size=len(data))


def _content_with_anything(
    text: str, inputs: Mapping[str, str], params: Mapping[str, str | int]
) -> tuple[str, ...]:
    return ()


def note_in(prompt: Prompt) -> str:
    """The note of a prompt, as its server was told it."""
    told = prompt.messages[0].content.removeprefix(f"{HINT}\n\n")
    return told.split("\n")[0].split(" word")[0]


def a_task(name: str, structured: bool) -> Task:
    """A task whose prompt is as long as its params say."""

    def build(inputs: Mapping[str, str], params: Mapping[str, str | int]) -> Prompt:
        content = str(params["note"]) + " word" * int(params["words"])
        schema = SCHEMA if structured else None
        return Prompt(messages=(Message(role="user", content=content),), answer_schema=schema, max_tokens=20)

    return Task(name, "small", structured, build, _content_with_anything, cache_seconds=60)


TASKS = {"free": a_task("free", False), "held": a_task("held", True)}
