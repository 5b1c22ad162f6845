"""Asking co-signers for cosignatures, and keeping what they gave beside the checkpoint.

Nothing they do stops the log from growing: what is wrong with one becomes an `Alert`, and whoever is about to
do something that cannot be taken back decides whether that is enough.
"""

from __future__ import annotations

import asyncio
import logging
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

import httpx
from sqlalchemy import Connection, select

from activities.services.cosignatures import WitnessKey, body_of, cosigned_at
from activities.services.database import Database, insert_for
from activities.services.notes import Tree
from models.cosigners import CosignerSettings
from models.errors import InvalidInput, LedgerBroken
from models.tables import Cosignature, table

COSIGNED = table(Cosignature)
ATTEMPTS = 10
"""Other processes of ours ask too, and each cosignature moves the co-signer on."""
LIMIT_BYTES = 64 * 1024
PLAIN = {"Accept-Encoding": "identity"}
SKEW = timedelta(minutes=5)
"""How far a co-signer's clock may be from ours."""
log = logging.getLogger(__name__)


class AlertKind(StrEnum):
    """What can be wrong between a log and a co-signer."""

    UNREACHABLE = "witness_unreachable"
    REFUSED = "witness_refused"
    """It does not know the log, or its key."""
    BEHIND = "witness_behind"
    """It has forgotten what it cosigned."""
    LIED = "witness_lied"
    """What it signed is not what it was asked to sign."""
    FORKED = "log_forked"
    """It has seen another history than the one that stands here."""


GRAVE = (AlertKind.FORKED, AlertKind.LIED, AlertKind.BEHIND)


@dataclass(frozen=True, slots=True)
class Alert:
    """Why a checkpoint has not this co-signer's cosignature, or what was odd about getting it."""

    kind: AlertKind
    witness: str
    text: str

    def __str__(self) -> str:
        """For a person."""
        return f"{self.kind}: {self.witness}: {self.text}"


@dataclass(frozen=True, slots=True)
class Stands:
    """The co-signer stands at another size than it was told."""

    size: int


Answer = str | Stands | Alert
Proof = Callable[[int, int], Awaitable[Sequence[bytes]]]
Again = Callable[[], Awaitable[tuple[Tree, str]]]


class RemoteCosigner:
    """One co-signer, as settings name it."""

    def __init__(
        self,
        settings: CosignerSettings,
        clock: Callable[[], datetime],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Asks nothing yet.

        Raises:
            InvalidInput: its key or its address is none.
        """
        self.key = WitnessKey.parse(settings.key)
        try:
            self._url = httpx.URL(f"{settings.url.rstrip('/')}/add-checkpoint")
        except (httpx.InvalidURL, ValueError):
            raise InvalidInput.field("ledger.cosigners", settings.url, "write https://HOST/PATH") from None
        self._seconds, self._clock, self._transport = settings.timeout_seconds, clock, transport

    @property
    def name(self) -> str:
        """How people call it."""
        return f"cosigner:{self.key.name}"

    def alert(self, kind: AlertKind, text: str) -> Alert:
        """Something is wrong with it."""
        return Alert(kind, self.name, text)

    async def ask(self, old: int, proof: Sequence[bytes], note: str) -> Answer:
        """A cosignature line for this note; or where it stands; or what is wrong."""
        lines = "".join(f"{b64encode(one).decode()}\n" for one in proof)
        request = f"old {old}\n{lines}\n{note}".encode()
        try:
            async with asyncio.timeout(self._seconds):
                status, text = await self._post(request)
        except (TimeoutError, httpx.HTTPError, OSError, ValueError) as error:
            return self.alert(AlertKind.UNREACHABLE, f"it does not answer ({type(error).__name__})")
        return self._read(status, text, note)

    async def _post(self, request: bytes) -> tuple[int, str]:
        async with (
            httpx.AsyncClient(trust_env=False, timeout=self._seconds, transport=self._transport) as client,
            client.stream("POST", self._url, content=request, headers=PLAIN) as response,
        ):
            data = bytearray()
            if "Content-Encoding" in response.headers:
                return response.status_code, ""  # Nobody asked for it, and what unfolds has no limit.
            async for part in response.aiter_bytes():
                data += part
                if len(data) > LIMIT_BYTES:
                    break
            return response.status_code, data[: LIMIT_BYTES + 1].decode(errors="replace")

    def _read(self, status: int, text: str, note: str) -> Answer:
        if len(text) > LIMIT_BYTES:
            return self.alert(AlertKind.REFUSED, f"it answers {status} with too much")
        if status == 200:
            return self._line(text, note)
        said = text.removesuffix("\n")
        if status == 409 and said.isascii() and said.isdigit() and len(said) < 19:
            return Stands(int(said))
        if status == 422:
            return self.alert(
                AlertKind.FORKED, "the log is no continuation of what it cosigned; `ledger verify` says where"
            )
        kind = AlertKind.UNREACHABLE if status >= 500 or status == 429 else AlertKind.REFUSED
        why = {403: ": it does not know our key", 404: ": it does not know our log"}.get(status, "")
        return self.alert(kind, f"it answers {status}{why}")

    def _line(self, text: str, note: str) -> Answer:
        """Its line among those it sent, if it holds over our bytes and its clock is right."""
        body = body_of(note)
        for line in text.split("\n"):
            at = cosigned_at(body, line, self.key)
            if at is not None:
                if abs(at - self._clock()) > SKEW:
                    return self.alert(AlertKind.LIED, f"it says that it signed at {at.isoformat()}")
                return line
        return self.alert(AlertKind.LIED, "it says yes, and did not sign this checkpoint with its key")


class Cosigning:
    """Gets every checkpoint cosigned, once, by every co-signer that will."""

    def __init__(self, database: Database, cosigners: Sequence[RemoteCosigner] = ()) -> None:
        """With no co-signers it does nothing."""
        self._database = database
        self.cosigners = tuple(cosigners)

    async def collect(self, tenant: str, tree: Tree, note: str, proof: Proof, again: Again) -> list[Alert]:
        """Ask all of them at once; what is wrong with whom.

        Args:
            tenant: whose log.
            tree: what the checkpoint says.
            note: the signed checkpoint.
            proof: that the log of one size continues that of another.
            again: signs the log as it stands now, when this checkpoint was overtaken.
        """
        asked = (_Round(self._database, one, tenant, proof, again) for one in self.cosigners)
        found = await asyncio.gather(*(one.run(tree, note) for one in asked))
        for alert in (one for one in found if one is not None):
            log.log(logging.ERROR if alert.kind in GRAVE else logging.WARNING, "ledger: %s", alert)
        return [one for one in found if one is not None]


@dataclass(slots=True)
class _Round:
    """One co-signer and one log, until it has cosigned or says why not."""

    database: Database
    cosigner: RemoteCosigner
    tenant: str
    proof: Proof
    again: Again

    async def run(self, tree: Tree, note: str) -> Alert | None:
        """Tell it where we are from where it is."""
        odd: Alert | None = None
        old: int | None = None
        for _ in range(ATTEMPTS):
            known, line = await self.database.read(self._known)
            if max(known, old or 0) > tree.size:
                # Another process of ours may have been quicker; if not, somebody has cut the log.
                tree, note = await self.again()
            if max(known, old or 0) > tree.size:
                return self._forked(max(known, old or 0), tree.size)
            if known == tree.size and cosigned_at(body_of(note), line, self.cosigner.key) is not None:
                return odd
            told = known if old is None else old
            answer = await self._ask(told, tree, note)
            if isinstance(answer, Alert):
                return answer
            if isinstance(answer, str):
                await self._keep(tree.size, answer)
                return odd
            if answer.size == tree.size == told:
                return self._forked(answer.size, tree.size)
            odd = self._behind(known, answer.size) if answer.size < known else odd
            old = answer.size
        return self.cosigner.alert(AlertKind.REFUSED, "it keeps saying that it stands elsewhere")

    async def _ask(self, old: int, tree: Tree, note: str) -> Answer:
        try:
            proof = await self.proof(old, tree.size) if old else ()
        except LedgerBroken as error:
            return self.cosigner.alert(AlertKind.FORKED, error.message)
        return await self.cosigner.ask(old, proof, note)

    def _behind(self, known: int, says: int) -> Alert:
        text = f"it cosigned {known} events, and now says that it has seen {says}; it has forgotten"
        return self.cosigner.alert(AlertKind.BEHIND, text)

    def _forked(self, theirs: int, ours: int) -> Alert:
        if theirs > ours:
            text = f"it has cosigned {theirs} events, and {ours} stand here: the log was cut"
        else:
            text = f"it has cosigned {theirs} events with another root: the log was rewritten"
        return self.cosigner.alert(AlertKind.FORKED, text)

    def _known(self, link: Connection) -> tuple[int, str]:
        """Up to where it has cosigned, as far as we know, and the line that says so."""
        mine = (COSIGNED.c.log_id == self.tenant) & (COSIGNED.c.key_id == self.cosigner.key.key_id)
        query = select(COSIGNED.c.size, COSIGNED.c.line).where(mine)
        row = link.execute(query.order_by(COSIGNED.c.size.desc()).limit(1)).first()
        return (0, "") if row is None else (row.size, row.line)

    async def _keep(self, size: int, line: str) -> None:
        row = {"log_id": self.tenant, "size": size, "key_id": self.cosigner.key.key_id, "line": line}

        def insert(link: Connection) -> None:
            made = insert_for(link.dialect.name)(COSIGNED).values(**row)
            link.execute(made.on_conflict_do_nothing())

        await self.database.write(insert)


def cosignatures(link: Connection, tenant: str, size: int | None = None) -> dict[int, list[str]]:
    """The cosignature lines of a log's checkpoints, by size."""
    query = select(COSIGNED.c.size, COSIGNED.c.line).where(COSIGNED.c.log_id == tenant)
    if size is not None:
        query = query.where(COSIGNED.c.size == size)
    found = dict[int, list[str]]()
    for row in link.execute(query.order_by(COSIGNED.c.size, COSIGNED.c.key_id)):
        found.setdefault(row.size, []).append(row.line)
    return found
