"""Breaking the glass: one signed answer goes ahead alone, and others say afterwards if that was right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from models.answers import Answer, Identity, Kind, Verdict
from models.loop import Assurance, BreakGlass, Intent, Reversibility
from models.policy import risk

UNSAID = BreakGlass(classes=(Reversibility.READ_ONLY,), alarm=("inbox",))
"""Where the policy that let the glass be broken is gone, one other person still has to look."""


def glass_fault(kind: Kind, answer: Answer, intent: Intent, identity: Identity) -> tuple[str, str] | None:
    """Field and remedy when the glass may not be broken so; what `glass_holds` asks for, and a reason."""
    glass = intent.gate.break_glass
    if kind is not Kind.APPROVE:
        return "break_glass", "only an approval can break the glass; leave it out"
    if glass is None:
        return "break_glass", "policy has no break_glass for this; the approvals it needs have to come"
    if risk(intent.plans) not in glass.classes:
        return "break_glass", f"policy allows it for {', '.join(glass.classes)} only"
    if identity.assurance is not Assurance.SIGNED:
        return "signature", "only a signed answer can break the glass; use --sign KEY"
    if answer.role not in glass.roles:
        return "role", f"answer in one of the roles {', '.join(glass.roles)}"
    if not answer.comment.strip():
        return "comment", "say why it cannot wait; it stands in the ledger"
    if _same(answer.approver, intent.proposer):
        return "approver", "whoever proposed it cannot break the glass for it"
    return None


def glass_holds(intent: Intent, verdict: Verdict) -> bool:
    """Whether this answer is enough for the intent, since its glass was rightly broken."""
    glass = intent.gate.break_glass
    if glass is None or verdict.assurance is not Assurance.SIGNED or verdict.role not in glass.roles:
        return False
    if intent.gate.hardware and not verdict.hardware:
        return False
    return risk(intent.plans) in glass.classes and not _same(verdict.approver, intent.proposer)


def review_fault(
    answer: Answer, intent: Intent, glass: BreakGlass, broke: Iterable[str], reviews: Sequence[Verdict]
) -> tuple[str, str] | None:
    """Field and remedy when somebody may not review this: it takes people who had no part in it."""
    parts = [one for one in (*broke, intent.proposer, intent.requester) if one is not None]
    if any(_same(answer.approver, one) for one in parts):
        return "approver", "who asked for it, proposed it or broke the glass cannot review it"
    if any(_same(answer.approver, one.approver) for one in reviews):
        return "approver", f"{answer.approver} has reviewed it already; somebody else has to"
    if answer.nonce is not None and any(answer.nonce == one.nonce for one in reviews):
        return "nonce", "this very answer has counted already; sign a new one"
    if glass.review_roles and answer.role not in glass.review_roles:
        return "role", f"answer in one of the roles {', '.join(glass.review_roles)}"
    return None


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()
