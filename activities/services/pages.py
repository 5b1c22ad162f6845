"""The pages of the desk: what waits, and the card of one run with what answers it. Plain HTML, no scripts.

The card is the one that was bound, byte for byte, as Markdown: nothing in it becomes a link or an element.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from markdown_it import MarkdownIt

from activities.services.runs import Card, Reading
from models.card import answer_json, visible
from models.channels import path_of
from models.gate import Judged, Kind
from models.loop import Assurance

STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { background: #f4f4f2; padding: .6rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td { padding: .2rem .8rem .2rem 0; vertical-align: top; }
form { display: grid; gap: .6rem; max-width: 30rem; } input, select, textarea { font: inherit; width: 100%; }
button { font: inherit; padding: .4rem 1rem; } .said { border-left: .3rem solid #777; padding-left: .8rem; }
"""
POLICY = (
    "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
"""No script, no picture, nothing from elsewhere; of styles this one."""
_MARKDOWN = (
    MarkdownIt("commonmark", {"html": False})
    .enable("table")
    .disable(["link", "image", "autolink", "reference", "entity"])
)
_WORDS = {
    Kind.APPROVE: "Approve",
    Kind.REJECT: "Reject",
    Kind.REVISE: "Send back",
    Kind.DELEGATE: "Hand on",
}


def list_page(rows: Iterable[Mapping[str, Any]]) -> str:
    """What waits, oldest first."""
    lines = [
        _row(
            f'<a href="{path_of(row["workflow_id"])}">{_text(row["title"] or row["workflow_id"])}</a>',
            *(_text(row[name]) for name in ("agent", "risk", "for")),
            _text(row["waiting_since"][:19].replace("T", " ")),
        )
        for row in rows
    ]
    head = _row("What", "Agent", "Risk", "For", "Waiting since")
    return _page("what waits", f"<table>{head}{''.join(lines)}</table>" if lines else "<p>Nothing waits.</p>")


def run_page(reading: Reading, people: Iterable[str], judged: Judged | None = None) -> str:
    """A run's card, where the run stands, and what answers it; `judged` is what was just answered."""
    card = reading.card
    parts = [
        _said(judged),
        _MARKDOWN.render(card.full) if card is not None else "<p>There is no intent yet.</p>",
        _state(reading),
        _answer(reading, tuple(people)),
    ]
    return _page(card.intent.proposal.title if card else reading.run, "".join(parts))


def word_page(text: str) -> str:
    """One sentence."""
    return _page("countersign", f"<p>{_text(text)}</p>")


def _page(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f'<p><a href="/">What waits</a></p>{body}</html>'
    )


def _said(judged: Judged | None) -> str:
    if judged is None:
        return ""
    text = (
        f"Counted; the run is {judged.state}."
        if judged.counted
        else f"Not counted: {judged.field}: {judged.remedy}"
    )
    return f'<p class="said" role="status">{_text(text)}</p>'


def _state(reading: Reading) -> str:
    rows = [("Run", reading.run), ("State", reading.state.value)]
    if reading.card is not None:
        rows.append(("Digest", reading.card.digest))
    for verdict in (*reading.progress.verdicts, *reading.progress.reviews):
        rows.append((verdict.kind.value, f"{verdict.approver} ({verdict.assurance})"))
    if reading.outcome is not None:
        rows.append(("Outcome", f"{reading.outcome.status} {reading.outcome.reason}".strip()))
    return f"<table>{''.join(_row(name, _text(value)) for name, value in rows)}</table>"


def _row(*cells: str) -> str:
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _answer(reading: Reading, people: tuple[str, ...]) -> str:
    card = reading.card
    if card is None or (reading.waiting is None and not reading.reviewing):
        return ""
    head = f"<h3>{'Was that right?' if reading.reviewing else 'To answer'}</h3>"
    if card.intent.gate.assurance is Assurance.SIGNED:
        flag = " --review" if reading.reviewing else ""
        command = f"countersign approve {reading.run}{flag} --digest {card.digest} --as YOUR-NAME --sign KEY"
        return f"{head}<p>It has to be signed, in a terminal:</p><pre>{_text(command)}</pre>"
    return head + _form(reading.run, card, people, reading.reviewing)


def _form(run: str, card: Card, people: tuple[str, ...], review: bool) -> str:
    rule, path = card.intent.gate, path_of(run)
    names = "".join(f'<option value="{escape(name)}">' for name in people)
    glass = rule.break_glass
    wanted = (glass.review_roles if glass else ()) if review else (*rule.roles, *rule.veto_roles)
    roles = "".join(f"<option>{_text(role)}</option>" for role in dict.fromkeys((*wanted, "")))
    pick = f'<label>In the role <select name="role">{roles}</select></label>' if wanted else ""
    kinds = (Kind.APPROVE, Kind.REJECT) if review else _WORDS
    buttons = " ".join(f'<button formaction="{path}/{kind.value}">{_WORDS[kind]}</button>' for kind in kinds)
    hand_on = "" if review else '<label>Hand on to <input name="to" autocomplete="off"></label>'
    hidden = {"digest": card.digest} | ({"review": "true"} if review else {})
    example = json.loads(answer_json(card.digest, wanted)) | ({"review": True} if review else {})
    return (
        f'<form method="post">{"".join(map(_hidden, hidden.items()))}'
        '<label>Your name <input name="approver" list="people" required autocomplete="off"></label>'
        f'<datalist id="people">{names}</datalist>{pick}'
        '<label>Comment <textarea name="comment" maxlength="4000"></textarea></label>'
        f"{hand_on}<p>{buttons}</p></form>"
        "<p>The name counts as claimed, as in the Temporal UI. Programs post this to "
        f"<code>{path}/approve</code>:</p><pre>{_text(json.dumps(example, indent=2))}</pre>"
    )


def _hidden(named: tuple[str, str]) -> str:
    return f'<input type="hidden" name="{named[0]}" value="{escape(named[1])}">'


def _text(value: object) -> str:
    return escape(visible(str(value)))
