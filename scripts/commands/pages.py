"""A published page as its readers get it: over HTTP and as a file, with every key fact in its text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from models.errors import ConnectorUnavailable, InvalidInput
from models.settings import Settings

TAG = re.compile(r"<[^>]*>")
HIDDEN = re.compile(r"<(script|style|head)\b.*?</\1>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Page:
    """One page, and the facts that are not in it."""

    address: str
    file: Path
    size: int
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether it holds something and lacks nothing."""
        return self.size > 0 and not self.missing


async def read_page(
    settings: Settings, client: httpx.AsyncClient, address: str, facts: Iterable[str]
) -> Page:
    """Read a page over HTTP and from its file.

    Raises:
        ConnectorUnavailable: it does not answer, or no file is behind it.
    """
    file = file_of(settings, address)
    try:
        served = (await client.get(address)).raise_for_status().text
        kept = file.read_text("utf-8")
    except (httpx.HTTPError, OSError) as error:
        raise ConnectorUnavailable(f"{address}: cannot be read ({error}); see the log of the desk") from None
    missing = tuple(
        fact for fact in facts if fact not in visible_text(served) or fact not in visible_text(kept)
    )
    return Page(address, file, file.stat().st_size, missing)


def file_of(settings: Settings, address: str) -> Path:
    """The file behind a page of one of our sites.

    Raises:
        InvalidInput: it is on no site of ours.
    """
    for site in settings.sites:
        root = site.address.rstrip("/")
        if address.startswith(f"{root}/"):
            inside = unquote(urlsplit(address.removeprefix(f"{root}/")).path).strip("/")
            return (settings.data / site.build / inside / "index.html").absolute()
    raise InvalidInput.field("address", address, "it is on no site of the settings")


def visible_text(page: str) -> str:
    """What a browser shows of a page, blanks folded."""
    return " ".join(html.unescape(TAG.sub(" ", HIDDEN.sub(" ", page))).split())
