"""What only a git site must withstand: kills, pushes from outside, hostile text, and builds that race."""

import asyncio
import fcntl
import html
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from activities.connectors.base import Work
from activities.connectors.git_site import GitSite
from activities.services.git import Git
from activities.services.process import run_program
from activities.services.site_builder import SiteBuilder, read_post
from activities.services.site_files import first_files
from activities.services.site_server import SiteServer, read_page
from models.errors import ConnectorRejected, ConnectorUnavailable, PreconditionLost
from models.settings import SiteSettings

KEY = "ab" * 32 + ".0"
REF = "refs/heads/main"
ROOT = Path(__file__).parents[1]
HOSTILE = (
    "---",
    "+++",
    "}",
    '{"a": 1}',
    "\\",
    '"',
    "'",
    "<script>alert(1)</script>",
    "</title>",
    "{{ .Site }}",
    "`",
    "&amp;",
    "\u202e",
    "é🙂",
    "# ",
    "title: x",
    "](javascript:alert(1))",
)


def now() -> datetime:
    return datetime.now(UTC)


def soon() -> datetime:
    return now() + timedelta(seconds=60)


def settings_for(port: int = 1) -> SiteSettings:
    return SiteSettings(
        name="blog",
        repository=Path("site.git"),
        build=Path("public"),
        address=f"http://127.0.0.1:{port}",
    )


def post(slug: str = "hello", **changes: object) -> Work:
    arguments: dict[str, object] = {
        "slug": slug,
        "title": "Hello",
        "description": "",
        "tags": [],
        "date": "2026-01-31T10:00:00+01:00",
        "draft": False,
        "body": "Some *text*.",
    }
    return Work("publish", {**arguments, **changes})


def offline(folder: Path, git: Git | None = None) -> GitSite:
    """A site that nobody reads over HTTP."""
    transport = httpx.MockTransport(lambda request: httpx.Response(503))
    client = httpx.AsyncClient(transport=transport)
    return GitSite(settings_for(), folder, client, now, engine="plain", git=git)


@asynccontextmanager
async def online(folder: Path) -> AsyncIterator[GitSite]:
    server = SiteServer(folder / "public")
    await server.start()
    try:
        async with httpx.AsyncClient() as client:
            yield GitSite(settings_for(server.port), folder, client, now, engine="plain")
    finally:
        await server.close()


async def publish(site: GitSite, work: Work, key: str = KEY):
    dry = await site.plan(work)
    return await site.apply(key, work, dry.version, soon())


def head_of(folder: Path) -> str:
    done = subprocess.run(
        ["git", f"--git-dir={folder / 'site.git'}", "rev-parse", REF], capture_output=True, check=True
    )
    return done.stdout.decode().strip()


class Interfering(Git):
    """Lets somebody else push just before the first moves of the branch."""

    def __init__(self, repository: Path, pushes: int, path: str = "content/posts/theirs.md") -> None:
        super().__init__(repository, now)
        self.pushes = pushes
        self.path = path

    async def swap(self, ref: str, new: str, old: str, deadline: datetime | None = None) -> bool:
        if self.pushes and deadline is not None:
            self.pushes -= 1
            entry = await self.store(f"push {self.pushes}\n".encode())
            theirs = await self.commit(old, {self.path: entry}, "Theirs\n", now())
            assert await super().swap(ref, theirs, old)
        return await super().swap(ref, new, old, deadline)


class Dying(Git):
    """Kills its own process where the branch would move."""

    async def swap(self, ref: str, new: str, old: str, deadline: datetime | None = None) -> bool:
        if deadline is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().swap(ref, new, old, deadline)


class Late(Git):
    """The clock passes the deadline while the commit is made."""

    def __init__(self, repository: Path) -> None:
        super().__init__(repository, lambda: now())
        self.passed = False

    async def commit(self, *arguments, **named) -> str:
        made = await super().commit(*arguments, **named)
        self.passed = True
        return made


def die_while_publishing(folder: str) -> None:
    """Entry of the child process in the kill test."""
    path = Path(folder)
    site = offline(path, Dying(path / "site.git", now))
    asyncio.run(publish(site, post()))


def publish_one(folder: str, slug: str, key: str) -> None:
    """Entry of the child processes in the race tests."""
    asyncio.run(publish(offline(Path(folder)), post(slug), key))


def child(call: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from tests import test_git_site as t; t.{call}"], cwd=ROOT
    )


async def test_a_process_killed_before_the_branch_moves_leaves_nothing(tmp_path: Path):
    site = offline(tmp_path)
    dry = await site.plan(post())
    before = head_of(tmp_path)
    killed = child(f"die_while_publishing({str(tmp_path)!r})")
    assert await asyncio.to_thread(killed.wait, 60) == -signal.SIGKILL
    assert head_of(tmp_path) == before
    assert await site.find(KEY, post()) is None
    applied = await site.apply(KEY, post(), dry.version, soon())
    assert await site.find(KEY, post()) == applied.__class__(
        applied.reference, applied.version, applied.links
    )


async def test_processes_that_start_at_once_share_one_repository_and_one_effect(tmp_path: Path):
    same = [child(f"publish_one({str(tmp_path)!r}, 'hello', {KEY!r})") for _ in range(3)]
    codes = [await asyncio.to_thread(one.wait, 60) for one in same]
    # One that planned after another's commit planned a different change; its key is found all the same.
    assert codes == [0, 0, 0]
    git = Git(tmp_path / "site.git", now)
    assert await git.run("rev-list", "--count", REF) == b"2\n"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".site.git")]
    assert os.readlink(tmp_path / "public").startswith(f"public.builds/{head_of(tmp_path)}")


async def test_a_lock_whose_owner_was_killed_is_cleared(tmp_path: Path):
    site = offline(tmp_path)
    dry = await site.plan(post())
    lock = tmp_path / "site.git" / f"{REF}.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    await site.apply(KEY, post(), dry.version, soon())
    assert not lock.exists()


async def test_a_lock_is_not_cleared_by_two_at_once(tmp_path: Path):
    site = offline(tmp_path)
    await publish(site, post())
    lock = tmp_path / "site.git" / f"{REF}.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    git = Git(tmp_path / "site.git", now)
    head = head_of(tmp_path)
    with (tmp_path / "site.git" / "clearing").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        # Another process has looked at it, and is about to take it away.
        assert not await git.swap(REF, head, head)
        assert lock.exists()
    assert await git.swap(REF, head, head)
    assert not lock.exists()


async def test_a_race_lost_to_an_unrelated_push_is_run_again(tmp_path: Path):
    git = Interfering(tmp_path / "site.git", pushes=3)
    site = offline(tmp_path, git)
    applied = await publish(site, post())
    assert git.pushes == 0
    assert applied.reference == head_of(tmp_path)
    assert "content/posts/theirs.md" in await git.entries(REF)


async def test_a_race_lost_to_a_push_of_the_same_post_is_drift(tmp_path: Path):
    git = Interfering(tmp_path / "site.git", pushes=1, path="content/posts/hello.md")
    site = offline(tmp_path, git)
    with pytest.raises(PreconditionLost, match=r"content/posts/hello\.md"):
        await publish(site, post())
    assert await site.find(KEY, post()) is None


async def test_a_changed_layout_is_drift(tmp_path: Path):
    git = Interfering(tmp_path / "site.git", pushes=1, path="layouts/index.html")
    with pytest.raises(PreconditionLost, match="configuration"):
        await publish(offline(tmp_path, git), post())


async def test_a_deadline_that_passes_during_the_commit_moves_nothing(tmp_path: Path):
    git = Late(tmp_path / "site.git")
    deadline = soon()
    client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(503)))

    def clock() -> datetime:
        return deadline if git.passed and armed else now()

    armed = False
    site = GitSite(settings_for(), tmp_path, client, clock, engine="plain", git=git)
    dry = await site.plan(post())
    before = head_of(tmp_path)
    armed = True
    with pytest.raises(ConnectorUnavailable, match="nothing was sent"):
        await site.apply(KEY, post(), dry.version, deadline)
    assert head_of(tmp_path) == before


async def test_plan_shows_the_diff_that_lands_but_for_the_key(tmp_path: Path):
    site = offline(tmp_path)
    dry = await site.plan(post(title='Say "hi"'))
    applied = await site.apply(KEY, post(title='Say "hi"'), dry.version, soon())
    git = Git(tmp_path / "site.git", now)
    shown = (await git.run("diff-tree", "-p", f"{applied.reference}^", applied.reference)).decode()
    landed = [line for line in shown.splitlines() if not line.startswith("index ")]
    assert dry.diff.replace("(the key of this action)", KEY).splitlines() == landed
    assert '+  "date": "2026-01-31T09:00:00Z",' in landed


async def test_plan_leaves_no_object_behind(tmp_path: Path):
    site = offline(tmp_path)
    await site.plan(post())
    objects = sorted((tmp_path / "site.git" / "objects").rglob("*"))
    await site.plan(post("other"))
    assert sorted((tmp_path / "site.git" / "objects").rglob("*")) == objects


async def test_a_commit_that_only_mentions_the_key_is_not_taken_for_it(tmp_path: Path):
    site = offline(tmp_path)
    await site.plan(post())
    git = Git(tmp_path / "site.git", now)
    head = await git.head(REF)
    assert head
    message = f"We saw\n\nCountersign-Action: {KEY}\n\nin a log\n"
    commit = await git.commit(head, {}, message, now())
    assert await git.swap(REF, commit, head)
    assert await site.find(KEY, post()) is None


async def test_a_draft_stands_in_the_branch_and_on_no_page(tmp_path: Path):
    async with online(tmp_path) as site:
        work = post(draft=True)
        applied = await publish(site, work)
        assert applied.links == ()
        seen = await site.verify(work, applied)
        assert seen.links == () and "draft" in seen.detail
        assert not (tmp_path / "public" / "posts" / "hello").exists()


async def test_verify_builds_again_what_is_missing_or_stale(tmp_path: Path):
    async with online(tmp_path) as site:
        applied = await publish(site, post())
        page = tmp_path / "public" / "posts" / "hello" / "index.html"
        page.write_text("something else")
        assert (await site.verify(post(), applied)).links == applied.links
        (tmp_path / "public").unlink()
        assert (await site.verify(post(), applied)).links == applied.links


async def test_verify_says_when_the_site_is_not_served_or_the_post_is_replaced(tmp_path: Path):
    site = offline(tmp_path)
    applied = await publish(site, post())
    with pytest.raises(ConnectorUnavailable, match="answered 503"):
        await site.verify(post(), applied)
    await publish(site, post(title="New"), f"{KEY}1")
    with pytest.raises(ConnectorUnavailable, match="no longer stands"):
        await site.verify(post(), applied)


async def test_the_effect_stands_even_if_the_pages_cannot_be_built(tmp_path: Path):
    git = Interfering(tmp_path / "site.git", pushes=1)
    site = offline(tmp_path, git)
    await site.plan(post())
    head = await git.head(REF)
    assert head
    broken = await git.store(b"---\ntitle: [\n---\n")
    commit = await git.commit(head, {"content/posts/broken.md": broken}, "Break\n", now())
    assert await git.swap(REF, commit, head)
    applied = await publish(site, post())
    assert "broken.md" in applied.detail
    assert await site.find(KEY, post()) is not None
    with pytest.raises(ConnectorUnavailable, match=r"broken\.md"):
        await site.verify(post(), applied)


async def test_undo_puts_the_former_text_back(tmp_path: Path):
    async with online(tmp_path) as site:
        await publish(site, post(title="First"), f"{KEY}1")
        applied = await publish(site, post(title="Second"), f"{KEY}2")
        assert "Second" in (tmp_path / "public/posts/hello/index.html").read_text()
        await site.undo(f"{KEY}3", post(title="Second"), applied, soon())
        assert "First" in (tmp_path / "public/posts/hello/index.html").read_text()


async def test_undo_of_something_that_is_no_commit_is_refused(tmp_path: Path):
    site = offline(tmp_path)
    applied = await publish(site, post())
    odd = applied.__class__("--output=x", applied.version)
    with pytest.raises(ConnectorRejected, match="no commit"):
        await site.undo(f"{KEY}3", post(), odd, soon())


async def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path):
    (tmp_path / "site.git").mkdir()
    with pytest.raises(ConnectorRejected, match="no bare git repository"):
        await offline(tmp_path).plan(post())


async def test_an_empty_repository_gets_its_first_commit(tmp_path: Path):
    subprocess.run(["git", "init", "--bare", "--quiet", str(tmp_path / "site.git")], check=True)
    assert (await publish(offline(tmp_path), post())).reference == head_of(tmp_path)


async def test_first_commits_are_the_same_everywhere(tmp_path: Path):
    heads = set()
    for name in ("one", "two"):
        await offline(tmp_path / name).plan(post())
        heads.add(head_of(tmp_path / name))
    assert len(heads) == 1


async def test_builds_that_race_end_with_the_newest_head(tmp_path: Path):
    site = offline(tmp_path)
    await site.plan(post())
    git = Git(tmp_path / "site.git", now)

    def builder() -> SiteBuilder:
        return SiteBuilder(git, REF, settings_for(), tmp_path / "public", now, engine="plain")

    async def push(number: int) -> None:
        await publish(site, post(f"post-{number}"), f"{KEY}{number}")

    await asyncio.gather(*(push(n) for n in range(3)), *(builder().build(force=True) for _ in range(4)))
    assert os.readlink(tmp_path / "public").startswith(f"public.builds/{head_of(tmp_path)}-plain-")
    assert all((tmp_path / f"public/posts/post-{n}/index.html").is_file() for n in range(3))
    assert len(list((tmp_path / "public.builds").iterdir())) <= 2


async def test_a_build_waits_for_another_only_until_its_deadline(tmp_path: Path):
    site = offline(tmp_path)
    await site.plan(post())
    builder = SiteBuilder(
        Git(tmp_path / "site.git", now), REF, settings_for(), tmp_path / "public", now, engine="plain"
    )
    async with builder._locked(None):
        with pytest.raises(ConnectorUnavailable, match="another build"):
            await builder.build(now() + timedelta(seconds=0.1))


async def test_a_program_that_does_not_end_is_stopped(tmp_path: Path):
    with pytest.raises(ConnectorUnavailable, match=r"sleep: no end within 0\.1 s"):
        await run_program("/bin/sleep", ["60"], seconds=0.1)
    with pytest.raises(ConnectorUnavailable, match="no such program"):
        await run_program(str(tmp_path / "none"), [], seconds=1)


async def test_a_cancelled_program_is_stopped_or_never_started(tmp_path: Path):
    os.mkfifo(tmp_path / "started")
    script = (
        f"trap 'echo stopped > {tmp_path}/ended; exit' TERM; echo > {tmp_path}/started; while :; do :; done"
    )
    task = asyncio.create_task(run_program("/bin/sh", ["-c", script], seconds=60))
    await asyncio.to_thread((tmp_path / "started").read_text)
    os.mkfifo(tmp_path / "ended")
    task.cancel()
    assert await asyncio.to_thread((tmp_path / "ended").read_text) == "stopped\n"
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_loop_that_closes_while_programs_start_ends(tmp_path: Path):
    async def leave_in_the_middle() -> None:
        tasks = [asyncio.create_task(offline(tmp_path / str(n)).plan(post())) for n in range(8)]
        await asyncio.wait(tasks, timeout=0.01)

    asyncio.run(leave_in_the_middle())


def text_of(parts: list[str]) -> str:
    return "".join(parts)


texts = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)), min_size=1, max_size=6).map(
    text_of
)
lines = texts.filter(lambda text: text.isprintable() and text.strip() != "" and len(text) <= 200)
bodies = (
    st.lists(texts, min_size=1, max_size=5)
    .map("\n".join)
    .filter(
        lambda text: (
            text.strip() != ""
            and all(c >= " " or c in "\n\t\r" for c in text)
            and "\x7f" not in text
            and "{{<" not in text
            and "{{%" not in text
        )
    )
)
slugs = st.from_regex(r"[a-z0-9]{1,12}(-[a-z0-9]{1,8}){0,3}", fullmatch=True).filter(lambda s: s != "index")


@pytest.fixture
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(slug=slugs, title=lines, description=lines, body=bodies)
def test_hostile_text_stays_text_and_touches_one_path(
    tmp_path: Path, loop: asyncio.Runner, slug: str, title: str, description: str, body: str
):
    async def trial() -> None:
        site = offline(tmp_path)
        work = post(slug, title=title, description=description, body=body)
        key = f"{KEY}-{os.urandom(4).hex()}"
        applied = await publish(site, work, key)
        git = Git(tmp_path / "site.git", now)
        parent, head = f"{applied.reference}^", applied.reference
        changed = await git.run("diff-tree", "-r", "--name-only", parent, head)
        assert changed.decode().split() == [f"content/posts/{slug}.md"]
        entry = (await git.entries(head))[f"content/posts/{slug}.md"]
        stored = (await git.run("cat-file", "blob", entry.blob)).decode()
        matter, end = json.JSONDecoder().raw_decode(stored)
        assert (matter["title"], matter["description"]) == (title, description)
        assert stored[end:] == f"\n\n{body}" + ("" if body.endswith("\n") else "\n")
        page = (tmp_path / "public" / "posts" / slug / "index.html").read_bytes().decode()
        assert f"<title>{html.escape(title)}</title>" in page
        assert f'<meta name="countersign-action" content="{key}">' in page
        assert "<script" not in page and 'href="javascript:' not in page
        assert page.count("<title>") == page.count("</title>") == 1

    loop.run(trial())


async def test_other_peoples_posts_are_read_with_yaml_and_toml(tmp_path: Path):
    (tmp_path / "a.md").write_text("---\ntitle: A\ndate: 2026-01-02\ndraft: true\n---\nText\n")
    (tmp_path / "b.md").write_text(
        '+++\ntitle = "B"\ndate = 2026-01-02T00:00:00Z\ntags = ["x"]\n+++\n\nText\n'
    )
    (tmp_path / "c.md").write_text("Only text\n")
    first, second, third = (read_post(tmp_path / f"{name}.md") for name in "abc")
    assert (first.title, first.date, first.draft, first.body) == ("A", "2026-01-02", True, "Text\n")
    assert (second.title, second.tags, second.draft, second.body) == ("B", ("x",), False, "Text\n")
    assert (third.title, third.body) == ("c", "Only text\n")


async def test_the_server_serves_what_the_link_points_at_and_nothing_else(tmp_path: Path):
    (tmp_path / "secret").write_text("secret")
    for name in ("old", "new"):
        (tmp_path / name / "posts").mkdir(parents=True)
        (tmp_path / name / "posts" / "index.html").write_text(name)
        (tmp_path / name / "style.css").write_text("p {}")
        (tmp_path / name / ".hidden").write_text("secret")
        (tmp_path / name / "leak").symlink_to(tmp_path / "secret")
    (tmp_path / "public").symlink_to("old")
    server = SiteServer(tmp_path / "public")
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        assert (await client.get("/posts/")).text == "old"
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").replace(tmp_path / "public")
        page = await client.get("/posts/")
        assert (page.text, page.headers["content-type"]) == ("new", "text/html; charset=utf-8")
        assert (await client.get("/style.css")).headers["content-type"] == "text/css; charset=utf-8"
        head = await client.head("/posts/")
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "3")
        moved = await client.get("/posts")
        assert (moved.status_code, moved.headers["location"]) == (301, "/posts/")
        for path in (
            "/none",
            "/",
            "/.hidden",
            "/leak",
            "/..%2fsecret",
            "/%2e%2e/secret",
            "/a%00b",
            "//posts",
        ):
            assert (await client.get(path)).status_code == 404, path
        assert (await client.post("/posts/")).status_code == 405
    await server.close()
    await server.close()


def test_a_page_outside_the_folder_is_not_read(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("secret")
    for path in ("../out", "/../out", "x/../../out", str(tmp_path / "out")):
        assert read_page(tmp_path / "in", path) is None


def test_the_first_files_name_the_marker_in_every_layout():
    layouts = [data for path, data in first_files(settings_for()).items() if path.startswith("layouts/")]
    assert len(layouts) == 3
    assert all(b".Params.countersign_action" in data for data in layouts)
