"""What people would write instead: the same checks in one FastAPI application, as one process or as so many workers.

`python -m tests.bench.monolith PORT WORKERS`, as tests.bench.systems starts it. For each request a SELECT of the key through
asyncpg's pool, the limiter's own script in Redis, and the engine through a kept connection of httpx; uvicorn with uvloop and
httptools, no access log. It does less than Portcullis: no usage, no traces, no metrics, no breaker, no second engine.
"""

from __future__ import annotations

import hmac
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import asyncpg  # type: ignore[import-untyped]
import httpx
import uvicorn
from fastapi import FastAPI, Header, HTTPException, Request, Response
from pydantic import BaseModel, Field
from redis.asyncio import BlockingConnectionPool, Redis

from libs.common.keys import parse
from services.auth.core import verifier_of
from services.limiter.core import PER_KEY
from services.limiter.lua import SCRIPT, Wire

POOL = 16
CONNECTIONS = 256
SELECT = "SELECT verifier, scopes, limit_minute, limit_day, expires_at, revoked_at FROM api_keys WHERE key_id = $1"


class Config(BaseModel):
    confidence_threshold: float = Field(default=0.5, ge=0, le=1)
    detailed_response: bool = False


class Asked(BaseModel):
    text: str = Field(min_length=1, max_length=100_000)
    config: Config = Config()


class Judged(BaseModel):
    is_malicious: bool
    confidence: float = Field(ge=0, le=1)
    threat_types: list[str]
    processing_time_ms: float
    endpoint: str | None = None


@asynccontextmanager
async def _connections(app: FastAPI) -> AsyncIterator[None]:
    async with (
        asyncpg.create_pool(os.environ["BENCH_DATABASE_URL"], min_size=4, max_size=POOL) as database,
        httpx.AsyncClient(
            base_url=os.environ["BENCH_ENGINE_URL"],
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            trust_env=False,
        ) as engine,
    ):
        pool = BlockingConnectionPool.from_url(os.environ["BENCH_REDIS_URL"], max_connections=POOL)
        app.state.database, app.state.engine = database, engine
        app.state.script = Redis.from_pool(pool).register_script(SCRIPT)
        app.state.pepper = os.environ["BENCH_KEY_PEPPER"].encode()
        yield


app = FastAPI(lifespan=_connections)
_wire = Wire(PER_KEY)


async def _limits(request: Request, key: str | None) -> tuple[str, tuple[int, int]]:
    """The caller's key id and limits. Raises HTTPException 401, 403."""
    parsed = parse(key or "")
    row: Any = await request.app.state.database.fetchrow(SELECT, parsed.key_id) if parsed is not None else None
    if parsed is None or row is None or row["revoked_at"] is not None:
        raise HTTPException(401)
    if row["expires_at"] is not None and row["expires_at"] <= datetime.now(UTC):
        raise HTTPException(401)
    if not hmac.compare_digest(verifier_of(request.app.state.pepper, parsed.digest), row["verifier"]):
        raise HTTPException(401)
    if "detect" not in row["scopes"]:
        raise HTTPException(403)
    return parsed.key_id, (row["limit_minute"], row["limit_day"])


@app.post("/v1/detect")
async def detect(asked: Asked, request: Request, response: Response, x_api_key: Annotated[str | None, Header()] = None) -> Judged:
    began = time.perf_counter()
    key_id, limits = await _limits(request, x_api_key)
    answers = await request.app.state.script([f"bench:{key_id}"], [_wire.windows, _wire.ask(limits, 1, None)])
    decision = _wire.decision(answers[0])
    for name, limit, used in zip(("Minute", "Day"), limits, decision.used, strict=True):
        response.headers[f"X-RateLimit-Limit-{name}"] = str(limit)
        response.headers[f"X-RateLimit-Remaining-{name}"] = str(max(0, limit - used))
    if not decision.admitted:
        raise HTTPException(429)
    try:
        answer = await request.app.state.engine.post("/v1/detect", json=asked.model_dump(), timeout=2.0)
    except httpx.HTTPError:
        raise HTTPException(503) from None
    if answer.status_code != 200:
        raise HTTPException(503)
    judged = Judged.model_validate_json(answer.content)
    judged.processing_time_ms = (time.perf_counter() - began) * 1000
    return judged


if __name__ == "__main__":
    uvicorn.run(
        "tests.bench.monolith:app",
        port=int(sys.argv[1]),
        workers=int(sys.argv[2]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
