"""What is asked of those who tell people that something waits, and what they answer."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import AwareDatetime, Field

from models.canonical import Digest
from models.loop import BreakGlass, Frozen, GateRule, Hours, Name

FIRST_ROUND = 10_000
"""Rounds of notices about a review begin here, so that none is taken for one about the intent."""
INBOX = "inbox"
"""The list of what waits; everything is delivered there as soon as Temporal has taken it."""


class NoticeOrder(Frozen):
    """Somebody is to hear of one intent on one channel."""

    tenant: Name
    workflow_id: str
    digest: Digest
    channel: Name
    round: int = Field(ge=0)
    """0 when the intent is new, then the number of the reminder; of a review, from `FIRST_ROUND` on."""


class Told(Frozen):
    """The channel has taken it."""

    at: AwareDatetime
    reference: str
    """The channel's own name for it: a message id, a file."""
    missed: int = 0
    """How many of those it was for were refused there."""


class Due(Frozen):
    """A reminder that falls due."""

    at: AwareDatetime
    hours: Hours


class Moment(Frozen):
    """A time."""

    at: AwareDatetime


def heard_by(rule: GateRule, reminders: int) -> tuple[str, ...]:
    """Who is to hear of it after that many reminders, the inbox apart; each once, in policy's order."""
    rungs = [name for rung in rule.ladder if rung.after <= reminders for name in rung.notify]
    return _each((*rule.channels, *rule.notify, *rungs))


def told_of(glass: BreakGlass, alarms: int) -> tuple[str, ...]:
    """Who is to hear of a review after that many alarms."""
    return _each((*glass.notify, *glass.alarm) if alarms else glass.notify)


def named_in(rule: GateRule) -> tuple[str, ...]:
    """Every channel a rule speaks of, apart from the inbox."""
    glass = () if rule.break_glass is None else told_of(rule.break_glass, 1)
    return _each((*heard_by(rule, max((rung.after for rung in rule.ladder), default=0)), *glass))


def _each(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name != INBOX))
