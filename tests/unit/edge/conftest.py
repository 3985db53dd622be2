from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.unit.edge.fakes import FakeStages, client_of, gate_of


@pytest.fixture
def stages() -> FakeStages:
    return FakeStages()


@pytest.fixture
async def client(stages: FakeStages) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(gate_of(stages)) as client:
        yield client
