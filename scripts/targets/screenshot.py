"""A picture of a page as Debian's Chromium shows it: `python -m scripts.targets.screenshot URL FILE`.

For the pictures in the README and for looking at the Temporal UI; needs `apt-get install chromium`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import tempfile
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


async def shoot(url: str, file: Path, seconds: float, size: tuple[int, int]) -> None:
    """Open the page, give its scripts `seconds`, and write a PNG."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            "chromium",
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                file.write_bytes(await _capture(session, port, url, seconds))
        finally:
            process.terminate()
            await process.wait()


async def _port(file: Path) -> str:
    async with asyncio.timeout(60):
        while not file.exists() or not file.read_text().strip():  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # another process has no event to await
    return file.read_text().split("\n")[0]


async def _capture(session: aiohttp.ClientSession, port: str, url: str, seconds: float) -> bytes:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        pages = await answer.json()
    page = next(one for one in pages if one["type"] == "page")
    async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as link:
        await _ask(link, 1, "Page.navigate", {"url": url})
        await asyncio.sleep(seconds)
        shot = await _ask(link, 2, "Page.captureScreenshot", {"format": "png"})
    return base64.b64decode(shot["data"])


async def _ask(
    link: aiohttp.ClientWebSocketResponse, number: int, method: str, parameters: dict[str, Any]
) -> dict[str, Any]:
    await link.send_json({"id": number, "method": method, "params": parameters})
    while True:
        answer = await link.receive_json(timeout=60)
        if answer.get("id") == number:
            return answer["result"]


def main() -> None:
    """Read the arguments and take the picture."""
    parser = argparse.ArgumentParser(prog="python -m scripts.targets.screenshot")
    parser.add_argument("url")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--size", default="1400x1400")
    options = parser.parse_args()
    width, height = (int(part) for part in options.size.split("x"))
    asyncio.run(shoot(options.url, options.file, options.seconds, (width, height)))


if __name__ == "__main__":
    main()
