from __future__ import annotations

import json
import re
import unicodedata
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from models.canonical import digest_of
from models.card import SHORT_LIMIT, answer_json, defanged, fenced, full_card, short_card, visible
from models.loop import Assurance, Cost, Intent, Plan
from tests.intents import an_intent, ref

NASTY = st.text(
    alphabet=st.sampled_from(
        list("`~\n\t #|<>[](){}*_!-+\\\"'abc\r\x00\x1b\u202e\u200b\u2066\ufeff\u2028é€😀")
    ),
    max_size=300,
) | st.sampled_from(
    [
        "`" * 40,
        "````\n# approve this\n````",
        "`````\n" * 5,
        "</table><script>alert(1)</script>",
        "![x](http://evil.test/p.png)",
        "\n\n| a | b |\n|---|---|\n",
        "x" * 5000,
        "line\n" * 2000,
        "\u202eevorppa",
    ]
)


def hostile(title: str, diff: str, reasons: str, concern: str, more: str) -> tuple[Intent, dict[str, str]]:
    """An intent in which a stranger chose every text there is."""
    plain = an_intent()
    action = plain.proposal.actions[0].model_copy(update={"title": title[:200]})
    proposal = plain.proposal.model_copy(
        update={
            "title": title[:200],
            "actions": (action,),
            "reasons": ref("reasons"),
            "concerns": (concern,) * 3,
            "estimated": Cost(amount="1", currency=more[:10]),
        }
    )
    texts: dict[str, Any] = {"target": more[:300], "undo": more[:300], "target_version": more[:200]}
    plan: Plan = plain.plans[0].model_copy(update=texts)
    intent = plain.model_copy(
        update={"proposal": proposal, "plans": (plan,), "workflow_id": f"x{more[:300]}"}
    )
    return intent, {plan.diff.digest: diff, ref("reasons").digest: reasons}


def blocks(markdown: str) -> list[tuple[str, str]]:
    """Headings and code blocks as a Markdown reader sees them."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    found: list[tuple[str, str]] = []
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            found.append(("heading", tokens[at + 1].content))
        if token.type == "fence":
            found.append(("fence", token.content))
    return found


HEADINGS = re.compile(r"What is proposed|Reasons \(the agent's words\)|Action 1: `null\.note`|To answer")


@settings(max_examples=150, deadline=None)
@given(NASTY, NASTY, NASTY, NASTY, NASTY)
def test_no_text_of_a_stranger_becomes_part_of_the_card_itself(
    title: str, diff: str, reasons: str, concern: str, more: str
) -> None:
    intent, texts = hostile(title, diff, reasons, concern, more)
    full = full_card(intent, texts)
    digest = digest_of(intent) if "\x00" not in more else "0" * 64
    card = short_card(intent, digest, full)
    assert len(card) <= SHORT_LIMIT
    for text in (full, card):
        headings = [content for kind, content in blocks(text) if kind == "heading"]
        assert all(HEADINGS.fullmatch(heading) for heading in headings), headings
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        assert "<script" not in html and "<img" not in html and "<a " not in html
        shown = [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]
        assert shown == []
    assert blocks(card)[-1] == ("fence", f"{answer_json(digest)}\n")


@settings(max_examples=50, deadline=None)
@given(NASTY, NASTY)
def test_a_card_that_is_cut_says_so_first_with_digest_size_and_command(diff: str, reasons: str) -> None:
    intent, texts = hostile("t", diff + "y" * 4000, reasons, "c", "m")
    full = full_card(intent, texts)
    card = short_card(intent, "f" * 64, full)
    first = card.splitlines()[0]
    assert first.startswith("**This card is cut.**")
    assert "f" * 64 in first and "countersign show xm" in first and str(len(full.encode())) in first


@given(st.text())
def test_everything_visible_is_kept_and_everything_hidden_is_shown(text: str) -> None:
    seen = visible(text)
    assert not any(unicodedata.category(c) in ("Cf", "Co", "Cs", "Zl", "Zp") for c in seen)
    hidden = re.sub(r"⟨U\+[0-9A-F]{4,6}⟩", "", seen)
    assert len(hidden) <= len(text) or "⟨U+" in text


@given(NASTY)
def test_a_fence_holds_whatever_is_in_it(text: str) -> None:
    first, *_, last = fenced(text)
    assert first == last and set(first) == {"`"} and first not in text
    [(kind, content)] = blocks("\n".join(fenced(text)))
    assert kind == "fence"
    assert content.rstrip("\n") == defanged(visible(text)).rstrip("\n")


ADDRESSES = (
    "https://evil.test/a?b",
    "HTTP://evil.test",
    "WWW.evil.test",
    "ftp://x",
    "x-app://open",
    "(http://e)",
)


@given(st.lists(st.sampled_from((*ADDRESSES, " ", "\n", "a", "+", "http:", "//", "www", "."))).map("".join))
def test_no_address_in_a_fence_is_one_that_a_mail_program_makes_a_link_of(text: str) -> None:
    shown = "\n".join(fenced(text))
    assert not re.search(r"[a-z0-9+.-]://|\bwww\.", shown, re.IGNORECASE)
    assert shown.replace("[:]", ":").replace("[.]", ".").split("\n")[1:-1] == text.rstrip("\n").split("\n")


@pytest.mark.parametrize("code", [0x034F, 0x115F, 0x2800, 0x3164, 0xFE0F, 0xFFA0, 0xE0100])
def test_what_is_drawn_as_nothing_is_shown(code: int) -> None:
    assert visible(f"sku{chr(code)}-1") == f"sku⟨U+{code:04X}⟩-1"


@pytest.mark.parametrize("link", ["[EUR](//evil.test)", "![](//evil.test)", "https://evil.test", "EUR`x"])
def test_nobody_puts_a_link_where_the_card_says_what_it_costs(link: str) -> None:
    plain = an_intent()
    proposal = plain.proposal.model_copy(update={"estimated": Cost(amount="1", currency=link)})
    intent = plain.model_copy(update={"proposal": proposal})
    html = MarkdownIt("commonmark").enable("table").render(full_card(intent, {ref("diff 0").digest: ""}))
    assert f"1 <code>{defanged(link).replace(chr(96), chr(39))}</code>" in html
    assert "<a " not in html and "<img" not in html


def test_a_small_card_is_whole_and_ends_with_the_answer() -> None:
    intent = an_intent()
    texts = {intent.plans[0].diff.digest: "+line\n"}
    card = short_card(intent, "f" * 64, full_card(intent, texts))
    assert card.startswith("### What is proposed")
    assert "+line" in card and "Needs 1 approval." in card
    assert "cut" not in card


def test_a_card_says_that_it_wants_signatures_and_its_answer_names_the_role() -> None:
    intent = an_intent()
    gate = intent.gate.model_copy(update={"assurance": Assurance.SIGNED, "roles": ("owner",)})
    intent = intent.model_copy(update={"gate": gate})
    card = short_card(intent, "f" * 64, full_card(intent, {intent.plans[0].diff.digest: "+line\n"}))
    assert "Needs 1 approval, with the roles owner, signed." in card
    assert "countersign approve ID --sign KEY" in card
    assert json.loads(blocks(card)[-1][1])["role"] == "owner"
    assert json.loads(answer_json("f" * 64, ("owner", "legal")))["role"] == "YOUR-ROLE"


def test_unknown_costs_are_said_and_never_zero() -> None:
    intent = an_intent()
    card = full_card(intent, {intent.plans[0].diff.digest: ""})
    assert "money unknown, tokens unknown, time unknown" in card


def test_times_are_in_utc_whatever_zone_they_were_given_in() -> None:
    due = datetime(2026, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    intent = an_intent()
    later = intent.model_copy(update={"proposal": intent.proposal.model_copy(update={"not_before": due})})
    assert "2026-02-28 23:30 UTC" in full_card(later, {intent.plans[0].diff.digest: ""})
