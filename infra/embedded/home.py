"""The folder in which one embedded Portcullis keeps everything: data, secrets, ports, logs.

Its secrets are made once, when they are first asked for. Every file that holds one can be read by its owner only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

HOME_VARIABLE = "PORTCULLIS_HOME"
UNIX_PATH_LIMIT = 107
"""Bytes of a Unix socket's path (sun_path on Linux, less the final NUL)."""
SOCKET_SUFFIX_RESERVE = 20
"""supervisord first binds a name of its own beside the socket's: `.` and its process id."""


class HomeError(Exception):
    """The home cannot be used; the text is one line that says what to do."""


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; it can be read by its owner only."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            Path(file.name).replace(path)  # the temporary file was made with mode 0600
        except OSError:
            Path(file.name).unlink()
            raise


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Binding a port on which somebody listens is refused, but for some older kernels only on listen.
            probe.listen()
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Home:
    """Paths below `path`, which must be absolute; `open_home` makes the folders."""

    path: Path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def environments(self) -> Path:
        """One private JSON file per service: the environment it is started with."""
        return self.path / "environments"

    @property
    def starts(self) -> Path:
        """One file per process with the time and process id of its last starts."""
        return self.path / "starts"

    @property
    def supervisor_configuration(self) -> Path:
        return self.path / "supervisord.conf"

    @property
    def demo_key(self) -> Path:
        return self.path / "secrets" / "demo-key"

    @property
    def admin_token(self) -> Path:
        return self.path / "secrets" / "admin-token"

    @property
    def edge_address(self) -> Path:
        """JSON: the host and port on which the edge was last started, and the URL of NATS if that is ours (`nats`)."""
        return self.path / "edge.json"

    @property
    def metrics_targets(self) -> Path:
        """JSON for Prometheus's file_sd: where each process that was last started serves its metrics."""
        return self.path / "prometheus" / "targets.json"

    def supervisor_socket(self) -> Path:
        """Where supervisord listens; in a private temporary folder when the home's path is too long for a socket."""
        beside = self.path / "supervisor.sock"
        if len(os.fsencode(beside)) <= UNIX_PATH_LIMIT - SOCKET_SUFFIX_RESERVE:
            return beside
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"portcullis-{os.getuid()}-{digest}"
        if len(os.fsencode(folder)) > UNIX_PATH_LIMIT - SOCKET_SUFFIX_RESERVE - len("/s"):
            folder = Path("/tmp") / folder.name  # noqa: S108
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
            raise HomeError(f"{folder} belongs to somebody else; set {HOME_VARIABLE} to a shorter path")
        return folder / "s"

    def secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_urlsafe(24)) -> str:
        """The secret of this name, made when it is first asked for."""
        path = self.path / "secrets" / name
        if not path.exists():
            write_private(path, make() + "\n")
        return path.read_text().strip()

    def kept_secret(self, name: str) -> str | None:
        """The secret of this name, if somebody has put one there."""
        path = self.path / "secrets" / name
        return path.read_text().strip() or None if path.exists() else None

    def port(self, name: str) -> int:
        """The port that was chosen for an internal server, or a new one if somebody else has taken it since."""
        path = self.path / "ports.json"
        ports: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        if name not in ports or not is_free("127.0.0.1", ports[name]):
            # The kernel may offer a port again that another server of ours has not taken yet.
            others = {port for other, port in ports.items() if other != name}
            while (port := free_port()) in others:
                pass
            ports[name] = port
            write_private(path, json.dumps(ports, indent=1) + "\n")
        return ports[name]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process at a time prepares or changes this home."""
        with (self.path / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HomeError(f"another command is starting Portcullis in {self.path} at this moment") from None
            yield


def locate_home(environment: dict[str, str]) -> Home:
    return Home((ROOT / environment.get(HOME_VARIABLE, ".portcullis")).absolute())


def open_home(environment: dict[str, str]) -> Home:
    """The home that the environment names, with its folders made."""
    home = locate_home(environment)
    try:
        home.path.mkdir(parents=True, exist_ok=True)
        # Root runs PostgreSQL as another user, which must be able to pass; what is inside is private one by one.
        home.path.chmod(0o711 if os.geteuid() == 0 else 0o700)
        for folder in (home.logs, home.environments, home.starts, home.path / "secrets", home.metrics_targets.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HomeError(
            f"{home.path} cannot be used ({error.strerror}); set {HOME_VARIABLE} to a folder that can be written"
        ) from None
    return home
