"""The same site, built by a real Hugo (`scripts/targets/hugo.sh` installs it)."""

import asyncio
import html
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from activities.connectors.base import Applied, Work
from activities.connectors.git_site import GitSite
from activities.services.git import Git
from activities.services.site_server import SiteServer
from models.errors import ConnectorUnavailable
from models.settings import SiteSettings

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("hugo") is None, reason="run scripts/targets/hugo.sh first"),
]

KEY = "ab" * 32 + "."
BODY = """Some *text*.

---

<script>alert(1)</script>

+++

{{ .Site }}

[x](javascript:alert(1))
"""
REF = "refs/heads/main"
TITLES = (
    "<script>alert(1)</script>",
    '--- "quoted" \\',
    "}} {{ .Site.Title }} +++",
    "ends with a backslash \\",
    "{ unbalanced",
    "é🙂 & co",
)


def now() -> datetime:
    return datetime.now(UTC)


def post(slug: str, **changes: object) -> Work:
    arguments: dict[str, object] = {
        "slug": slug,
        "title": "Hello",
        "description": "About",
        "tags": ["one"],
        "date": "2026-01-31T09:00:00Z",
        "draft": False,
        "body": BODY,
    }
    return Work("publish", {**arguments, **changes})


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[GitSite]:
    server = SiteServer(tmp_path / "public")
    await server.start()
    settings = SiteSettings(
        name="blog",
        repository=Path("site.git"),
        build=Path("public"),
        address=f"http://127.0.0.1:{server.port}",
    )
    async with httpx.AsyncClient() as client:
        yield GitSite(settings, tmp_path, client, now, engine="hugo")
    await server.close()


async def publish(site: GitSite, work: Work, key: str) -> Applied:
    dry = await site.plan(work)
    return await site.apply(key, work, dry.version, now() + timedelta(seconds=60))


async def test_a_published_post_is_read_back_over_http(site: GitSite, tmp_path: Path):
    work = post("hello")
    applied = await publish(site, work, f"{KEY}0")
    assert applied.detail == "committed; pages built"
    seen = await site.verify(work, applied)
    assert seen.links[0].endswith("/posts/hello/")
    page = (tmp_path / "public/posts/hello/index.html").read_text()
    assert f'<meta name="countersign-action" content="{KEY}0">' in page
    assert "<em>text</em>" in page and '<meta name="description" content="About">' in page
    for index in ("index.html", "posts/index.html"):
        assert 'href="/posts/hello/"' in (tmp_path / "public" / index).read_text()


async def test_hostile_text_stays_text(site: GitSite, tmp_path: Path):
    for number, title in enumerate(TITLES):
        work = post(f"post-{number}", title=title, description=title)
        applied = await publish(site, work, f"{KEY}{number}")
        await site.verify(work, applied)
        page = (tmp_path / f"public/posts/post-{number}/index.html").read_text()
        assert "<script" not in page and 'href="javascript:' not in page
        shown = html.unescape(page.partition("<title>")[2].partition("</title>")[0])
        assert shown == title
        assert "{{ .Site }}" in page


async def test_drafts_are_not_built_and_future_posts_are(site: GitSite, tmp_path: Path):
    draft, future = post("draft", draft=True), post("future", date="2099-01-01T00:00:00Z")
    await site.verify(draft, await publish(site, draft, f"{KEY}0"))
    await site.verify(future, await publish(site, future, f"{KEY}1"))
    assert not (tmp_path / "public/posts/draft").exists()


async def test_undo_takes_the_page_away(site: GitSite, tmp_path: Path):
    work = post("hello")
    applied = await publish(site, work, f"{KEY}0")
    await site.undo(f"{KEY}0", work, applied, now() + timedelta(seconds=60))
    assert not (tmp_path / "public/posts/hello").exists()
    assert (tmp_path / "public/index.html").is_file()


async def test_a_site_that_hugo_cannot_build_is_named_and_the_effect_stands(site: GitSite, tmp_path: Path):
    work = post("hello")
    await site.plan(work)
    git = Git(tmp_path / "site.git", now)
    head = await git.head(REF)
    assert head
    broken = await git.store(b"---\ntitle: [\n---\n")
    commit = await git.commit(head, {"content/posts/broken.md": broken}, "Break\n", now())
    assert await git.swap(REF, commit, head)
    applied = await publish(site, work, f"{KEY}0")
    assert "not built" in applied.detail
    with pytest.raises(ConnectorUnavailable, match="hugo cannot build"):
        await site.verify(work, applied)


async def test_posts_published_at_once_are_all_there(site: GitSite, tmp_path: Path):
    works = [post(f"post-{n}") for n in range(4)]
    await asyncio.gather(*(publish(site, work, f"{KEY}{n}") for n, work in enumerate(works)))
    assert all((tmp_path / f"public/posts/post-{n}/index.html").is_file() for n in range(4))
