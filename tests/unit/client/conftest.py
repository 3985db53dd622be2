from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.unit.client.kit import Face


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Callable[..., Face]:
    """Makes a client, once of each kind."""
    return partial(Face, request.param)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PORTCULLIS_URL", "PORTCULLIS_API_KEY", "PORTCULLIS_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
