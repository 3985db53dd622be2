"""Builds each service's image, looks into it, and runs the whole gateway from the images: `./run images`.

It needs no Docker and no registry: Debian's buildah and podman on Linux, as root, and a base that debootstrap makes of Debian's
packages (or `--base`). NATS, Redis and PostgreSQL come from their wheels, since their images cannot be had everywhere. What
cannot be done ends the run with a line that says so; nothing is skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets as random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from infra.docker import health
from infra.embedded import servers
from infra.embedded.home import locate_home
from libs.common import VERSION
from libs.common.subjects import SERVICES, micro_name
from tests.conftest import free_port, running
from tests.images.compose import try_compose
from tests.images.engine import ROOT, Engine, TrialError, check_machine, expect, say
from tests.images.use import use

RELEASE = "bookworm"
BASE, BUILD_BASE = "localhost/portcullis-base", "localhost/portcullis-build-base"
BASE_PACKAGES = "python3,ca-certificates"
# As Debian's own slim images are made; what apt has fetched is of no use in an image.
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/apt/lists", "var/cache/apt")
STOP_SECONDS = 40
FORBIDDEN = {
    "bin": ("pip", "pip3", "uv", "uvx", "gcc", "cc", "g++", "make", "wget", "curl"),
    "site-packages": ("pip", "uv"),
    "dist-packages": ("pip", "uv"),
    "python3.11": ("ensurepip",),
}
"""What must not be found in an image, by the folder that it would be in."""


def make_base(engine: Engine) -> tuple[str, str]:
    """A base as small as Debian's slim images, with Python; and one to build on. Made once."""
    if engine.status("image", "exists", BUILD_BASE) == 0:
        return BASE, BUILD_BASE
    root = engine.home / "base"
    shutil.rmtree(root, ignore_errors=True)
    say(f"making a base of {RELEASE} with {BASE_PACKAGES}")
    engine.run("debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", RELEASE, str(root))
    for path in LEFT_OUT:
        for entry in (root / path).glob("*"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    container = engine.buildah("from", "scratch")
    engine.buildah("copy", "--quiet", container, str(root), "/")
    engine.buildah("commit", "--quiet", "--format", "docker", "--rm", container, BASE)
    shutil.rmtree(root)
    say("making a base to build on, which has venv")
    container = engine.buildah("from", BASE)
    install = "apt-get update -qq && apt-get install -qq --no-install-recommends python3-venv"
    engine.buildah("run", *_outside(), container, "--", "/bin/sh", "-c", install)
    engine.buildah("commit", "--quiet", "--format", "docker", "--rm", container, BUILD_BASE)
    return BASE, BUILD_BASE


def _outside() -> list[str]:
    """How steps of a build reach the package index: as this machine does."""
    return ["--isolation", "chroot", "--network", "host", "--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]


def image(service: str) -> str:
    return f"localhost/{micro_name(service)}:{VERSION}"


def build(engine: Engine, service: str, base: str, build_base: str) -> None:
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    arguments = {"SERVICE": service, "BASE": base, "BUILD_BASE": build_base, "REVISION": revision}
    arguments |= {name: os.environ[name] for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX") if os.environ.get(name)}
    given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    began = time.monotonic()
    engine.buildah(
        "build", "--quiet", "--format", "docker", "--layers", *_outside(), *given,
        "--file", "infra/docker/Dockerfile", "--tag", image(service), ".",
    )  # fmt: skip
    say(f"built {image(service)} in {time.monotonic() - began:.0f} s")


@dataclass(frozen=True)
class Seen:
    """What an image holds, in bytes: all of it, and what the service adds to the base."""

    total: int
    added: int


def look_into(engine: Engine, service: str, base: str) -> Seen:
    """Check what must and must not be in an image."""
    described = engine.inspect_image(image(service))
    configuration = described["Config"]
    expect(configuration["User"] == "10001:10001", f"{service}: runs as {configuration['User']!r}")
    test = described.get("Healthcheck", {}).get("Test")
    expect(test == ["CMD", "python", "/app/health.py"], f"{service}: health check {test}")
    labels = configuration["Labels"]
    for label in ("title", "version", "licenses", "revision"):
        expect(labels.get(f"org.opencontainers.image.{label}"), f"{service}: no label {label}")
    mounted = Path(engine.podman("image", "mount", image(service)))
    try:
        files = [Path(folder) / name for folder, folders, names in os.walk(mounted) for name in (*folders, *names)]
        found = [path for path in files if path.name in FORBIDDEN.get(path.parent.name, ())]
        expect(not found, f"{service}: {', '.join(str(path.relative_to(mounted)) for path in found)} in the image")
        weights = [path for path in files if path.suffix == ".onnx" and "/models/" in str(path)]
        expect(bool(weights) == (service == "fallback_model"), f"{service}: model weights {weights}")
        services = {path.name for path in (mounted / "app" / "services").iterdir() if path.is_dir()} - {"__pycache__"}
        expect(services == {service}, f"{service}: the code of {services} is in the image")
        expect((mounted / "app" / "sbom.cdx.json").stat().st_size > 1000, f"{service}: no bill of materials")
        kept = [path for path in files if not path.is_symlink() and path.is_relative_to(mounted / "app")]
        changeable = [path for path in kept if path.stat().st_uid == 10001 or path.stat().st_mode & 0o022]
        expect(not changeable, f"{service}: {changeable[:3]} could be changed")
        hidden = [path for path in kept if not path.stat().st_mode & 0o004]
        expect(not hidden, f"{service}: {hidden[:3]} cannot be read")
    finally:
        engine.podman("image", "unmount", image(service))
    return Seen(described["Size"], described["Size"] - engine.inspect_image(base)["Size"])


@dataclass
class Gateway:
    """The servers, what each service is given, and where the edge is."""

    folder: Path
    common: dict[str, str]
    passwords: dict[str, str]
    secrets: dict[str, dict[str, str]]
    edge_port: int
    admin_token: str
    environment: dict[str, dict[str, str]] = field(default_factory=dict)


@contextlib.contextmanager
def standing(folder: Path) -> Iterator[Gateway]:
    """NATS, Redis and PostgreSQL until the end of the block, and what the services need to know of them."""
    passwords = {name: random.token_urlsafe(24) for name in (*SERVICES, "operator")}
    issuer, admin_token, console = servers.new_issuer(), random.token_urlsafe(24), free_port()
    with (
        running(servers.nats(folder / "nats", free_port(), passwords, issuer)) as nats,
        running(servers.redis(folder, free_port(), random.token_urlsafe(24))) as redis,
        running(servers.postgres(folder, free_port(), random.token_urlsafe(24))) as postgres,
    ):
        pepper = random.token_urlsafe(24)
        edge = free_port()
        yield Gateway(
            folder,
            {"PORTCULLIS_NATS_URL": nats.url, "PORTCULLIS_SECRETS_DIR": "/run/secrets", "PORTCULLIS_METRICS_HOST": "127.0.0.1"},
            passwords,
            {
                "auth": {
                    "database_url": postgres.url,
                    "key_pepper": pepper,
                    "admin_token": admin_token,
                    "nats_issuer_seed": issuer,
                },
                "limiter": {"redis_url": redis.url},
                "console": {"admin_token": admin_token},
            },
            edge,
            admin_token,
            {
                "edge": {"PORTCULLIS_EDGE_PORT": str(edge), "PORTCULLIS_CONSOLE_URL": f"http://127.0.0.1:{console}"},
                "console": {"PORTCULLIS_CONSOLE_PORT": str(console)},
            },
        )


def start(engine: Engine, gateway: Gateway, service: str, *command: str) -> str:
    """Run a service's image as infra/compose.yaml does: nothing may be written, nothing gained. The container's name."""
    name = f"portcullis-{service}{'-'.join(('', *command))}-{os.getpid()}"
    folder = gateway.folder / "secrets" / name
    folder.mkdir(parents=True)
    for secret, value in {"nats_password": gateway.passwords[service], **gateway.secrets.get(service, {})}.items():
        (folder / f"portcullis_{secret}").write_text(value + "\n")
    variables = {
        **gateway.common,
        **gateway.environment.get(service, {}),
        "PORTCULLIS_NATS_USER": service,
        "PORTCULLIS_METRICS_PORT": str(free_port()),
    }
    engine.podman(
        "run", "--detach", "--name", name, "--network", "host",
        "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges",
        "--volume", f"{folder}:/run/secrets:ro",
        *(part for variable, value in variables.items() for part in ("--env", f"{variable}={value}")),
        image(service), *command,
    )  # fmt: skip
    return name


def run_all(engine: Engine) -> None:
    """Every service from its image against servers from their wheels: migrate, start, use, stop."""
    folder = engine.home / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o711)
    names: dict[str, str] = {}
    with standing(folder) as gateway:
        try:
            names["migrate"] = start(engine, gateway, "auth", "migrate")
            expect(engine.podman("wait", names["migrate"]) == "0", f"migrate failed: {engine.logs(names['migrate'])}")
            for service in SERVICES:
                names[service] = start(engine, gateway, service)
            engine.wait_healthy([names[service] for service in SERVICES])
            ready = ("exec", names["edge"], "python", "/app/health.py", str(gateway.edge_port))
            expect(engine.status(*ready) == 0, "the edge says that a detection would not be answered")
            say(f"healthy, by the images' own check ({health.PATH}): {', '.join(SERVICES)}")
            use(f"http://127.0.0.1:{gateway.edge_port}", gateway.admin_token)
            for service in SERVICES:
                engine.podman("stop", "--time", str(STOP_SECONDS), names[service])
                status = engine.podman("inspect", "--format", "{{.State.ExitCode}}", names[service])
                expect(status == "0", f"{service} ended with {status}: {engine.logs(names[service])}")
            say("each stopped cleanly when it was told to")
        finally:
            for name in names.values():
                engine.status("rm", "--force", "--time", "0", name)
    shutil.rmtree(folder, ignore_errors=True)


def check_compose() -> None:
    """What is tried here is what compose runs: the same images."""
    described = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())["services"]
    names = {described[service]["image"].partition(":")[0] for service in SERVICES}
    expect(names == {micro_name(service) for service in SERVICES}, f"compose calls the images {names}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="an image with Python 3.11 and venv, in place of one that debootstrap makes")
    parser.add_argument("--storage-driver", default="overlay", help="vfs where the kernel or the file system has no overlay")
    parser.add_argument("--build-only", action="store_true", help="build the images and look into them")
    parser.add_argument("--compose", action="store_true", help="then run infra/compose.yaml, with podman-compose")
    parser.add_argument("--clean", action="store_true", help="delete images and base at the end")
    arguments = parser.parse_args()
    engine = Engine(locate_home(dict(os.environ)).path / "images", arguments.storage_driver)
    sizes = {}
    try:
        check_machine("buildah", "podman", *([] if arguments.base else ["debootstrap"]))
        check_compose()
        base, build_base = (arguments.base, arguments.base) if arguments.base else make_base(engine)
        for service in SERVICES:
            build(engine, service, base, build_base)
            sizes[service] = look_into(engine, service, base)
        if not arguments.build_only:
            run_all(engine)
        if arguments.compose:
            try_compose(engine, base)
    except TrialError as error:
        print(f"portcullis: {error}", file=sys.stderr)
        return 1
    finally:
        for service, seen in sizes.items():
            say(f"{micro_name(service):28} {seen.total / 1e6:6.1f} MB, of which {seen.added / 1e6:6.1f} MB above the base")
        if arguments.clean:
            engine.status("rmi", "--all", "--force")
            shutil.rmtree(engine.home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
