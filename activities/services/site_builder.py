"""Builds the head of a site's branch into the folder it is served from.

With Hugo where it is installed, otherwise with a plain builder that knows posts and an index. Readers see the
old build or the new one, never half of one, and never an older one after a newer one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import html
import io
import json
import os
import shutil
import tarfile
import tomllib
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from markdown_it import MarkdownIt

from activities.services.git import Clock, Git
from activities.services.process import run_program, seconds_left
from activities.services.site_files import MARKER
from models.errors import ConnectorUnavailable
from models.settings import SiteSettings

Engine = Literal["auto", "hugo", "plain"]

LIMIT = timedelta(seconds=120)
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Post:
    """A post as read from its file."""

    slug: str
    title: str
    description: str
    date: str
    tags: tuple[str, ...]
    draft: bool
    marker: str
    body: str


class SiteBuilder:
    """Turns the branch's head into pages."""

    def __init__(
        self,
        git: Git,
        ref: str,
        site: SiteSettings,
        build: Path,
        clock: Clock,
        engine: Engine = "auto",
    ) -> None:
        """`build` becomes a link to the newest build, which lies in the folder `<build>.builds`."""
        self._git = git
        self._ref = ref
        self._site = site
        build = build.absolute()
        self._build = build
        self._builds = build.with_name(f"{build.name}.builds")
        self._clock = clock
        self._hugo = (shutil.which("hugo") or "hugo") if engine == "hugo" else None
        if engine == "auto":
            self._hugo = shutil.which("hugo")

    @property
    def engine(self) -> str:
        """What builds the pages."""
        return "hugo" if self._hugo else "plain"

    async def build(self, deadline: datetime | None = None, force: bool = False) -> str:
        """Build the head unless its build is the one that is served; returns the commit.

        Args:
            deadline: stop trying then.
            force: build even if it seems to be there.

        Raises:
            ConnectorUnavailable: it could not be built.
        """
        self._builds.mkdir(parents=True, exist_ok=True)
        async with self._locked(deadline):
            # Read under the lock: who builds last has seen the newest head.
            head = await self._git.head(self._ref)
            if head is None:
                raise ConnectorUnavailable(f"{self._site.name}: branch {self._site.branch} has no commit")
            if force or not self._served().startswith(f"{head}-{self.engine}-"):
                await self._build_and_show(head, deadline)
            return head

    def _served(self) -> str:
        try:
            return Path(os.readlink(self._build)).name
        except OSError:
            return ""

    async def _build_and_show(self, head: str, deadline: datetime | None) -> None:
        former = self._served()
        name = f"{head}-{self.engine}-{uuid.uuid4().hex[:8]}"
        source, target = self._builds / f"{name}.source", self._builds / name
        try:
            await self._export(head, source, deadline)
            await self._render(source, target, deadline)
            self._show(target)
        except OSError as error:
            raise ConnectorUnavailable(f"{self._site.name}: building {head}: {error.strerror}") from error
        finally:
            # The former build stays for readers who are half-way through it.
            self._clean({self._served(), former})

    async def _export(self, head: str, source: Path, deadline: datetime | None) -> None:
        packed = await self._git.run("archive", "--format=tar", head, deadline=deadline)
        await asyncio.to_thread(_unpack, packed, source)

    async def _render(self, source: Path, target: Path, deadline: datetime | None) -> None:
        if self._hugo is None:
            await asyncio.to_thread(render_plain, source, target, self._site)
            return
        arguments = (
            f"--source={source}",
            f"--destination={target}",
            f"--baseURL={self._site.address.rstrip('/')}/",
            f"--cacheDir={source}/.cache",
            # An approved post is due now, whatever date it bears; waiting is the proposal's `not_before`.
            "--buildFuture",
            "--noBuildLock",
            "--quiet",
        )
        seconds = seconds_left(self._clock(), deadline, LIMIT)
        home = {"HOME": str(source)}
        ended = await run_program(self._hugo, arguments, seconds=seconds, environment=home)
        if ended.code != 0:
            raise ConnectorUnavailable(f"{self._site.name}: hugo cannot build the site: {ended.complaint}")

    def _show(self, target: Path) -> None:
        if self._build.is_dir() and not self._build.is_symlink():
            self._build.rmdir()
        link = self._builds / f"{target.name}.link"
        link.symlink_to(Path(self._builds.name) / target.name)
        link.replace(self._build)

    def _clean(self, keep: set[str]) -> None:
        for path in self._builds.iterdir():
            if path.name not in keep and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_symlink():
                path.unlink()

    @contextlib.asynccontextmanager
    async def _locked(self, deadline: datetime | None) -> AsyncGenerator[None]:
        """One build at a time among all processes; a killed one lets go by dying."""
        seconds = seconds_left(self._clock(), deadline, LIMIT)
        handle = os.open(self._build.with_name(f"{self._build.name}.lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            async with asyncio.timeout(seconds):
                # Another process holds it: there is no event to wait for.
                while not _try_lock(handle):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            os.close(handle)
            raise ConnectorUnavailable(f"{self._site.name}: another build took {seconds:.1f} s") from None
        except BaseException:
            os.close(handle)
            raise
        try:
            yield
        finally:
            os.close(handle)


def render_plain(source: Path, target: Path, site: SiteSettings) -> None:
    """Write each post that is no draft, and an index of them.

    Raises:
        ConnectorUnavailable: a post's front matter cannot be read; names the file.
    """
    posts = [read_post(path) for path in sorted((source / "content" / "posts").glob("*.md"))]
    shown = sorted((p for p in posts if not p.draft), key=lambda p: (p.date, p.slug), reverse=True)
    for post in shown:
        _write(target / "posts" / post.slug / "index.html", _post_page(post, site))
    _write(target / "posts" / "index.html", _index_page(shown, site, "../"))
    _write(target / "index.html", _index_page(shown, site, ""))


def read_post(path: Path) -> Post:
    """Read a post with JSON, YAML or TOML front matter.

    Raises:
        ConnectorUnavailable: it has none that can be read.
    """
    try:
        matter, body = _split(path.read_text(encoding="utf-8"))
        when = matter.get("date", "")
        return Post(
            slug=path.stem,
            title=str(matter.get("title", path.stem)),
            description=str(matter.get("description", "")),
            date=when.isoformat() if isinstance(when, date) else str(when),
            tags=tuple(str(tag) for tag in matter.get("tags") or ()),
            draft=bool(matter.get("draft", False)),
            marker=str(matter.get(MARKER, "")),
            body=body,
        )
    except (ValueError, yaml.YAMLError, AttributeError) as error:
        raise ConnectorUnavailable(
            f"content/posts/{path.name}: its front matter cannot be read ({type(error).__name__}); repair it"
        ) from error


def _split(text: str) -> tuple[dict[str, Any], str]:
    if text.startswith("{"):
        matter, end = json.JSONDecoder().raw_decode(text)
        return cast(dict[str, Any], matter), text[end:].lstrip("\n")
    for fence, load in (("---\n", yaml.safe_load), ("+++\n", tomllib.loads)):
        if text.startswith(fence):
            head, found, body = text[len(fence) :].partition(f"\n{fence}")
            if not found:
                raise ValueError("front matter has no end")
            return cast(dict[str, Any], load(head) or {}), body.lstrip("\n")
    return {}, text


def _post_page(post: Post, site: SiteSettings) -> str:
    """Raw HTML in a body comes out as text: whoever wrote it, it is never markup of ours."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tags = "".join(f"<li>{html.escape(tag)}</li>" for tag in post.tags)
    body = (
        f"<article>\n<h1>{html.escape(post.title)}</h1>\n<p><time>{html.escape(post.date)}</time></p>\n"
        f"{markdown.render(post.body)}</article>\n<ul>{tags}</ul>\n"
    )
    return _page(site, post.title, body, post.description, post.marker)


def _index_page(posts: list[Post], site: SiteSettings, up: str) -> str:
    items = "".join(
        f'<li><a href="{up}posts/{html.escape(p.slug)}/">{html.escape(p.title)}</a></li>\n' for p in posts
    )
    return _page(site, site.title, f"<h1>{html.escape(site.title)}</h1>\n<ul>\n{items}</ul>\n")


def _page(site: SiteSettings, title: str, body: str, description: str = "", marker: str = "") -> str:
    about = f'<meta name="description" content="{html.escape(description)}">\n' if description else ""
    mark = f'<meta name="countersign-action" content="{html.escape(marker)}">\n' if marker else ""
    return (
        f'<!doctype html>\n<html lang="{html.escape(site.language)}">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n{about}{mark}</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _unpack(packed: bytes, folder: Path) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
