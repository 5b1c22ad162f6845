"""The policy as a target: a change of what an agent may do without a person, made by an ordinary intent.

It stands in the ledger, which refuses a second event of one key, so using a key twice changes nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from activities.connectors.base import Applied, Dry, Work
from activities.services.amendments import Attempt, InForce, applied, change_in, withdraw_in
from activities.services.arguments import read_arguments
from activities.services.database import Database
from activities.services.records import records_of
from models.amendments import OPERATION, Amendment, difference
from models.autonomy import CONFIDENCE, ActionClass, Record, interval
from models.errors import ConnectorUnavailable, InvalidInput, UnknownName
from models.ledger import Entry
from models.loop import Guarantee, Reversibility
from models.policy import GATE_POLICY, POLICY_AGENT, policy_digest

REMEDIES = {
    "agent": "name an agent that has a policy",
    "base": "propose it with `countersign policy propose`, which fills it in",
    "autonomy": "write automatic, automatic_up_to, automatic_amount, automatic_currency, automatic_within, "
    "grants, as in the file",
}


class GatePolicy:
    """Changes of policy."""

    name = GATE_POLICY
    guarantee = Guarantee.KEYED
    settle = timedelta(0)

    def __init__(self, database: Database, force: InForce, clock: Callable[[], datetime]) -> None:
        """The database holds the ledger; `force` knows the file."""
        self._database = database
        self._force = force
        self._clock = clock

    async def plan(self, work: Work) -> Dry:
        """Show what would pass without a person then and does not now, and what the record says.

        Raises:
            InvalidInput: an argument is wrong, the file is another one by now, or nothing would change.
            PolicyDenied: the agent has no policy.
        """
        wanted = self._read(work)
        rules = await self._database.read(lambda link: self._force.rules(link, work.tenant, wanted.agent))
        after = wanted.autonomy.over(self._force.file.of(wanted.agent))
        if policy_digest(after) == rules.digest:
            raise InvalidInput.field("autonomy", wanted.agent, "it is what is in force; change something")
        records = await records_of(self._database, work.tenant)
        record = [line for of, one in records.items() if of.agent == wanted.agent for line in _told(of, one)]
        return Dry(
            target=f"{GATE_POLICY}:{wanted.agent}",
            version=rules.digest,
            diff="\n".join([*difference(rules.policy, after), *record]) + "\n",
            reversibility=Reversibility.REVERSIBLE,
            undo="the rules that are in force now are put back, as far as they still hold",
        )

    async def find(self, key: str, work: Work) -> Applied | None:
        """Look the key up in the ledger."""
        agent = self._shape(work).agent
        entry = await self._database.read(lambda link: applied(link, work.tenant, agent, key))
        return None if entry is None else _applied(entry)

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Put the change in force, once per key.

        Raises:
            PreconditionLost: the policy, or the file, has changed since the plan.
        """
        wanted = self._shape(work)

        def change(link: Connection) -> Entry:
            attempt = Attempt(work.tenant, key, deadline, self._clock())
            return change_in(link, self._force, attempt, wanted, expected)

        return _applied(await self._database.write(change))

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """Read it back.

        Raises:
            ConnectorUnavailable: it is not there.
        """
        found = await self.find(applied.reference, work)
        if found is None:
            raise ConnectorUnavailable(f"{GATE_POLICY}: no change {applied.reference}; try again")
        return found

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """Take the change back, once per key; what was in force before is again, as far as it still holds.

        Raises:
            ConnectorRejected: another change came after it.
        """
        wanted, undoes = self._shape(work), applied.reference

        def withdraw(link: Connection) -> Entry:
            attempt = Attempt(work.tenant, key, deadline, self._clock())
            return withdraw_in(link, self._force, attempt, wanted, undoes)

        return _applied(await self._database.write(withdraw))

    def _read(self, work: Work) -> Amendment:
        wanted = self._shape(work)
        if wanted.agent == POLICY_AGENT or wanted.agent not in self._force.file.agents:
            known = ", ".join(one for one in sorted(self._force.file.agents) if one != POLICY_AGENT) or "none"
            raise InvalidInput.field("agent", wanted.agent, f"name one of {known}; the file has no other")
        if wanted.base != self._force.base:
            raise InvalidInput.field(
                "base", wanted.base[:12], "the file's policy is another one by now; propose the change again"
            )
        return wanted

    def _shape(self, work: Work) -> Amendment:
        if work.operation != OPERATION:
            raise UnknownName(f"operation: {work.operation!r} is not known here; known: {OPERATION}")
        arguments: dict[str, Any] = work.arguments
        return read_arguments(Amendment, arguments, REMEDIES)


def _applied(entry: Entry) -> Applied:
    version = str(entry.body.get("after") or entry.body["before"])
    return Applied(str(entry.body["key"]), version, detail="withdrawn" if "withdraws" in entry.body else "")


def _told(of: ActionClass, record: Record) -> tuple[str, ...]:
    """What the ledger says of a class, in numbers; counted here, and no claim of whoever proposes."""
    low, high = interval(record.unchanged, record.decided)
    return (
        f" # on record: {of.connector}.{of.operation} ({of.reversibility}): {record.unchanged} of "
        f"{record.decided} approved unchanged, {CONFIDENCE:.0%} interval {low:.1%} to {high:.1%}; "
        f"{record.alone} passed alone, {record.undone} undone",
    )
