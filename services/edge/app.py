"""Composition root: the HTTP application, and the server that it runs in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from libs.common import VERSION
from libs.common.bus import Bus
from libs.common.errors import PortcullisError
from libs.common.service import Service
from services.edge import openapi, pages, problems
from services.edge.admission import Admission
from services.edge.batch import Batches
from services.edge.bodies import Bodies
from services.edge.console import Console, opened
from services.edge.gate import Gate, call_of
from services.edge.handlers import Handlers, refused
from services.edge.health import FleetMonitor
from services.edge.jobs import Jobs
from services.edge.limit import AdaptiveLimit
from services.edge.ports import Stages
from services.edge.replies import Refused
from services.edge.server import serving
from services.edge.settings import EdgeSettings

CLIENT_CLOSED = 499
"""Nobody reads this status (the caller has gone); it is nginx's name for it in the metrics."""
CORS_MAX_AGE_SECONDS = 600


class _PlainRoute(APIRoute):
    """A route whose function takes the request and gives the response: nothing for FastAPI to parse, validate or convert."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        endpoint: Callable[[Request], Awaitable[Response]] = self.endpoint

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = answer


class _App(FastAPI):
    """FastAPI without the layers that have nothing to do here: the gate is where bugs end, and `Bodies` bounds what is read.

    A call whose path is the same for everybody goes to its function at once. All others, and all where middleware was added, are
    looked for among the routes.
    """

    _fixed: dict[tuple[str, str], _PlainRoute] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._fixed is None:
            self._fixed = self._fixed_routes()
        route = self._fixed.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"], scope["route"] = self, route
        request = Request(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except (PortcullisError, Refused) as error:
            response = await refused(request, error)
        except ClientDisconnect as error:
            response = await _gone(request, error)
        await response(scope, receive, send)

    def _fixed_routes(self) -> dict[tuple[str, str], _PlainRoute]:
        routes = [route for route in self.routes if isinstance(route, _PlainRoute) and not route.param_convertors]
        return {} if self.user_middleware else {(method, route.path): route for route in routes for method in route.methods or ()}

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = ExceptionMiddleware(self.router, handlers=self.exception_handlers)
        for middleware, arguments, options in reversed(self.user_middleware):
            app = middleware(app, *arguments, **options)
        return app


def build(stages: Stages, settings: EdgeSettings, console: Console | None = None) -> Gate:
    """The whole HTTP side as one ASGI application, on whatever stages there are; `console`: who answers below /console."""
    bodies = Bodies(settings.max_body_bytes, settings.edge_max_buffered_bytes, settings.body_timeout_seconds)
    limit = AdaptiveLimit(
        least=settings.edge_min_in_flight,
        most=settings.edge_max_in_flight,
        tolerated_seconds=settings.edge_tolerated_wait_ms / 1000,
    )
    handlers = Handlers(
        stages,
        bodies,
        FleetMonitor(stages),
        Admission(limit, stages.clock),
        request_timeout_seconds=settings.request_timeout_seconds,
    )
    batches = Batches(
        stages,
        Bodies(settings.max_batch_body_bytes, settings.edge_max_batch_buffered_bytes, settings.batch_body_timeout_seconds),
        request_timeout_seconds=settings.request_timeout_seconds,
        idle_seconds=settings.batch_idle_seconds,
        most_line_bytes=settings.max_body_bytes,
        most_batches=settings.edge_max_batches,
    )
    jobs = Jobs(
        stages,
        Bodies(settings.max_batch_body_bytes, settings.edge_max_batch_buffered_bytes, settings.batch_body_timeout_seconds),
        request_timeout_seconds=settings.request_timeout_seconds,
        idle_seconds=settings.batch_idle_seconds,
        most_line_bytes=settings.max_body_bytes,
        most_submissions=settings.edge_max_batches,
    )
    batches.later = jobs.submit
    app = _App(
        title="Portcullis",
        version=VERSION,
        description=openapi.DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={
            PortcullisError: refused,
            Refused: refused,
            HTTPException: _framework_refusal,
            405: _wrong_method,
            ClientDisconnect: _gone,
        },
    )
    app.router.route_class = _PlainRoute
    openapi.add_routes(app, handlers, batches, jobs)
    app.add_api_route("/metrics", handlers.metrics, include_in_schema=False)
    pages.add_pages(app)
    if console is not None:
        console.add_routes(app)
    if settings.cors_origin_names:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin_names,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=openapi.REQUEST_HEADERS,
            expose_headers=openapi.ANSWER_HEADERS,
            max_age=CORS_MAX_AGE_SECONDS,
        )
    gate = Gate(app, settings, stages.clock)
    handlers.gate = batches.gate = jobs.gate = gate
    if console is not None:
        console.gate = gate
    return gate


@asynccontextmanager
async def front(bus: Bus, settings: EdgeSettings) -> AsyncIterator[None]:
    """Serve HTTP; until NATS is there, and when it goes away, calls are answered 503."""
    async with AsyncExitStack() as stack:
        console: Console | None = None
        if settings.console_url is not None:
            console = await stack.enter_async_context(opened(settings.console_url))
        gate = build(bus, settings, console)
        bus.told.extend(gate.meters.all)
        await stack.enter_async_context(serving(gate, settings))
        yield


async def _framework_refusal(request: Request, error: Any) -> Response:
    return problems.respond_http(error.status_code, call_of(request.scope).request_id, error.headers)


async def _wrong_method(request: Request, _: Any) -> Response:
    # Starlette names the methods of the first route that has the path, and FastAPI has a route for each method.
    path = request.scope["path"]
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    allowed = sorted({method for route in routes for method in route.methods or ()})
    return problems.respond_http(405, call_of(request.scope).request_id, {"allow": ", ".join(allowed)})


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


SERVICE = Service("edge", EdgeSettings, front=front)
