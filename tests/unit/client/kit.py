"""A gateway that is played, and both clients behind one face."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from portcullis_client import AsyncClient, Client, Retry

KEY = "pc_live_" + "a" * 50
VERDICT = {
    "is_malicious": True, "confidence": 0.92, "threat_types": ["jailbreak"], "processing_time_ms": 4.5, "endpoint": "m",
    "request_id": "r1", "degraded": False, "coverage": {"tokens": 9, "windows": 1, "truncated": False},
}  # fmt: skip
JOB = {
    "id": "0" * 28, "state": "running", "total": 3, "done": 1, "malicious": 0, "failed": 0,
    "created_at": "2026-11-25T10:00:00.000Z",
}  # fmt: skip

Handler = Callable[[httpx.Request], httpx.Response]


def problem(code: str, status: int, **fields: Any) -> httpx.Response:
    document = {"type": f"urn:portcullis:problem:{code}", "title": "T", "status": status, "detail": "D.", "request_id": "r9"}
    return httpx.Response(status, json=document | fields, headers={"content-type": "application/problem+json"})


def item_problem(code: str, status: int, **fields: Any) -> dict[str, Any]:
    return {"code": code, "title": "T", "status": status, "detail": "D.", **fields}


def ndjson(*lines: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, content=b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def texts_of(request: httpx.Request) -> list[str]:
    return [json.loads(line)["text"] for line in request.content.splitlines()]


def result(index: int, *, malicious: bool = False, **fields: Any) -> dict[str, Any]:
    verdict = {"is_malicious": malicious, "confidence": 0.5, "threat_types": [], "endpoint": "m", "degraded": False}
    return {"index": index, "id": None, **verdict, **fields}


def summary(total: int, error: dict[str, Any] | None = None) -> dict[str, Any]:
    extra = {} if error is None else {"error": error, "next_index": total}
    counts = {"total": total, "malicious": 0, "benign": total, "failed": 0, "degraded": 0}
    return {"summary": {**counts, "complete": error is None, "processing_time_ms": 1.0, **extra}}


class Gateway:
    """Answers from a list, one after the other, and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response | BaseException | Handler) -> None:
        self.requests: list[httpx.Request] = []
        self._answers: Iterator[httpx.Response | BaseException | Handler] = iter(answers)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = next(self._answers)
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            return answer(request)
        # A copy: an answer may be given to several clients, and httpx ties it to one.
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


class Face:
    """`Client` or `AsyncClient`: every call is awaited, and every stream a list. `slept`: the pauses, in seconds."""

    def __init__(self, kind: str, handler: Handler, *, retry: Retry | None = None, **options: Any) -> None:
        self.slept: list[float] = []
        self._asynchronous = kind == "async"
        self._handler = handler
        self._options = {"url": "http://gateway", "api_key": KEY, "retry": retry} | options

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._call_async(name) if self._asynchronous else self._call(name)

    def _call(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with Client(transport=_Read(self._handler), sleep=self.slept.append, **self._options) as client:
                answer = getattr(client, name)(*arguments, **options)
                return list(answer) if inspect.isgenerator(answer) else answer

        return call

    def _call_async(self, name: str) -> Callable[..., Any]:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        async def call(*arguments: Any, **options: Any) -> Any:
            async with AsyncClient(transport=_Read(self._handler), sleep=sleep, **self._options) as client:
                answer = getattr(client, name)(*arguments, **options)
                if inspect.isasyncgen(answer):
                    return [each async for each in answer]
                return await answer

        return lambda *arguments, **options: asyncio.run(call(*arguments, **options))


class _Read(httpx.MockTransport):
    """With the request's body read, whichever kind it is."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return super().handle_request(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return await super().handle_async_request(request)
