"""Rules over prose: sentences, numbers, links, grounding, escaping. Pure text in, plain answers out.

What a model wrote is never trusted: it is cut into sentences here, each is held against what the person
wrote, and whatever stands in a page afterwards is escaped so that it reads as text and nothing else.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LINK = re.compile(r"(?:https?://|www\.)[^\s<>\"'()\[\]{}\\`*|]+", re.IGNORECASE)
MARKUP = re.compile(r"</?[A-Za-z!?]|```|~~~|\]\(|\{\{|\{%|&#?\w+;|\*\*|__")
BLOCK = re.compile(r"^\s*(?:#{1,6}(?:\s|$)|[-*+•]\s|\d{1,9}[.)]\s|-{3,}|={3,}|\+{3,}|>|\||```|<)")
NUMBER = re.compile(r"\d(?:[\d.,:/]*\d)?")
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
SENTENCE = re.compile(r"(?<=[.!?…])[\"'”’)]*\s+")
STEM = 5
GROUNDED_PERCENT = 80
ASIDE = frozenset(("answer", "answers", "instruction", "note", "notes", "paragraph", "sentence", "sentences"))
COUNTING = frozenset(
    WORD.findall(
        "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred "
        "thousand million billion dozen half twice percent "
    )
)
COMMON = frozenset(
    WORD.findall(
        "about after again also always another because been before being both cannot come could does "
        "doing done each either even ever every from give goes have having here into itself just know "
        "like made make many more most much must need needs never nobody none only other others ours "
        "over same should show since some such take than that their them then there these they thing "
        "things this those through time under until upon very want what when where whether which while "
        "whole will with without would your yours "
    )
)
_ESCAPED = re.compile(r"([\\`*_\[\]<>&#~|{}$])")
_LEADING = re.compile(r"^([-+=:]|\d{1,9}(?=[.)]))")
_UNSAFE_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@dataclass(frozen=True, slots=True)
class Grounds:
    """What prose may lean on: the person's own words, the facts placed elsewhere, the house's limits."""

    text: str
    """Everything the person wrote, facts left out."""
    facts: tuple[str, ...]
    banned: tuple[str, ...] = ()
    check_links: bool = True
    revised: bool = False
    """Whether somebody has asked for changes."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """A phrase that an earlier sentence used already, and the later sentence that holds it."""

    phrase: str
    sentence: str


def is_one_line(text: str) -> bool:
    """Whether it holds no line break, control character or invisible character."""
    return not any(unicodedata.category(letter) in _UNSAFE_CATEGORIES for letter in text)


def flat(text: str) -> str:
    """One line: whitespace collapsed, control and invisible characters gone."""
    spaced = re.sub(r"[ \t\r\n\f\v]+", " ", text).strip(" ")
    return "".join(letter for letter in spaced if is_one_line(letter))


def folded(text: str) -> str:
    """For comparing: lower case, words and numbers only, single spaces around each."""
    return " " + " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())) + " "


def words(text: str) -> list[str]:
    """Its words, in lower case."""
    return [word.casefold() for word in WORD.findall(text)]


def sentences(text: str) -> tuple[str, ...]:
    """Cut one line into sentences."""
    return tuple(part for part in SENTENCE.split(flat(text)) if part)


def tidy(answer: str) -> tuple[str, ...]:
    """Sentences of a model's answer, without lists, headings, labels, wrapping quotes and a cut-off end."""
    lines = [line.strip() for line in answer.splitlines()]
    kept = [line for line in lines if line and not BLOCK.match(line) and not line.endswith(":")]
    found = list(sentences(" ".join(kept).strip("\"'“”` ")))
    if len(found) > 1 and found[-1].rstrip("\"'”’)")[-1:] not in ".!?…":
        found.pop()
    return tuple(dict.fromkeys(found))


def holds(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text, whatever the case, spacing and punctuation."""
    wanted = folded(phrase)
    return wanted in folded(text) if wanted.strip() else phrase.casefold() in text.casefold()


def faults(sentence: str, grounds: Grounds) -> tuple[str, ...]:
    """What is wrong with one sentence of a model, each as a phrase that follows "it". Quotes nothing."""
    found = [
        f"repeats key fact {number}, which the page already lists"
        for number, fact in enumerate(grounds.facts, 1)
        if holds(sentence, fact)
    ]
    if numbers(sentence) - numbers(grounds.text):
        found.append("names a number that the notes do not")
    if grounds.check_links and set(LINK.findall(sentence)) - set(LINK.findall(grounds.text)):
        found.append("has a link that the brief does not")
    if MARKUP.search(sentence):
        found.append("contains markup")
    if ASIDE.intersection(words(sentence)) - set(words(grounds.text)):
        found.append("talks about the task instead of the subject")
    found += [f"uses the banned phrase {phrase!r}" for phrase in grounds.banned if holds(sentence, phrase)]
    if not is_grounded(sentence, grounds):
        found.append("says something that the notes do not say")
    return tuple(found)


def numbers(text: str) -> set[str]:
    """Numbers it names, in figures or as English words."""
    return set(NUMBER.findall(text)) | COUNTING.intersection(words(text))


def is_grounded(sentence: str, grounds: Grounds) -> bool:
    """Whether most of its content words are the person's own."""
    content = _content(sentence)
    known = _content(" ".join((grounds.text, *grounds.facts)))
    return len(content & known) * 100 >= GROUNDED_PERCENT * len(content)


def shares_words(one: str, other: str) -> bool:
    """Whether a content word stands in both."""
    return bool(_content(one) & _content(other))


def repeats(paragraphs: Sequence[Sequence[str]], size: int = 5) -> tuple[Repeat, ...]:
    """Phrases of `size` words or more that a later paragraph takes from an earlier one, one per sentence."""
    seen: set[tuple[str, ...]] = set()
    found: list[Repeat] = []
    for paragraph in paragraphs:
        grams = [(sentence, _grams(sentence, size)) for sentence in paragraph]
        for sentence, own in grams:
            at = next((start for start, gram in enumerate(own) if gram in seen), None)
            if at is not None:
                found.append(Repeat(_longest(own, at, seen), sentence))
        seen.update(gram for _, own in grams for gram in own)
    return tuple(found)


def escape(text: str) -> str:
    """Markdown whose rendering is exactly this line of text, at the start of a line or a list item too."""
    return _guard(_ESCAPED.sub(r"\\\1", flat(text)))


def escape_with_links(text: str) -> str:
    """Like `escape`, with web addresses kept as links; call it only on text whose links were checked."""
    parts = re.split(f"({LINK.pattern})", flat(text), flags=re.IGNORECASE)
    marked = (_link(part) if odd % 2 else _ESCAPED.sub(r"\\\1", part) for odd, part in enumerate(parts))
    return _guard("".join(marked))


def slugify(text: str, longest: int = 60) -> str:
    """A safe slug; text without Latin letters or digits gets one from its SHA-256."""
    plain = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode()
    parts = re.findall(r"[a-z0-9]+", plain)
    while len(parts) > 1 and len("-".join(parts)) > longest:
        parts.pop()
    slug = "-".join(parts)[:longest]
    return slug if slug and slug != "index" else "post-" + hashlib.sha256(text.encode()).hexdigest()[:12]


def shorten(texts: Iterable[str], most_words: int) -> tuple[str, ...]:
    """As many whole sentences from the front as fit; at least the first."""
    kept: list[str] = []
    left = most_words
    for text in texts:
        left -= len(text.split())
        if left < 0 and kept:
            break
        kept.append(text)
    return tuple(kept)


def _content(text: str) -> set[str]:
    return {word[:STEM] for word in words(text) if len(word) > 3 and word not in COMMON}


def _grams(sentence: str, size: int) -> list[tuple[str, ...]]:
    parts = words(sentence)
    return [tuple(parts[start : start + size]) for start in range(len(parts) - size + 1)]


def _longest(own: list[tuple[str, ...]], at: int, seen: set[tuple[str, ...]]) -> str:
    phrase = list(own[at])
    for gram in own[at + 1 :]:
        if gram not in seen:
            break
        phrase.append(gram[-1])
    return " ".join(phrase)


def _guard(marked: str) -> str:
    """Keep a line that starts with `12.`, `-`, `+`, `=` or `:` from becoming a list or a heading."""
    found = _LEADING.match(marked)
    if found is None:
        return marked
    number = found[1][0].isdigit()
    return f"{found[1]}\\{marked[found.end() :]}" if number else f"\\{marked}"


def _link(address: str) -> str:
    bare = address.rstrip(".,;:!?")
    target = f"<{bare}>" if bare.lower().startswith("http") else _ESCAPED.sub(r"\\\1", bare)
    return target + address[len(bare) :]
