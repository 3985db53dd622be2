"""/docs, /openapi.json and /asyncapi."""

from __future__ import annotations

import re
from typing import Any

import httpx

from libs.common import contracts, subjects
from services.edge import asyncapi


def references(document: Any) -> list[str]:
    if isinstance(document, dict):
        own = [document["$ref"]] if isinstance(document.get("$ref"), str) else []
        return own + [reference for value in document.values() for reference in references(value)]
    if isinstance(document, list):
        return [reference for value in document for reference in references(value)]
    return []


def assert_resolves(document: dict[str, Any]) -> None:
    for reference in references(document):
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]


async def test_every_call_of_the_contract_is_described(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert_resolves(document)
    calls = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert calls == {
        ("POST", "/v1/detect"),
        ("POST", "/v1/detect/batch"),
        ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/{id}"),
        ("DELETE", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs/{id}/results"),
        ("POST", "/auth/register"),
        ("GET", "/auth/profile"),
        ("POST", "/auth/rotate"),
        ("DELETE", "/auth/key"),
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys"),
        ("GET", "/admin/keys/{key_id}"),
        ("PATCH", "/admin/keys/{key_id}"),
        ("DELETE", "/admin/keys/{key_id}"),
        ("GET", "/v1/circuit-breakers"),
        ("POST", "/v1/circuit-breakers/{name}/reset"),
        ("GET", "/health"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
    }
    detect = document["paths"]["/v1/detect"]["post"]
    assert set(detect["responses"]) == {"200", *map(str, (400, 401, 403, 413, 415, 422, 429, 431, 503, 504))}


async def test_the_pages_load_nothing_from_elsewhere(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/asyncapi"):
        response = await client.get(path, headers={"Accept": "text/html,*/*;q=0.8"})
        assert response.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "unsafe-eval" not in response.headers["content-security-policy"]
        assert "<script>" not in response.text
        for address in re.findall(r'(?:src|href)="([^"#]+)"', response.text):
            assert address.startswith("/"), address
            assert (await client.get(address)).status_code == 200


async def test_asyncapi_is_json_unless_a_browser_asks(client: httpx.AsyncClient) -> None:
    for headers in ({}, {"Accept": "application/json"}, {"Accept": "*/*"}):
        response = await client.get("/asyncapi", headers=headers)
        assert response.headers["content-type"] == "application/json"
        assert response.json()["asyncapi"] == "3.0.0"
    assert_resolves(response.json())


def test_asyncapi_knows_every_subject() -> None:
    names = [name for name in vars(subjects) if name.isupper() and isinstance(getattr(subjects, name), str)]
    spelt = {getattr(subjects, name) for name in names if ".v1." in getattr(subjects, name)}
    assert {channel.subject for channel in asyncapi.CHANNELS} == spelt | {
        subjects.model_pool(subjects.DEFAULT_POOL),
        subjects.model_pool_batch(subjects.DEFAULT_POOL),
    }


def test_asyncapi_agrees_with_the_permissions() -> None:
    for channel in asyncapi.CHANNELS:
        for service, lists in ((channel.sender, "publish"), (channel.receiver, "subscribe")):
            if service == "client":
                own = getattr(subjects.door_permissions("*"), lists)
                assert channel.subject in own or channel.subject == subjects.DOOR_LIVE_RESULTS, (channel, lists)
                continue
            if channel.subject == subjects.DOOR_LIVE_RESULTS:  # `jobs` may publish whatever belongs to a job
                continue
            if service == "anyone" or channel.subject == subjects.USAGE_RECORDED:  # read through JetStream
                continue
            if service not in subjects.PERMISSIONS:  # whoever takes up work that was accepted earlier
                assert channel.subject == subjects.BATCH_TAKE
                continue
            allowed = getattr(subjects.PERMISSIONS[service], lists)
            pool = subjects.model_pool("*"), subjects.model_pool_batch("*")
            wild = channel.subject.replace(subjects.DEFAULT_POOL, "*")
            assert channel.subject in allowed or (wild in pool and wild in allowed), (channel, lists)


def test_asyncapi_describes_every_message_as_the_services_read_it() -> None:
    schemas = asyncapi.document()["components"]["schemas"]
    for channel in asyncapi.CHANNELS:
        for kind in (channel.message, channel.answer):
            if kind is not None:
                assert set(schemas[kind.__name__]["properties"]) == set(kind.__struct_fields__)
    assert set(schemas["Reply"]["properties"]) == set(contracts.Reply.__struct_fields__)
