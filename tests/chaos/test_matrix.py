"""The matrix of faults. A dozen cells of it in the ordinary run; all of them by `just chaos` (PORTCULLIS_TEST_CHAOS=long)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chaos.conftest import ROOMY, stack_in
from tests.chaos.hostile_engine import hostile_engine
from tests.chaos.matrix import CELLS, COMPONENTS, FAST, FAST_EDGE, FAULTS, LOCKED, NOT_SENSIBLE, SCENARIOS
from tests.chaos.questions import engines_verdict
from tests.chaos.rig import Rig, small_disks
from tests.chaos.scenario import Scenario, play
from tests.conftest import free_port

LONG = os.environ.get("PORTCULLIS_TEST_CHAOS") == "long"
# Those with an engine last: the proxy is started anew for them.
PLAYED = sorted((s for s in (*SCENARIOS, FAST, FAST_EDGE, LOCKED) if LONG or s.short), key=lambda scenario: scenario.engine)


@pytest.fixture(scope="module")
async def rig() -> AsyncIterator[Rig]:
    """One of each, all of whose connections run over links."""
    with tempfile.TemporaryDirectory(prefix="pc-") as home, small_disks(Path(home)):
        async with hostile_engine(free_port(), engines_verdict) as engine:
            with stack_in(Path(home), environment=ROOMY) as stack:
                rig = Rig(stack, engine)
                rig.wire()
                yield rig
                rig.close()


@pytest.mark.parametrize("scenario", PLAYED, ids=lambda scenario: scenario.name)
async def test_the_invariants_hold(rig: Rig, scenario: Scenario) -> None:
    print(f"\n{scenario.name}: {await play(rig, scenario)}")


def test_every_cell_has_a_scenario_or_a_reason() -> None:
    for component in COMPONENTS:
        for fault in FAULTS:
            assert ((component, fault) in CELLS) != ((component, fault) in NOT_SENSIBLE), (component, fault)
    assert len(CELLS) == len(SCENARIOS)
