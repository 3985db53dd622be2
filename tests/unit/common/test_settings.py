"""Secrets from files: found by their variable's name, yielding to the environment, and one line about what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from libs.common.settings import SECRETS_VARIABLE, CommonSettings, load


class Settings(CommonSettings):
    token: SecretStr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PORTCULLIS_TOKEN", raising=False)
    monkeypatch.delenv("PORTCULLIS_NATS_PASSWORD", raising=False)
    monkeypatch.setenv(SECRETS_VARIABLE, str(tmp_path))
    return tmp_path


def test_a_secret_is_read_from_the_file_that_is_called_like_its_variable(folder: Path) -> None:
    (folder / "portcullis_token").write_text("from a file\n")
    (folder / "portcullis_nats_password").write_text("another")
    (folder / "somebody-elses").write_text("is left alone")
    settings = load(Settings)
    assert settings.token.get_secret_value() == "from a file"
    assert settings.nats_password is not None
    assert settings.nats_password.get_secret_value() == "another"


def test_the_environment_goes_before_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "portcullis_token").write_text("from a file")
    monkeypatch.setenv("PORTCULLIS_TOKEN", "from the environment")
    assert load(Settings).token.get_secret_value() == "from the environment"


def test_without_a_folder_nothing_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "portcullis_token").write_text("from a file")
    monkeypatch.delenv(SECRETS_VARIABLE)
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        load(Settings)


def test_a_folder_that_is_not_there_ends_the_start_with_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(SECRETS_VARIABLE, str(folder / "missing"))
    with pytest.raises(SystemExit) as end:
        load(Settings)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert SECRETS_VARIABLE in line
    assert "no such folder" in line


def test_a_secret_that_may_not_be_read_ends_the_start_with_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = folder / "portcullis_token"
    secret.write_text("from a file")

    def refused(*_: object, **__: object) -> str:  # root may read every file
        raise PermissionError(13, "Permission denied", str(secret))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(SystemExit) as end:
        load(Settings)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{secret}: permission denied" in line
    assert "from a file" not in line


def test_several_services_in_one_process_have_a_password_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTCULLIS_TOKEN", "a token")
    (folder / "portcullis_nats_passwords").write_text('{"edge": "first-password", "auth": "second"}')
    settings = load(Settings)
    assert {name: password.get_secret_value() for name, password in settings.nats_passwords.items()} == {
        "edge": "first-password",
        "auth": "second",
    }
    assert "first-password" not in repr(settings)
    for wrong in ("edge=one", '["one"]', '{"edge": 1}', "[" * 100_000):
        monkeypatch.setenv("PORTCULLIS_NATS_PASSWORDS", wrong)
        with pytest.raises(SystemExit):
            load(Settings)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("portcullis: PORTCULLIS_NATS_PASSWORDS: ")
        assert "JSON object such as" in line
        assert wrong not in line
