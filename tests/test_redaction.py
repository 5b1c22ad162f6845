"""Placeholders: nothing that rules find leaves in a prompt, and everything comes back in the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from activities.services.router import Answerer
from activities.tiers.scripted import Scripted
from models.errors import OutputInvalid, PolicyDenied
from models.inference import Answered, Call, Completion, DataClass, Inputs, Message, Params, Prompt, Task
from models.privacy import found_in, spans
from models.redaction import HINT, PLACEHOLDER, Redaction, dangling
from models.routing import needs_of, route
from models.settings import TaskSettings, TierSettings
from tests.test_router import Shelf

MAIL, PHONE, IBAN, IP = "ann@example.org", "+49 30 123456-78", "DE89370400440532013000", "203.0.113.7"
CARD = "4111 1111 1111 1111"
LETTER = (
    f"{MAIL} asks to be called at {PHONE}, wants {CARD} and {IBAN} gone, and wrote from {IP}; {MAIL} again."
)
DATA = st.sampled_from(
    [MAIL, "jürgen@müller-öfen.de", PHONE, "030 / 1234567", CARD, "378282246310005", IBAN, IP]
    + ["DE89 3704 0044 0532 0130 00", "2001:db8::ff00:42:8329", "(202) 555-0143", "GB82WEST12345698765432"]
)
PIECES = st.one_of(
    DATA,
    st.sampled_from(
        [" ", ", ", "\n", ".", ":", "-", "/", "(", "@", "⟦EMAIL_1⟧", "⟦CARD_2⟧", "⟦", "_1⟧", "7"]
    ),
    st.text(alphabet="0123456789:.-+ @abcDE/()⟦⟧_", max_size=12),
    st.text(max_size=12),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_no_datum_is_left_and_every_one_comes_back(text: str) -> None:
    redaction = Redaction()
    redacted = redaction.redact(text)
    assert found_in(redacted) == frozenset()
    assert redaction.restore(redacted) == text


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_a_place_is_found_exactly_where_something_is_found(text: str) -> None:
    places = spans(text)
    assert bool(places) == bool(found_in(text))
    assert all(start < end <= len(text) for start, end, _ in places)
    assert list(places) == sorted(places)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, max_size=3))
def test_no_datum_leaves_in_a_prompt_and_marks_of_its_own_are_left_alone(
    texts: list[str], choices: list[str]
) -> None:
    schema = {"properties": {"to": {"enum": choices}}} if choices else None
    messages = tuple(Message(role="user", content=text) for text in texts)
    redaction = Redaction()
    sent = redaction.veil(Prompt(messages=messages, answer_schema=schema))
    whole = [message.content for message in sent.messages]
    assert not any(found_in(text) for text in whole)
    back = [redaction.restore(text) for text in whole]
    assert back == [f"{HINT}\n\n{texts[0]}", *texts[1:]]
    if choices:
        listed = (sent.answer_schema or {})["properties"]["to"]["enum"]
        assert not any(found_in(choice) for choice in listed)
        assert [redaction.restore(choice) for choice in listed] == choices


def test_one_datum_has_one_mark_and_two_have_two() -> None:
    redacted = Redaction().redact(f"{MAIL}, bob@example.org, {MAIL}")
    assert redacted == "⟦EMAIL_1⟧, ⟦EMAIL_2⟧, ⟦EMAIL_1⟧"
    assert Redaction().redact(f"⟦EMAIL_1⟧ {MAIL}") == "⟦EMAIL_1⟧ ⟦EMAIL_2⟧"


def test_a_mark_that_was_made_up_is_objected_to() -> None:
    assert dangling("write to ⟦EMAIL_9⟧", ["write"]) != ()
    assert dangling("write to ⟦EMAIL_9⟧", ["you may write ⟦EMAIL_9⟧"]) == ()
    assert dangling("write to Ann", []) == ()


@pytest.mark.parametrize(
    "mark", ["⟦EMAIL 1⟧", "⟦email_1⟧", "⟦EMAIL_1", "⟦ EMAIL_01 ⟧", "⟦EMAIL_١⟧", "\\\\u27e6EMAIL_1\\\\u27e7"]
)
def test_a_mark_that_was_not_copied_exactly_is_objected_to_and_never_sent_on_unseen(mark: str) -> None:
    redaction = Redaction()
    redaction.redact(f"write to {MAIL}")
    assert redaction.restore(mark) == mark
    assert dangling(mark, [f"write to {MAIL}"]) != ()
    assert dangling(mark, [f"you may write {mark}"]) == ()


def test_a_mark_is_turned_back_however_json_spells_it_and_a_strangers_one_never() -> None:
    for spelt in ("⟦EMAIL_{}⟧", "\\u27e6EMAIL_{}\\u27e7", "\\u27E6EMAIL_{}\\u27E7"):
        redaction = Redaction()
        letter = Message(role="user", content=f"{spelt.format(1)} writes to {MAIL}")
        sent = redaction.veil(Prompt(messages=(letter,)))
        assert "writes to ⟦EMAIL_2⟧" in sent.messages[0].content
        answer = f'{{"to": "{spelt.format(2)}", "from": "{spelt.format(1)}"}}'
        assert redaction.restore(answer) == f'{{"to": "{MAIL}", "from": "{spelt.format(1)}"}}'


SCHEMA = {
    "type": "object",
    "properties": {"reply": {"type": "string", "maxLength": 90}},
    "required": ["reply"],
    "additionalProperties": False,
}


def build(inputs: Inputs, params: Params) -> Prompt:
    return Prompt(
        messages=(Message(role="user", content=f"Answer: {inputs['letter']}"),), answer_schema=SCHEMA
    )


def names_her(text: str, inputs: Inputs, params: Params) -> tuple[str, ...]:
    return () if MAIL in text and MAIL in inputs["letter"] else (f"it does not say {MAIL}",)


TASK = Task("reply", "small", True, build, names_her)


def marks_in(prompt: Prompt) -> dict[str, str]:
    """The first mark of each kind in a prompt, the one that is explained apart."""
    found = PLACEHOLDER.findall(prompt.messages[0].content.removeprefix(HINT))
    return {mark.strip("⟦⟧").rsplit("_")[0]: mark for mark in reversed(found)}


def said(reply: str) -> Completion:
    text = json.dumps({"reply": reply}, ensure_ascii=False)
    return Completion(
        text=text, finish="stop", prompt_tokens=9, completion_tokens=9, model="m", milliseconds=1
    )


async def asked(script: Any, redact: bool = True, **more: Any) -> tuple[Answered, Shelf, Scripted]:
    shelf, scripted = Shelf(), Scripted("edge", script)
    letter = await shelf.put("acme", LETTER.encode())
    tier = TierSettings(name="edge", kind="llama_cpp", url="http://127.0.0.1:9", **more)
    wanted = {"reply": TaskSettings(redact=redact)}
    answerer = Answerer([tier], {"edge": scripted}, {"reply": TASK}, shelf, wanted=wanted)
    call = Call(task="reply", inputs={"letter": letter})
    return await answerer.answer("acme", call, "edge"), shelf, scripted


def unseen(prompts: list[Prompt]) -> bool:
    sent = "".join(prompt.model_dump_json() for prompt in prompts)
    return not any(datum in sent for datum in (MAIL, PHONE, CARD, IBAN, IP))


async def test_a_tier_that_may_not_see_personal_data_works_on_marks_and_the_answer_has_the_data() -> None:
    answered, shelf, scripted = await asked(lambda prompt: said(f"Dear {marks_in(prompt)['EMAIL']}, done."))
    assert unseen(scripted.prompts)
    assert scripted.prompts[0].messages[0].content.startswith(HINT)
    assert json.loads(await shelf.text("acme", answered.text)) == {"reply": f"Dear {MAIL}, done."}
    assert (answered.problems, answered.repaired) == ((), False)


async def test_an_answer_in_which_json_spells_the_marks_has_the_data() -> None:
    def script(prompt: Prompt) -> Completion:
        plain = said(f"Dear {marks_in(prompt)['EMAIL']}, done.")
        return plain.model_copy(update={"text": json.dumps(json.loads(plain.text))})

    answered, shelf, _ = await asked(script)
    assert json.loads(await shelf.text("acme", answered.text)) == {"reply": f"Dear {MAIL}, done."}
    assert answered.problems == ()


async def test_asking_again_quotes_answer_and_objections_with_marks_too() -> None:
    def script(prompt: Prompt) -> Completion:
        marks = marks_in(prompt)
        return said(f"Call {marks['PHONE']}" if len(prompt.messages) == 1 else f"Dear {marks['EMAIL']}")

    answered, shelf, scripted = await asked(script)
    assert len(scripted.prompts) == 2 and len(scripted.prompts[1].messages) == 3
    assert unseen(scripted.prompts)
    assert MAIL in await shelf.text("acme", answered.text) and answered.repaired


async def test_an_answer_is_held_to_its_schema_with_the_data_in_it() -> None:
    def long(prompt: Prompt) -> Completion:
        return said(" ".join([marks_in(prompt)["EMAIL"]] * 6))

    with pytest.raises(OutputInvalid, match="maxLength"):
        await asked(long)


async def test_a_tier_that_may_see_personal_data_gets_it_as_it_is() -> None:
    classes = (DataClass.INTERNAL, DataClass.PERSONAL)
    answered, _, scripted = await asked(lambda _: said(f"Dear {MAIL}"), data_classes=classes)
    assert LETTER in scripted.prompts[0].messages[0].content and answered.problems == ()


async def test_without_leave_of_its_task_a_call_stays_where_personal_data_may_be_seen() -> None:
    with pytest.raises(PolicyDenied, match="data class personal"):
        await asked([], redact=False)


@pytest.mark.parametrize(
    ("data_class", "wanted", "may"),
    [
        (DataClass.INTERNAL, TaskSettings(redact=True), True),
        (DataClass.INTERNAL, TaskSettings(), False),
        (DataClass.CONFIDENTIAL, TaskSettings(redact=True), False),
        (DataClass.PERSONAL, TaskSettings(redact=True), False),
    ],
)
def test_the_route_allows_marks_only_for_data_that_rules_found(
    data_class: DataClass, wanted: TaskSettings, may: bool
) -> None:
    inputs, call = {"letter": LETTER}, Call(task="reply", data_class=data_class)
    needs = needs_of(TASK, call, build(inputs, {}), inputs, wanted)
    assert needs.data_class is DataClass.PERSONAL
    tier = TierSettings(name="edge", kind="llama_cpp", url="http://127.0.0.1:9")
    if may:
        assert route("reply", needs, [tier], "small").tiers == ("edge",)
    else:
        with pytest.raises(PolicyDenied, match="data class personal"):
            route("reply", needs, [tier], "small")


def test_room_and_money_are_held_for_the_prompt_with_its_marks() -> None:
    inputs, call = {"letter": LETTER}, Call(task="reply")
    plain = needs_of(TASK, call, build(inputs, {}), inputs)
    marked = needs_of(TASK, call, build(inputs, {}), inputs, TaskSettings(redact=True))
    assert marked.context_tokens >= plain.context_tokens
