"""/docs, /openapi.json and /asyncapi. Nothing is loaded from another host: a machine without a network sees the same pages."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import msgspec
from fastapi import FastAPI, Request, Response

from libs.common.errors import ErrorCode, PortcullisError
from services.edge import asyncapi

# Swagger UI sets styles from its script, and its style sheet holds pictures as data.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}

_DOCS = b"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Portcullis</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/docs/assets/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="/docs/assets/swagger-ui-bundle.js"></script>
<script src="/docs/assets/start.js"></script></body></html>"""
_START = b"""SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});"""
_STYLE = b"""body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}pre{background:#f5f5f5;overflow-x:auto;padding:1rem}"""


def add_pages(app: FastAPI) -> None:
    @cache
    def openapi_document() -> bytes:
        return msgspec.json.encode(app.openapi())

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(_: Request) -> Response:
        return Response(openapi_document(), media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    async def docs(_: Request) -> Response:
        return Response(_DOCS, headers=_HEADERS, media_type="text/html")

    @app.get("/docs/assets/{name}", include_in_schema=False)
    async def asset(request: Request) -> Response:
        found = _assets().get(request.path_params["name"])
        if found is None:
            raise PortcullisError(ErrorCode.NOT_FOUND)
        content, media_type = found
        return Response(content, headers={"cache-control": "max-age=3600"}, media_type=media_type)

    @app.get("/asyncapi", include_in_schema=False)
    async def asyncapi_document(request: Request) -> Response:
        headers = {**_HEADERS, "vary": "accept"}
        wants_page = "text/html" in request.headers.get("accept", "") and request.query_params.get("format") != "json"
        if wants_page:
            return Response(_asyncapi_page(), headers=headers, media_type="text/html")
        return Response(_asyncapi_json(), headers=headers, media_type="application/json")


@cache
def _asyncapi_json() -> bytes:
    return msgspec.json.encode(asyncapi.document())


@cache
def _asyncapi_page() -> str:
    return asyncapi.page()


@cache
def _assets() -> dict[str, tuple[bytes, str]]:
    """By name: content and media type. Read when a page is first looked at, from the wheel that ships Swagger UI."""
    spec = importlib.util.find_spec("fastapi_offline")
    assert spec is not None  # a dependency of this package
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "static"
    return {
        "swagger-ui-bundle.js": ((folder / "swagger-ui-bundle.js").read_bytes(), "text/javascript"),
        "swagger-ui.css": ((folder / "swagger-ui.css").read_bytes(), "text/css"),
        "start.js": (_START, "text/javascript"),
        "page.css": (_STYLE, "text/css"),
    }
