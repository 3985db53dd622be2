"""`./run backup DIR` and `./run restore DIR`: everything that a home keeps, to and from a folder, while nothing runs.

PostgreSQL goes as a dump, which a later version reads as well; JetStream and Redis as their files, which are whole once the
servers have stopped. Secrets go along: without the pepper no issued key is valid. What servers of your own keep is not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from infra.embedded import control, servers
from infra.embedded.home import HOME_VARIABLE, Home, write_private
from libs.common import VERSION

FORMAT = 1
"""Of a backup's folder."""
START_SECONDS = 60.0
MANIFEST = "portcullis-backup.json"
DUMP = "postgres.dump"
FILES = ("jetstream", "appendonly.aof", "secrets")
"""Copied as they are, where they are there."""
DATA = ("jetstream", "appendonly.aof", "postgres", "secrets")
"""What a home has that has been used."""


class BackupError(Exception):
    """It cannot be done; the text is one line that says what to do."""


def backup(home: Home, target: Path) -> list[str]:
    """Write a backup into `target`, which must not exist yet. Returns what is in it. Raises BackupError."""
    if target.exists():
        raise BackupError(f"{target} exists; name a folder that does not exist yet")
    if not _holds(home, "secrets"):
        raise BackupError(f"there is nothing in {home.path}; {HOME_VARIABLE} names another home")
    _require_quiet(home)
    # Under another name until it is complete, so that half a backup is not taken for one.
    making = target.with_name(target.name + ".partial")
    shutil.rmtree(making, ignore_errors=True)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, making, ignore_errors=True)
        making.mkdir(parents=True, mode=0o700)
        kept = [name for name in FILES if _copy(home.path / name, making / name)]
        if (home.path / "postgres").exists():
            with _postgres(home) as connection:
                _run("pg_dump", connection, "--format=custom", "--no-owner", f"--file={making / DUMP}")
            kept.append(DUMP)
        manifest = {"format": FORMAT, "portcullis": VERSION, "made_at": datetime.now(UTC).isoformat(), "holds": kept}
        write_private(making / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        making.rename(target)
        undo.pop_all()
    return kept


def restore(home: Home, source: Path) -> list[str]:
    """Fill a home that has nothing yet. Returns what was restored. Raises BackupError."""
    kept = _manifest(source)
    if held := [name for name in DATA if _holds(home, name)]:
        raise BackupError(f"{home.path} already holds {', '.join(held)}; move it away, or set {HOME_VARIABLE} to another folder")
    _require_quiet(home)
    with ExitStack() as undo:
        undo.callback(_empty, home)  # half of it would be taken for a home
        for name in kept:
            if name != DUMP:
                _copy(source / name, home.path / name)
        if DUMP in kept:
            with _postgres(home) as connection:
                _run("pg_restore", connection, "--exit-on-error", "--no-owner", "--single-transaction", str(source / DUMP))
        undo.pop_all()
    return kept


def _empty(home: Home) -> None:
    for path in (home.path / name for name in DATA):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _manifest(source: Path) -> list[str]:
    try:
        manifest = json.loads((source / MANIFEST).read_text())
        kept = [str(name) for name in manifest["holds"]]
        written = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BackupError(f"{source} is no backup: it has no {MANIFEST} that can be read") from None
    if written != FORMAT:
        raise BackupError(f"{source} has format {written}, and this version reads {FORMAT}; use the version that wrote it")
    if missing := [name for name in kept if name not in (*FILES, DUMP) or not (source / name).exists()]:
        raise BackupError(f"{source} is not complete: {', '.join(missing)} is missing")
    return kept


def _require_quiet(home: Home) -> None:
    if control.Supervisor(home).pid() is not None:
        raise BackupError("Portcullis runs, and what it keeps changes; stop it first with ./run down")
    control.end_leftovers(home)


def _holds(home: Home, name: str) -> bool:
    path = home.path / name
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _copy(source: Path, target: Path) -> bool:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    elif source.exists():
        shutil.copy2(source, target)
    return source.exists()


@contextmanager
def _postgres(home: Home) -> Iterator[dict[str, str]]:
    """PostgreSQL alone, for the block; yields the environment with which its programs connect."""
    server = servers.postgres(home.path, home.port("postgres"), home.secret("postgres"))
    connection = {
        **os.environ,
        "PGHOST": servers.HOST,
        "PGPORT": str(server.port),
        "PGUSER": servers.POSTGRES_USER,
        "PGDATABASE": servers.POSTGRES_DATABASE,
        "PGPASSWORD": home.secret("postgres"),
    }
    log = home.logs / "backup.log"
    with log.open("wb") as output:
        process = subprocess.Popen(server.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)  # noqa: S603
    try:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run([servers.postgres_binaries() / "pg_isready", "--quiet"], env=connection).returncode:  # noqa: S603
            if process.poll() is not None or time.monotonic() > deadline:
                raise BackupError(f"PostgreSQL does not start; its log is {log}")
            time.sleep(0.1)
        yield connection
    finally:
        process.send_signal(signal.Signals[f"SIG{server.stop_signal}"])
        process.wait(START_SECONDS)


def _run(program: str, connection: dict[str, str], *arguments: str) -> None:
    command = [str(servers.postgres_binaries() / program), "--dbname", connection["PGDATABASE"], *arguments]
    completed = subprocess.run(command, env=connection, capture_output=True, text=True)  # noqa: S603
    if completed.returncode:
        said = completed.stderr.strip().splitlines() or [f"exit status {completed.returncode}"]
        raise BackupError(f"{program}: {said[0]}")
