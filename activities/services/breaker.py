"""Circuit breakers: one per endpoint, model and way of asking, so that one fault condemns nothing else.

Only faults of the server count. Back-pressure belongs to `admission`; a request that the server refuses is
the request's fault; an answer that breaks its schema counts by itself, against structured output only. A
health page alone never closes a breaker: a probe must generate a token, then traffic comes back in steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from models.errors import OutputInvalid, RateLimited, Unavailable
from models.inference import Attempt, Ending, TimeLimit, attempt_of

WINDOW_SECONDS = 30.0
SAMPLES = 20
CONNECTS = 5
"""Connections that failed in a row."""
OPEN_SECONDS = 5.0
MOST_OPEN_SECONDS = 60.0
RAMP = (10, 25, 50, 100)
"""Percent of an endpoint's room that is used after a probe, a step per `STEP` good answers. Calls beyond it
wait; were they refused, an only endpoint would fail most of its calls after it has recovered."""
STEP = 5
MOST_BREAKERS = 4096
"""Schemas may hold a request's own words, so that there are ever new ones."""


class Sign(StrEnum):
    """What one attempt says of its endpoint."""

    GOOD = "good"
    FAULT = "fault"
    UNREACHED = "unreached"
    """A fault, and the connection did not even come about."""
    PRESSURE = "pressure"
    BROKEN_SCHEMA = "broken_schema"
    NOTHING = "nothing"


class Pass(StrEnum):
    """What a call may do."""

    GO = "go"
    PROBE = "probe"
    """Generate one token first; the outcome decides for everybody."""
    STOP = "stop"


_OF_ENDING = {
    Ending.OK: Sign.GOOD,
    Ending.TRUNCATED: Sign.GOOD,
    Ending.OVERLOADED: Sign.PRESSURE,
    Ending.SCHEMA_VIOLATED: Sign.BROKEN_SCHEMA,
    Ending.SCHEMA_UNSUPPORTED: Sign.BROKEN_SCHEMA,
    Ending.BACKEND_FAULT: Sign.FAULT,
    Ending.INCOMPLETE: Sign.FAULT,
}


def sign_of(attempt: Attempt) -> Sign:
    """What an attempt says; our own short total limit says nothing of the server."""
    if attempt.ending is not Ending.TIMEOUT:
        faulty = attempt.ending is Ending.BACKEND_FAULT and not attempt.sent
        return Sign.UNREACHED if faulty else _OF_ENDING.get(attempt.ending, Sign.NOTHING)
    if attempt.limit is TimeLimit.CONNECT:
        return Sign.UNREACHED
    return Sign.NOTHING if attempt.limit is TimeLimit.TOTAL else Sign.FAULT


def sign_of_error(error: BaseException) -> Sign:
    """The same of an error, by its type, never by its text."""
    attempt = attempt_of(error)
    if attempt is not None:
        return sign_of(attempt)
    if isinstance(error, RateLimited):
        return Sign.PRESSURE
    if isinstance(error, OutputInvalid):
        return Sign.BROKEN_SCHEMA
    if isinstance(error, Unavailable):
        return Sign.FAULT
    return Sign.NOTHING


@dataclass(slots=True)
class Breaker:
    """One breaker. `clock` counts seconds; `jitter` gives 0 to 1."""

    clock: Callable[[], float]
    jitter: Callable[[], float]
    openings: int = 0
    _seen: deque[tuple[float, bool]] = field(default_factory=deque[tuple[float, bool]])
    _unreached: int = 0
    _until: float | None = None
    """Open until then; `None` is closed."""
    _patience: float = OPEN_SECONDS
    _probing: bool = False
    _ramp: int = len(RAMP) - 1
    _good: int = 0

    @property
    def share(self) -> int:
        """Percent of the endpoint's room to use now."""
        return RAMP[self._ramp]

    @property
    def is_open(self) -> bool:
        """Whether calls are kept away now; a probe may be due all the same."""
        return self._until is not None

    @property
    def is_calm(self) -> bool:
        """Whether one made anew would say the same."""
        return self._until is None and not self._unreached and self._ramp == len(RAMP) - 1

    def ask(self) -> Pass:
        """Say what a call may do now."""
        if self._until is None:
            return Pass.GO
        if self._probing or self.clock() < self._until:
            return Pass.STOP
        self._probing = True
        return Pass.PROBE

    def probed(self, alive: bool) -> None:
        """Close after a probe that generated a token; otherwise stay open for longer."""
        self._probing = False
        if not alive:
            self._open()
            return
        self._until, self._ramp, self._good = None, 0, 0
        self._seen.clear()
        self._unreached = 0

    def abandoned(self) -> None:
        """A probe was cancelled and says nothing; the next call probes."""
        self._probing = False

    def saw(self, sign: Sign) -> None:
        """Count an attempt."""
        if sign in (Sign.PRESSURE, Sign.NOTHING, Sign.BROKEN_SCHEMA):
            return
        if self._until is not None:
            # Stragglers that were under way: bad news makes it last, good news is no probe.
            self._until = max(self._until, self._pause()) if sign is not Sign.GOOD else self._until
            return
        bad = sign is not Sign.GOOD
        self._unreached = self._unreached + 1 if sign is Sign.UNREACHED else 0
        self._count(bad)
        if not bad:
            self._climb()
        elif self._ramp < len(RAMP) - 1 or self._is_too_much():
            # What fails while traffic comes back has not recovered.
            self._open()

    def _count(self, bad: bool) -> None:
        now = self.clock()
        self._seen.append((now, bad))
        while self._seen[0][0] < now - WINDOW_SECONDS:
            self._seen.popleft()

    def _is_too_much(self) -> bool:
        if self._unreached >= CONNECTS:
            return True
        bad = sum(failed for _, failed in self._seen)
        return len(self._seen) >= SAMPLES and bad * 2 >= len(self._seen)

    def _climb(self) -> None:
        self._good += 1
        if self._ramp < len(RAMP) - 1 and self._good >= STEP:
            self._ramp, self._good = self._ramp + 1, 0
        if self._ramp == len(RAMP) - 1:
            self._patience = OPEN_SECONDS

    def _open(self) -> None:
        self._until = self._pause()
        self._patience = min(self._patience * 2, MOST_OPEN_SECONDS)
        self.openings += 1

    def _pause(self) -> float:
        return self.clock() + self._patience * (0.5 + self.jitter() / 2)


@dataclass(slots=True)
class Breakers:
    """All breakers of a process; others may take its word as a hint, never as a fact."""

    clock: Callable[[], float]
    jitter: Callable[[], float]
    most: int = MOST_BREAKERS
    """So many are kept."""
    _breakers: dict[tuple[str, str, str], Breaker] = field(
        default_factory=dict[tuple[str, str, str], Breaker]
    )
    """Those that were asked for last stand last."""
    _before: int = 0
    """How often those opened that are not kept any more."""

    def of(self, endpoint: str, model: str = "", mode: str = "") -> Breaker:
        """The breaker of an endpoint with the model behind it, asked in one way."""
        key = (endpoint, model, mode)
        one = self._breakers.pop(key, None) or Breaker(self.clock, self.jitter)
        self._breakers[key] = one
        if len(self._breakers) > self.most:
            self._leave()
        return one

    def _leave(self) -> None:
        """Forget one that nobody has asked for in a long time, if there is one that has nothing to say."""
        keys = list(self._breakers)[:-1]
        gone = next((key for key in keys if self._breakers[key].is_calm), keys[0])
        self._before += self._breakers.pop(gone).openings

    def is_open(self, endpoint: str) -> bool:
        """Whether any breaker of an endpoint is open."""
        return any(one.is_open for key, one in self._breakers.items() if key[0] == endpoint)

    def openings(self) -> int:
        """How often any of them opened."""
        return self._before + sum(one.openings for one in self._breakers.values())
