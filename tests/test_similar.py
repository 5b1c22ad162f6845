import json
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.errors import InvalidInput
from models.inference import Message, Prompt, Task
from models.settings import TaskSettings
from models.similar import (
    EDGES,
    LONGEST,
    NEAR,
    SPENT,
    TESTED,
    Near,
    Tally,
    at_most,
    candidate,
    edge_of,
    explores,
    framed,
    gist_of,
    given_from,
    guarded,
    is_won,
    may_be_similar,
)
from scripts.bench._paraphrases import Learnt, World, stream

TALLIES = st.builds(Tally, st.integers(0, 600), st.integers(0, 30))
EVIDENCE = st.dictionaries(st.sampled_from(EDGES), TALLIES)
PERMITTED = st.integers(1, 200)


def test_nothing_is_given_without_comparisons_whatever_the_similarity():
    assert given_from({}, 200) is None
    assert not any(explores(f"route {number}") for number in range(3))


@settings(deadline=None)
@given(EVIDENCE, PERMITTED, st.sampled_from(EDGES))
def test_one_more_wrong_answer_never_opens_what_was_closed_and_a_milder_bound_never_closes(
    evidence, permitted, edge
):
    lowest = given_from(evidence, permitted)
    worse = evidence | {edge: evidence.get(edge, Tally()) + Tally(0, 1)}
    now = given_from(worse, permitted)
    assert now is None or (lowest is not None and now >= lowest)
    if lowest is not None:
        milder = given_from(evidence, min(1000, permitted + 50))
        assert milder is not None
        assert milder <= lowest


@settings(deadline=None)
@given(EVIDENCE, PERMITTED)
def test_what_is_given_was_wrong_less_often_than_permitted_and_says_at_most_how_often(evidence, permitted):
    edge = given_from(evidence, permitted)
    if edge is None:
        return
    seen = [tally for at, tally in evidence.items() if at >= edge]
    right, wrong = (sum(getattr(tally, name) for tally in seen) for name in ("right", "wrong"))
    assert wrong * 1000 < TESTED * permitted * (right + wrong)
    assert wrong * 1000 / (right + wrong) <= at_most(evidence, edge) <= permitted


def chance_of_ever_winning(permitted, share, comparisons):
    """Exactly, by the number of wrong ones so far, stopped where the bet is won."""
    alive, won = [1.0], 0.0
    for count in range(1, comparisons + 1):
        after = [0.0] * (len(alive) + 1)
        for wrong, weight in enumerate(alive):
            after[wrong] += weight * (1 - share)
            after[wrong + 1] += weight * share
        for wrong, weight in enumerate(after):
            if weight and is_won_known(count - wrong, wrong, permitted):
                won, after[wrong] = won + weight, 0.0
        # What can hardly win any more is left out, on the safe side.
        while len(after) > 1 and after[-1] < 1e-15:
            won += after.pop()
        alive = after
    return won


@cache
def is_won_known(right, wrong, permitted):
    return is_won(Tally(right, wrong), permitted)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([50, 100, 200]), st.floats(1.0, 3.0))
@example(50, 1.0)
@example(200, 1.0)
def test_where_more_is_wrong_than_permitted_hardly_any_sequence_of_comparisons_wins(permitted, times):
    share = TESTED * permitted / 1000 * times
    chance = chance_of_ever_winning(permitted, share, 400)
    assert chance <= SPENT * permitted / 1000 / len(EDGES)


@pytest.mark.parametrize(
    "world", [World(), World(twins=0.6, apart=0.3), World(fickle=0.03)], ids=["plain", "twins", "fickle"]
)
@pytest.mark.parametrize("permitted", [50, 100])
def test_on_streams_with_known_answers_no_more_is_wrong_than_permitted(world, permitted):
    learnt = Learnt(permitted)
    for asked in stream(world, 1, 1500):
        learnt.ask(asked)
    assert learnt.counted.wrong * 1000 <= permitted * learnt.counted.similar


def test_on_such_a_stream_a_fixed_threshold_breaks_the_bound_and_evidence_still_finds_hits():
    world = World(twins=0.6, apart=0.3)
    learnt, fixed = Learnt(100), Learnt(100, threshold=920)
    for asked in stream(world, 7, 1500):
        learnt.ask(asked)
        fixed.ask(asked)
    assert learnt.counted.similar > 100
    assert learnt.counted.wrong * 1000 <= 100 * learnt.counted.similar
    assert fixed.counted.wrong > learnt.counted.wrong


def near(similarity, gist="a", key="k"):
    return Near(key, similarity, gist * 64)


def test_the_nearest_counts_unless_those_about_as_near_got_other_answers():
    assert candidate([near(970, key="one"), near(930, gist="b")]).key == "one"
    assert candidate([near(970), near(970 - NEAR, gist="b")]) is None
    assert candidate([near(EDGES[-1] - 1)]) is None
    assert candidate([]) is None
    assert (edge_of(985), edge_of(979), edge_of(0)) == (980, 960, None)


DIFFERENT = [
    ("raise the limit to 10", "raise the limit to 100"),
    ("the fee is 1.5 %", "the fee is 15 %"),
    ("it takes 10 days", "it takes 10 weeks"),
    ("it takes ten days", "it takes nine days"),
    ("the server is up", "the server is down"),
    ("please enable logging", "please disable logging"),
    ("the parcel has arrived", "the parcel has not arrived"),
    ("it works", "it doesn't work"),
    ("send it to Ann", "send it to Bob"),
    ("Acme wants its money", "Globex wants its money"),
    ("move it from Ann to Bob", "move it from Bob to Ann"),
    ("pay from Ann to Bob", "pay to Ann from Bob"),
    ("order AB-17 is late", "order AB-71 is late"),
    ('delete the page "home"', 'delete the page "shop"'),
    ("write to ann@example.org", "write to bob@example.org"),
    ("see /etc/hosts", "see /etc/passwd"),
    ("open it on monday", "open it on friday"),
    ("the price is $5", "the price is €5"),
    ("es geht", "es geht nicht"),
    ("approve the request", "reject the request"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_embeddings_are_blind_to_must_be_the_same(one, other):
    assert tuple(guarded(one)) != tuple(guarded(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Where is my parcel?", "my parcel, where might it be"),
        ("It isn't working", "it is not working"),
        ("Could you change the address of invoice 77?", "I need another address for invoice 77"),
        ("How do I get a refund", "what must I do for a refund?"),
    ],
)
def test_other_words_for_the_same_are_let_through(one, other):
    assert sorted(guarded(one)) == sorted(guarded(other))


WORDS = st.lists(
    st.sampled_from(("parcel", "order", "the", "limit", "to", "is", "late", "Ann", "days", "raise")),
    max_size=6,
)


@settings(deadline=None)
@given(WORDS, WORDS, st.integers(0, 10**9), st.integers(0, 10**9))
def test_no_two_numbers_pass_for_the_same_wherever_they_stand(before, after, one, other):
    first, second = (" ".join([*before, str(number), *after]) for number in (one, other))
    assert (tuple(guarded(first)) == tuple(guarded(second))) is (one == other)


def prompt(*contents, **more):
    return Prompt(messages=tuple(Message(role="user", content=content) for content in contents), **more)


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Co")), min_size=1, max_size=30)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), TEXT, min_size=1), TEXT, TEXT)
def test_frame_and_texts_make_the_prompt_again_so_nothing_else_of_it_can_differ(inputs, head, foot):
    said = prompt(head, *(f"{head}{text}{foot}" for text in inputs.values()))
    parts = framed(said, inputs)
    if parts is None:
        return
    frame = Prompt.model_validate_json(json.loads(parts.frame)[0])
    for message, original in zip(frame.messages, said.messages, strict=True):
        content = message.content
        for place, text in enumerate(parts.texts):
            content = content.replace(chr(0xE000 + place), text)
        assert content == original.content


@pytest.mark.parametrize(
    ("said", "inputs"),
    [
        (prompt("no text"), {}),
        (prompt("Sort: "), {"text": " "}),
        (prompt("Sort: HELLO"), {"text": "hello"}),
        (prompt("Sort: hel"), {"text": "hello"}),
        (prompt("x" * (LONGEST + 1)), {"text": "x" * (LONGEST + 1)}),
        (prompt("Sort: a\ue000b"), {"text": "a\ue000b"}),
    ],
)
def test_a_text_that_is_missing_changed_cut_too_long_or_marked_is_compared_with_none(said, inputs):
    assert framed(said, inputs) is None


@pytest.mark.parametrize("more", [{"seed": 8}, {"max_tokens": 9}, {"answer_schema": {"type": "object"}}])
def test_another_schema_or_sampling_is_another_frame(more):
    inputs = {"text": "hello there"}
    first, second = (
        framed(prompt("Sort: hello there"), inputs),
        framed(prompt("Sort: hello there", **more), inputs),
    )
    assert first.frame != second.frame


def test_answers_are_compared_by_what_counts_of_them():
    assert gist_of('{"a": 1, "b": 2}', None) == gist_of('{"b":2,"a":1}', None)
    assert gist_of(" yes\n", None) == gist_of("yes", None) != gist_of("no", None)
    category = lambda text: json.loads(text)["category"]  # noqa: E731
    assert gist_of('{"category": "a", "why": "x"}', category) == gist_of('{"category": "a"}', category)


def test_settings_permit_it_only_for_tasks_that_code_declares_read_only_and_whose_answers_are_kept():
    made = Task("sort", "small", False, lambda *_: prompt("x"), lambda *_: ())
    wanted = TaskSettings(similar_wrong_permille=20, cache_seconds=60)
    with pytest.raises(InvalidInput, match=r"tasks\.sort\.similar_wrong_permille.*read_only"):
        may_be_similar(made, wanted)
    reading = Task("sort", "small", False, made.build, made.check, read_only=True)
    may_be_similar(reading, wanted)
    with pytest.raises(InvalidInput, match="cache_seconds"):
        may_be_similar(reading, TaskSettings(similar_wrong_permille=20))
