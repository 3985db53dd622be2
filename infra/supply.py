"""What Portcullis is made of: `python -m infra.supply audit` asks about known vulnerabilities, `… sbom` writes what runs.

Both read the lock and nothing else, so that they say the same on every machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[1]
FOUND, NOT_ASKED = 1, 3
"""Exit statuses: something is known to be vulnerable; not everything could be asked about."""

_EXPORT = ("uv", "export", "--quiet", "--frozen", "--all-packages", "--all-extras", "--no-dev")
"""What runs, with every extra; not what only tests need."""


class Vulnerability(msgspec.Struct):
    id: str
    fix_versions: list[str] = []


class Dependency(msgspec.Struct):
    """One package in pip-audit's report; `skip_reason` when it was not asked about."""

    name: str
    version: str = ""
    vulns: list[Vulnerability] = []
    skip_reason: str | None = None


class Report(msgspec.Struct):
    dependencies: list[Dependency]


@dataclass(frozen=True, slots=True)
class Verdict:
    status: int
    lines: tuple[str, ...]


def judge(dependencies: Sequence[Dependency]) -> Verdict:
    """What a report means. pip-audit itself takes what it could not ask about for sound."""
    lines = [
        f"{each.name} {each.version}: {found.id}" + (f", mended in {', '.join(found.fix_versions)}" if found.fix_versions else "")
        for each in dependencies
        for found in each.vulns
    ]
    skipped = [each.name for each in dependencies if each.skip_reason]
    if dependencies and len(skipped) == len(dependencies):
        lines.append(
            "Nothing was audited: the vulnerability service knows none of these packages, or cannot be reached from here."
        )
    elif skipped:
        lines.append(f"Not audited, since the vulnerability service does not know them: {', '.join(skipped)}.")
    if any(each.vulns for each in dependencies):
        return Verdict(FOUND, tuple(lines))
    if skipped or not dependencies:
        return Verdict(NOT_ASKED, tuple(lines) or ("Nothing was audited: the lock names no package.",))
    return Verdict(0, (f"No vulnerability is known in {len(dependencies)} packages.",))


def audit() -> Verdict:
    """Ask about every package of the lock. The service is PyPI's, or what PIP_AUDIT_VULNERABILITY_SERVICE names."""
    with tempfile.TemporaryDirectory(prefix="portcullis-audit-") as folder:
        locked = Path(folder) / "requirements.txt"
        with locked.open("w") as file:
            subprocess.run((*_EXPORT, "--no-emit-workspace", "--format", "requirements.txt"), cwd=ROOT, stdout=file, check=True)  # noqa: S603
        # With hashes there is nothing to resolve, and nothing is downloaded.
        read = ("--requirement", str(locked), "--require-hashes", "--disable-pip")
        command = (sys.executable, "-m", "pip_audit", *read, "--format", "json", "--progress-spinner", "off")
        asked = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    try:
        return judge(msgspec.json.decode(asked.stdout, type=Report).dependencies)
    except msgspec.DecodeError:
        said = asked.stderr.strip().splitlines() or ["it said nothing"]
        return Verdict(NOT_ASKED, (f"Nothing was audited: the vulnerability service cannot be reached ({said[-1][:200]}).",))


def sbom() -> str:
    """A CycloneDX document in JSON, of what runs."""
    made = subprocess.run((*_EXPORT, "--format", "cyclonedx1.5"), cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return made.stdout


def problem_of(document: str) -> str | None:
    """What the schema has against a bill of materials, None for nothing."""
    # Not at the top: the stack imports this package, and has no such library.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_5).validate_str(document)
    return None if error is None else str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="supply", description=__doc__)
    parser.add_argument("what", choices=["audit", "sbom"])
    parser.add_argument("file", nargs="?", type=Path, default=Path("sbom.cdx.json"), help="where the bill of materials goes")
    chosen = parser.parse_args(arguments)
    if chosen.what == "audit":
        verdict = audit()
    else:
        document = sbom()
        problem = problem_of(document)
        if problem is None:
            chosen.file.write_text(document)
        said = f"{chosen.file}: CycloneDX 1.5" if problem is None else f"The bill of materials is not valid: {problem}"
        verdict = Verdict(0 if problem is None else FOUND, (said,))
    for line in verdict.lines:
        print(line, file=sys.stdout if verdict.status == 0 else sys.stderr)
    return verdict.status


if __name__ == "__main__":
    raise SystemExit(main())
