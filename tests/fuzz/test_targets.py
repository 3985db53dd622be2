"""Each target on its seeds and on what has failed once, and a short run of the fuzzer on each; `just fuzz` is the long one."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, found, fuzz

OURS = sorted(set(TARGETS) - {"planted"})
needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason=f"atheris has no wheel for {platform.python_implementation()} on {platform.system()} {platform.machine()}",
)


@pytest.mark.parametrize("name", OURS)
def test_seeds_and_what_has_failed_once_do_not_fail(name: str) -> None:
    module = importlib.import_module(TARGETS[name].module)
    inputs = [*module.seeds(), *(path.read_bytes() for path in sorted(found(name).glob("*")))]
    assert len(inputs) > 5
    for data in inputs:
        module.run(data)


@needs_atheris
@pytest.mark.parametrize("name", OURS)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    ended = fuzz(name, tmp_path, f"-runs={TARGETS[name].short_runs}", "-seed=1")
    assert ended.returncode == 0, ended.stdout[-4000:]
    assert f"Done {TARGETS[name].short_runs} runs" in ended.stdout
    assert list((tmp_path / "corpus").iterdir()), "no input led anywhere new: nothing is instrumented"


@needs_atheris
def test_a_mistake_is_found_and_what_leads_there_is_kept(tmp_path: Path) -> None:
    ended = fuzz("planted", tmp_path, f"-runs={TARGETS['planted'].short_runs}", "-seed=1")
    assert ended.returncode != 0
    assert "ValueError: planted" in ended.stdout
    (kept,) = tmp_path.glob("crash-*")
    assert kept.read_bytes().startswith(b"{!}")
