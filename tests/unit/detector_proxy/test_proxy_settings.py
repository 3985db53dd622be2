from __future__ import annotations

import pytest

from libs.common.settings import load
from services.detector_proxy.settings import DetectorProxySettings


def configured(monkeypatch: pytest.MonkeyPatch, **values: str) -> DetectorProxySettings:
    for name, value in values.items():
        monkeypatch.setenv(f"PORTCULLIS_{name}", value)
    return load(DetectorProxySettings)


def test_nothing_set_means_that_the_pool_is_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = configured(monkeypatch)
    assert (settings.engine_kind, settings.engine_url, settings.fallback_pool) == (None, None, "fallback")
    assert settings.breaker_policy.failure_threshold == 5


@pytest.mark.parametrize(
    ("kind", "url"),
    [
        ("detect", "http://engine:8080"),
        ("detect", "https://engine.example/base/"),
        ("tei", "http://127.0.0.1:3000"),
        ("kserve", "http://[::1]:9000/v2/models/guard"),
        ("pool", "pool:gpu"),
    ],
)
def test_every_kind_can_be_configured(monkeypatch: pytest.MonkeyPatch, kind: str, url: str) -> None:
    settings = configured(monkeypatch, ENGINE_KIND=kind, ENGINE_URL=url)
    assert settings.engine_kind == kind
    assert settings.engine_pool == ("gpu" if kind == "pool" else "")


@pytest.mark.parametrize(
    "values",
    [
        {"ENGINE_KIND": "detect"},
        {"ENGINE_URL": "http://engine:8080"},
        {"ENGINE_KIND": "magic", "ENGINE_URL": "http://engine:8080"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "engine:8080"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "ftp://engine"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "http://"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "http://engine:99999"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "http://user:s3cret@engine"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "http://engine/?key=s3cret"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": "http://en gine"},
        {"ENGINE_KIND": "detect", "ENGINE_URL": ""},
        {"ENGINE_KIND": "kserve", "ENGINE_URL": "http://engine:8080"},
        {"ENGINE_KIND": "pool", "ENGINE_URL": "http://engine:8080"},
        {"ENGINE_KIND": "pool", "ENGINE_URL": "pool:a.b"},
        {"ENGINE_KIND": "pool", "ENGINE_URL": "pool:fallback"},
        {"ENGINE_TIMEOUT_SECONDS": "0"},
        {"ENGINE_TIMEOUT_SECONDS": "nan"},
        {"ENGINE_TIMEOUT_SECONDS": "inf"},
        {"ENGINE_THRESHOLD": "1.1"},
        {"ENGINE_THRESHOLD": "nan"},
        {"ENGINE_MAX_CONCURRENCY": "0"},
        {"ENGINE_NAME": "two words"},
        {"ENGINE_TOKEN": "two\nlines s3cret"},
        {"ENGINE_BENIGN_LABELS": " , "},
        {"FALLBACK_POOL": "a.>"},
        {"FALLBACK_POOL": "Upper"},
        {"BREAKER_FAILURES": "11"},
        {"BREAKER_RATE": "0"},
        {"BREAKER_OPEN_SECONDS": "5"},
    ],
)
def test_a_wrong_value_ends_the_start_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], values: dict[str, str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        configured(monkeypatch, **values)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "PORTCULLIS_" in told
    assert "s3cret" not in told


def test_labels_are_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured(monkeypatch, ENGINE_BENIGN_LABELS="SAFE, Label_0").benign_labels == {"safe", "label_0"}
