"""Requests and their ends: the claim on a request key, and the outcome that answers it for ever after."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, select, update

from activities.services.content import ERASED, TEXT, get_blob, get_unless_gone, put_blob
from activities.services.database import Database, to_micros
from activities.services.ends import borne_out
from activities.services.ledger_store import append_in, entries_in
from activities.services.memory_store import keep
from activities.services.regions import home_of
from activities.services.residence import withheld
from models.card import visible
from models.errors import InvalidInput, KeyDestroyed, RegionBound
from models.ledger import Append, Appended, Draft, Entry, EventType, event_id
from models.loop import Intent, Outcome, Proposal, Ref, Request, body_digest
from models.memory import Cause, Memo
from models.orders import Admission, Admitted, Conclusion, Pace
from models.people import People, unfit
from models.policy import Policy, policy_digest
from models.tables import Claim, table

CLAIM = table(Claim)
KEPT_REFUSALS = 2000
"""As many as one task of a run may log, so that what a lost one had logged is known again."""


@dataclass(frozen=True, slots=True)
class _Start:
    body: Ref
    entries: tuple[Entry, ...] = ()
    intent: Intent | None = None
    proposal: Proposal | None = None
    card: str = ""
    earlier: Outcome | None = None
    refusal: str = ""
    requester: str | None = None


class Requests:
    """Admits runs and concludes them."""

    def __init__(
        self,
        database: Database,
        policy: Policy,
        pace: Pace,
        clock: Callable[[], datetime],
        people: People | None = None,
        misplaced: Callable[[Request], str | None] = lambda request: None,
        heed: Callable[[Connection, Append, datetime], None] = lambda link, wish, now: None,
    ) -> None:
        """Policy, pace and whether people are configured are handed to each run when it starts.

        `misplaced` says why a request is not for the process it came to, before anything of it is kept;
        `heed` is told of each end, in the transaction that logs it.
        """
        self._heed = heed
        self._misplaced = misplaced
        self._people = people or People()
        self._database = database
        self._policy = policy
        self._pace = pace
        self._clock = clock

    async def admit(self, admission: Admission) -> Admitted:
        """Claim the request key and log the request; a run that was here before gets its stream back.

        Raises:
            PolicyDenied: the agent has no policy.
        """
        policy = self._policy.of(admission.request.agent)
        if (wrong := self._misplaced(admission.request)) is not None:
            body = _name_of(admission.request)
            return Admitted(body=body, policy=policy, policy_digest=policy_digest(policy), refusal=wrong)
        why = unfit(self._people, policy.start_roles, admission.request.requester)
        start = await self._database.write(lambda link: _admit(link, admission, self._clock(), why))
        return Admitted(
            body=start.body,
            policy=policy,
            policy_digest=policy_digest(policy),
            pace=self._pace,
            people=bool(self._people.people),
            requester=start.requester,
            entries=start.entries,
            intent=start.intent,
            proposal=start.proposal,
            card=start.card,
            earlier=start.earlier,
            refusal=start.refusal,
        )

    async def conclude(self, conclusion: Conclusion) -> Appended:
        """Log the outcome, answer the claim and keep the memories, in one commit."""
        return await self._database.write(lambda link: self._conclude(link, conclusion, self._clock()))

    def _conclude(self, link: Connection, conclusion: Conclusion, now: datetime) -> Appended:
        meant = conclusion.outcome
        outcome = borne_out(link, conclusion.append.tenant, meant)
        if outcome != meant:
            conclusion = _corrected(conclusion, outcome)
        appended = _conclude(link, conclusion, now)
        if not appended.won:
            return appended
        self._heed(link, conclusion.append, now)
        return appended if outcome == meant else _as_it_stands(link, conclusion.append)

    async def outcome(self, tenant: str, agent: str, key: str) -> Outcome | None:
        """How a request ended, if it has."""
        query = select(CLAIM.c.outcome).where(_is(tenant, agent, key))
        found = await self._database.read(lambda connection: connection.execute(query).scalar_one_or_none())
        return None if found is None else Outcome.model_validate_json(found)


def _admit(connection: Connection, admission: Admission, now: datetime, bar: str | None) -> _Start:
    request = admission.request
    claim = connection.execute(select(CLAIM).where(_is(request.tenant, request.agent, request.key))).first()
    body = _body(connection, request, claim is not None and claim.outcome is not None)
    if claim is not None and claim.body_digest != body.digest:
        return _Start(body, refusal=_other_body(request.key, claim.body_digest, body.digest))
    if claim is not None and claim.workflow_id != admission.workflow_id:
        if claim.outcome is not None:
            return _Start(body, earlier=Outcome.model_validate_json(claim.outcome))
        return _Start(body, refusal=f"key: {request.key!r} is in work as {claim.workflow_id}; look there")
    if (other := _other_request(connection, admission, body)) is not None:
        return _Start(body, refusal=other)
    if claim is None:
        if visible(admission.workflow_id) != admission.workflow_id:
            shown = visible(admission.workflow_id)[:80]
            return _Start(
                body, refusal=f"workflow id: {shown!r} has characters that are not seen; leave them out"
            )
        if bar is not None:
            # Before the key is claimed, so that whoever may start it still can.
            return _Start(body, refusal=f"requester: {request.requester!r} may not start it: {bar}")
        _claim(connection, admission, body, now)
    draft = _request_event(admission, body)
    wish = Append(tenant=request.tenant, stream=admission.workflow_id, expected=0, drafts=(draft,))
    append_in(connection, wish, now)
    entries = entries_in(connection, request.tenant, admission.workflow_id)
    intent, card = last_intent(connection, request.tenant, entries)
    proposal = _last_proposal(connection, request.tenant, entries)
    requester = entries[0].body.get("requester")
    return _Start(body, _needed(entries), intent, proposal, card, requester=requester)


def _needed(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """What a run needs of its stream; of refusals the last, since those of a flood would fill its history."""
    refused = [entry.version for entry in entries if entry.type is EventType.REFUSAL]
    since = refused[-KEPT_REFUSALS] if len(refused) > KEPT_REFUSALS else 0
    return tuple(one for one in entries if one.type is not EventType.REFUSAL or one.version >= since)


def _body(connection: Connection, request: Request, has_ended: bool) -> Ref:
    try:
        if isinstance(request.body, str):
            data = request.body.encode()
            return put_blob(connection, request.tenant, data, TEXT, request.subject, plainly=True)
        get_blob(connection, request.tenant, request.body.digest)
        return request.body
    except (InvalidInput, KeyDestroyed) as error:
        # What is left of a run that has ended is its review, which does not go with what was erased.
        if not has_ended or isinstance(error, RegionBound):
            raise
        return _name_of(request)


def _name_of(request: Request) -> Ref:
    if isinstance(request.body, Ref):
        return request.body
    return Ref(digest=body_digest(request), size=len(request.body.encode()))


def _claim(connection: Connection, admission: Admission, body: Ref, now: datetime) -> None:
    request = admission.request
    connection.execute(
        CLAIM.insert().values(
            tenant=request.tenant,
            agent=request.agent,
            key=request.key,
            body_digest=body.digest,
            workflow_id=admission.workflow_id,
            claimed_at=to_micros(now),
        )
    )


def last_intent(connection: Connection, tenant: str, entries: tuple[Entry, ...]) -> tuple[Intent | None, str]:
    """The last intent among the events of a stream, read back from its bound bytes, and its short card."""
    logged = [entry.body for entry in entries if entry.type is EventType.INTENT]
    if not logged:
        return None, ""
    intent = Intent.model_validate_json(get_blob(connection, tenant, logged[-1]["digest"]))
    has_ended = any(entry.type is EventType.OUTCOME for entry in entries)
    read = get_unless_gone if has_ended else get_blob
    card = read(connection, tenant, logged[-1]["short_card"])
    return intent, ERASED if card is None else card.decode()


def _last_proposal(connection: Connection, tenant: str, entries: tuple[Entry, ...]) -> Proposal | None:
    logged = [entry.body["proposal"] for entry in entries if entry.type is EventType.PROPOSAL]
    return (
        Proposal.model_validate_json(get_blob(connection, tenant, logged[-1]["digest"])) if logged else None
    )


def _conclude(connection: Connection, conclusion: Conclusion, now: datetime) -> Appended:
    appended = append_in(connection, conclusion.append, now)
    if appended.won:
        request, told = conclusion.request, conclusion.outcome.model_dump(mode="json")
        connection.execute(
            update(CLAIM)
            .where(_is(request.tenant, request.agent, request.key))
            .values(outcome=json.dumps(withheld(connection, request.tenant, told)))
        )
        cause = Cause(event=conclusion.append.drafts[-1].event_id, run=conclusion.append.stream)
        for memo in conclusion.memos:
            _remember(connection, memo, now, cause)
    return appended


def _corrected(conclusion: Conclusion, outcome: Outcome) -> Conclusion:
    """The same with another outcome, of which nothing is worth remembering."""
    *others, last = conclusion.append.drafts
    drafts = (*others, last.model_copy(update={"body": outcome.model_dump(mode="json")}))
    wish = conclusion.append.model_copy(update={"drafts": drafts})
    return conclusion.model_copy(update={"append": wish, "outcome": outcome, "memos": ()})


def _as_it_stands(link: Connection, wish: Append) -> Appended:
    return Appended(won=True, entries=entries_in(link, wish.tenant, wish.stream, wish.expected))


def _remember(connection: Connection, memo: Memo, now: datetime, cause: Cause) -> None:
    """Keep a record; a region's are kept in its own database, where its own recalls look."""
    home = home_of(connection)
    if home is None:
        keep(connection, memo, now, cause)
    else:
        home.write(lambda link: keep(link, memo, now, cause))


def _request_event(admission: Admission, body: Ref) -> Draft:
    request, workflow_id = admission.request, admission.workflow_id
    return Draft(
        event_id=event_id(request.tenant, workflow_id, admission.chain, EventType.REQUEST, 1),
        stream=workflow_id,
        type=EventType.REQUEST,
        actor_kind="system",
        actor_ref="intake",
        correlation_id=workflow_id,
        body={"agent": request.agent, "key": request.key, "body": body.model_dump(mode="json")}
        | ({} if request.requester is None else {"requester": request.requester}),
    )


def _other_request(connection: Connection, admission: Admission, body: Ref) -> str | None:
    """Whether this workflow id was another request's, whose stream must not be taken for this one's."""
    standing = entries_in(connection, admission.request.tenant, admission.workflow_id)
    wanted = _request_event(admission, body).body
    same = ("agent", "key", "body")
    if not standing or all(standing[0].body.get(name) == wanted[name] for name in same):
        return None
    return f"workflow id: {admission.workflow_id!r} was used by another request; start this one under its own"


def _other_body(key: str, first: str, now: str) -> str:
    return (
        f"key: {key!r} was used for other content (first {first[:12]}…, now {now[:12]}…); "
        "use a new key, or send the first content again"
    )


def _is(tenant: str, agent: str, key: str):
    return (CLAIM.c.tenant == tenant) & (CLAIM.c.agent == agent) & (CLAIM.c.key == key)
