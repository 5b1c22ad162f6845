"""When people are at work: the next opening after a moment, by the clock on their wall."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from models.loop import Day, Hours

DAYS = tuple(Day)
FARTHEST = 400
"""Days that are looked ahead; more holidays in a row than that is a mistake."""


def is_known(zone: str) -> bool:
    """Whether there is a time zone of that name here."""
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def next_open(hours: Hours, moment: datetime) -> datetime:
    """The moment itself if people are at work then, else when they next begin; in UTC.

    Raises:
        ValueError: they do not work within `FARTHEST` days.
    """
    zone = ZoneInfo(hours.zone)
    today = moment.astimezone(zone).date()
    for ahead in range(FARTHEST):
        day = today + timedelta(days=ahead)
        if not _works(hours, day):
            continue
        opens, closes = (_at(day, text, zone) for text in (hours.opens, hours.closes))
        if moment < closes:
            return max(moment.astimezone(UTC), opens)
    raise ValueError(f"closed: nobody works for {FARTHEST} days after {today}; take some holidays out")


def _works(hours: Hours, day: date) -> bool:
    return DAYS[day.weekday()] in hours.days and day not in hours.closed


def _at(day: date, text: str, zone: ZoneInfo) -> datetime:
    # Through UTC, so that the night in which clocks are put forward has no time that does not exist.
    return datetime.combine(day, time.fromisoformat(text), zone).astimezone(UTC)
