"""Backup, wipe, restore of the embedded stack: keys, usage, limits and unfinished jobs are there again."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from infra.embedded.backup import DUMP, MANIFEST, BackupError, backup, restore
from infra.embedded.home import HOME_VARIABLE, Home, open_home
from tests.chaos.conftest import ROOMY
from tests.chaos.kit import Caller, Stack, callers, register
from tests.chaos.questions import is_right, question

ITEMS, ALLOWED = 12, 5
DETECTIONS = 3


@asynccontextmanager
async def up(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    try:
        stack.up()
        async with callers(stack) as session:
            yield session
    finally:
        stack.down()


async def profile(session: aiohttp.ClientSession, key: str) -> dict[str, Any]:
    """What is kept of a key: its record, its usage, and what is left of its day."""
    async with session.get("/auth/profile", headers={"X-API-Key": key}) as response:
        body: dict[str, Any] = await response.json()
        assert response.status == 200, body
        return {name: value for name, value in body.items() if not name.endswith("_this_minute")}


async def counted(session: aiohttp.ClientSession, key: str) -> dict[str, Any]:
    """The profile as soon as every detection is in it."""
    async with asyncio.timeout(20):
        while (found := await profile(session, key))["total_requests"] < DETECTIONS:
            await asyncio.sleep(0.1)
    return found


async def test_everything_is_there_again_after_a_wipe() -> None:
    with tempfile.TemporaryDirectory(prefix="pc-") as folder:
        stack = Stack(Path(folder) / "home", environment=ROOMY)
        kept = Path(folder) / "kept"
        async with up(stack) as session:
            key, slow = await register(session), await register(session, rate_limit_per_minute=ALLOWED)
            for number in range(DETECTIONS):
                async with session.post("/v1/detect", json={"text": question(number).text}, headers={"X-API-Key": key}) as told:
                    assert told.status == 200
            before = await counted(session, key)
            assert before["requests_today"] == DETECTIONS
            caller = Caller(session, slow, patience_seconds=60)
            lines = b"".join(json.dumps({"id": str(n), "text": question(n).text}).encode() + b"\n" for n in range(ITEMS))
            job_id = await caller.submit(lines, "before-the-wipe")
            while len(first := await caller.results(job_id)) < ALLOWED:
                await asyncio.sleep(0.1)
            refused = stack.run("backup", str(kept), check=False)
            assert (refused.returncode, "./run down" in refused.stderr) == (1, True)
            assert not kept.exists()

        assert DUMP in stack.run("backup", str(kept)).stdout
        assert [path for path in (kept, *kept.rglob("*")) if path.stat().st_mode & 0o077] == []
        again = stack.run("restore", str(kept), check=False)
        assert (again.returncode, "already holds" in again.stderr) == (1, True)
        shutil.rmtree(stack.home)
        assert "./run up" in stack.run("restore", str(kept)).stdout

        async with up(stack) as session:
            assert await profile(session, key) == before
            caller = Caller(session, slow, patience_seconds=60)
            assert await caller.submit(lines, "before-the-wipe") == job_id
            status, body = await caller.insist("GET", f"/v1/jobs/{job_id}")
            job = json.loads(body)
            assert (status, job["state"], job["total"], job["done"] >= ALLOWED) == (200, "running", ITEMS, True)
            assert (await caller.results(job_id))[:ALLOWED] == first
            admin = {"X-Admin-Token": (stack.home / "secrets" / "admin-token").read_text().strip()}
            key_id = slow.split("_")[2][:12]
            async with session.patch(f"/admin/keys/{key_id}", json={"rate_limit_per_minute": 1000}, headers=admin) as changed:
                assert changed.status == 200, await changed.text()
            assert (await caller.wait(job_id))["state"] == "done"
            found = await caller.results(job_id)
        assert Counter(line["index"] for line in found) == Counter(range(ITEMS))
        assert all(is_right(question(line["index"]), line) for line in found)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """One that was used, without PostgreSQL."""
    home = open_home({HOME_VARIABLE: str(tmp_path / "home")})
    home.secret("key-pepper")
    (home.path / "jetstream").mkdir()
    (home.path / "jetstream" / "a").write_text("stream")
    return home


def test_a_backup_is_complete_or_not_there(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copytree", fails)
    with pytest.raises(OSError, match="no space"):
        backup(home, tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    monkeypatch.undo()
    assert backup(home, tmp_path / "kept") == ["jetstream", "secrets"]
    with pytest.raises(BackupError, match="exists"):
        backup(home, tmp_path / "kept")


def test_a_restored_home_is_complete_or_empty(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backup(home, tmp_path / "kept")
    other = open_home({HOME_VARIABLE: str(tmp_path / "other")})
    copy = shutil.copytree

    def fails_later(source: Path, *arguments: object, **options: object) -> object:
        if source.name == "secrets":
            raise OSError("no space left on device")
        return copy(source, *arguments, **options)  # type: ignore[arg-type, type-var]

    monkeypatch.setattr(shutil, "copytree", fails_later)
    with pytest.raises(OSError, match="no space"):
        restore(other, tmp_path / "kept")
    assert not (other.path / "jetstream").exists()
    monkeypatch.undo()
    restore(open_home({HOME_VARIABLE: str(other.path)}), tmp_path / "kept")
    assert (other.path / "jetstream" / "a").read_text() == "stream"
    assert other.secret("key-pepper") == home.secret("key-pepper")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2"),
        ({"holds": ["jetstream", "secrets", DUMP]}, "not complete"),
        ({"holds": ["../elsewhere"]}, "not complete"),
        ({"holds": None}, "not complete|no backup"),
    ],
)
def test_what_is_no_backup_is_refused(home: Home, tmp_path: Path, change: dict[str, object], said: str) -> None:
    kept = tmp_path / "kept"
    backup(home, kept)
    (kept / MANIFEST).write_text(json.dumps(json.loads((kept / MANIFEST).read_text()) | change))
    with pytest.raises(BackupError, match=said):
        restore(open_home({HOME_VARIABLE: str(tmp_path / "other")}), kept)
    with pytest.raises(BackupError, match="is no backup"):
        restore(open_home({HOME_VARIABLE: str(tmp_path / "other")}), tmp_path)


def test_an_empty_home_has_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="there is nothing"):
        backup(open_home({HOME_VARIABLE: str(tmp_path / "home")}), tmp_path / "kept")
