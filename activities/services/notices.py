"""Channels: e-mail, signed webhook, terminal. Each says that an intent waits, what it is, and how to answer.

A notice carries the card that was bound, read by its digest. A webhook carries no card, only its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import smtplib
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from pathlib import Path
from typing import Protocol

import httpx
from pydantic import SecretStr

from activities.services.content import ERASED, get_blob, get_unless_gone
from activities.services.database import Database
from activities.services.regions import home_behind
from models.card import visible
from models.channels import ChannelSettings, EmailSettings, WebhookSettings, path_of
from models.errors import ConnectorRejected, CredentialsRejected, RateLimited, Unavailable, UnknownName
from models.loop import Intent
from models.notices import FIRST_ROUND, NoticeOrder, Told

Clock = Callable[[], datetime]
SIGNATURE, TIMESTAMP, IDENTITY = "Countersign-Signature", "Countersign-Timestamp", "Countersign-Id"
AGAIN = frozenset({408, 425, 429})


@dataclass(frozen=True, slots=True)
class Notice:
    """What a channel tells."""

    order: NoticeOrder
    title: str
    card: str
    card_digest: str
    expires_at: datetime
    desk: str = ""
    """Where its pages are, if it has any."""

    @property
    def id(self) -> str:
        """The same for every attempt, so that a second one can be known as such."""
        return f"{self.order.digest}.{self.order.channel}.{self.order.round}"

    @property
    def command(self) -> str:
        """How to answer from a terminal."""
        review = " --review" if self.is_review else ""
        return f"countersign approve {visible(self.order.workflow_id)}{review} --digest {self.order.digest}"

    @property
    def page(self) -> str:
        """Where to read and answer it in a browser; empty without a desk."""
        return f"{self.desk}{path_of(self.order.workflow_id)}" if self.desk else ""

    @property
    def is_review(self) -> bool:
        """Whether it is about what was done already, by breaking the glass."""
        return self.order.round >= FIRST_ROUND

    def text(self) -> str:
        """The card, and how to answer."""
        page = f"Its page: {self.page}\n" if self.page else ""
        if self.is_review:
            late = "ALARM: its review is late.\n\n" if self.order.round > FIRST_ROUND else ""
            return (
                f"{late}Somebody broke the glass and went ahead with this alone.\n\n{self.card}\n\n"
                f"Somebody who had no part in it has to say whether that was right:\n\n    {self.command}\n\n"
                f"or reject instead of approve.\n{page}"
            )
        again = f"Reminder {self.order.round}: this still waits.\n\n" if self.order.round else ""
        return (
            f"{again}{self.card}\n\nOpen until {self.expires_at.isoformat()} at the latest.\n"
            f"To answer:\n\n    {self.command}\n\nor reject, revise, delegate instead of approve.\n{page}"
        )

    def body(self) -> bytes:
        """What it is about, by digest, and where to read and answer it."""
        order = self.order
        return json.dumps(
            {
                "id": self.id,
                "tenant": order.tenant,
                "workflow_id": order.workflow_id,
                "digest": order.digest,
                "card": self.card_digest,
                "round": order.round,
                "open_until": self.expires_at.isoformat(),
                "command": self.command,
                "page": self.page,
            },
            sort_keys=True,
        ).encode()


class Message(Protocol):
    """Anything that channels can tell."""

    @property
    def id(self) -> str:
        """The same for every attempt, so that a second one can be known as such."""
        ...

    @property
    def title(self) -> str:
        """In one line; whoever wrote it."""
        ...

    def text(self) -> str:
        """For people."""
        ...

    def body(self) -> bytes:
        """For programs, as JSON, without texts."""
        ...


class Channel(Protocol):
    """One way to reach people."""

    async def send(self, notice: Message, now: datetime) -> Told:
        """Hand it over; returns once the other side has taken it."""
        ...


class Noticing:
    """Reads what is bound, and tells people."""

    def __init__(
        self, database: Database, channels: Mapping[str, Channel], clock: Clock, desk: str = ""
    ) -> None:
        """Channels by the names that policy uses; where the desk's pages are, if there are any."""
        self._database = database
        self._channels = channels
        self._clock = clock
        self._desk = desk

    async def notify(self, order: NoticeOrder) -> Told:
        """Tell people on one channel.

        Raises:
            UnknownName: no such channel is configured.
            Unavailable, RateLimited: it did not take it; calling again is safe.
            ConnectorRejected, CredentialsRejected: it never will.
        """
        channel = self._channels.get(order.channel)
        if channel is None:
            known = ", ".join(sorted(self._channels)) or "none"
            raise UnknownName(f"channel: {order.channel!r} is not configured; known: {known}")
        return await channel.send(await self._notice(order), self._clock())

    async def _notice(self, order: NoticeOrder) -> Notice:
        data = await self._database.read(lambda link: get_blob(link, order.tenant, order.digest))
        intent = Intent.model_validate_json(data)
        if (home := home_behind(self._database)) is not None:
            # Mail servers and screens are anywhere; who may read it, reads it in the region.
            title, card = f"bound to region {home.region}", _limited(order, home.region)
        else:
            text = await self._database.read(
                lambda link: get_unless_gone(link, order.tenant, intent.card_digest)
            )
            title, card = intent.proposal.title, ERASED if text is None else text.decode()
        return Notice(order, title, card, intent.card_digest, intent.expires_at, self._desk)


class Email:
    """Plain text by SMTP; in a thread, since the library waits."""

    def __init__(self, settings: EmailSettings) -> None:
        """Connects for each notice."""
        self._settings = settings

    async def send(self, notice: Message, now: datetime) -> Told:
        """Hand it to the mail server.

        Raises:
            Unavailable: it did not take it now.
            ConnectorRejected, CredentialsRejected: it never will.
        """
        message = letter(notice, self._settings)
        try:
            refused = await asyncio.to_thread(self._send, message)
        except smtplib.SMTPAuthenticationError:
            raise CredentialsRejected(f"channel {self._settings.name}: user and token are refused") from None
        except smtplib.SMTPRecipientsRefused as error:
            codes = [code for code, _ in error.recipients.values()]
            raise self._refused(min(codes, default=450)) from None
        except smtplib.SMTPResponseException as error:
            raise self._refused(error.smtp_code) from None
        except (smtplib.SMTPException, OSError) as error:
            kind = type(error).__name__
            raise Unavailable(
                f"channel {self._settings.name}: the mail server did not take it ({kind})"
            ) from None
        return Told(at=now, reference=str(message["Message-ID"]), missed=refused)

    def _send(self, message: EmailMessage) -> int:
        settings = self._settings
        server = smtplib.SMTP(settings.host, settings.port, timeout=settings.timeout_seconds)
        try:
            if settings.starttls:
                server.starttls(context=ssl.create_default_context())
            if settings.user is not None and settings.token is not None:
                server.login(settings.user, settings.token.get_secret_value())
            return len(server.send_message(message))
        finally:
            # What the server took it has, however it says good-bye.
            with suppress(smtplib.SMTPException, OSError):
                server.quit()

    def _refused(self, code: int) -> Unavailable | ConnectorRejected:
        text = f"channel {self._settings.name}: the mail server answered {code}"
        if 400 <= code < 500:
            return Unavailable(text)
        return ConnectorRejected(f"{text}; correct sender and to")


class Webhook:
    """One signed POST: what waits, by digest, and where its card is. No texts."""

    def __init__(self, settings: WebhookSettings, client: httpx.AsyncClient) -> None:
        """The client follows no redirects."""
        self._settings = settings
        self._client = client

    async def send(self, notice: Message, now: datetime) -> Told:
        """Post it.

        Raises:
            Unavailable, RateLimited: not now.
            ConnectorRejected, CredentialsRejected: never.
        """
        body = notice.body()
        stamp = str(int(now.timestamp()))
        headers = {
            "Content-Type": "application/json",
            IDENTITY: notice.id,
            TIMESTAMP: stamp,
            SIGNATURE: signature(self._settings.token, stamp, body),
        }
        try:
            answer = await self._client.post(self._settings.url, content=body, headers=headers)
        except httpx.HTTPError as error:
            kind = type(error).__name__
            raise Unavailable(f"channel {self._settings.name}: no answer ({kind}); trying again") from None
        _accepted(self._settings.name, answer.status_code)
        return Told(at=now, reference=notice.id)


class Terminal:
    """A file per notice in a folder that somebody watches."""

    def __init__(self, folder: Path) -> None:
        """The folder is made with the first notice."""
        self._folder = folder

    async def send(self, notice: Message, now: datetime) -> Told:
        """Write it.

        Raises:
            Unavailable: the folder takes no file.
        """
        path = self._folder / f"{notice.id}.md"
        try:
            await asyncio.to_thread(_write, path, notice.text())
        except OSError as error:
            raise Unavailable(f"channel {path.parent.name}: {error.strerror}; make room for it") from None
        return Told(at=now, reference=path.name)


def channels(
    settings: Sequence[ChannelSettings], folder: Path, client: httpx.AsyncClient
) -> dict[str, Channel]:
    """The channels that settings name; terminals write below `folder`."""
    return {one.name: _channel(one, folder, client) for one in settings}


def letter(notice: Message, settings: EmailSettings) -> EmailMessage:
    """The mail; a title cannot put headers into it."""
    message = EmailMessage()
    message["Subject"] = f"[countersign] {visible(notice.title).replace(chr(10), ' ')}"[:200]
    message["From"] = settings.sender
    message["To"] = ", ".join(settings.to)
    message["Message-ID"] = f"<{notice.id}@countersign>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(notice.text())
    return message


def _limited(order: NoticeOrder, region: str) -> str:
    """What may be said outside of a region: that something waits, and where all of it is to be read."""
    return (
        f"An intent of a request that is bound to region {region} waits.\n"
        f"To read it, in that region: countersign show {visible(order.workflow_id)}\n"
    )


def signature(key: SecretStr, stamp: str, body: bytes) -> str:
    """`v1=` and the HMAC-SHA256 of timestamp, a full stop and the body."""
    signed = f"{stamp}.".encode() + body
    return f"v1={hmac.new(key.get_secret_value().encode(), signed, hashlib.sha256).hexdigest()}"


def _channel(settings: ChannelSettings, folder: Path, client: httpx.AsyncClient) -> Channel:
    match settings:
        case EmailSettings():
            return Email(settings)
        case WebhookSettings():
            return Webhook(settings, client)
        case _:
            return Terminal(folder / settings.name)


def _accepted(name: str, status: int) -> None:
    text = f"channel {name}: answered {status}"
    if 200 <= status < 300:
        return
    if status in (401, 403):
        raise CredentialsRejected(f"{text}; correct its token")
    if status == 429:
        raise RateLimited(text)
    if status in AGAIN or status >= 500:
        raise Unavailable(text)
    raise ConnectorRejected(f"{text}; correct its url")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
