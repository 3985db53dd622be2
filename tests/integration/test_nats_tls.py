"""TLS to NATS: a real server whose certificate a CA of the test's own has signed, and services that trust it or do not."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import nats
import nats.errors
import pytest
import trustme
from pydantic import SecretStr

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common.bus import Bus
from libs.common.service import ConfigurationError, connect
from libs.common.settings import CommonSettings, load
from tests.conftest import free_port, running

PASSWORD = "a-password-that-must-not-be-seen"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trusted(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that PORTCULLIS_NATS_TLS_CA names."""
    return _written(authority, tmp_path_factory.mktemp("ca"))


def _written(authority: trustme.CA, folder: Path) -> Path:
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@contextmanager
def serving(home: Path, certificate: trustme.LeafCert | None) -> Iterator[Server]:
    """NATS as the stack configures it, with `certificate` for its connections; without one, without TLS."""
    server = servers.nats(home, free_port(), {"limiter": PASSWORD})
    if certificate is not None:
        paths = {"cert_file": str(home / "server.pem"), "key_file": str(home / "server.key")}
        certificate.cert_chain_pems[0].write_to_path(paths["cert_file"])
        certificate.private_key_pem.write_to_path(paths["key_file"])
        written = home / "nats.conf"
        written.write_text(json.dumps(json.loads(written.read_text()) | {"tls": paths}))
        server = replace(server, url=server.url.replace("nats://", "tls://"))
    with running(server):
        yield server


@pytest.fixture(scope="module")
def server(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("nats"), authority.issue_cert("127.0.0.1")) as server:
        yield server


def settings(url: str, trusted: Path | None) -> CommonSettings:
    return CommonSettings(
        nats_url=url,
        nats_user="limiter",
        nats_password=SecretStr(PASSWORD),
        nats_tls_ca=str(trusted) if trusted is not None else None,
    )


async def refusal(url: str, trusted: Path | None) -> str:
    """The one line with which a service gives up; trying again for ever would be silence."""
    chosen = settings(url, trusted)
    with pytest.raises(ConfigurationError) as caught:
        async with asyncio.timeout(20):
            await connect(Bus("limiter", chosen), chosen)
    assert PASSWORD not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["tls", "nats"])
async def test_a_service_works_over_tls(server: Server, trusted: Path, scheme: str) -> None:
    chosen = settings(server.url.replace("tls://", f"{scheme}://"), trusted)
    bus = Bus("limiter", chosen)
    await connect(bus, chosen)
    await bus.start()
    assert bus.connection._transport is not None
    assert bus.connection._transport._io_writer.get_extra_info("cipher") is not None  # type: ignore[attr-defined]
    await bus.drain()


async def test_a_service_finds_the_server_of_a_list_that_is_there(server: Server, trusted: Path) -> None:
    chosen = settings(f"tls://127.0.0.1:{free_port()}, {server.url}", trusted)
    bus = Bus("limiter", chosen)
    async with asyncio.timeout(20):
        await connect(bus, chosen)
    assert bus.connected
    await bus.drain()


async def test_the_server_takes_nobody_without_tls(server: Server) -> None:
    """What the tests above and below rest on."""
    with pytest.raises((nats.errors.Error, OSError)):
        await nats.connect(server.url, user="limiter", password=PASSWORD, allow_reconnect=False, max_reconnect_attempts=0)


async def test_a_server_of_another_ca_is_refused(server: Server, tmp_path: Path) -> None:
    said = await refusal(server.url, _written(trustme.CA(), tmp_path))
    assert "certificate" in said
    assert "PORTCULLIS_NATS_TLS_CA" in said


def test_a_service_ends_with_that_one_line(server: Server, tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PORTCULLIS_")},
        "PORTCULLIS_NATS_URL": server.url,
        "PORTCULLIS_NATS_USER": "limiter",
        "PORTCULLIS_NATS_PASSWORD": PASSWORD,
        "PORTCULLIS_NATS_TLS_CA": str(_written(trustme.CA(), tmp_path)),
    }
    completed = subprocess.run(
        [sys.executable, "-m", "services.limiter"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert completed.returncode == 2
    (line,) = completed.stderr.splitlines()
    assert line.startswith("portcullis limiter: the certificate of the NATS server is not accepted")


async def test_a_private_ca_has_to_be_named(server: Server) -> None:
    assert "PORTCULLIS_NATS_TLS_CA" in await refusal(server.url, None)


async def test_a_certificate_of_another_name_is_refused(authority: trustme.CA, trusted: Path, tmp_path: Path) -> None:
    with serving(tmp_path, authority.issue_cert("nats.example")) as server:
        assert "certificate" in await refusal(server.url, trusted)


@pytest.mark.parametrize("asked", ["by the CA", "by the scheme"])
async def test_no_password_is_sent_to_a_server_that_offers_no_tls(asked: str, trusted: Path, tmp_path: Path) -> None:
    """Whoever stands in between would only have to leave `tls_required` out of the server's greeting."""
    with serving(tmp_path, None) as server:
        url, ca = (server.url, trusted) if asked == "by the CA" else (server.url.replace("nats://", "tls://"), None)
        assert "no TLS" in await refusal(url, ca)


@pytest.mark.parametrize("content", [None, b"", b"no certificate\n"], ids=["missing", "empty", "garbage"])
def test_a_ca_that_cannot_be_read_is_told_in_one_line(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("PORTCULLIS_NATS_TLS_CA", str(path))
    with pytest.raises(SystemExit) as caught:
        load(CommonSettings)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("portcullis: PORTCULLIS_NATS_TLS_CA: ")
