"""What a process opens, by where it stands, and what a region's records may say at the centre."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from sqlalchemy import Connection

from activities.services.content import TEXT, guard, put_blob
from activities.services.database import Database
from activities.services.regions import Home, bind, home_of
from activities.services.vault import load_keys
from models.ledger import Draft
from models.settings import Settings

TEXTS = frozenset({"reason", "remedy", "detail", "links"})
"""Fields of records that are words for people. Errors quote what they refuse, and a link its page's title."""
NAMED = re.compile(r"sha256:[0-9a-f]{64}")


@contextmanager
def stores(settings: Settings, open_: Callable[[str], Database] = Database) -> Generator[Database]:
    """The database as this process uses it: in a region all content goes to the region's own instead."""
    keys = load_keys(settings.sealing, settings.data, settings.region_url or settings.database_url)
    with ExitStack() as stack:
        if settings.region is None or settings.region_url is None:
            database = guard(open_(settings.database_url), keys)
            stack.callback(database.close)
            yield database
            return
        # Closed last, because what is still queued at the centre writes there.
        own = guard(open_(settings.region_url), keys)
        stack.callback(own.close)
        database = open_(settings.database_url)
        stack.callback(database.close)
        yield bind(database, Home(settings.region, own))


def withheld(connection: Connection, tenant: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the centre may hold it: in a region its words are kept there, and named here."""
    if home_of(connection) is None:
        return dict(body)
    return {name: _without_words(connection, tenant, name, value) for name, value in body.items()}


def _without_words(connection: Connection, tenant: str, name: str, value: Any) -> Any:
    if isinstance(value, str):
        return _named(connection, tenant, value) if name in TEXTS else value
    if isinstance(value, Mapping):
        return withheld(connection, tenant, cast("Mapping[str, Any]", value))
    if isinstance(value, list | tuple):
        return [_without_words(connection, tenant, name, one) for one in cast("list[Any]", value)]
    return value


def _named(connection: Connection, tenant: str, words: str) -> str:
    # A step that is taken again brings the same words, or names of words that stand already.
    if not words or NAMED.fullmatch(words):
        return words
    return f"sha256:{put_blob(connection, tenant, words.encode(), TEXT).digest}"


def withheld_in(connection: Connection, tenant: str, drafts: tuple[Draft, ...]) -> tuple[Draft, ...]:
    """The same of events that are about to be appended."""
    if home_of(connection) is None:
        return drafts
    return tuple(d.model_copy(update={"body": withheld(connection, tenant, d.body)}) for d in drafts)
