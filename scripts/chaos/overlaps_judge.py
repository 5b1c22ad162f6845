"""What must be true once everybody is done, from the target's own book, the ledger, and what was told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from activities.services.ledger_export import of_database
from activities.services.verifier import Verifier
from models.errors import ConnectorRejected, ConnectorUnavailable, CountersignError
from models.ledger import act_stream
from models.loop import Guarantee
from models.orders import Effect, Effected
from scripts.chaos.bound import TENANT

if TYPE_CHECKING:
    from scripts.chaos.overlaps import Playing

NOTHING = (Effected.ABSENT, Effected.DRIFTED, Effected.REFUSED)
TRIES = 8


class Judge:
    """What must be true of a run once everybody is done."""

    def __init__(self, played: Playing) -> None:
        """Look at what is left."""
        self._played, self._case, self._target = played, played.case, played.target
        self._database, self._stage, self._order = played.database, played.stage, played.order
        self._wrong = played.wrong

    async def judge(self) -> None:
        """Let time pass and what is under way arrive, ask what became of it, and compare."""
        early = [*self._target.book]
        for sent in [*self._target.coming]:
            # Whatever may still arrive does, once everybody has been told.
            self._target.arrives(sent)
        final = await self._truth()
        done = sum(1 for one in self._target.book if one.key == self._played.key)
        if final is None:
            return self._wrong.append("nobody can find out what became of it")
        self._compare("in the end", final.what, done)
        for step, what in self._played.heard:
            if step != "undo" and (self._case.undoing or self._ended_by_run(what)):
                continue
            self._compare(f"{step} was told", what, done)
        if len(early) != len(self._target.book) and final.what in NOTHING:
            self._wrong.append("a request arrived after it was called absent")
        self._in_the_ledger(final)
        await self._again(final)
        self._verify()

    def _ended_by_run(self, what: Effected) -> bool:
        """A run that has ended its intent waits for no answer, and does not mind what it is."""
        return what is Effected.REFUSED and not self._played.left["expire"]

    async def _truth(self) -> Effect | None:
        """As the run does, when all attempts are over."""
        step = self._played.actor.undo if self._case.undoing else self._played.actor.settle
        for _ in range(TRIES):
            ahead = [one for one in self._played.deadlines() if one >= self._stage.clock()]
            if ahead:
                self._stage.pass_by(max(ahead))
            try:
                return await step(self._order)
            except ConnectorUnavailable:
                continue
            except ConnectorRejected:
                return Effect(what=Effected.ABSENT, reason="it cannot be taken back")
        return None

    def _compare(self, who: str, what: Effected, done: int) -> None:
        blind = self._case.guarantee is Guarantee.BLIND
        positive = what is (Effected.UNDONE if self._case.undoing else Effected.APPLIED)
        if done > 1 and not blind:
            self._wrong.append(f"it was done {done} times")
        if positive and done != 1:
            self._wrong.append(f"{who} {what}, and it was done {done} times")
        if what in NOTHING and done:
            self._wrong.append(f"{who} {what}, and it was done")
        if what is Effected.IN_DOUBT and not blind:
            self._wrong.append(f"{who} in doubt, and the target can be asked")
        if blind and self._target.calls[self._played.key] > 1:
            self._wrong.append("it was sent twice to a target that cannot be asked")

    def _in_the_ledger(self, final: Effect) -> None:
        key = self._played.key
        stream = act_stream(self._order.workflow_id)
        rows = self._database.rows(f"SELECT type, envelope FROM event WHERE stream = '{stream}' ORDER BY seq")
        kinds = [str(row[0]) for row in rows if f'"key":"{key}"' in bytes(row[1]).decode()]
        tried = "compensation" if self._case.undoing else "apply"
        receipts = kinds.count("receipt")
        sure = final.what in (Effected.APPLIED, Effected.UNDONE)
        if receipts != (1 if sure else 0):
            self._wrong.append(f"{final.what} in the end, and {receipts} receipts: {kinds}")
        if receipts and tried not in kinds[: kinds.index("receipt")]:
            self._wrong.append(f"a receipt of what was never begun: {kinds}")
        if receipts and tried in kinds[kinds.index("receipt") :]:
            self._wrong.append(f"begun again after its receipt: {kinds}")
        if kinds.count("absent") > 1 or ("absent" in kinds and receipts):
            self._wrong.append(f"absent and not: {kinds}")

    async def _again(self, final: Effect) -> None:
        """Whoever asks again hears the same, and nothing comes of it."""
        book, size = [*self._target.book], self._events()
        for step in ("undo", "undo") if self._case.undoing else ("apply", "settle", "apply"):
            try:
                effect = await getattr(self._played.actor, step)(self._order)
            except CountersignError as error:
                if not (self._case.undoing and final.what is Effected.ABSENT):
                    self._wrong.append(f"{step} again: {type(error).__name__}: {error.message}")
                continue
            if self._ended_by_run(effect.what):
                continue
            same = effect.what is final.what or (effect.what in NOTHING and final.what in NOTHING)
            if not same:
                self._wrong.append(f"{step} again says {effect.what}, it was {final.what}")
        if final.what in (Effected.APPLIED, Effected.UNDONE) and (book, size) != (
            self._target.book,
            self._events(),
        ):
            self._wrong.append("asking again changed something")

    def _events(self) -> int:
        return len(self._database.rows("SELECT seq FROM event WHERE type NOT IN ('refusal')"))

    def _verify(self) -> None:
        head = tuple(map(tuple, self._database.rows("SELECT size, peaks FROM log_head")))
        known = self._played.world.verified
        if head not in known:
            report = Verifier(()).check(of_database(self._database.link, TENANT, "explored"))
            known[head] = tuple(f"the verifier: {one.what}" for one in report.findings)
        self._wrong.extend(known[head])
