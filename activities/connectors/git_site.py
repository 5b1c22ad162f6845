"""Publishes posts to a git + Hugo-style site.

The commit is the effect: it carries the action's key, the key is looked up in the head that the commit is
built upon, and the branch moves by compare-and-set, so the repository itself refuses its second use. Pages
are built from the branch afterwards and can be built again at any time. It never touches a working copy, and
never sends after its deadline.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import httpx

from activities.connectors.base import Applied, Dry, Work
from activities.services.arguments import read_arguments
from activities.services.git import Changes, Clock, Git
from activities.services.site_builder import Engine, SiteBuilder
from activities.services.site_files import MARKER, REMEDIES, Publish, first_files
from models.canonical import sha256
from models.errors import ConnectorRejected, ConnectorUnavailable, InvalidInput, PreconditionLost, UnknownName
from models.loop import Guarantee, Reversibility
from models.settings import SiteSettings

TRIES = 50
CONFIGURATION = ("config.toml", "hugo.toml", "layouts")
TRAILER = "Countersign-Action"
UNDOES = "Countersign-Undoes"
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,199}")
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
KEY_TO_COME = "(the key of this action)"
"""Stands in a plan's diff where the post gets its key, which derives from the intent that binds the diff."""
FORMAT = (
    "%H%x00%(trailers:key=Countersign-Action,valueonly,separator=%x01)"
    "%x00%(trailers:key=Countersign-Undoes,valueonly,separator=%x01)"
)


@dataclass(frozen=True, slots=True)
class Landed:
    """A commit on the branch that carries a key."""

    commit: str
    undoes: str


class GitSite:
    """One site. `keyed`: a key's second use finds the first one's commit."""

    guarantee = Guarantee.KEYED
    settle = timedelta(0)

    def __init__(
        self,
        site: SiteSettings,
        data: Path,
        client: httpx.AsyncClient,
        clock: Clock,
        engine: Engine = "auto",
        git: Git | None = None,
    ) -> None:
        """Touches nothing yet: the repository is made when first asked for.

        Args:
            site: the site's settings.
            data: the data folder its paths are relative to.
            client: reads pages back.
            clock: the time, aware.
            engine: what builds the pages; `auto` is Hugo where it is installed.
            git: the repository, if not the one the settings name.
        """
        self.name: str = site.name
        self._site = site
        self._client = client
        self._clock = clock
        self._ref = f"refs/heads/{site.branch}"
        self._git = git or Git(data / site.repository, clock)
        self._builder = SiteBuilder(self._git, self._ref, site, data / site.build, clock, engine)
        self._turn = asyncio.Lock()
        self._founded = False

    async def plan(self, work: Work) -> Dry:
        """Show the post's diff; nothing stays behind in the repository.

        Raises:
            InvalidInput: an argument is wrong; names field, value and remedy.
        """
        post = _read(work)
        head = await self._head()
        async with self._git.scratch() as scratch:
            entry = await self._git.store(post.file(KEY_TO_COME), extra=scratch)
            tree = await self._git.tree(head, {post.path: entry}, extra=scratch)
            diff = await self._diff(head, tree, scratch)
        new = post.path not in await self._git.entries(head, post.path)
        back = f"takes {post.path} away" if new else f"puts {post.path} back as it was"
        return Dry(
            target=f"{self.name}:{post.path}",
            version=await self._version(head, post),
            diff=diff,
            reversibility=Reversibility.REVERSIBLE,
            undo=f"a new commit {back}",
        )

    async def find(self, key: str, work: Work) -> Applied | None:
        """Look for the commit that carries the key."""
        post = _read(work)
        landed = await self._landed(await self._head(), _checked(key))
        return await self._applied(landed, post) if landed else None

    async def apply(self, key: str, work: Work, expected: str, deadline: datetime) -> Applied:
        """Commit the post, once per key, and build the pages.

        Raises:
            PreconditionLost: the post or the site's configuration has changed since `expected`.
            ConnectorUnavailable: the deadline passed, or git failed.
        """
        post = _read(work)

        async def change(head: str) -> Changes:
            standing = await self._version(head, post)
            if standing != expected:
                raise PreconditionLost(
                    f"{self.name}: {post.path} or the site's configuration changed since the plan; plan again"
                )
            return {post.path: await self._git.store(post.file(key), deadline=deadline)}

        commit = await self._land(f"Publish {post.slug}", _checked(key), "", change, deadline)
        return await self._show(await self._applied(commit, post), deadline)

    async def verify(self, work: Work, applied: Applied) -> Applied:
        """Read the page back as a visitor would; a draft is looked up in the branch.

        Raises:
            ConnectorUnavailable: it cannot be seen yet.
        """
        post = _read(work)
        head = await self._head()
        if await self._differs(head, applied.reference, post.path):
            raise ConnectorUnavailable(
                f"{self.name}: {post.path} no longer stands as in {applied.reference}; look who changed it"
            )
        if post.draft:
            return replace(applied, links=(), detail=f"draft; stands in {self._site.branch}, on no page")
        page, key = self._page(post), await self._key_of(applied.reference)
        await self._builder.build()
        if await self._looks(page, key) is not None:
            await self._builder.build(force=True)
            why = await self._looks(page, key)
            if why is not None:
                raise ConnectorUnavailable(f"{page}: {why}")
        return replace(applied, links=(page,), detail="the page answers and carries the action's key")

    async def undo(self, key: str, work: Work, applied: Applied, deadline: datetime) -> Applied:
        """Commit the post's former state, once per key.

        Raises:
            ConnectorRejected: the post has changed since.
            ConnectorUnavailable: the deadline passed, or git failed.
        """
        post = _read(work)
        if not COMMIT.fullmatch(applied.reference):
            raise ConnectorRejected(
                f"reference: {applied.reference[:80]!r} is no commit; give the receipt's own"
            )

        async def change(head: str) -> Changes:
            if await self._differs(head, applied.reference, post.path):
                raise ConnectorRejected(
                    f"{self.name}: {post.path} changed after {applied.reference}; "
                    "restore it by hand or with a new post"
                )
            former = await self._git.entries(f"{applied.reference}^", post.path)
            return {post.path: former.get(post.path)}

        subject = f"Take back {post.slug}"
        landed = await self._land(subject, _checked(key), applied.reference, change, deadline)
        return await self._show(replace(await self._applied(landed, post), links=()), deadline)

    async def _land(
        self,
        subject: str,
        key: str,
        undoes: str,
        change: Callable[[str], Awaitable[Changes]],
        deadline: datetime,
    ) -> Landed:
        """Build upon the head and move the branch; a race lost to others is run again on the new head."""
        message = f"{subject}\n\n{TRAILER}: {key}\n" + (f"{UNDOES}: {undoes}\n" if undoes else "")
        async with self._turn:
            for attempt in range(TRIES):
                self._in_time(deadline)
                head = await self._head()
                standing = await self._landed(head, key, undoes)
                if standing is not None:
                    return standing
                changes = await change(head)
                commit = await self._git.commit(head, changes, message, self._clock(), deadline)
                self._in_time(deadline)
                if await self._git.swap(self._ref, commit, head, deadline):
                    return Landed(commit, undoes)
                await asyncio.sleep(min(0.005 * attempt, 0.1))
        raise ConnectorUnavailable(
            f"{self.name}: {self._site.branch} moved {TRIES} times meanwhile; try again"
        )

    def _in_time(self, deadline: datetime) -> None:
        if self._clock() >= deadline:
            raise ConnectorUnavailable(
                f"{self.name}: the attempt's deadline {deadline.isoformat()} has passed; nothing was sent"
            )

    async def _show(self, applied: Applied, deadline: datetime) -> Applied:
        """Build the pages. The commit stands whether or not that works: `verify` builds again."""
        try:
            await self._builder.build(deadline)
        except ConnectorUnavailable as error:
            return replace(applied, detail=f"committed; pages not built yet: {error.message}"[:300])
        return replace(applied, detail="committed; pages built")

    async def _head(self) -> str:
        if not self._founded:
            await self._git.found(self._ref, first_files(self._site))
            self._founded = True
        head = await self._git.head(self._ref)
        if head is None:
            raise ConnectorUnavailable(f"{self.name}: branch {self._site.branch} is gone; restore it")
        return head

    async def _version(self, commit: str, post: Publish) -> str:
        """Name what the action reads or overwrites, and nothing else: other posts may come and go."""
        entries = await self._git.entries(commit, post.path, *CONFIGURATION)
        covered = {path: f"{entry.mode} {entry.blob}" for path, entry in sorted(entries.items())}
        return sha256(json.dumps([post.path, covered]).encode())

    async def _differs(self, head: str, reference: str, path: str) -> bool:
        there, then = await self._git.entries(head, path), await self._git.entries(reference, path)
        return there != then

    async def _landed(self, head: str, key: str, undoes: str = "") -> Landed | None:
        """The oldest commit that carries exactly this key (and takes back exactly that commit)."""
        needle = f"--grep={TRAILER}: {key}"
        out = await self._git.run("log", "--no-show-signature", "-F", needle, f"--format={FORMAT}", head)
        for line in reversed(out.decode(errors="replace").splitlines()):
            commit, keys, taken_back = line.split("\0")
            if key in keys.split("\x01") and (not undoes or taken_back == undoes):
                return Landed(commit, taken_back)
        return None

    async def _key_of(self, commit: str) -> str:
        out = await self._git.run("log", "-1", "--no-show-signature", f"--format={FORMAT}", commit)
        return out.decode(errors="replace").strip("\n").split("\0")[1].split("\x01")[0]

    async def _applied(self, landed: Landed, post: Publish) -> Applied:
        links = () if post.draft or landed.undoes else (self._page(post),)
        return Applied(landed.commit, await self._version(landed.commit, post), links)

    async def _diff(self, head: str, tree: str, scratch: Mapping[str, str]) -> str:
        options = ("-p", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--text")
        out = await self._git.run("diff-tree", *options, head, tree, extra=scratch)
        lines = out.decode(errors="replace").split("\n")
        # The id of a blob that holds a key to come would name bytes that never stand anywhere.
        return "\n".join(line for line in lines if not line.startswith("index "))

    def _page(self, post: Publish) -> str:
        return f"{self._site.address.rstrip('/')}/posts/{post.slug}/"

    async def _looks(self, page: str, key: str) -> str | None:
        """Why the page does not show what was applied; `None` if it does."""
        try:
            answer = await self._client.get(page)
        except httpx.HTTPError as error:
            return f"cannot be read ({type(error).__name__}); is the site served?"
        if answer.status_code != 200:
            return f"answered {answer.status_code}"
        mark = rf"""<meta\s+name=["']?countersign-action["']?\s+content=["']?{re.escape(key)}["'\s/>]"""
        if not re.search(mark, answer.text):
            return f"does not carry the action's key; its layout must print the front matter field {MARKER}"
        return None


def _read(work: Work) -> Publish:
    if work.operation != "publish":
        raise UnknownName(f"operation: {work.operation!r} is not known to a git site; known: publish")
    return read_arguments(Publish, work.arguments, REMEDIES)


def _checked(key: str) -> str:
    if not KEY.fullmatch(key):
        raise InvalidInput.field("key", key, "write letters, digits and ._:- only, at most 200 characters")
    return key
