from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from infra.embedded.home import (
    HOME_VARIABLE,
    ROOT,
    UNIX_PATH_LIMIT,
    Home,
    HomeError,
    is_free,
    locate_home,
    open_home,
    write_private,
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home({HOME_VARIABLE: str(tmp_path / "home")})


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_home_is_in_the_checkout_unless_told_otherwise(tmp_path: Path) -> None:
    assert locate_home({}).path == ROOT / ".portcullis"
    assert locate_home({HOME_VARIABLE: str(tmp_path)}).path == tmp_path


def test_nobody_else_can_look_into_the_home(home: Home) -> None:
    assert mode(home.path) & 0o066 == 0
    for folder in (home.logs, home.environments, home.starts, home.path / "secrets"):
        assert mode(folder) == 0o700


def test_a_secret_is_made_once_and_is_the_owners_only(home: Home) -> None:
    first = home.secret("redis")
    assert len(first) >= 32
    assert home.secret("redis") == first != home.secret("postgres")
    assert mode(home.path / "secrets" / "redis") == 0o600


def test_a_private_file_is_replaced_in_one_step_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        write_private(path, "new")
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert mode(path) == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_port_is_remembered_until_somebody_takes_it(home: Home) -> None:
    port = home.port("nats")
    assert home.port("nats") == port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert not is_free("127.0.0.1", port)
        moved = home.port("nats")
    assert moved != port
    assert home.port("nats") == moved


def test_the_supervisors_socket_fits_however_deep_the_home_lies(tmp_path: Path) -> None:
    assert Home(Path("/short")).supervisor_socket().parent == Path("/short")
    deep = Home(tmp_path.joinpath(*["a-long-folder-name"] * 6))
    path = deep.supervisor_socket()
    assert len(os.fsencode(path)) < UNIX_PATH_LIMIT
    assert path == deep.supervisor_socket() != Home(deep.path / "other").supervisor_socket()
    assert mode(path.parent) == 0o700
    path.parent.chmod(0o755)
    with pytest.raises(HomeError, match=HOME_VARIABLE):
        deep.supervisor_socket()
    path.parent.rmdir()


def test_only_one_command_prepares_a_home(home: Home) -> None:
    with home.lock(), pytest.raises(HomeError, match="another command"), home.lock():
        pass
    with home.lock():
        pass


def test_a_home_that_cannot_be_made_is_explained_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match=HOME_VARIABLE) as caught:
        open_home({HOME_VARIABLE: str(tmp_path / "file" / "home")})
    assert "\n" not in str(caught.value)
