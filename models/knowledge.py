"""What an agent knows about one subject before it decides: its belief, and the records that count."""

from __future__ import annotations

from pydantic import AwareDatetime, Field, ValidationError

from models.beliefs import Belief, Look, Subject, evidence
from models.canonical import Digest
from models.loop import Evidence, Frozen, Name

RECORDS = 20


class Noted(Frozen):
    """A record about the subject, by reference; `version` is the digest of its text."""

    record_id: str
    version: Digest
    kind: Name
    recorded_at: AwareDatetime


class Known(Frozen):
    """All of it, at one version of the belief."""

    belief: Belief
    records: tuple[Noted, ...] = Field(default=(), max_length=RECORDS)
    """The newest ones, newest first."""

    def evidence(self) -> tuple[Evidence, ...]:
        """How a proposal says that it rests on this; an approval is asked again when the belief changes."""
        records = (Evidence(reference=one.record_id, version=one.version) for one in self.records)
        # A subject that nothing is believed about need not be named.
        return (*([evidence(self.belief)] if self.belief.version else []), *records)


def look_about(tenant: Name, agent: Name, subject: str | None) -> Look | None:
    """What to look up about the subject of a request; `None` if it is none a belief could be about."""
    try:
        return Look.model_validate({"tenant": tenant, "agent": agent, "subject": subject})
    except ValidationError:
        return None


class Warm(Frozen):
    """Have ready what will be asked for: what settings name, and what was asked for of late."""

    tenant: Name


class Chores(Frozen):
    """What a run of upkeep is for; without anything, to have ready what will be asked for."""

    calibrate: bool = False
    """Fit again what confidences are worth."""


class Warmed(Frozen):
    """How many subjects were looked at, and how many of them had to be made ready."""

    subjects: int
    made: int


class PrewarmSettings(Frozen):
    """A subject to have ready: a SKU that sells, an incident that is open."""

    subject: Subject
    agents: tuple[Name, ...] = Field(min_length=1)
    """Whose beliefs about it."""

    def looks(self, tenant: str) -> tuple[Look, ...]:
        """What to look up."""
        return tuple(Look(tenant=tenant, agent=agent, subject=self.subject) for agent in self.agents)
