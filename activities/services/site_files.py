"""What stands in a site's repository: posts as files, and the first files of a new site."""

from __future__ import annotations

import json
from datetime import UTC
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field

from models.loop import Frozen
from models.settings import SiteSettings

MARKER = "countersign_action"
"""Front matter field with the key of the action that wrote the post."""


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters")
    return text


def _slug(text: str) -> str:
    if text == "index":
        # Hugo takes content/posts/index.md for the whole section, and the other posts vanish.
        raise ValueError("index is taken")
    return text


def _body(text: str) -> str:
    if not text.strip() or any(c < " " and c not in "\n\t\r" for c in text) or "\x7f" in text:
        raise ValueError("empty, or control characters")
    if "{{<" in text or "{{%" in text:
        raise ValueError("Hugo would run it")
    return text


Line = Annotated[str, AfterValidator(_line)]


class Publish(Frozen):
    """A post as it shall stand on the site."""

    slug: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=80), AfterValidator(_slug)]
    title: Annotated[Line, Field(min_length=1, max_length=200, pattern=r"\S")]
    description: Annotated[Line, Field(max_length=500)] = ""
    tags: tuple[Annotated[str, Field(pattern=r"^\w[\w .+#&'\-]{0,39}$")], ...] = Field(
        default=(), max_length=20
    )
    date: AwareDatetime
    draft: bool = False
    body: Annotated[str, Field(max_length=200_000), AfterValidator(_body)]

    @property
    def path(self) -> str:
        """Where it lies in the repository."""
        return f"content/posts/{self.slug}.md"

    def file(self, marker: str) -> bytes:
        """The post's bytes. JSON front matter, because no text can break out of it."""
        matter = {
            "title": self.title,
            "description": self.description,
            "date": self.date.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "draft": self.draft,
            "tags": list(self.tags),
            MARKER: marker,
        }
        head = json.dumps(matter, ensure_ascii=False, indent=2)
        end = "" if self.body.endswith("\n") else "\n"
        return f"{head}\n\n{self.body}{end}".encode()


REMEDIES = {
    "slug": "write lower-case words and digits joined by single hyphens, at most 80 characters, not 'index'",
    "title": "write 1 to 200 characters on one line",
    "description": "write at most 500 characters on one line",
    "tags": "write at most 20 short words, each at most 40 letters, digits, spaces or .+#&'-",
    "date": "write an ISO 8601 time with its zone, such as 2026-01-31T09:00:00Z",
    "draft": "write true or false",
    "body": "write Markdown, 1 to 200000 characters, no control characters and no Hugo shortcodes {{< or {{%",
}


def first_files(site: SiteSettings) -> dict[str, bytes]:
    """A minimal Hugo site, for a repository that does not exist yet."""
    head = (
        '<!doctype html>\n<html lang="{{ .Site.LanguageCode }}">\n<head>\n<meta charset="utf-8">\n'
        "<title>{{ .Title }}</title>\n"
        '{{ with .Description }}<meta name="description" content="{{ . }}">{{ end }}\n'
        '{{ with .Params.MARKER }}<meta name="countersign-action" content="{{ . }}">{{ end }}\n'
        "</head>\n<body>\n"
    ).replace("MARKER", MARKER)
    single = (
        '<article>\n<h1>{{ .Title }}</h1>\n<p><time>{{ .Date.Format "2006-01-02" }}</time></p>\n'
        "{{ .Content }}\n</article>\n<ul>{{ range .Params.tags }}<li>{{ . }}</li>{{ end }}</ul>\n"
    )
    items = '<li><a href="{{ .RelPermalink }}">{{ .Title }}</a></li>'
    listing = "<h1>{{ .Title }}</h1>\n<ul>\n{{ range PAGES }}" + items + "\n{{ end }}</ul>\n"
    foot = "</body>\n</html>\n"
    texts = {
        "config.toml": (
            f"baseURL = {json.dumps(site.address.rstrip('/') + '/')}\n"
            f"languageCode = {json.dumps(site.language)}\n"
            f"title = {json.dumps(site.title, ensure_ascii=False)}\n"
            'disableKinds = ["taxonomy", "term", "RSS", "sitemap"]\n'
        ),
        "layouts/_default/single.html": head + single + foot,
        "layouts/_default/list.html": head + listing.replace("PAGES", ".Pages.ByDate.Reverse") + foot,
        "layouts/index.html": head + listing.replace("PAGES", ".Site.RegularPages.ByDate.Reverse") + foot,
    }
    return {path: text.encode() for path, text in texts.items()}
