"""Changes of what an agent may do without a person: what people agreed to, and how it shrinks by itself.

A change lies over the policy of the file and says one thing only: what passes without a person. Everything
else (who must agree, who may start, which connectors) stands in the file alone. What is here only ever
narrows; to widen takes another change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from models.autonomy import UNDONE, ActionClass
from models.canonical import Digest, digest_of
from models.ledger import Draft, Entry, EventType
from models.loop import (
    Amount,
    Currency,
    Exemption,
    Frozen,
    GateRule,
    Intent,
    Limits,
    Name,
    Reversibility,
    Status,
)
from models.policy import OUTDATED, SEVERITY, AgentPolicy, Policy

OPERATION = "amend"
LIMITS = (
    "automatic",
    "automatic_up_to",
    "automatic_amount",
    "automatic_currency",
    "automatic_within",
)
"""The fields of a gate that say what passes without a person."""
SETBACKS = frozenset({*UNDONE, Status.FAILED})
"""Ends after which a class of actions is no longer trusted as before."""


class Autonomy(Frozen):
    """What passes without a person: the part of a policy that a change puts in place of the file's."""

    automatic: bool = False
    automatic_up_to: Literal[Reversibility.READ_ONLY, Reversibility.REVERSIBLE] = Reversibility.REVERSIBLE
    automatic_amount: Amount | None = None
    automatic_currency: Currency | None = None
    automatic_within: Limits | None = None
    grants: tuple[Exemption, ...] = Field(default=(), max_length=100)

    @model_validator(mode="after")
    def _amount_with_currency(self) -> Self:
        if (self.automatic_amount is None) != (self.automatic_currency is None):
            raise ValueError("automatic_amount and automatic_currency stand together; set both, or neither")
        return self

    @field_validator("grants")
    @classmethod
    def _names_differ(cls, grants: tuple[Exemption, ...]) -> tuple[Exemption, ...]:
        if len({one.name for one in grants}) < len(grants):
            raise ValueError("two grants have one name; uses are counted by it, so rename one")
        return grants

    @classmethod
    def of(cls, policy: AgentPolicy) -> Autonomy:
        """That part of a policy."""
        return cls(grants=policy.grants, **{name: getattr(policy.gate, name) for name in LIMITS})

    def over(self, file: AgentPolicy) -> AgentPolicy:
        """The policy of the file with this in place of its own."""
        gate = file.gate.model_copy(update={name: getattr(self, name) for name in LIMITS})
        return file.model_copy(update={"gate": gate, "grants": self.grants})


class Amendment(Frozen):
    """A change as it is bound into an intent."""

    agent: Name
    base: Digest
    """The whole policy of the file that it was made over; over another one it means nothing."""
    autonomy: Autonomy


class Stands(Frozen):
    """What the stream of an agent's changes amounts to."""

    change: Entry | None = None
    """The newest that was not taken back."""
    narrowed: tuple[ActionClass, ...] = ()
    """Classes that lost what it had allowed them, since."""


def base_of(policy: Policy) -> str:
    """Name of everything the file says."""
    return digest_of(policy)


def stands(entries: Iterable[Entry]) -> Stands:
    """The newest change of a stream, and what was narrowed since.

    A key counts where it comes first: repeating an old change brings nothing back.
    """
    known, changes = set[str](), list[Entry]()
    narrowed = list[tuple[int, ActionClass]]()
    for entry in entries:
        if entry.type is EventType.POLICY_NARROWED:
            narrowed.append((entry.version, ActionClass.model_validate(entry.body["class"])))
        elif entry.type is EventType.POLICY_CHANGED and (key := str(entry.body["key"])) not in known:
            known.add(key)
            undone = entry.body.get("withdraws")
            changes = [one for one in changes if one.body["key"] != undone]
            changes += [entry] if undone is None else []
    if not changes:
        return Stands()
    last = changes[-1]
    since = dict.fromkeys(what for version, what in narrowed if version > last.version)
    return Stands(change=last, narrowed=tuple(since))


def in_force(amendment: Amendment, file: AgentPolicy, narrowed: Iterable[ActionClass]) -> AgentPolicy:
    """The policy under a change that counts, after everything that was narrowed since."""
    policy = amendment.autonomy.over(file)
    for what in narrowed:
        policy = without(policy, file, what)
    return policy


def without(policy: AgentPolicy, file: AgentPolicy, what: ActionClass) -> AgentPolicy:
    """The policy with nothing left for a class of actions but what the file gives it; wider in nothing."""
    grants = tuple(kept for one in policy.grants if (kept := _spared(one, file, what)) is not None)
    gate = policy.gate
    if SEVERITY.index(what.reversibility) <= SEVERITY.index(Reversibility(gate.automatic_up_to)):
        gate = _drawn_back(gate, file.gate)
    return policy.model_copy(update={"gate": gate, "grants": grants})


def bounded(policy: AgentPolicy, file: AgentPolicy) -> AgentPolicy:
    """The policy with nothing left that the file does not give; wider in nothing."""
    grants = tuple(one for one in policy.grants if one in file.grants)
    return policy.model_copy(update={"gate": _drawn_back(policy.gate, file.gate), "grants": grants})


def reaches(wider: GateRule, narrower: GateRule) -> bool:
    """Whether all that passes alone under one rule surely passes under the other."""
    if not narrower.automatic:
        return True
    order = [SEVERITY.index(Reversibility(one.automatic_up_to)) for one in (narrower, wider)]
    within = _limits_reach(wider.automatic_within, narrower.automatic_within)
    return wider.automatic and order[0] <= order[1] and within and _amount_reaches(wider, narrower)


def setback(draft: Draft) -> str | None:
    """Why an event narrows what a change allowed; `None` if it does not."""
    match draft.type:
        case EventType.DRIFT:
            # That people changed the rules says nothing of the action.
            return None if draft.body.get("reason") == OUTDATED else "drift"
        case EventType.COMPENSATION:
            return "rollback"
        case EventType.OUTCOME:
            status = str(draft.body.get("status"))
            return status if status in SETBACKS else None
        case _:
            return None


def classes_of(intent: Intent) -> tuple[ActionClass, ...]:
    """The classes of an intent's actions, each once."""
    found = (
        ActionClass(
            agent=intent.proposer,
            connector=plan.connector,
            operation=plan.operation,
            reversibility=plan.reversibility,
        )
        for plan in intent.plans
    )
    return tuple(dict.fromkeys(found))


def difference(before: AgentPolicy, after: AgentPolicy) -> tuple[str, ...]:
    """What passes without a person before and after, line by line, as in a diff."""
    old, new = lines(before), lines(after)
    same = [line for line in old if line in new]
    return (
        *(f" {line}" for line in same),
        *(f"-{line}" for line in old if line not in new),
        *(f"+{line}" for line in new if line not in old),
    )


def lines(policy: AgentPolicy) -> tuple[str, ...]:
    """What passes without a person, a line each, as it would stand in the file."""
    gate = policy.gate.model_dump(mode="json", include=set(LIMITS), exclude_none=True)
    shown = [f"{name} = {_value(gate[name])}" for name in LIMITS if name in gate]
    for grant in policy.grants:
        said = grant.model_dump(mode="json", exclude_none=True, exclude={"name"})
        shown += [f"grants.{grant.name}.{name} = {_value(value)}" for name, value in said.items()]
    return tuple(shown)


def _value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case dict():
            return f"{{ {', '.join(f'{name} = {_value(one)}' for name, one in value.items())} }}"
        case list():
            return f"[{', '.join(_value(one) for one in value)}]"
        case _:
            # Escaped, so that no value can look like a line of its own.
            return json.dumps(value)


def _spared(grant: Exemption, file: AgentPolicy, what: ActionClass) -> Exemption | None:
    """What is left of a grant; the file's own are the file's business."""
    if grant in file.grants or grant.connector != what.connector or what.operation not in grant.operations:
        return grant
    left = tuple(one for one in grant.operations if one != what.operation)
    return grant.model_copy(update={"operations": left}) if left else None


def _drawn_back(gate: GateRule, file: GateRule) -> GateRule:
    """The limits of the file where they are surely no wider; otherwise none at all."""
    limits = {name: getattr(file, name) for name in LIMITS}
    if all(getattr(gate, name) == limit for name, limit in limits.items()):
        return gate
    return gate.model_copy(update=limits if reaches(gate, file) else {"automatic": False})


def _amount_reaches(wider: GateRule, narrower: GateRule) -> bool:
    if wider.automatic_amount is None:
        return True
    same = wider.automatic_currency == narrower.automatic_currency
    if narrower.automatic_amount is None or not same:
        return False
    return Decimal(narrower.automatic_amount) <= Decimal(wider.automatic_amount)


def _limits_reach(wider: Limits | None, narrower: Limits | None) -> bool:
    asked = (wider or Limits(), narrower or Limits())
    if asked[0].at_most_minor is not None and asked[0].currency != asked[1].currency:
        return False
    pairs = [(one.at_most_permille, one.at_most_minor) for one in asked]
    return all(_at_most(most, least) for most, least in zip(*pairs, strict=True))


def _at_most(wider: int | None, narrower: int | None) -> bool:
    return wider is None or (narrower is not None and narrower <= wider)
