"""The two peppers of an exchange: what is refused at the start, in one line that shows neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.common.settings import SECRETS_VARIABLE, load
from services.auth.app import peppers_of
from services.auth.core import verifier_of
from services.auth.settings import AuthSettings

NEW, OLD = "the-pepper-from-now-on", "the-pepper-until-now"


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTCULLIS_DATABASE_URL", "postgresql://u:p@db/portcullis")
    monkeypatch.setenv("PORTCULLIS_KEY_PEPPER", NEW)
    monkeypatch.delenv("PORTCULLIS_KEY_PEPPER_PREVIOUS", raising=False)
    monkeypatch.delenv(SECRETS_VARIABLE, raising=False)


def test_without_a_previous_pepper_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not peppers_of(load(AuthSettings)).is_exchanging
    monkeypatch.setenv("PORTCULLIS_KEY_PEPPER_PREVIOUS", "")
    assert not peppers_of(load(AuthSettings)).is_exchanging
    monkeypatch.delenv("PORTCULLIS_KEY_PEPPER_PREVIOUS")
    monkeypatch.setenv(SECRETS_VARIABLE, str(tmp_path))
    (tmp_path / "portcullis_key_pepper_previous").write_text("\n")
    assert not peppers_of(load(AuthSettings)).is_exchanging


def test_both_peppers_are_used_and_the_current_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTCULLIS_KEY_PEPPER_PREVIOUS", OLD)
    settings = load(AuthSettings)
    assert peppers_of(settings).verifiers("digest") == (verifier_of(NEW.encode(), "digest"), verifier_of(OLD.encode(), "digest"))
    assert peppers_of(settings).verifier("digest") == verifier_of(NEW.encode(), "digest")
    for secret in (NEW, OLD):
        assert secret not in repr(settings)


@pytest.mark.parametrize(
    ("previous", "said"),
    [
        (NEW, "PORTCULLIS_KEY_PEPPER_PREVIOUS is the same as PORTCULLIS_KEY_PEPPER"),
        ("too-short-a-one", "PORTCULLIS_KEY_PEPPER_PREVIOUS: Value should have at least 16 items"),
    ],
)
def test_a_wrong_one_is_refused_in_one_line(
    previous: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORTCULLIS_KEY_PEPPER_PREVIOUS", previous)
    with pytest.raises(SystemExit):
        load(AuthSettings)
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert previous not in error
