"""Serves a folder over HTTP to this machine: GET and HEAD, nothing outside the folder, nothing hidden.

The folder may be a link that is swapped while requests run; each request sees one whole build.
"""

from __future__ import annotations

import asyncio
import mimetypes
from pathlib import Path

from aiohttp import web

from activities.services.listening import Listening

NOT_FOUND = b"<!doctype html>\n<title>Not found</title>\n<h1>Not found</h1>\n<p>No such page here.</p>\n"
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


class SiteServer(Listening):
    """A small static server."""

    def __init__(self, folder: Path, port: int = 0, host: str = "127.0.0.1") -> None:
        """Port 0 takes a free one, known after `start`."""
        super().__init__(port, host)
        self._folder = folder

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._serve)
        return app

    async def _serve(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        found = await asyncio.to_thread(read_page, self._folder, path)
        if found is None:
            return web.Response(status=404, body=NOT_FOUND, content_type="text/html", headers=HEADERS)
        file, data = found
        if file.name == "index.html" and path and not path.endswith(("/", "index.html")):
            raise web.HTTPMovedPermanently(f"{request.rel_url.raw_path}/", headers=HEADERS)
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        charset = "utf-8" if kind.startswith("text/") else None
        return web.Response(body=data, content_type=kind, charset=charset, headers=HEADERS)


def read_page(folder: Path, path: str) -> tuple[Path, bytes] | None:
    """The file a path names, and its bytes; once more if the folder was swapped meanwhile."""
    root = folder.resolve()
    found = _read(root, path)
    again = folder.resolve()
    return found if found is not None or again == root else _read(again, path)


def _read(root: Path, path: str) -> tuple[Path, bytes] | None:
    parts = path.split("/")
    if path.startswith("/") or "\0" in path or any(part.startswith(".") for part in parts):
        return None
    try:
        file = (root / path).resolve()
        if file.is_dir():
            file = (file / "index.html").resolve()
        # Resolved before it is compared, so that a link inside the folder cannot lead out of it.
        return (file, file.read_bytes()) if file.is_relative_to(root) else None
    except (OSError, RuntimeError):
        return None
