"""Binding: from a proposal and its dry runs to canonical bytes, a digest, a card, and an event."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Connection

from activities.services.amendments import InForce
from activities.services.beliefs import renewed_in
from activities.services.content import get_blob, put_blob, put_model
from activities.services.database import Database
from activities.services.ends import unkept
from activities.services.grants import give_back, take_use
from activities.services.ledger_store import append_in, entries_in
from activities.services.requests import last_intent
from models.canonical import sha256
from models.card import full_card, short_card
from models.errors import PreconditionLost
from models.ledger import Draft
from models.loop import Intent, Use
from models.orders import Presentation, Presented
from models.policy import covers, passes_alone, policy_digest

MARKDOWN = "text/markdown; charset=utf-8"


class Intents:
    """Puts proposals forward."""

    def __init__(
        self, database: Database, clock: Callable[[], datetime], force: InForce | None = None
    ) -> None:
        """Events are stamped by the clock. With `force`, what is in force when it is bound is the policy."""
        self._force = force
        self._database = database
        self._clock = clock

    async def present(self, presentation: Presentation) -> Presented:
        """Bind and log an intent; if the stream has moved on, return what stands there."""
        return await self._database.write(lambda link: self._present(link, presentation))

    def _present(self, link: Connection, presentation: Presentation) -> Presented:
        if self._force is not None and self._force.file.may_change:
            policy = self._force.of(link, presentation.append.tenant, presentation.proposal.agent)
            said = {"policy": policy, "policy_digest": policy_digest(policy)}
            presentation = presentation.model_copy(update=said)
        return _present(link, presentation, self._clock())


def _present(connection: Connection, presentation: Presentation, now: datetime) -> Presented:
    tenant = presentation.append.tenant
    texts = {ref: get_blob(connection, tenant, ref).decode() for ref in _texts(presentation)}
    use = _use(connection, presentation)
    presentation = _up_to_date(connection, presentation, asked=use is None)
    intent = _bind(presentation, use, card_digest="0" * 64)
    full = full_card(intent, texts)
    intent = intent.model_copy(update={"card_digest": sha256(full.encode())})
    # The intent itself is what was decided on, and stays; its cards hold the texts, and go with the subject.
    subject = presentation.request.subject
    put_blob(connection, tenant, full.encode(), MARKDOWN, subject, plainly=True)
    digest = put_model(connection, tenant, intent).digest
    card = short_card(intent, digest, full)
    short = put_blob(connection, tenant, card.encode(), MARKDOWN, subject, plainly=True)
    drafts = _events(presentation, intent, digest, short.digest)
    wish = presentation.append.model_copy(update={"drafts": drafts})
    appended = append_in(connection, wish, now)
    if appended.won:
        if (key := unkept(connection, tenant, wish.stream)) is not None:
            raise PreconditionLost(f"action {key} stands or may yet arrive; nothing new is bound beside it")
        return Presented(won=True, digest=digest, intent=intent, card=card)
    if use is not None:
        give_back(connection, tenant, intent.proposer, use)
    standing = entries_in(connection, tenant, wish.stream)
    bound, card = last_intent(connection, tenant, standing)
    return Presented(won=False, entries=appended.entries, intent=bound, card=card)


def _texts(presentation: Presentation) -> list[str]:
    reasons = presentation.proposal.reasons
    return [plan.diff.digest for plan in presentation.plans] + ([reasons.digest] if reasons else [])


def _up_to_date(connection: Connection, presentation: Presentation, asked: bool) -> Presentation:
    """Put again, a proposal rests on what is believed now, and people are shown what has changed in it.

    The first time it is as its agent made it: if that has changed, the agent is to think again first.

    Raises:
        PreconditionLost: it has changed, and nobody would be asked.
    """
    if presentation.number == 1:
        return presentation
    proposal, changed = renewed_in(connection, presentation.append.tenant, presentation.proposal)
    if not changed:
        return presentation
    if not asked or passes_alone(presentation.policy.gate, presentation.plans):
        raise PreconditionLost(
            f"evidence: {changed[0][:200]}; nobody is asked, so decide again and send it anew"
        )
    concerns = dict.fromkeys((*(text[:300] for text in changed), *proposal.concerns))
    renewed = proposal.model_copy(update={"concerns": tuple(concerns)})
    return presentation.model_copy(update={"proposal": renewed})


def _use(connection: Connection, presentation: Presentation) -> Use | None:
    """A use of the first grant that covers everything and has one left, if a person would be asked."""
    policy, plans = presentation.policy, presentation.plans
    if passes_alone(policy.gate, plans):
        return None
    for grant in policy.grants:
        if covers(grant, plans, presentation.created_at):
            use = take_use(connection, presentation.append.tenant, presentation.proposal.agent, grant)
            if use is not None:
                return use
    return None


def _bind(presentation: Presentation, use: Use | None, card_digest: str) -> Intent:
    gate = presentation.policy.gate
    return Intent(
        tenant=presentation.append.tenant,
        workflow_id=presentation.append.stream,
        request_key=presentation.request.key,
        number=presentation.number,
        proposer=presentation.proposal.agent,
        proposal=presentation.proposal,
        plans=presentation.plans,
        already_applied=presentation.already_applied,
        requester=presentation.request.requester,
        gate=gate,
        use=use,
        policy_digest=presentation.policy_digest,
        card_digest=card_digest,
        created_at=presentation.created_at,
        expires_at=presentation.created_at + timedelta(seconds=gate.absolute_seconds),
        nonce=presentation.nonce,
    )


def _events(presentation: Presentation, intent: Intent, digest: str, short: str) -> tuple[Draft, Draft]:
    plans, intents = presentation.append.drafts
    plan = {
        "number": intent.number,
        "plans": [
            {
                "action": one.action,
                "connector": one.connector,
                "operation": one.operation,
                "version": one.target_version,
                "reversibility": one.reversibility.value,
                "guarantee": one.guarantee.value,
                "diff": one.diff.digest,
            }
            for one in intent.plans
        ],
    }
    bound = {
        "digest": digest,
        "number": intent.number,
        "card": intent.card_digest,
        "short_card": short,
        "policy": intent.policy_digest,
        "expires_at": intent.expires_at.isoformat(),
    }
    return plans.model_copy(update={"body": plan}), intents.model_copy(update={"body": bound})
