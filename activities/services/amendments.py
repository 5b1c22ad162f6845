"""The policy in force: what the file says, and over it the newest change that people agreed to.

A change is believed for as long as its proof holds: the intent it names, the signed verdicts on it, and the
keys and roles of those who gave them, read from the ledger each time. Where that fails nothing is left of it
but what the file gives as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError
from sqlalchemy import Connection, select

from activities.services.content import get_blob
from activities.services.ledger_store import add_all_in, append_in, entries_in
from activities.services.reservations import EFFECT, Held
from models.amendments import (
    Amendment,
    Autonomy,
    Stands,
    base_of,
    bounded,
    classes_of,
    in_force,
    setback,
    stands,
    without,
)
from models.answers import Verdict
from models.autonomy import ActionClass
from models.canonical import derived_id
from models.errors import (
    ConnectorRejected,
    ConnectorUnavailable,
    InvalidInput,
    PolicyDenied,
    PreconditionLost,
)
from models.gate import Standing, counted_verdicts, may_act, standing
from models.ledger import Append, Draft, Entry, EventType, policy_stream
from models.loop import Frozen, Intent, Status, action_key
from models.policy import GATE_POLICY, POLICY_AGENT, AgentPolicy, Policy, is_current, policy_digest

Doubt = Callable[[str, Verdict], str | None]


class Rules(Frozen):
    """The policy of one agent as it is in force, and why."""

    agent: str
    policy: AgentPolicy
    digest: str
    source: str = "file"
    """file; changed; narrowed, since something was undone; lapsed, since its proof or its file is gone."""
    why: str = ""
    change: Entry | None = None
    narrowed: tuple[ActionClass, ...] = ()
    version: int = 0
    """Events in the stream of its changes."""


class InForce:
    """Reads which policy is in force, and narrows it."""

    def __init__(self, policy: Policy, doubt: Doubt = lambda tenant, verdict: None) -> None:
        """`policy` is the file's; `doubt` says why a verdict of a tenant is not believed any more."""
        self.file = policy
        self._base = base_of(policy)
        self._doubt = doubt

    @property
    def base(self) -> str:
        """Name of everything the file says."""
        return self._base

    def of(self, link: Connection, tenant: str, agent: str) -> AgentPolicy:
        """The policy of an agent.

        Raises:
            PolicyDenied: the file has none.
        """
        if not self.file.may_change or agent == POLICY_AGENT:
            return self.file.of(agent)
        return self.rules(link, tenant, agent).policy

    def rules(self, link: Connection, tenant: str, agent: str) -> Rules:
        """The same with its reasons.

        Raises:
            PolicyDenied: the file has none.
        """
        file = self.file.of(agent)
        if not self.file.may_change or agent == POLICY_AGENT:
            return _rules(agent, file)
        entries = entries_in(link, tenant, policy_stream(agent))
        told, version = stands(entries), len(entries)
        if told.change is None:
            return _rules(agent, file, version=version)
        given = {"change": told.change, "narrowed": told.narrowed, "version": version}
        if told.change.body.get("base") != self._base:
            why = "the file's policy is another one since; propose the change again, or put it into the file"
            return _rules(agent, file, source="lapsed", why=why, **given)
        amendment, why = self._proven(link, tenant, agent, told.change)
        policy = in_force(amendment, file, told.narrowed) if amendment else Autonomy().over(file)
        if why is not None:
            return _rules(agent, bounded(policy, file), source="lapsed", why=why, **given)
        return _rules(agent, policy, source="narrowed" if told.narrowed else "changed", **given)

    def heed(self, link: Connection, wish: Append, now: datetime) -> None:
        """Narrow what a change had allowed, in the transaction that says that something went wrong."""
        if not self.file.may_change:
            return
        for draft in wish.drafts:
            if (why := setback(draft)) is not None and draft.body.get("digest") is not None:
                self._narrow(link, wish.tenant, draft, why, now)

    def _narrow(self, link: Connection, tenant: str, draft: Draft, why: str, now: datetime) -> None:
        digest = str(draft.body["digest"])
        intent = Intent.model_validate_json(get_blob(link, tenant, digest))
        if draft.type is EventType.OUTCOME and not _had_passed(link, intent, digest):
            return
        told = stands(entries_in(link, tenant, policy_stream(intent.proposer)))
        if told.change is None:
            return
        lost = self._lost(link, intent, told)
        drafts = [(tenant, _narrowing(tenant, draft, told.change, what, why)) for what in lost]
        add_all_in(link, drafts, now)

    def _lost(self, link: Connection, intent: Intent, told: Stands) -> list[ActionClass]:
        """The classes that a change had allowed something; where it cannot be read, all of them."""
        fresh = [one for one in classes_of(intent) if one not in told.narrowed]
        file, change = self.file.agents.get(intent.proposer), told.change
        if file is None or change is None or change.body.get("base") != self._base:
            return fresh
        amendment, _ = self._proven(link, intent.tenant, intent.proposer, change)
        if amendment is None:
            return fresh
        policy = in_force(amendment, file, told.narrowed)
        return [one for one in fresh if without(policy, file, one) != policy]

    def _proven(
        self, link: Connection, tenant: str, agent: str, change: Entry
    ) -> tuple[Amendment | None, str | None]:
        """What was agreed to, read from what was bound, and why it does not count any more."""
        try:
            intent, amendment = bound_change(link, tenant, change)
        except (InvalidInput, ValidationError, LookupError):
            return None, "what it rests on cannot be read"
        if amendment.agent != agent or amendment.base != change.body["base"]:
            return amendment, "it was agreed to for another agent or another file"
        if not is_current(self.file.of(POLICY_AGENT), intent, change.recorded_at):
            return amendment, "it was agreed to under another rule for changes than the file's"
        entries = entries_in(link, tenant, intent.workflow_id)
        ends = [one for one in entries if one.type is EventType.OUTCOME]
        if any(one.body.get("status") != Status.EXECUTED for one in ends):
            return amendment, "the run that made it ended otherwise"
        before = [one for one in entries if one.type is not EventType.OUTCOME]
        digest = str(change.body["digest"])
        why = may_act(before, intent, digest, change.recorded_at, lambda one: self._doubt(tenant, one))
        return amendment, why


def bound_change(link: Connection, tenant: str, change: Entry) -> tuple[Intent, Amendment]:
    """The intent that a change names, and the change that was bound into it.

    Raises:
        InvalidInput, ValidationError, LookupError: there is none, or it is of something else.
    """
    digest, run = str(change.body["digest"]), change.body["run"]
    intent = Intent.model_validate_json(get_blob(link, tenant, digest))
    action = intent.proposal.actions[0]
    same = change.body["key"] == action_key(digest, 0) and intent.workflow_id == run
    if not same or intent.tenant != tenant or action.connector != GATE_POLICY:
        raise LookupError("it is not what the event says")
    return intent, Amendment.model_validate_json(get_blob(link, tenant, action.arguments.digest))


def applied(link: Connection, tenant: str, agent: str, key: str) -> Entry | None:
    """The event by which an action key changed the policy of an agent, if it has."""
    for entry in entries_in(link, tenant, policy_stream(agent)):
        if entry.type is EventType.POLICY_CHANGED and entry.body.get("key") == key:
            return entry
    return None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at changing a policy, as its target sees it."""

    tenant: str
    key: str
    deadline: datetime
    now: datetime


def change_in(
    link: Connection, force: InForce, attempt: Attempt, amendment: Amendment, expected: str
) -> Entry:
    """Put a change in force, once per key, if the policy is still the one it was planned against.

    Raises:
        PreconditionLost: it is not.
        PolicyDenied: nobody reserved the key, so nobody looked whether it may be used.
        ConnectorUnavailable: the deadline has passed.
    """
    agent = amendment.agent
    # Read before the key is looked up: what another attempt of it does meanwhile is then no drift.
    rules = force.rules(link, attempt.tenant, agent)
    if (done := applied(link, attempt.tenant, agent, attempt.key)) is not None:
        return done
    run = _reserved_by(link, attempt)
    if amendment.base != force.base or rules.digest != expected:
        raise PreconditionLost(f"{GATE_POLICY}: the policy of {agent} has changed since the plan")
    after = policy_digest(amendment.autonomy.over(force.file.of(agent)))
    body = {"base": amendment.base, "before": rules.digest, "after": after}
    return _append(link, attempt, run, rules, body)


def withdraw_in(
    link: Connection, force: InForce, attempt: Attempt, amendment: Amendment, undoes: str
) -> Entry:
    """Take a change back, once per key, so that the one before it is in force again, as far as it still is.

    Raises:
        ConnectorRejected: another change came after it.
        PolicyDenied, ConnectorUnavailable: as for `change_in`.
    """
    rules = force.rules(link, attempt.tenant, amendment.agent)
    if (done := applied(link, attempt.tenant, amendment.agent, attempt.key)) is not None:
        return done
    run = _reserved_by(link, attempt)
    if rules.change is None or rules.change.body["key"] != undoes:
        raise ConnectorRejected(
            f"{GATE_POLICY}: another change of {amendment.agent} came after it; propose what you want instead"
        )
    body = {"base": amendment.base, "before": rules.digest, "withdraws": undoes}
    return _append(link, attempt, run, rules, body)


def _append(link: Connection, attempt: Attempt, run: str, rules: Rules, body: dict[str, str]) -> Entry:
    stream, key = policy_stream(rules.agent), attempt.key
    named = {"agent": rules.agent, "key": key, "digest": key.partition(".")[0], "run": run}
    draft = Draft(
        event_id=derived_id("event", attempt.tenant, stream, EventType.POLICY_CHANGED, key),
        stream=stream,
        type=EventType.POLICY_CHANGED,
        actor_kind="worker",
        actor_ref="act",
        correlation_id=run,
        body=named | body,
    )
    wish = Append(tenant=attempt.tenant, stream=stream, expected=rules.version, drafts=(draft,))
    if not append_in(link, wish, attempt.now).won:
        raise PreconditionLost(
            f"{GATE_POLICY}: the policy of {rules.agent} is being changed by somebody else"
        )
    return entries_in(link, attempt.tenant, stream, rules.version)[0]


def _reserved_by(link: Connection, attempt: Attempt) -> str:
    """The run whose attempt holds the key of this tenant; the gate was asked in that transaction."""
    mine = (EFFECT.c.tenant == attempt.tenant) & (EFFECT.c.key == attempt.key)
    row = link.execute(select(EFFECT).where(mine)).first()
    if row is None or row.state != Held.RESERVED:
        raise PolicyDenied(f"action {attempt.key}: no attempt of this tenant holds it")
    if attempt.now >= attempt.deadline:
        raise ConnectorUnavailable(f"action {attempt.key}: its deadline has passed; nothing was changed")
    return str(row.workflow_id)


def _had_passed(link: Connection, intent: Intent, digest: str) -> bool:
    """Whether anything could have been done; what never passed the gate says nothing of its actions."""
    verdicts = counted_verdicts(entries_in(link, intent.tenant, intent.workflow_id), digest)
    return standing(intent, verdicts) is Standing.PASSED


def _narrowing(tenant: str, cause: Draft, change: Entry, what: ActionClass, why: str) -> Draft:
    stream, named = policy_stream(what.agent), what.model_dump(mode="json")
    parts = (cause.event_id, what.connector, what.operation, what.reversibility.value)
    return Draft(
        event_id=derived_id("event", tenant, stream, EventType.POLICY_NARROWED, *parts),
        stream=stream,
        type=EventType.POLICY_NARROWED,
        actor_kind="system",
        actor_ref="gate",
        correlation_id=cause.correlation_id,
        causation_id=cause.event_id,
        body={"agent": what.agent, "class": named, "why": why, "change": change.body["key"]},
    )


def _rules(agent: str, policy: AgentPolicy, **more: object) -> Rules:
    return Rules.model_validate({"agent": agent, "policy": policy, "digest": policy_digest(policy), **more})
