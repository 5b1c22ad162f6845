from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from activities.services.database import Database
from activities.services.ledger_store import entries_in
from activities.services.reservations import (
    Claimant,
    Held,
    Hold,
    Turn,
    close,
    confirm,
    confirmed,
    look,
    reserve,
)
from models.ledger import EventType, act_stream
from models.loop import Guarantee, Receipt
from tests.conftest import a_key
from tests.databases import migrated

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ATTEMPT, SETTLE = timedelta(seconds=30), timedelta(seconds=10)
DEADLINE, SETTLED = NOW + ATTEMPT, NOW + ATTEMPT + SETTLE
TICK = timedelta(microseconds=1)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    path: Path = tmp_path_factory.mktemp("reservations")
    made = Database(migrated(f"sqlite:///{path / 'countersign.db'}"))
    yield made
    made.close()


def claimant(guarantee: Guarantee) -> Claimant:
    key = a_key()
    return Claimant(
        tenant="default",
        workflow_id=f"run-{key}",
        key=f"{key}.0",
        digest=key * 2,
        action=0,
        guarantee=guarantee,
        attempt=ATTEMPT,
        settle=SETTLE,
        event=EventType.APPLY,
    )


def receipt(who: Claimant, reference: str = "r") -> Receipt:
    return Receipt(action_key=who.key, action=0, reference=reference, version="v")


def take(database: Database, who: Claimant, now: datetime = NOW) -> Hold:
    return database.submit(lambda link: reserve(link, who, now)).result()


def logged(database: Database, who: Claimant) -> list[str]:
    found = database.read_now(lambda link: entries_in(link, who.tenant, act_stream(who.workflow_id)))
    return [entry.type.value for entry in found]


@pytest.mark.parametrize("guarantee", list(Guarantee))
def test_the_first_attempt_sends_and_a_confirmed_key_is_done_for_ever(
    database: Database, guarantee: Guarantee
) -> None:
    who = claimant(guarantee)
    hold = take(database, who)
    assert (hold.turn, hold.epoch, hold.deadline, hold.until) == (Turn.SEND, 1, DEADLINE, SETTLED)
    database.submit(lambda link: confirm(link, who, receipt(who), NOW)).result()
    for later in (NOW, SETTLED + TICK):
        again = take(database, who, later)
        assert (again.turn, again.receipt) == (Turn.DONE, receipt(who))
    assert logged(database, who) == ["apply", "receipt"]


def test_a_silent_attempt_at_a_target_that_can_be_asked_is_waited_for_until_it_has_settled(
    database: Database,
) -> None:
    who = claimant(Guarantee.ASKED)
    take(database, who)
    for early in (NOW, DEADLINE, SETTLED):
        assert (take(database, who, early).turn, take(database, who, early).epoch) == (Turn.WAIT, 1)
    hold = take(database, who, SETTLED + TICK)
    assert (hold.turn, hold.epoch, hold.deadline) == (Turn.ASK, 2, SETTLED + TICK + ATTEMPT)


def test_a_silent_attempt_at_a_target_that_refuses_a_second_use_is_taken_over_at_once(
    database: Database,
) -> None:
    who = claimant(Guarantee.KEYED)
    take(database, who)
    assert (take(database, who).turn, take(database, who).epoch) == (Turn.ASK, 3)


def test_a_silent_attempt_at_a_target_that_cannot_be_asked_is_in_doubt_and_never_repeated(
    database: Database,
) -> None:
    who = claimant(Guarantee.BLIND)
    take(database, who)
    for later in (NOW, SETTLED + TICK):
        assert take(database, who, later).turn is Turn.DOUBT
    assert logged(database, who) == ["apply", "in_doubt"]
    # A late answer of the target ends the doubt.
    database.submit(lambda link: confirm(link, who, receipt(who), SETTLED)).result()
    assert take(database, who).turn is Turn.DONE


@pytest.mark.parametrize("state", [Held.CLOSED, Held.DRIFTED])
def test_a_closed_key_stays_closed_and_cannot_be_confirmed(database: Database, state: Held) -> None:
    who = claimant(Guarantee.KEYED)
    hold = take(database, who)
    assert database.submit(lambda link: close(link, who, NOW, state, "why", hold)).result()
    assert take(database, who, SETTLED + TICK).turn.value == state.value
    with pytest.raises(LookupError, match="closed before"):
        database.submit(lambda link: confirm(link, who, receipt(who), NOW)).result()
    assert logged(database, who) == ["apply", "absent"]


def test_a_key_cannot_be_closed_by_who_saw_it_before_somebody_else_took_it(database: Database) -> None:
    who = claimant(Guarantee.KEYED)
    assert database.read_now(lambda link: look(link, who, NOW)) is None
    first = take(database, who)
    assert not database.submit(lambda link: close(link, who, NOW, Held.CLOSED, "why")).result()
    second = take(database, who)
    assert not database.submit(lambda link: close(link, who, NOW, Held.CLOSED, "why", first)).result()
    assert database.submit(lambda link: close(link, who, NOW, Held.CLOSED, "why", second)).result()
    assert logged(database, who) == ["apply", "apply", "absent"]


def test_a_confirmed_key_cannot_be_closed(database: Database) -> None:
    who = claimant(Guarantee.KEYED)
    take(database, who)
    database.submit(lambda link: confirm(link, who, receipt(who), NOW)).result()
    assert not database.submit(lambda link: close(link, who, NOW, Held.CLOSED, "why")).result()
    found = database.read_now(lambda link: confirmed(link, who.tenant, [who.key]))
    assert found == {who.key: receipt(who)}


def test_the_first_receipt_stands(database: Database) -> None:
    who = claimant(Guarantee.KEYED)
    take(database, who)
    database.submit(lambda link: confirm(link, who, receipt(who, "first"), NOW)).result()
    second = database.submit(lambda link: confirm(link, who, receipt(who, "second"), NOW)).result()
    assert second.reference == "first"
    assert logged(database, who) == ["apply", "receipt"]


def test_looking_takes_nothing(database: Database) -> None:
    who = claimant(Guarantee.ASKED)
    assert database.read_now(lambda link: look(link, who, NOW)) is None
    take(database, who)
    early = database.read_now(lambda link: look(link, who, SETTLED))
    late = database.read_now(lambda link: look(link, who, SETTLED + TICK))
    assert early is not None and late is not None
    assert (early.turn, late.turn) == (Turn.WAIT, Turn.ASK)
    assert logged(database, who) == ["apply"]


def test_a_key_that_nobody_tried_can_be_closed_before_anybody_does(database: Database) -> None:
    who = claimant(Guarantee.BLIND)
    assert database.submit(lambda link: close(link, who, NOW, Held.CLOSED, "never")).result()
    assert take(database, who).turn is Turn.CLOSED
