"""When a call may get the answer of a similar one. Pure, and never because a similarity looks high enough.

Two things must hold. What embeddings are blind to (numbers, names, codes, quotations, negations, directions)
must be the same in both texts. And answers must have been compared: a bet against the claim that more than
the permitted share of answers at such similarities is wrong must have been won so clearly that, if the claim
were true, hardly any sequence of comparisons however long would ever win it. Without comparisons nothing is
given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from models.canonical import Digest, sha256
from models.errors import InvalidInput
from models.inference import Inputs, Prompt, Task
from models.settings import TaskSettings

EDGES = (980, 960, 940, 920, 900, 850, 800, 700)
"""Similarities, in thousandths, from which on an answer may be given; below the last it never is."""
NEAR = 30
"""Texts this little farther than the nearest have a say: if their answers differ, nobody knows."""
LONGEST = 800
"""Characters of a text that an embedding surely covers to its end."""
EXPLORED = 50
"""Of a thousand calls that could be given an answer, how many ask all the same, to keep evidence new."""
MOST_COMPARED = 5000
"""From here on older comparisons count half, so that what has changed is noticed."""
TESTED, SPENT = 0.9, 0.1
"""Parts of the permitted share: the one that is tested, and the chance that the test itself is wrong.
Together they are all of it, so that the expected share of wrong answers stays within what was permitted."""
BETS = (0.0, 0.125, 0.25, 0.5)
"""What the share may be instead, as parts of the tested one; the stake is spread over them evenly."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Comparisons: how many of the answers were the same, and how many were not."""

    right: int = 0
    wrong: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.right + other.right, self.wrong + other.wrong)


Evidence = Mapping[int, Tally]
"""By edge: comparisons of texts at least so similar, and less so than the next edge."""


@dataclass(frozen=True, slots=True)
class Near:
    """A kept answer whose text lies near."""

    key: str
    similarity: int
    """In thousandths."""
    gist: Digest
    """Names what counts of the answer."""


def may_be_similar(task: Task, wanted: TaskSettings) -> None:
    """Refuse what settings permit and the task, as it is in code, does not.

    Raises:
        InvalidInput: it is not declared read-only, or its answers are not kept.
    """
    field, value = f"tasks.{task.name}.similar_wrong_permille", wanted.similar_wrong_permille
    if not task.read_only:
        remedy = "the task is not declared read_only in code; leave the setting out"
        raise InvalidInput.field(field, value, remedy)
    if (task.cache_seconds if wanted.cache_seconds is None else wanted.cache_seconds) == 0:
        remedy = "only answers that are kept are given again; set cache_seconds as well"
        raise InvalidInput.field(field, value, remedy)


def edge_of(similarity: int) -> int | None:
    """The edge under which a comparison is counted; `None` where nothing is ever given."""
    return next((edge for edge in EDGES if similarity >= edge), None)


def candidate(near: Sequence[Near]) -> Near | None:
    """The nearest, unless it is too far or those about as near got other answers."""
    if not near:
        return None
    best = max(near, key=lambda one: one.similarity)
    if edge_of(best.similarity) is None:
        return None
    close = {one.gist for one in near if one.similarity >= best.similarity - NEAR}
    return best if len(close) == 1 else None


def given_from(evidence: Evidence, permille: int) -> int | None:
    """The least similarity at which answers may be given, if any.

    All that lies above an edge is judged together; and no stretch between edges may by itself have been wrong
    more often than permitted, so that good ones do not pay for bad ones.
    """
    found, total = None, Tally()
    for edge in EDGES:
        own = evidence.get(edge, Tally())
        if own.wrong * 1000 > permille * (own.right + own.wrong):
            break
        total += own
        if is_won(total, permille):
            found = edge
    return found


def at_most(evidence: Evidence, edge: int) -> int:
    """The share of wrong answers from this edge on, in thousandths, that the comparisons rule out."""
    total = sum((tally for at, tally in evidence.items() if at >= edge), Tally())
    low, high = 1, 1000
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_won(total, middle) else (middle + 1, high)
    return low


def is_won(total: Tally, permille: int) -> bool:
    """Whether the bet that at most this share is wrong was won, for one edge of them all."""
    permitted = permille / 1000
    needed = math.log(len(EDGES) / (SPENT * permitted))
    return winnings(total, TESTED * permitted) >= needed


def winnings(total: Tally, share: float) -> float:
    """Logarithm of what one unit has become that was bet against `share` or more being wrong.

    Were the claim true, no comparison would be expected to raise it, whatever went before; it would ever
    reach x with a chance of at most 1/x, however often somebody looks.
    """
    logs = [_won(total, share, part) for part in BETS]
    best = max(logs)
    return best + math.log(sum(math.exp(one - best) for one in logs) / len(logs))


def _won(total: Tally, share: float, part: float) -> float:
    if total.wrong and part == 0:
        return -math.inf
    wrong = total.wrong * math.log(part) if total.wrong else 0.0
    return wrong + total.right * math.log((1 - share * part) / (1 - share))


def explores(route: str) -> bool:
    """Whether a call asks although it could be given an answer; always the same for one route."""
    return int(sha256(f"similar {route}".encode())[:8], 16) % 1000 < EXPLORED


def gist_of(text: str, gist: Callable[[str], str] | None) -> Digest:
    """Names what counts of an answer: what its task says, else all of it, JSON without regard to layout."""
    return sha256((_plain(text) if gist is None else gist(text)).encode())


def _plain(text: str) -> str:
    try:
        return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text.strip()


@dataclass(frozen=True, slots=True)
class Framed:
    """A prompt taken apart: what may differ between similar calls, and what may not."""

    frame: str
    """The prompt with marks in the place of its texts."""
    texts: tuple[str, ...]
    guarded: tuple[tuple[str, ...], ...]
    """Of each text what must be the same."""


FIRST_MARK, LAST_MARK = "\ue000", "\uf8ff"


def framed(prompt: Prompt, inputs: Inputs) -> Framed | None:
    """Take a prompt apart; `None` if a text is empty, too long, or does not stand in it as it is.

    Frame and texts make the prompt again, so that nothing else of it can differ.
    """
    names = sorted(inputs)
    texts = tuple(inputs[name].strip() for name in names)
    if not texts or not all(_fits(text) for text in texts):
        return None
    contents = [message.content for message in prompt.messages]
    if any(FIRST_MARK <= sign <= LAST_MARK for content in contents for sign in content):
        return None
    for place in sorted(range(len(texts)), key=lambda place: -len(texts[place])):
        if not any(texts[place] in content for content in contents):
            return None
        mark = chr(ord(FIRST_MARK) + place)
        contents = [content.replace(texts[place], mark) for content in contents]
    turns = [
        message.model_copy(update={"content": content})
        for message, content in zip(prompt.messages, contents, strict=True)
    ]
    frame = prompt.model_copy(update={"messages": tuple(turns)}).model_dump_json()
    return Framed(json.dumps([frame, names]), texts, tuple(tuple(guarded(text)) for text in texts))


def _fits(text: str) -> bool:
    return 0 < len(text) <= LONGEST


# What embeddings are blind to.

_TOKEN = re.compile(r'"[^"]*"|“[^”]*”|„[^“”]*[“”]|«[^»]*»|`[^`]*`|(?<!\w)[\'‘][^\'’]+[\'’](?!\w)|\S+')
_QUOTES = "\"“„«`'‘"
_ENDS = tuple(".!?:;…")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NOT = _words(
    "not no never none nobody nothing nowhere neither nor without cannot unless except hardly barely only "
    "nicht nichts nie niemals kein keine keinen keinem keiner keines ohne nein außer nur ne pas jamais "
    "sans aucun aucune non nunca ningún ninguna nada sin"
)
_WAYS = _words(
    "up down on off in out above below over under before after more less most least first last next "
    "previous all any every each both either same other opposite left right buy sell high low higher "
    "lower early late earlier later true false yes and or if then instead than min max minimum maximum "
    "today tomorrow yesterday now always once twice half double"
)
_WAY_STEMS = (
    *("increas", "decreas", "rais", "lower", "reduc", "enabl", "disabl", "allow", "den", "block", "unblock"),
    *("open", "clos", "start", "stop", "add", "remov", "delet", "creat", "activ", "deactiv", "inactiv"),
    *("grant", "revok", "accept", "reject", "approv", "refus", "lock", "unlock", "include", "exclu"),
    *("import", "export", "send", "sent", "receiv", "win", "won", "los", "pass", "fail", "succe", "un"),
    *("dis", "non", "im", "ir", "il", "mis", "anti"),
)
"""Beginnings of words that point somewhere; some are of words that do not, which costs a hit and no more."""
_COUNTS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred "
    "thousand million billion dozen quarter third second monday tuesday wednesday thursday friday "
    "saturday sunday january february march april may june july august september october november "
    "december"
)
_BEFORE = _words("to from by until till since for at of with against between via as into onto")
_OPENERS = _words(
    "a an the this that these those there here it its he she they we i you my your our their his her who "
    "whom whose what which when where why how is are was were am be been being do does did done have has "
    "had can could will would shall should might must please hello hi hey dear thanks thank sorry ok okay "
    "well so also but because since while although though as at by for from of to with about into let "
    "tell show give find get help make want need try know think see look use say ask explain describe "
    "list write read i'm i've i'd it's what's that's there's where's who's how's let's"
)
"""Words that begin sentences with a capital and name nobody."""


def guarded(text: str) -> Iterator[str]:
    """What of a text must be the same, in its order: quotations, codes, numbers with their units, names,
    negations and directions. The lists know English best; what they do not know is left to the evidence.
    """
    before, counted, begins = "", False, True
    for token in _TOKEN.findall(text):
        word, kind = _kind(token, begins)
        if kind or counted:
            # "10 days" is not "10 weeks", and "to Ann" is not "from Ann".
            yield f"{before} {word}" if kind == "named" and before in _BEFORE else word
        counted = kind == "named" and any(sign.isnumeric() for sign in word)
        begins = token.endswith(_ENDS)
        before = word


def _kind(token: str, begins: bool) -> tuple[str, str]:
    """A token as it counts, and whether it is something that is named or a little word that turns things."""
    if token[0] in _QUOTES and len(token) > 1 and token[-1] in "\"”“»`'’":
        return token[1:-1].casefold(), "named"
    bare = token.strip(".,;:!?…()[]{}<>\"“”„«»`'‘’")
    word = bare.casefold().replace("’", "'")
    if word.endswith("n't"):
        return "not", "turns"
    if word in _NOT or word in _WAYS or word in _COUNTS or word.startswith(_WAY_STEMS):
        return "not" if word in ("not", "cannot") else word, "turns"
    return word, "named" if _is_code(bare) or _is_name(bare, word, begins) else ""


def _is_code(bare: str) -> bool:
    return any(sign.isnumeric() or sign in "@/\\_#$€£%+=*&|~^" for sign in bare) or "." in bare or ":" in bare


def _is_name(bare: str, word: str, begins: bool) -> bool:
    if any(sign.isupper() for sign in bare[1:]):
        return True
    return bare[:1].isupper() and word != "i" and not (begins and word in _OPENERS)
