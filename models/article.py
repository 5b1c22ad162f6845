"""An article put together from models' answers: the reading of answers, the placing of facts, the checks.

Pure and total: any answer, however wrong, gives an article in which every fact of the brief stands unchanged
in its slot, or a concern that says otherwise. A sentence that the brief does not bear is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from models.content import Brief, ContentSettings, slug_candidates
from models.loop import Frozen
from models.prose import (
    BLOCK,
    Grounds,
    Repeat,
    escape,
    escape_with_links,
    faults,
    flat,
    folded,
    holds,
    repeats,
    sentences,
    shares_words,
    shorten,
    tidy,
)

MOST_WORDS = 90
"""Of one section's prose."""
LEAST_WORDS = 40
"""Of one section's prose, if the notes give that much; a model with nothing to say would invent."""
MOST_REPEATS = 2
DESCRIPTION = (20, 155)
HEADING = 60
Item = TypeVar("Item")
_PLAIN_HEADINGS = ("The main points", "Good to know", "In practice", "And also")


class Draft(Frozen):
    """An article as it would be published, and what its checks still object to."""

    title: str
    slug: str
    description: str
    tags: tuple[str, ...]
    body: str
    """Markdown."""
    concerns: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    """What code chose instead of a model's answer, where nothing is lost by it."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A heading per section, and the numbers (from 0) of the facts that stand in its slot."""

    headings: tuple[str, ...]
    slots: tuple[tuple[int, ...], ...]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answers:
    """What models answered, as it came; `rewritten` is paraphrase by sentence."""

    outline: str
    sections: tuple[str, ...]
    metadata: str
    rewritten: Mapping[str, str]
    feedback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prose:
    """A section's sentences after checking."""

    sentences: tuple[str, ...]
    concerns: tuple[str, ...] = ()


def section_count(brief: Brief) -> int:
    """Two to four sections, by the number of facts."""
    return min(4, max(2, math.ceil(len(brief.key_facts) / 2)))


def grounds(brief: Brief, feedback: Sequence[str], limits: ContentSettings) -> Grounds:
    """What prose for this brief may lean on."""
    text = "\n".join((brief.title, brief.audience, *brief.keywords, brief.notes, *feedback))
    return Grounds(text, brief.key_facts, limits.banned_phrases, limits.check_links, bool(feedback))


def section_notes(brief: Brief) -> tuple[tuple[str, ...], ...]:
    """The author's own sentences for each section, in their order; those that hold a fact are left out."""
    lines = (line for line in brief.notes.splitlines() if not BLOCK.match(line))
    own = [s for s in sentences(" ".join(lines)) if not any(holds(s, fact) for fact in brief.key_facts)]
    return tuple(shorten(group, MOST_WORDS) for group in _split(own, section_count(brief)))


def default_slots(brief: Brief) -> tuple[tuple[int, ...], ...]:
    """Facts in the brief's order, evenly spread."""
    return tuple(tuple(group) for group in _split(range(len(brief.key_facts)), section_count(brief)))


def read_outline(brief: Brief, answer: str) -> Outline:
    """The outline in a model's answer; whatever is unusable in it becomes code's own choice."""
    given = mapping_of(answer)
    offered = [flat(text).strip(" .:#-") for text in texts_of(given.get("headings"))]
    slots = _slots(given.get("places"), brief)
    notices: list[str] = []
    # Facts are moved only by a model whose headings show that it knew which facts it put where.
    if slots is None or not all(_fits(brief, offered, number, slot) for number, slot in enumerate(slots)):
        slots = default_slots(brief)
        notices.append("the facts stand in the brief's order, evenly spread")
    headings: list[str] = []
    for number, slot in enumerate(slots):
        if _fits(brief, offered, number, slot) and offered[number] not in headings:
            headings.append(offered[number])
            continue
        headings.append(_plain_heading(brief, slot, headings))
        notices.append(f"the heading of section {number + 1} was chosen by code")
    return Outline(tuple(headings), slots, tuple(notices))


def heading_faults(heading: str, brief: Brief) -> tuple[str, ...]:
    """What is wrong with a heading."""
    if not 3 <= len(heading) <= HEADING or len(heading.split()) > 8:
        return (f"is not 3 to {HEADING} characters and at most 8 words",)
    same = [f"repeats key fact {n}" for n, fact in enumerate(brief.key_facts, 1) if holds(heading, fact)]
    if holds(heading, brief.title):
        same.append("repeats the title")
    return (*same, *faults(heading, Grounds(grounds(brief, (), ContentSettings()).text, brief.key_facts)))


def read_section(brief: Brief, number: int, answer: str, ground: Grounds) -> Prose:
    """A section's prose out of a model's answer; the author's notes stand in where too little is left."""
    kept, dropped = _sieve(tidy(answer), ground)
    notes = section_notes(brief)[number]
    kept = shorten(kept, MOST_WORDS)
    where = f"section {number + 1}"
    concerns = tuple(f"{where}: a sentence of the model was left out because it {why}" for why in dropped)
    if kept and count_words(kept) >= least_words(notes, ground):
        return Prose(kept, concerns)
    if not notes:
        return Prose((), (*concerns, f"{where}: it has no text but its facts, and the brief has no notes"))
    return Prose(notes, (*concerns, f"{where}: the brief's own notes stand in place of the model's text"))


def find_repeats(
    brief: Brief, sections: Sequence[str], limits: ContentSettings, feedback: Sequence[str] = ()
) -> tuple[Repeat, ...]:
    """Sentences that repeat an earlier section's phrase; at most two are worth a question."""
    paragraphs = _paragraphs(brief, sections, grounds(brief, feedback, limits))
    return repeats([prose.sentences for prose in paragraphs])[:MOST_REPEATS]


def compose(brief: Brief, answers: Answers, limits: ContentSettings) -> Draft:
    """Put the article together, place the facts, and check the whole."""
    ground = grounds(brief, answers.feedback, limits)
    outline = read_outline(brief, answers.outline)
    paragraphs = [
        Prose(_reworded(prose.sentences, answers.rewritten, ground), prose.concerns)
        for prose in _paragraphs(brief, answers.sections, ground)
    ]
    body = "\n\n".join(
        _section(brief, heading, prose.sentences, slot)
        for heading, prose, slot in zip(outline.headings, paragraphs, outline.slots, strict=True)
    )
    concerns = [concern for prose in paragraphs for concern in prose.concerns]
    concerns += review(brief, outline, [prose.sentences for prose in paragraphs], body, limits)
    return Draft(
        title=brief.title,
        body=body + "\n",
        concerns=tuple(dict.fromkeys(concerns)),
        **_metadata(brief, answers.metadata, ground, outline.notices),
    )


def review(
    brief: Brief,
    outline: Outline,
    paragraphs: Sequence[Sequence[str]],
    body: str,
    limits: ContentSettings,
) -> tuple[str, ...]:
    """Check the whole article as if nothing before had been checked."""
    prose = " ".join((*outline.headings, *(sentence for group in paragraphs for sentence in group)))
    found = [
        f"key fact {number} {wrong}"
        for number, fact in enumerate(brief.key_facts, 1)
        if (wrong := _misplaced(body, fact, number - 1, outline, prose))
    ]
    length = len(f"{prose} {' '.join(brief.key_facts)}".split())
    if not limits.min_words <= length <= limits.max_words:
        found.append(f"it has {length} words; {limits.min_words} to {limits.max_words} are wanted")
    whole = f"{brief.title} {prose} {' '.join(brief.key_facts)}"
    found += [f"it uses the banned phrase {p!r}" for p in limits.banned_phrases if holds(whole, p)]
    found += [
        f"section {number} has neither text nor facts"
        for number, (group, slot) in enumerate(zip(paragraphs, outline.slots, strict=True), 1)
        if not group and not slot
    ]
    if repeats(paragraphs):
        found.append("a phrase of five words or more stands in two sections")
    return tuple(found)


def paraphrase_faults(found: Sequence[str], sentence: str, phrase: str, ground: Grounds) -> tuple[str, ...]:
    """What is wrong with other words for a sentence."""
    wrong = [f"it {why}" for text in found for why in faults(text, ground)]
    text = " ".join(found)
    if not found or len(text) > 2 * len(sentence) + 20:
        wrong.append("write one sentence of about the same length")
    if phrase and holds(text, phrase):
        wrong.append("it still holds the phrase that must go")
    return tuple(wrong)


def description_faults(description: str, ground: Grounds) -> tuple[str, ...]:
    """What is wrong with a description."""
    text = flat(description)
    wrong = [why for sentence in sentences(text) for why in faults(sentence, ground)]
    if not DESCRIPTION[0] <= len(text) <= DESCRIPTION[1] or text[-1:] not in ".!?…":
        wrong.append(f"is not a whole sentence of {DESCRIPTION[0]} to {DESCRIPTION[1]} characters")
    return tuple(wrong)


def least_words(notes: Sequence[str], ground: Grounds) -> int:
    """The fewest words a section with these notes may have."""
    # A person who has seen the text may want less of it.
    percent = 20 if ground.revised else 60
    return min(LEAST_WORDS, count_words(notes) * percent // 100)


def count_words(texts: Sequence[str]) -> int:
    """Words of several texts together."""
    return sum(len(text.split()) for text in texts)


def mapping_of(answer: str) -> dict[str, object]:
    """The JSON object in an answer; empty if there is none."""
    try:
        read = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return cast(dict[str, object], read) if isinstance(read, dict) else {}


def texts_of(value: object) -> list[str]:
    """The texts in a JSON array; empty if it is none."""
    items = cast(list[object], value) if isinstance(value, list) else []
    return [item for item in items if isinstance(item, str)]


def text_of(given: Mapping[str, object], name: str) -> str:
    """A text field of an answer; empty if it is none."""
    value = given.get(name)
    return value if isinstance(value, str) else ""


def _fits(brief: Brief, offered: Sequence[str], number: int, slot: Sequence[int]) -> bool:
    """Whether a heading is sound and speaks of the facts below it."""
    if number >= len(offered) or heading_faults(offered[number], brief):
        return False
    return not slot or shares_words(offered[number], " ".join(brief.key_facts[at] for at in slot))


def _slots(places: object, brief: Brief) -> tuple[tuple[int, ...], ...] | None:
    """The model's placing if it is one: every fact has a section, and no section goes without."""
    count, facts = section_count(brief), len(brief.key_facts)
    given = cast(list[object], places) if isinstance(places, list) else []
    chosen = [p - 1 for p in given if isinstance(p, int) and not isinstance(p, bool) and 1 <= p <= count]
    if len(given) != facts or len(chosen) != facts or len(set(chosen)) < min(count, facts):
        return None
    return tuple(tuple(n for n in range(facts) if chosen[n] == at) for at in range(count))


def _plain_heading(brief: Brief, slot: Sequence[int], taken: Sequence[str]) -> str:
    facts = " ".join(brief.key_facts[number] for number in slot)
    near = [word for word in brief.keywords if holds(facts, word)]
    fitting = [word[:1].upper() + word[1:] for word in (*near, *brief.keywords)]
    offered = [text for text in (*fitting[: len(near)], *_PLAIN_HEADINGS) if text not in taken]
    return next(text for text in offered if not any(holds(text, fact) for fact in brief.key_facts))


def _paragraphs(brief: Brief, answers: Sequence[str], ground: Grounds) -> list[Prose]:
    given = list(answers) + [""] * section_count(brief)
    found = [read_section(brief, number, given[number], ground) for number in range(section_count(brief))]
    seen: set[str] = set()
    unique: list[Prose] = []
    for prose in found:
        fresh = tuple(s for s in prose.sentences if folded(s) not in seen)
        seen.update(folded(s) for s in prose.sentences)
        unique.append(Prose(fresh, prose.concerns))
    return unique


def _sieve(found: Sequence[str], ground: Grounds) -> tuple[list[str], list[str]]:
    kept: list[str] = []
    dropped: list[str] = []
    for sentence in found:
        wrong = faults(sentence, ground)
        if wrong:
            dropped.append(wrong[0])
        else:
            kept.append(sentence)
    return kept, dropped


def _reworded(prose: Sequence[str], rewritten: Mapping[str, str], ground: Grounds) -> tuple[str, ...]:
    texts: list[str] = []
    for sentence in prose:
        other = tidy(rewritten.get(sentence, ""))
        fits = other and not paraphrase_faults(other, sentence, "", ground)
        texts += list(other) if fits else [sentence]
    return tuple(texts)


def _section(brief: Brief, heading: str, prose: Sequence[str], slot: Sequence[int]) -> str:
    lines = [f"## {escape(heading)}"]
    if prose:
        lines.append(escape_with_links(" ".join(prose)))
    if slot:
        lines.append("\n".join(_item(brief.key_facts[number]) for number in slot))
    return "\n\n".join(lines)


def _item(fact: str) -> str:
    return f"- {escape(fact)}"


def _misplaced(body: str, fact: str, number: int, outline: Outline, prose: str) -> str:
    places = [at for at, block in enumerate(_blocks(body)) for line in block if line == _item(fact)]
    wanted = [at for at, slot in enumerate(outline.slots) if number in slot]
    if places != wanted or len(places) != 1:
        return "does not stand unchanged, once, in its slot"
    return "stands outside its slot too" if holds(prose, fact) else ""


def _blocks(body: str) -> list[list[str]]:
    return [block.splitlines() for block in f"\n{body}".split("\n## ")[1:]]


def _metadata(brief: Brief, answer: str, ground: Grounds, notices: tuple[str, ...]) -> dict[str, Any]:
    given = mapping_of(answer)
    description = flat(text_of(given, "description"))
    if description_faults(description, ground):
        description = _plain_description(brief, ground)
        notices = (*notices, "the description was chosen by code")
    slugs = slug_candidates(brief)
    slug = text_of(given, "slug")
    chosen = tuple(dict.fromkeys(tag for tag in texts_of(given.get("tags")) if tag in brief.keywords))
    return {
        "description": description,
        "slug": slug if slug in slugs else slugs[0],
        # A weak model repeats itself; one tag out of many is then no choice.
        "tags": chosen if len(chosen) > 1 else brief.keywords,
        "notices": notices,
    }


def _plain_description(brief: Brief, ground: Grounds) -> str:
    own = (sentence for group in section_notes(brief) for sentence in group)
    plain = (sentence for sentence in own if not description_faults(sentence, ground))
    return next(plain, f"{brief.title}."[: DESCRIPTION[1]])


def _split(items: Sequence[Item], count: int) -> tuple[tuple[Item, ...], ...]:
    share, rest = divmod(len(items), count)
    ends = [share * (n + 1) + min(n + 1, rest) for n in range(count)]
    return tuple(tuple(items[start:end]) for start, end in zip([0, *ends], ends, strict=False))
