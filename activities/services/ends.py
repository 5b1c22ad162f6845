"""Whether what a run says became of its actions is what their keys say.

Whoever may use Temporal may complete an activity by hand. A run cannot tell such an answer from a worker's;
the keys can, which only the acting worker writes.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select

from activities.services.ledger_store import entries_in
from activities.services.reservations import EFFECT, Held
from models.ledger import EventType
from models.loop import Outcome, Receipt, Status

UNDO = ".undo"
OPEN = (Held.RESERVED, Held.DOUBT)
UNSETTLED = (Status.IN_DOUBT, Status.COMPENSATION_FAILED)
"""Ends that claim nothing of the actions that have no receipt in them."""


def borne_out(link: Connection, tenant: str, outcome: Outcome) -> Outcome:
    """The outcome as it was meant, or one in doubt where the keys of its run say something else."""
    if outcome.digest is None:
        return outcome  # Nothing was put to anybody: its receipts, if any, are of runs that it started.
    standing, undone, pending = _keys(link, tenant, outcome.workflow_id)
    real = _real(outcome.receipts, standing)
    left = {key: receipt for key, receipt in standing.items() if key not in undone}
    is_true = len(real) == len(outcome.receipts)
    if outcome.status not in UNSETTLED:
        is_true = is_true and real.keys() == left.keys() and not pending
    if is_true:
        return outcome
    said = f"{outcome.status}, {outcome.reason}" if outcome.reason else outcome.status
    reason = f"the ledger does not bear out what was reported ({said}); look at the target"[:300]
    receipts = tuple((left | real)[key] for key in sorted(left))
    return outcome.model_copy(update={"status": Status.IN_DOUBT, "reason": reason, "receipts": receipts})


def unkept(link: Connection, tenant: str, workflow_id: str) -> str | None:
    """The key of an action of this run that stands, or may yet, and was not kept; `None` if there is none."""
    standing, undone, pending = _keys(link, tenant, workflow_id)
    drifts = (entry.body for entry in entries_in(link, tenant, workflow_id) if entry.type is EventType.DRIFT)
    kept = {receipt["action_key"] for body in drifts for receipt in body["kept"]}
    return next(iter(pending + sorted(standing.keys() - undone - kept)), None)


def _keys(link: Connection, tenant: str, workflow_id: str) -> tuple[dict[str, Receipt], set[str], list[str]]:
    """What was applied, what of it was taken back, and what of either is not known yet."""
    wanted = (EFFECT.c.tenant == tenant) & (EFFECT.c.workflow_id == workflow_id)
    rows = link.execute(select(EFFECT.c.key, EFFECT.c.state, EFFECT.c.result).where(wanted)).all()
    done = {row.key: row.result for row in rows if row.state == Held.CONFIRMED}
    undone = {key.removesuffix(UNDO) for key in done if key.endswith(UNDO)}
    standing = {
        key: Receipt.model_validate_json(result) for key, result in done.items() if not key.endswith(UNDO)
    }
    return standing, undone, sorted(row.key for row in rows if row.state in OPEN)


def _real(receipts: Sequence[Receipt], standing: dict[str, Receipt]) -> dict[str, Receipt]:
    """Those that the acting worker has confirmed, each once; a reader may have added links and a detail."""
    real = dict[str, Receipt]()
    for receipt in receipts:
        known = standing.get(receipt.action_key)
        if known is not None and _of_target(known) == _of_target(receipt):
            real.setdefault(receipt.action_key, receipt)
    return real


def _of_target(receipt: Receipt) -> tuple[int, str, str]:
    return receipt.action, receipt.reference, receipt.version
