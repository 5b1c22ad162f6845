import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.inference import Call, DataClass, Message, Prompt, Task
from models.privacy import Kind, found_in, luhn, mod97, raised
from models.routing import needs_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to ann.o'neil+shop@mail.example.org today", Kind.EMAIL),
        ("Ärger: jürgen@müller-öfen.de.", Kind.EMAIL),
        ("call +49 30 123456-78", Kind.PHONE),
        ("call 0049 (30) 1234567", Kind.PHONE),
        ("Tel. 030 / 1234567", Kind.PHONE),
        ("card 4111 1111 1111 1111 please", Kind.CARD),
        ("card 5500-0000-0000-0004", Kind.CARD),
        ("378282246310005", Kind.CARD),
        ("pay DE89 3704 0044 0532 0130 00 by Friday", Kind.IBAN),
        ("GB82WEST12345698765432", Kind.IBAN),
        ("from 203.0.113.7 at night", Kind.IP),
        ("from 2001:db8::ff00:42:8329.", Kind.IP),
    ],
)
def test_personal_data_is_found_by_its_form(text, kind):
    assert kind in found_in(text)
    assert raised(DataClass.PUBLIC, [text]) is DataClass.PERSONAL


@pytest.mark.parametrize(
    "text",
    [
        "Bicycles from 499 EUR, open 8:30 to 18:00, since 1998.",
        "order 4111 1111 1111 1112 has a wrong check digit",
        "1234567890123456",
        "DE88 3704 0044 0532 0130 00",
        "version 1.2.3 of 2026-05-04 12:30:45",
        "listens on 127.0.0.1 and on ::1",
        "std::vector and a@b",
        "300.1.2.3",
        "sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "https://example.org/posts/2026/05/04/kettles-and-teapots",
        "",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert found_in(text) == frozenset()
    assert raised(DataClass.PUBLIC, [text]) is DataClass.PUBLIC


@given(st.sampled_from(list(DataClass)), st.lists(st.text(max_size=80), max_size=4))
def test_a_class_is_never_lowered(data_class, texts):
    assert raised(data_class, texts) in (data_class, DataClass.PERSONAL)


@given(st.text(alphabet="0123456789:.-+ @abcdefDE/()", max_size=400))
def test_any_text_is_read_without_an_error(text):
    found_in(text)


@given(st.text(alphabet="0123456789", min_size=1, max_size=25))
def test_exactly_one_check_digit_fits(digits):
    assert sum(luhn(digits + last) for last in "0123456789") == 1


def test_check_digits_of_accounts():
    assert mod97("GB82WEST12345698765432")
    assert not mod97("GB83WEST12345698765432")


def test_a_call_with_personal_inputs_or_params_needs_a_tier_that_may_see_them():
    prompt = Prompt(messages=(Message(role="user", content="x"),))
    task = Task("draft", "small", False, lambda inputs, params: prompt, lambda *_: ())
    quiet = needs_of(task, Call(task="draft"), prompt, {"brief": "a kettle"})
    loud = needs_of(task, Call(task="draft"), prompt, {"brief": "ask ann@example.org"})
    param = needs_of(task, Call(task="draft", params={"to": "ann@example.org"}), prompt)
    assert [needs.data_class for needs in (quiet, loud, param)] == ["internal", "personal", "personal"]


def test_an_identifier_of_ours_is_no_account_number():
    assert not found_in("bd362d3ec8a149dba5234ba5aef05a44")
    assert found_in("DE89 3704 0044 0532 0130 00 is ours") == {Kind.IBAN}
