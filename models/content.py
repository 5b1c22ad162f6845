"""What a person asks of the content agent: a brief in Markdown with front matter, read strictly.

    ---
    title: Spring bicycle workshop for beginners
    audience: people who cycle to work
    tone: friendly
    key_facts:                       # 1 to 12; each stands in the article word for word, exactly once
      - The workshop opens on Saturday 14 March at 9:30
    keywords: [bicycle, repair]      # 1 to 10; the article's tags are chosen among them
    target: demo                     # the name of a site
    slug: spring-bicycle-workshop    # may be left out
    publish: now                     # now, draft, or {at: 2027-03-01T08:00:00+01:00}
    ---
    Free notes: what the article may say beside the facts.

Every value is text as it is written, so `key_facts: [1.50]` keeps its zero. A brief is data: nothing it says
can change who must approve, and it is refused whole rather than half understood.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    AwareDatetime,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from models.errors import InvalidInput
from models.loop import Frozen, Name
from models.prose import flat, folded, is_one_line, slugify

MAX_BRIEF_BYTES = 64 * 1024
REQUIRED = ("title", "audience", "tone", "key_facts", "keywords", "target", "publish")
KEYS = (*REQUIRED, "slug")
AMENDABLE = ("title", "audience", "tone", "keywords", "slug", "publish")
_FENCE = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_AMENDMENT = re.compile(rf"^\s*({'|'.join(AMENDABLE)})\s*:\s*\S", re.MULTILINE)
_REMEDIES = {
    "title": "write 3 to 120 characters on one line",
    "audience": "say in 3 to 120 characters on one line who reads it",
    "tone": "say in 3 to 60 characters on one line how it should sound",
    "key_facts": "list 1 to 12 different facts, each one line of 3 to 300 characters",
    "keywords": "list 1 to 10 different words of 2 to 40 letters, digits, blanks or .+#&'-",
    "target": "write the name of a site, for instance demo",
    "slug": "use lower-case letters, digits and single hyphens, at most 80, for instance spring-workshop",
    "publish": "write now, draft, or {at: 2027-03-01T08:00:00+01:00} with its UTC offset",
    "notes": "remove control and invisible characters",
}


def _line(value: str) -> str:
    if not is_one_line(value) or value != value.strip() or "  " in value:
        raise ValueError("must be one line without control or invisible characters or double blanks")
    return value


def _wordy(value: str) -> str:
    if not folded(value).strip():
        raise ValueError("must hold a letter or digit")
    return value


def _slug(value: str) -> str:
    if value == "index":
        raise ValueError("index is the name of the whole section")
    return value


def _prose(value: str) -> str:
    if not is_one_line(re.sub(r"[\n\t]", " ", value)):
        raise ValueError("must hold no control or invisible characters")
    return value


Line = Annotated[str, AfterValidator(_line), AfterValidator(_wordy)]
Title = Annotated[Line, Field(min_length=3, max_length=120)]
Fact = Annotated[Line, Field(min_length=3, max_length=300)]
Keyword = Annotated[Line, Field(min_length=2, max_length=40, pattern=r"^\w[\w .+#&'\-]+$")]
Slug = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=80), AfterValidator(_slug)
]


class Target(Frozen):
    """Where the article goes."""

    site: Name
    slug: Slug | None = None


class At(Frozen):
    """Publish no earlier than this."""

    at: AwareDatetime


class Brief(Frozen):
    """What a person wants written."""

    title: Title
    audience: Annotated[Line, Field(min_length=3, max_length=120)]
    tone: Annotated[Line, Field(min_length=3, max_length=60)]
    key_facts: tuple[Fact, ...] = Field(min_length=1, max_length=12)
    keywords: tuple[Keyword, ...] = Field(min_length=1, max_length=10)
    target: Target
    publish: Literal["now", "draft"] | At
    notes: Annotated[str, AfterValidator(_prose)] = ""
    """Markdown below the front matter: what the article may say beside the facts."""

    @model_validator(mode="after")
    def _distinct(self) -> Brief:
        # A fact inside another could not be counted: "Open Monday" also stands in "Open Monday to Friday".
        for number, fact in enumerate(self.key_facts):
            for other, longer in enumerate(self.key_facts):
                if number != other and (folded(fact) in folded(longer) or fact in longer):
                    raise InvalidInput.field(
                        f"key_facts.{number}", fact, f"it stands in key_facts.{other} too; keep one of them"
                    )
        if len({folded(word) for word in self.keywords}) != len(self.keywords):
            raise InvalidInput.field("keywords", list(self.keywords), "list each word once")
        return self

    @property
    def at(self) -> datetime | None:
        """The time before which it may not be published."""
        return self.publish.at if isinstance(self.publish, At) else None

    @property
    def draft(self) -> bool:
        """Whether it goes to the site unpublished."""
        return self.publish == "draft"


def parse_brief(data: bytes) -> Brief:
    """Read a brief.

    Raises:
        InvalidInput: it names the field, the value and what to write instead.
    """
    front, notes = _split(_decoded(data))
    return _brief(_known(_mapping(front)), notes)


def render_brief(brief: Brief) -> bytes:
    """Write a brief so that `parse_brief` reads the same one."""
    publish = {"at": brief.at.isoformat()} if brief.at else brief.publish
    front = {
        **brief.model_dump(include={"title", "audience", "tone"}),
        "key_facts": list(brief.key_facts),
        "keywords": list(brief.keywords),
        "target": brief.target.site,
        **({"slug": brief.target.slug} if brief.target.slug else {}),
        "publish": publish,
    }
    text = yaml.safe_dump(front, allow_unicode=True, sort_keys=False, width=10_000)
    return f"---\n{text}---\n{brief.notes}\n".encode()


def amend(brief: Brief, feedback: Sequence[str]) -> tuple[Brief, tuple[str, ...]]:
    """Follow feedback lines like `slug: other-slug` by code; returns why a line was not followed.

    Everything else in the feedback is for the model. Facts and target stay: they are what was asked for.
    """
    refused: list[str] = []
    for number, text in enumerate(feedback, 1):
        for line in (line for line in text.splitlines() if _AMENDMENT.match(line)):
            try:
                brief = _amended(brief, line.strip())
            except InvalidInput:
                field = line.split(":")[0].strip()
                refused.append(f"feedback {number}: {field} was not followed; {_REMEDIES[field]}")
    return brief, tuple(refused)


def slug_candidates(brief: Brief) -> tuple[str, ...]:
    """Slugs that code finds acceptable; the brief's own is the only one if it names one."""
    if brief.target.slug:
        return (brief.target.slug,)
    long = [word for word in brief.title.split() if len(word) > 3]
    texts = (brief.title, " ".join(long[:4]) or brief.title, f"{brief.keywords[0]} {brief.title}")
    return tuple(dict.fromkeys(slugify(text) for text in texts))


class _Texts(yaml.BaseLoader):
    """YAML whose scalars all stay text; aliases are refused because they can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [cast(str, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            raise yaml.YAMLError("a key stands twice")
        return super().construct_mapping(node, deep)


def _decoded(data: bytes) -> str:
    if len(data) > MAX_BRIEF_BYTES:
        raise InvalidInput.field("brief", f"{len(data)} bytes", f"write at most {MAX_BRIEF_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {data[error.start]:#04x} at offset {error.start}"
        raise InvalidInput.field("brief", wrong, "save the file as UTF-8") from None
    if not text.strip():
        raise InvalidInput.field(
            "brief", "", f"it is empty; start it with front matter: {', '.join(REQUIRED)}"
        )
    return text.replace("\r\n", "\n")


def _split(text: str) -> tuple[str, str]:
    found = _FENCE.match(text)
    if found is None:
        first = text.split("\n", 1)[0]
        raise InvalidInput.field("front matter", first, "start and end it with a line that holds only ---")
    return found[1], text[found.end() :].strip()


def _mapping(front: str) -> dict[Any, Any]:
    try:
        # Safe: the loader's base builds only text, lists and mappings.
        read = yaml.load(front, Loader=_Texts)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 2}" if mark is not None else type(error).__name__
        problem = getattr(error, "problem", None) or str(error)[:80]
        raise InvalidInput.field(
            "front matter", where, f"write plain YAML, one key: value a line ({problem})"
        ) from None
    if not isinstance(read, dict):
        raise InvalidInput.field("front matter", read, f"write a mapping with the keys {', '.join(REQUIRED)}")
    return cast(dict[Any, Any], read)


def _known(front: dict[Any, Any]) -> dict[str, Any]:
    for key in front:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InvalidInput.field("front matter", key, f"{hint}known keys are {', '.join(KEYS)}")
    for key in REQUIRED:
        if key not in front:
            raise InvalidInput.field(key, None, f"it is missing; {_REMEDIES[key]}")
    return cast(dict[str, Any], front)


def _brief(front: dict[str, Any], notes: str) -> Brief:
    fields = {
        key: _flattened(value) for key, value in front.items() if key not in ("target", "slug", "publish")
    }
    target: dict[str, Any] = {"site": front["target"]}
    if "slug" in front:
        target["slug"] = front["slug"]
    try:
        return Brief(**fields, target=Target(**target), publish=_publish(front["publish"]), notes=notes)
    except ValidationError as error:
        raise _named(error) from None


def _flattened(value: Any) -> Any:
    if isinstance(value, list):
        return [_flattened(item) for item in cast(list[Any], value)]
    # Runs of blanks are one blank in every rendered page; folding them here keeps the promise checkable.
    return re.sub(r"[ \t\n]+", " ", value) if isinstance(value, str) else value


def _publish(value: Any) -> Any:
    if isinstance(value, dict) and set(cast(dict[str, Any], value)) == {"at"}:
        try:
            return At(at=datetime.fromisoformat(str(value["at"])))
        except (ValueError, ValidationError):
            pass
    elif value in ("now", "draft"):
        return value
    raise InvalidInput.field("publish", value, _REMEDIES["publish"])


def _named(error: ValidationError) -> InvalidInput:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    path = ["target" if part == "site" else part for part in path]
    remedy = _REMEDIES.get(path[0], "correct it")
    return InvalidInput.field(".".join(path), first["input"], f"{remedy} ({flat(first['msg'])})")


def _amended(brief: Brief, line: str) -> Brief:
    front, notes = _split(render_brief(brief).decode())
    return _brief(_known({**_mapping(front), **_mapping(line)}), notes)


class ContentSettings(Frozen):
    """What a post must satisfy, and when two ideas count as one."""

    banned_phrases: tuple[str, ...] = ()
    min_words: int = Field(default=40, ge=0)
    max_words: int = Field(default=1500, ge=1)
    duplicate_permille: int = Field(default=850, ge=0, le=1000)
    """Cosine times 1000 from which an earlier post counts as a near-duplicate."""
    check_links: bool = True

    @field_validator("max_words")
    @classmethod
    def _leaves_room(cls, most: int, info: ValidationInfo) -> int:
        least = info.data.get("min_words", 0)
        if most < least:
            raise ValueError(f"no post has fewer than min_words ({least}) of them as well; raise it")
        return most
