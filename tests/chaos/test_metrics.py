"""The metrics of a running stack: what is declared and nothing else, labels with bounds whatever callers send, and queries that
find something when Prometheus itself collects them."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from libs.common.probes import LIVE_PATH, READY_PATH
from libs.common.subjects import SERVICES
from tests.chaos.kit import ATTACK, BENIGN, ROOT, Stack, callers, register
from tests.conftest import free_port, wait_until
from tests.metric_labels import allowed
from tests.metrics_kit import alert_queries, dashboard_queries, of_service, parsed, rules
from tests.prometheus_tools import prometheus, promtool

MOST_SERIES = 2000
"""Of one process. A label without a bound is far beyond it in no time."""
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"

# On a stack at rest but for a few calls these have nothing to show, and rightly so.
EMPTY_WHEN_WELL = frozenset(
    {
        "overview.json: Failed calls",
        "overview.json: Failed messages by stage",
        "overview.json: Waiting messages by stage",
        "stage.json: Traces",  # nothing is recorded where nobody collects it
        "model.json: Tried with another worker",
        "limits.json: Clients on NATS",
        "jobs.json: Given back",
    }
)

BUSY = frozenset(
    {
        *("failed", "expired", "overloaded", "stage_unavailable", "deadline_exceeded", "no_engine", "5xx", "503", "504", "429"),
        *("stale", "local", "busy", "no_answer", "timeout", "true"),
    }
)


def targets(stack: Stack) -> dict[str, list[str]]:
    """The addresses of each service's replicas, as Prometheus is told."""
    found: dict[str, list[str]] = {}
    for group in json.loads((stack.home / "prometheus" / "targets.json").read_text()):
        found.setdefault(group["labels"]["service"], []).extend(group["targets"])
    return found


async def scrape(address: str, accept: str = "text/plain") -> str:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session,
        session.get(f"http://{address}/metrics", headers={"Accept": accept}) as response,
    ):
        assert response.status == 200
        return await response.text()


async def pages(stack: Stack) -> dict[str, str]:
    return {service: await scrape(address) for service, addresses in targets(stack).items() for address in addresses}


async def ask_for_everything(session: aiohttp.ClientSession, key: str, canary: str) -> None:
    """Each kind of call once, good and bad, with the canary wherever a caller may write."""
    keyed = {"X-API-Key": key, "X-Request-ID": f"id-{canary}"}
    for text in (ATTACK, BENIGN, f"{canary} {BENIGN}"):
        await _send(session, "POST", "/v1/detect", headers=keyed, json={"text": text, "config": {"detailed_response": True}})
    batch = {"requests": [{"id": canary, "text": ATTACK}, {"id": "2", "text": BENIGN}]}
    for preferred in ({}, {"Prefer": "respond-async"}):
        await _send(session, "POST", "/v1/detect/batch", headers=keyed | preferred, json=batch)
        await _send(session, "POST", "/v1/detect/batch", headers=keyed | preferred, json={"requests": [{"text": ""}]})
    await _send(session, "POST", "/v1/detect", headers=keyed, data=f'{{"text": "{canary}')
    await _send(session, "POST", "/v1/detect", headers={"X-API-Key": f"pc_live_{canary}"}, json={"text": BENIGN})
    await _send(session, "POST", "/auth/register", json={"name": canary})
    await _send(session, "POST", "/auth/register", json={"name": canary, "rate_limit_per_minute": -1})
    await _send(session, canary.upper().replace("-", ""), f"/{canary}", headers={"Host": "localhost"})
    await _send(session, "GET", "/health", headers={"Host": canary})
    for path in (
        "/auth/profile",
        f"/v1/jobs/{canary}",
        f"/v1/jobs/{canary}/results",
        f"/admin/keys/{canary}",
        "/v1/circuit-breakers",
    ):
        await _send(session, "GET", path, headers=keyed)
    await _send(session, "POST", f"/v1/circuit-breakers/{canary}/reset", headers=keyed)


async def _send(session: aiohttp.ClientSession, method: str, path: str, **more: Any) -> None:
    async with session.request(method, path, **more) as response:
        await response.read()


async def job_is_done(session: aiohttp.ClientSession, key: str) -> None:
    headers = {"X-API-Key": key, "Prefer": "respond-async"}
    body = {"requests": [{"text": ATTACK}, {"text": BENIGN}]}
    async with session.post("/v1/detect/batch", headers=headers, json=body) as response:
        location = response.headers["Location"]
    state = ""
    deadline = time.monotonic() + 20
    while state != "done":
        assert time.monotonic() < deadline, state
        async with session.get(location, headers=headers) as response:
            state = (await response.json())["state"]
        await asyncio.sleep(0.1)


async def test_every_process_says_that_it_runs_and_takes_work(stack: Stack) -> None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10)) as session:
        for service, addresses in targets(stack).items():
            for path in (LIVE_PATH, READY_PATH):
                async with session.get(f"http://{addresses[0]}{path}") as response:
                    assert response.status == 200, (service, path)


async def test_a_stack_exports_what_is_declared(stack: Stack) -> None:
    found = await pages(stack)
    assert set(found) == set(SERVICES)
    for service, page in found.items():
        declared = of_service(service)
        exported = parsed(page)
        assert {name: exported[name].type for name in exported} == {name: family.kind for name, family in declared.items()}
        for name, family in exported.items():
            for sample in family.samples:
                assert frozenset(sample.labels) == declared[name].series[sample.name], sample


def of_a_busy_machine(labels: tuple[tuple[str, str], ...]) -> bool:
    """What may come at any time, if something takes too long: one of a few values, as `allowed` sees to."""
    return any(value in BUSY for _, value in labels)


async def test_labels_have_bounds_whatever_callers_send(stack: Stack) -> None:
    """After everything has been asked once, asking it again in other words makes no series more."""
    rounds: list[dict[str, set[tuple[str, tuple[tuple[str, str], ...]]]]] = []
    canaries: list[str] = []
    async with callers(stack) as session:
        key = await register(session)
        await job_is_done(session, key)
        for _ in range(2):
            for _ in range(3):
                canaries.append(f"canary-{secrets.token_hex(6)}")
                await ask_for_everything(session, key, canaries[-1])
            rounds.append({})
            for service, page in (await pages(stack)).items():
                series = rounds[-1][service] = set()
                for name, family in parsed(page).items():
                    for sample in family.samples:
                        series.add((sample.name, tuple(sorted(sample.labels.items()))))
                        for label, value in sample.labels.items():
                            assert allowed(name, label, value), (service, sample)
    for service in SERVICES:
        assert len(rounds[0][service]) < MOST_SERIES
        assert not {series for series in rounds[1][service] - rounds[0][service] if not of_a_busy_machine(series[1])}
    known = "".join(str(series) for series in rounds[1].values())
    for secret in (*canaries, key, key.split("_")[2], "localhost"):
        assert secret not in known


def linted(page: str) -> tuple[int, str]:
    done = subprocess.run([promtool(), "check", "metrics"], input=page, capture_output=True, text=True)
    return done.returncode, done.stderr


async def test_names_are_as_prometheus_wants_them(stack: Stack) -> None:
    for service, page in (await pages(stack)).items():
        assert await asyncio.to_thread(linted, page) == (0, ""), service


async def test_both_formats_are_served_and_tell_the_same(stack: Stack) -> None:
    for addresses in targets(stack).values():
        page = await scrape(addresses[0], OPEN_METRICS)
        assert page.endswith("# EOF\n")
        assert {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")} >= set(
            parsed(await scrape(addresses[0]))
        )


async def test_the_public_page_says_less_than_the_process_s_own(stack: Stack) -> None:
    async with callers(stack) as session:
        await _send(session, "GET", "/admin/keys")
        async with session.get("/metrics") as response:
            public = parsed(await response.text())
    (address,) = targets(stack)["edge"]
    assert "/admin/keys" in await scrape(address)
    assert set(public) == {
        "portcullis_http_requests",
        "portcullis_http_request_duration_seconds",
        "portcullis_http_in_flight",
        "portcullis_http_in_flight_limit",
    }
    assert not any(sample.labels.get("route", "").startswith("/admin") for family in public.values() for sample in family.samples)


# --- by Prometheus itself ------------------------------------------------------------------------------------------------


class Collector:
    """Prometheus with our configuration and rules, on a stack's targets, a second apart instead of fifteen."""

    def __init__(self, folder: Path, stack: Stack) -> None:
        own = ROOT / "infra" / "prometheus"
        configuration = yaml.safe_load((own / "prometheus.yml").read_text())
        configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        configuration["rule_files"] = [str(own / pattern) for pattern in configuration["rule_files"]]
        (scraped,) = configuration["scrape_configs"]
        (discovery,) = scraped["file_sd_configs"]
        assert "../../.portcullis/prometheus/*.json" in discovery["files"]
        discovery["files"] = [str(stack.home / "prometheus" / "*.json")]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [
                prometheus(),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(folder / "log").open("w"),
        )

    async def get(self, path: str, **parameters: str) -> Any:
        async with (
            aiohttp.ClientSession(self.url, timeout=aiohttp.ClientTimeout(10)) as session,
            session.get(f"/api/v1/{path}", params=parameters) as response,
        ):
            answer = await response.json()
            assert answer["status"] == "success", (parameters, answer)
            return answer["data"]

    async def query(self, expression: str) -> list[Any]:
        result: list[Any] = (await self.get("query", query=expression))["result"]
        return result

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def collector(stack: Stack) -> Iterator[Collector]:
    with tempfile.TemporaryDirectory(prefix="pc-prometheus-") as folder:
        started = Collector(Path(folder), stack)
        try:
            wait_until(lambda: _ready(started), what="Prometheus")
            yield started
        finally:
            started.stop()


def _ready(collector: Collector) -> bool:
    assert collector.process.poll() is None, "Prometheus has ended"
    done = subprocess.run(["curl", "-sf", f"{collector.url}/-/ready"], capture_output=True)
    return done.returncode == 0


async def until(condition: Any, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.2)


async def test_one_scrape_configuration_finds_every_process(stack: Stack, collector: Collector) -> None:
    async def all_up() -> bool:
        up = await collector.query('up{job="portcullis"} == 1')
        return {(each["metric"]["service"], each["metric"]["replica"]) for each in up} == {(name, "0") for name in SERVICES}

    await until(all_up, "every process to be scraped")
    assert (await collector.get("targets"))["droppedTargets"] == []


async def test_every_query_of_every_dashboard_finds_something(stack: Stack, collector: Collector) -> None:
    """After each kind of call has been made: but for those on trouble, of which there should be none."""
    async with callers(stack) as session:
        key = await register(session)
        for _ in range(4):  # what a rate is of needs several scrapes
            await ask_for_everything(session, key, "canary")
            await job_is_done(session, key)
            await asyncio.sleep(1.1)
    empty = [query for query in dashboard_queries() if not await collector.query(query.expression)]
    assert not [query for query in empty if query.where not in EMPTY_WHEN_WELL]


async def test_alerts_can_be_evaluated_and_a_stack_that_is_well_wakes_nobody(stack: Stack, collector: Collector) -> None:
    for query in alert_queries():
        await collector.query(query.expression)

    async def evaluated() -> bool:
        groups = (await collector.get("rules"))["groups"]
        return len(groups) > 0 and all(rule["lastEvaluation"][:4] != "0001" for group in groups for rule in group["rules"])

    await until(evaluated, "the rules to be evaluated")
    groups = (await collector.get("rules"))["groups"]
    assert {rule["name"] for group in groups for rule in group["rules"]} == {rule["alert"] for rule in rules()}
    assert all(rule["health"] == "ok" for group in groups for rule in group["rules"])
    firing = [alert for alert in (await collector.get("alerts"))["alerts"] if alert["state"] == "firing"]
    assert not [alert for alert in firing if alert["labels"]["severity"] == "page"], firing
