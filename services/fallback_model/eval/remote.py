"""Scores texts through a running Portcullis: what a caller sees."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx

_IN_FLIGHT = 16
_MOST_TRIES = 60


class RemoteError(Exception):
    """The gateway could not be asked; the text says why and holds no key."""


@dataclass(frozen=True)
class Answer:
    confidence: float
    is_malicious: bool
    threats: tuple[str, ...]
    endpoint: str


async def score(url: str, key: str, texts: list[str]) -> list[Answer]:
    """Asks `POST /v1/detect` for each text, some at once, and waits where the key's limit says so. Raises `RemoteError`."""
    gate = asyncio.Semaphore(_IN_FLIGHT)
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=60.0) as client:

        async def ask(text: str) -> Answer:
            async with gate:
                for _ in range(_MOST_TRIES):
                    try:
                        response = await client.post("/v1/detect", json={"text": text})
                    except httpx.HTTPError as error:
                        raise RemoteError(f"{url} does not answer: {type(error).__name__}") from None
                    if response.status_code in (429, 503):
                        await asyncio.sleep(float(response.headers.get("Retry-After", "1")))
                        continue
                    if response.status_code != 200:
                        raise RemoteError(f"{url} answered {response.status_code}: {response.text[:200]}")
                    body = response.json()
                    return Answer(body["confidence"], body["is_malicious"], tuple(body["threat_types"]), body["endpoint"])
                raise RemoteError(f"{url} was busy {_MOST_TRIES} times in a row")

        return list(await asyncio.gather(*(ask(text) for text in texts)))
