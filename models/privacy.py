"""Personal data found by rules. What is found raises a data class and never lowers one.

Rules find what has a form: e-mail addresses, phone numbers, payment cards, bank accounts, IP addresses. They
do not find names; a caller that knows better says so with the data class of its call.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import StrEnum

from models.inference import DataClass

Place = tuple[int, int]
"""From and to in a text."""


class Kind(StrEnum):
    """Forms of personal data."""

    EMAIL = "email"
    PHONE = "phone"
    CARD = "card"
    IBAN = "iban"
    IP = "ip"


_EMAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
_PHONE = re.compile(
    r"(?<!\d )(?:(?<![\w.+])\+|(?<![\w.+-])00)[1-9](?:[ ./()-]{0,2}\d){6,14}(?!\w)"
    r"|(?<![\w.+-])(?<!\d )0\d{1,4}(?: ?[/-] ?| )\d[\d -]{4,10}\d(?!\w)"
    r"|(?<![\w.+-])(?<!\d )(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![\w-])"
)
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)")
_IBAN = re.compile(r"(?<!\w)[A-Za-z]{2}\d{2}(?: ?[A-Za-z0-9]){11,30}(?!\w)")
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(?![\w:])")
_COUNTRIES = {
    15: "NO",
    16: "BE",
    18: "DK FI FK FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU MN XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM SO TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HN HU LB NI PL SV",
    29: "BR EG PS QA UA",
    30: "JO KW MU YE",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
_IBAN_LENGTHS = {country: length for length, names in _COUNTRIES.items() for country in names.split()}
"""ISO 13616: without them one random identifier in two thousand would be an account number."""
_NOT_DIGIT = re.compile(r"\D")
_DIGIT = re.compile(r"\d")

# The lengths and beginnings that payment networks give out; other numbers with a good check digit abound.
_NETWORK = re.compile(
    r"4\d{12}(?:\d{3})?(?:\d{3})?|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[0689]\d{12}|6\d{15,18}"
)


def found_in(text: str) -> frozenset[Kind]:
    """Which forms of personal data stand in a text."""
    return frozenset(kind for kind, finds in _rules(text).items() if finds(text))


def raised(data_class: DataClass, texts: Iterable[str]) -> DataClass:
    """`personal` if a text holds personal data, else the class as it was."""
    if data_class is DataClass.PERSONAL:
        return data_class
    return DataClass.PERSONAL if is_personal(texts) else data_class


def is_personal(texts: Iterable[str]) -> bool:
    """Whether rules find personal data in a text."""
    return any(finds(text) for text in texts for finds in _rules(text).values())


def spans(text: str) -> tuple[tuple[int, int, Kind], ...]:
    """Where personal data stand in a text: from, to and which. Of those that overlap it is the first."""
    found = [(start, end, kind) for kind, places in _PLACES.items() for start, end in places(text)]
    kept: list[tuple[int, int, Kind]] = []
    for start, end, kind in sorted(found, key=lambda one: (one[0], -one[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end, kind))
    return tuple(kept)


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def mod97(iban: str) -> bool:
    """Whether the check digits of a bank account number are right (ISO 13616)."""
    turned = iban[4:] + iban[:4]
    return int("".join(str(int(letter, 36)) for letter in turned)) % 97 == 1


def _rules(text: str) -> Mapping[Kind, Callable[[str], bool]]:
    """Those that can find something: without a digit most of them cannot, and need not look."""
    return _RULES if _DIGIT.search(text) else _WITHOUT_DIGITS


def _email(text: str) -> bool:
    return "@" in text and _EMAIL.search(text) is not None


def _phone(text: str) -> bool:
    return _PHONE.search(text) is not None


def _card(text: str) -> bool:
    return any(True for _ in _cards(text))


def _iban(text: str) -> bool:
    return any(True for _ in _ibans(text))


def _ip(text: str) -> bool:
    return any(True for _ in _ips(text))


def _cards(text: str) -> Iterator[Place]:
    for match in _CARD.finditer(text):
        number = _NOT_DIGIT.sub("", match.group())
        if _NETWORK.fullmatch(number) is not None and luhn(number):
            yield match.span()


def _ibans(text: str) -> Iterator[Place]:
    for match in _IBAN.finditer(text):
        if length := _iban_length(match.group()):
            yield match.start(), match.start() + length


def _iban_length(written: str) -> int:
    """How much of it is an account number; the words after one look like more of it."""
    parts = written.split(" ")
    for count in range(len(parts), 0, -1):
        reading = "".join(parts[:count])
        if len(reading) == _IBAN_LENGTHS.get(reading[:2].upper()) and reading.isascii() and mod97(reading):
            return len(" ".join(parts[:count]))
    return 0


def _ips(text: str) -> Iterator[Place]:
    yield from (match.span() for match in _IPV4.finditer(text) if _is_ip(match.group()))
    if text.count(":") < 2:
        return
    for match in _IPV6.finditer(text):
        written = match.group().rstrip(".:")
        if _is_ip(written):
            yield match.start(), match.start() + len(written)


def _is_ip(written: str) -> bool:
    try:
        address = ipaddress.ip_address(written)
    except ValueError:
        return False
    # One's own machine is nobody's address.
    return not (address.is_loopback or address.is_unspecified)


_RULES: dict[Kind, Callable[[str], bool]] = {
    Kind.EMAIL: _email,
    Kind.PHONE: _phone,
    Kind.CARD: _card,
    Kind.IBAN: _iban,
    Kind.IP: _ip,
}
_WITHOUT_DIGITS = {kind: _RULES[kind] for kind in (Kind.EMAIL, Kind.IP)}
_PLACES: dict[Kind, Callable[[str], Iterable[Place]]] = {
    Kind.EMAIL: lambda text: (match.span() for match in _EMAIL.finditer(text)),
    Kind.PHONE: lambda text: (match.span() for match in _PHONE.finditer(text)),
    Kind.CARD: _cards,
    Kind.IBAN: _ibans,
    Kind.IP: _ips,
}
