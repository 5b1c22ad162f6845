"""What an approver reads, made by plain code from the bound bytes. Model and stranger texts are fenced.

The card proper holds everything. The short card fits the Temporal UI and says first when something is missing
from it, with the digest, the size and the command that shows the rest.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from models.loop import Assurance, Change, Cost, Intent, Limits, Plan
from models.policy import passes_alone, risk

LINKED = re.compile(r":(?=//)|(?<=\bwww)\.", re.IGNORECASE)
SHORT_LIMIT = 3_000
"""Characters; the UI sends the text in a URL to be rendered, and proxies refuse long ones."""
IGNORED = frozenset(
    (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x2800, 0x3164, 0xFFA0)
    + (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))
)
"""What is drawn as nothing though its category is that of letters, marks and signs, or that of none yet."""


def full_card(intent: Intent, texts: Mapping[str, str]) -> str:
    """Markdown with everything; `texts` holds diffs and reasons by digest."""
    return "\n".join([*_head(intent), *_reasons(intent, texts), *_actions(intent, texts), *_gate(intent)])


def short_card(intent: Intent, digest: str, full: str) -> str:
    """Markdown of at most `SHORT_LIMIT` characters, the answer to paste included."""
    tail = "\n".join(_answer(intent, digest))
    if len(full) + len(tail) < SHORT_LIMIT:
        return f"{full}\n{tail}"
    notice = (
        f"**This card is cut.** All of it: `countersign show {_inline(intent.workflow_id)[:200]}` "
        f"({len(full.encode())} bytes, intent `{digest}`)."
    )
    cut = _cut(full, SHORT_LIMIT - len(notice) - len(tail) - len("\n\n\n\n…\n"))
    return f"{notice}\n\n{cut}\n\n…\n{tail}"


def answer_json(digest: str, roles: Sequence[str] = ()) -> str:
    """The JSON to send with approve, reject or revise; with the role where the gate asks for one."""
    role = {"role": roles[0] if len(roles) == 1 else "YOUR-ROLE"} if roles else {}
    return json.dumps({"digest": digest, "approver": "YOUR-NAME"} | role)


def review_card(digest: str) -> str:
    """What the UI shows once somebody has gone ahead alone."""
    answer = json.dumps({"digest": digest, "approver": "YOUR-NAME", "review": True})
    return "\n".join(
        [
            "### Done by breaking the glass, and to be reviewed",
            "Send Signal `approve` if that was right, or `reject` (with a `comment`), with this JSON:",
            *fenced(answer, "json"),
        ]
    )


def visible(text: str) -> str:
    """Control, bidirectional and zero-width characters shown as their code points."""
    return "".join(_shown(character) for character in text)


def fenced(text: str, language: str = "") -> list[str]:
    """A code fence longer than any run of backticks inside."""
    fence = "````"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", *defanged(visible(text)).rstrip("\n").split("\n"), fence]


def defanged(text: str) -> str:
    """Addresses as they are still read, but no mail program or terminal makes a link of: `https[:]//`."""
    return LINKED.sub(lambda found: f"[{found[0]}]", text)


def _cut(text: str, room: int) -> str:
    """As much as fits, with the fence that is open there closed."""
    kept: list[str] = []
    fence = ""
    for line in text.split("\n"):
        after = _fence_after(line, fence)
        left = room - len(after) - 2
        if len(line) > left:
            # Inside a fence a piece of a line is safe; anywhere else it could begin something.
            kept += [line[: max(0, left)], fence] if fence and after else [fence] if fence else []
            break
        kept.append(line)
        fence = after
        room -= len(line) + 1
    return "\n".join(kept)


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after a line."""
    if fence:
        return "" if line == fence else fence
    run = line[: len(line) - len(line.lstrip("`"))]
    return run if len(run) >= 4 else ""


def _head(intent: Intent) -> list[str]:
    proposal = intent.proposal
    rows = [
        ("agent", intent.proposer),
        ("risk", risk(intent.plans)),
        ("actions", str(len(intent.plans))),
        ("intent", f"number {intent.number} of this run"),
        ("open until", f"{_time(intent.expires_at)} at the latest"),
        ("estimated cost", cost_text(proposal.estimated)),
    ]
    if intent.requester is not None:
        rows.append(("asked for by", f"`{_inline(intent.requester)}`"))
    if proposal.not_before is not None:
        rows.append(("not before", _time(proposal.not_before)))
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    concerns = ["", "**Please look at:**", *fenced("\n".join(proposal.concerns))] if proposal.concerns else []
    return ["### What is proposed", *fenced(proposal.title), "", *table, *concerns, ""]


def _reasons(intent: Intent, texts: Mapping[str, str]) -> list[str]:
    if intent.proposal.reasons is None:
        return []
    return ["#### Reasons (the agent's words)", *fenced(texts[intent.proposal.reasons.digest]), ""]


def _actions(intent: Intent, texts: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for plan in intent.plans:
        action = intent.proposal.actions[plan.action]
        lines += [
            f"#### Action {plan.action + 1}: `{plan.connector}.{plan.operation}`",
            *fenced(action.title),
        ]
        moved = [f"- {change_text(change)}" for change in plan.changes]
        lines += ["", _plan_line(plan), *moved, "", *fenced(texts[plan.diff.digest], "diff"), ""]
    if intent.already_applied:
        lines.append(f"Already applied earlier: {', '.join(str(n + 1) for n in intent.already_applied)}")
    return lines


def _plan_line(plan: Plan) -> str:
    parts = [
        f"target `{_inline(plan.target)}`",
        f"version `{_inline(plan.target_version[:16])}`",
        f"{plan.reversibility} (undo: `{_inline(plan.undo)}`)",
        f"guarantee {plan.guarantee}",
    ]
    return " · ".join(parts)


def _gate(intent: Intent) -> list[str]:
    rule, use = intent.gate, intent.use
    if use is not None:
        left = f"use {use.number} of {use.grant.max_uses}, good until {_time(use.grant.valid_until)}"
        left = ", ".join(part for part in (left, limits_text(use.grant)) if part)
        return [f"Passes without a person under the grant `{use.grant.name}` ({left})."]
    if passes_alone(rule, intent.plans):
        return ["Policy lets this pass without a person."]
    roles = f", with the roles {', '.join(rule.roles)}" if rule.roles else ""
    signed = ", signed" if rule.assurance is Assurance.SIGNED else ""
    device = " by a security key" if rule.hardware else ""
    return [f"Needs {rule.approvals} approval{'s' if rule.approvals > 1 else ''}{roles}{signed}{device}."]


def _answer(intent: Intent, digest: str) -> list[str]:
    what = (
        "Send Signal `approve`, `reject` or `revise` (with a `comment`) with this JSON, your name filled in:"
    )
    if intent.gate.assurance is Assurance.SIGNED:
        what = f"An answer has to be signed: `countersign approve ID --sign KEY` does that. {what}"
    return ["", "#### To answer", what, *fenced(answer_json(digest, intent.gate.roles), "json")]


def cost_text(cost: Cost) -> str:
    """Money, tokens and time in words; unknown is said, never zero."""
    money = f"{cost.amount} {_unit(cost.currency)}" if cost.amount is not None else "money unknown"
    tokens = f"{cost.tokens} tokens" if cost.tokens is not None else "tokens unknown"
    seconds = f"{cost.milliseconds / 1000:.1f} s" if cost.milliseconds is not None else "time unknown"
    return f"{money}, {tokens}, {seconds}"


def _unit(currency: str | None) -> str:
    if not currency:
        return "of unknown currency"
    # What looks like none was written by a model or a stranger, and could be a link.
    return currency if currency.isascii() and currency.isalpha() else f"`{_inline(currency)}`"


def change_text(change: Change) -> str:
    """What a number is moved from and to, and by how much of what it was, never rounded down."""
    unit = f"{change.currency} in its smallest unit" if change.currency else "plain number"
    step = change.new - change.old
    part = "from nothing"
    if change.old:
        # Towards the larger figure: what is beyond a limit shall not look as if it were within.
        hundredths = -(-abs(step) * 10_000 // change.old)
        part = f"{hundredths // 100}.{hundredths % 100:02} %"
    return f"`{_inline(change.what)}`: {change.old} → {change.new} ({unit}; {step:+}, {part})"


def limits_text(limits: Limits) -> str:
    """How far numbers may be moved, in words; empty for no limit."""
    parts: list[str] = []
    if limits.at_most_permille is not None:
        parts.append(f"at most {limits.at_most_permille // 10}.{limits.at_most_permille % 10} % each")
    if limits.at_most_minor is not None:
        parts.append(f"at most {limits.at_most_minor} {limits.currency} in its smallest unit altogether")
    return ", ".join(parts)


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _inline(text: str) -> str:
    return defanged(visible(text)).replace("`", "'").replace("|", "/").replace("\n", " ").replace("<", "‹")


def _shown(character: str) -> str:
    if character in "\n\t":
        return character
    hidden = (
        unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") or ord(character) in IGNORED
    )
    return f"⟨U+{ord(character):04X}⟩" if hidden else character
