from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from models.errors import InvalidInput
from models.memory import EmbeddingSettings
from models.settings import Settings, SiteSettings, TemporalSettings, TierSettings
from scripts import stack as stacks
from scripts.supervisor import Backoff, Child, Note, NotReady, Phase, Supervisor, tail

ROOT = Path(__file__).parents[1]
SERVE = "import pathlib, signal, sys; pathlib.Path(sys.argv[1]).touch(); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SERVE


async def until(happened: Callable[[], bool]) -> None:
    """Files and processes have no event to await; give up is the test's own timeout."""
    async with asyncio.timeout(30):
        while not happened():
            await asyncio.sleep(0.01)


def child(folder: Path, name: str, code: str = SERVE, **more: object) -> Child:
    mark = folder / f"{name}.mark"

    async def ready(pid: int) -> None:
        await until(mark.exists)

    return Child(name, (sys.executable, "-c", code, str(mark)), ready, **more)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def small(data: Path, **more: object) -> Settings:
    """A stack of nothing but a dev server."""
    temporal = TemporalSettings(address=f"127.0.0.1:{free_port()}", ui_port=free_port())
    return Settings(data=data, temporal=temporal, embeddings=None, roles=()).model_copy(update=more)


class Waits:
    """Stands in for sleeping between starts: records, and lets the first `free` waits pass."""

    def __init__(self, free: int) -> None:
        self.asked: list[float] = []
        self.used_up = asyncio.Event()
        self._free = free

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        if len(self.asked) > self._free:
            self.used_up.set()
            await asyncio.Event().wait()


async def test_a_crashing_child_is_started_again_with_growing_waits(tmp_path: Path) -> None:
    waits = Waits(free=3)

    async def ready(pid: int) -> None:
        pass

    crash = (sys.executable, "-c", "import sys; sys.exit(9)")
    flaky = Child("crash", crash, ready, backoff=Backoff(first=1, most=3))
    notes: list[Note] = []
    async with Supervisor([flaky], tmp_path, notes.append, waits, lambda: 0.0):
        await asyncio.wait_for(waits.used_up.wait(), 30)
    assert waits.asked == [1, 2, 3, 3]
    assert [note.phase for note in notes].count(Phase.STARTING) == 4
    assert any("exit code 9" in note.detail for note in notes)


async def test_a_killed_child_gets_a_new_process(tmp_path: Path) -> None:
    async with Supervisor([child(tmp_path, "one")], tmp_path, pause=Waits(free=1)) as running:
        first = running.pid("one")
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: running.pid("one") not in (None, first))


def test_waits_double_up_to_a_limit_and_chance_only_shortens_them() -> None:
    backoff = Backoff(first=1, most=10)
    assert [backoff.delay(n, 0) for n in (1, 2, 3, 4, 5, 4000)] == [1, 2, 4, 8, 10, 10]
    assert backoff.delay(1, 1) == 0.5


async def test_children_start_after_and_stop_before_what_they_need(tmp_path: Path) -> None:
    notes: list[Note] = []
    parts = [child(tmp_path, "worker", after=("engine",)), child(tmp_path, "engine")]
    async with Supervisor(parts, tmp_path, notes.append):
        pass
    told = [(note.name, note.phase) for note in notes]
    assert told.index(("engine", Phase.READY)) < told.index(("worker", Phase.STARTING))
    assert told.index(("worker", Phase.STOPPED)) < told.index(("engine", Phase.STOPPED))


async def test_a_child_that_ends_before_it_is_ready_fails_the_start_with_its_last_words(
    tmp_path: Path,
) -> None:
    broken = child(tmp_path, "broken", "import sys; print('no such weights'); sys.exit(4)")
    good = child(tmp_path, "good")
    supervisor = Supervisor([good, broken], tmp_path)
    with pytest.raises(NotReady, match=r"(?s)broken ended with exit code 4.*no such weights"):
        await supervisor.__aenter__()
    assert supervisor.pid("good") is None


async def test_a_silent_child_fails_the_start_when_its_time_is_up(tmp_path: Path) -> None:
    silent = child(tmp_path, "silent", "import signal; signal.pause()", timeout=0.2)
    with pytest.raises(NotReady, match=r"not ready after 0\.2 s"):
        await Supervisor([silent], tmp_path).__aenter__()


async def test_a_child_that_ignores_the_stop_is_killed_after_its_grace(tmp_path: Path) -> None:
    async with Supervisor([child(tmp_path, "deaf", STUBBORN, grace=0.1)], tmp_path) as running:
        pid = running.pid("deaf")
        assert pid is not None
    assert not psutil.pid_exists(pid)


async def test_a_child_sees_the_variables_it_was_given(tmp_path: Path) -> None:
    code = "import os; print(os.environ['GREETING'], flush=True);" + SERVE
    async with Supervisor([child(tmp_path, "told", code, env={"GREETING": "a=b c"})], tmp_path) as running:
        assert tail(running.log("told")) == ["a=b c"]


async def test_a_full_log_is_moved_aside_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "one.log").write_bytes(b"x" * 5_000_000)
    (tmp_path / "one.log.1").write_text("older")
    async with Supervisor([child(tmp_path, "one")], tmp_path):
        pass
    assert (tmp_path / "one.log").stat().st_size == 0
    assert (tmp_path / "one.log.1").stat().st_size == 5_000_000
    assert (tmp_path / "one.log.2").read_text() == "older"


LAUNCHER = """
import asyncio, pathlib, sys
from scripts.supervisor import Child, Supervisor

folder = pathlib.Path(sys.argv[1])

def child(name, code):
    mark = folder / name
    async def ready(pid):
        while not mark.exists():
            await asyncio.sleep(0.01)
    return Child(name, (sys.executable, "-c", code, str(mark)), ready)

async def main():
    async with Supervisor([child("one", sys.argv[2]), child("two", sys.argv[3])], folder) as running:
        (folder / "pids.new").write_text(f"{running.pid('one')} {running.pid('two')}")
        (folder / "pids.new").rename(folder / "pids")
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_no_child_outlives_a_killed_launcher_even_one_that_ignores_sigterm(tmp_path: Path) -> None:
    launcher = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LAUNCHER, tmp_path, SERVE, STUBBORN, cwd=ROOT
    )
    await until((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in pids)
    launcher.kill()
    await launcher.wait()
    await until(lambda: all(gone(pid) for pid in pids))


def gone(pid: int) -> bool:
    """No such process, or only its exit status is left for somebody to collect."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_a_child_whose_launcher_is_gone_already_never_starts(tmp_path: Path) -> None:
    leash = ROOT / "scripts" / "leash.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", leash, "1", "--", sys.executable, "-c", SERVE, tmp_path / "mark"
    )
    assert await process.wait() == 71
    assert not (tmp_path / "mark").exists()


async def test_a_stack_with_a_dev_server_comes_up_and_goes_down(tmp_path: Path) -> None:
    migrated: list[str] = []
    settings = small(tmp_path)
    async with stacks.stack(settings, migrate=lambda s: migrated.append(s.tenant)) as running:
        assert stacks.holder(settings) == str(os.getpid())
        assert "/namespaces/default/" in running.addresses["Temporal UI"]
        assert stacks.is_taken(stacks.ports(settings)[0])
    assert migrated == ["default"]
    assert stacks.holder(settings) is None
    assert not (tmp_path / "run" / "settings.json").exists()


async def test_a_second_launcher_on_the_same_data_is_refused(tmp_path: Path) -> None:
    settings = small(tmp_path)
    with stacks.locked(settings), pytest.raises(InvalidInput, match=f"already runs on it .pid {os.getpid()}"):
        async with stacks.stack(settings):
            raise AssertionError("it started")


async def test_a_lock_file_left_behind_by_a_dead_launcher_does_not_block(tmp_path: Path) -> None:
    settings = small(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "up.lock").write_text("999999")
    with stacks.locked(settings), (tmp_path / "run" / "up.lock").open() as file:
        assert file.read() == str(os.getpid())
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_taken_port_is_refused_by_name_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        settings = small(tmp_path, embeddings=EmbeddingSettings(url=f"http://127.0.0.1:{port}"))
        notes: list[Note] = []
        expected = f"embeddings.url: {port} .*taken.*COUNTERSIGN_EMBEDDINGS__URL"
        with pytest.raises(InvalidInput, match=expected):
            async with stacks.stack(settings, notes.append):
                raise AssertionError("it started")
    assert notes == []


def test_two_parts_that_want_one_port_are_refused(tmp_path: Path) -> None:
    settings = small(tmp_path, embeddings=EmbeddingSettings(url="http://127.0.0.1:8233"))
    settings = settings.model_copy(update={"temporal": TemporalSettings()})
    with pytest.raises(InvalidInput, match=r"temporal\.ui_port: 8233 .*embeddings\.url has that port"):
        stacks.ports(settings)


def test_what_is_started_here_must_listen_here(tmp_path: Path) -> None:
    settings = small(tmp_path, embeddings=EmbeddingSettings(url="http://example.com:80"))
    with pytest.raises(InvalidInput, match="listens on 127"):
        stacks.ports(settings)


def test_two_tiers_with_one_address_share_one_model_server(tmp_path: Path) -> None:
    tiers = tuple(
        TierSettings(name=name, kind="llama_cpp", url="http://127.0.0.1:8090", managed=True, concurrency=n)
        for n, name in enumerate(("edge", "standard"), start=1)
    )
    settings = small(tmp_path, tiers=tiers, embeddings=EmbeddingSettings(), roles=("decide",))
    parts = {part.name: part for part in stacks.children(settings, tmp_path / "kept.json")}
    assert set(parts) == {"model-edge-standard", "model-embeddings", "temporal", "decide"}
    assert parts["decide"].after == ("temporal",)
    assert parts["model-edge-standard"].argv[-4:] == ("--parallel", "2", "--context", "4096")


def test_a_served_site_takes_its_port_only_when_the_desk_runs(tmp_path: Path) -> None:
    site = SiteSettings(name="demo", repository=Path("r"), build=Path("b"), address="http://127.0.0.1:8085")
    with_desk, without = small(tmp_path, sites=(site,), roles=("desk",)), small(tmp_path, sites=(site,))
    assert "sites.demo.address" in {port.setting for port in stacks.ports(with_desk)}
    assert "sites.demo.address" not in {port.setting for port in stacks.ports(without)}
