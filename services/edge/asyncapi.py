"""The NATS side as an AsyncAPI 3 document, made from the subjects and messages that the services themselves use."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import msgspec

from libs.common import VERSION, context, contracts, subjects

_SCHEMA = "#/components/schemas/{name}"


@dataclass(frozen=True, slots=True)
class Channel:
    """A subject. `answer`: what a reply's `result` holds; None: nobody answers."""

    subject: str
    message: type[contracts.Message]
    sender: str
    receiver: str
    summary: str
    answer: type[contracts.Message] | None = None
    every_replica: bool = False


_ACCOUNT, _ADMIN_KEY = contracts.AccountRequest, contracts.AdminKey

CHANNELS = (
    Channel(subjects.DETECT_REQUEST, contracts.DetectRequest, "edge", "auth", "A text to be judged", contracts.Verdict),
    Channel(
        subjects.DETECT_AUTHENTICATED, contracts.AuthenticatedDetect, "auth", "limiter", "… from a caller whose key is valid",
        contracts.Verdict,
    ),
    Channel(
        subjects.DETECT_ADMITTED, contracts.AdmittedDetect, "limiter", "detector_proxy", "… that is within its limits",
        contracts.Verdict,
    ),
    Channel(
        subjects.model_pool(subjects.DEFAULT_POOL), contracts.ModelRequest, "detector_proxy", "fallback_model",
        "A text for a worker of the fallback pool", contracts.ModelResult,
    ),
    Channel(
        subjects.BATCH_REQUEST, contracts.AdmissionRequest, "edge", "auth", "Units for many texts, all or none",
        contracts.Admission,
    ),
    Channel(
        subjects.BATCH_TAKE, contracts.TakeRequest, "jobs", "auth", "Units for work accepted earlier, as far as there is room",
        contracts.Admission,
    ),
    Channel(
        subjects.BATCH_AUTHENTICATED, contracts.AuthenticatedAdmission, "auth", "limiter", "… for a key that is valid",
        contracts.Admission,
    ),
    Channel(
        subjects.BATCH_ITEMS, contracts.DetectItems, "edge", "detector_proxy", "Many texts whose units have been taken",
        contracts.ItemResults,
    ),
    Channel(
        subjects.model_pool_batch(subjects.DEFAULT_POOL), contracts.ModelItems, "detector_proxy", "fallback_model",
        "Many texts for a worker of the fallback pool, as bulk work", contracts.ModelItemResults,
    ),
    Channel(
        subjects.JOBS_REQUEST, contracts.JobRequest, "edge", "auth", "Something about a job: the payload is the operation's own",
    ),
    *(
        Channel(
            subjects.JOBS_OPERATIONS[operation], contracts.AuthenticatedJobRequest, "auth", "jobs",
            f"… from a caller whose key is valid. {what}: {payload.__name__}", answer,
        )
        for operation, what, payload, answer in (
            ("create", "Begin a submission", contracts.JobCreate, contracts.JobOpened),
            ("append", "Store items", contracts.JobAppend, None),
            ("seal", "All items are there", contracts.JobSeal, contracts.JobStatus),
            ("get", "How a job is", contracts.JobGet, contracts.JobStatus),
            ("list", "A page of the caller's jobs", contracts.JobList, contracts.JobPage),
            ("results", "A page of results", contracts.JobResults, contracts.JobResultPage),
            ("cancel", "End a job", contracts.JobGet, contracts.JobStatus),
        )
    ),
    *(
        Channel(subject, message, "client", "jobs", f"A client, in the name of its key: {what}", answer)
        for subject, what, message, answer in (
            (subjects.DOOR_SUBMIT, "submit a job", contracts.JobSubmit, contracts.JobStatus),
            (subjects.DOOR_STATUS, "how a job is", contracts.JobGet, contracts.JobStatus),
            (subjects.DOOR_LIST, "a page of its jobs", contracts.JobList, contracts.JobPage),
            (subjects.DOOR_RESULTS, "a page of results", contracts.JobResults, contracts.JobResultPage),
            (subjects.DOOR_CANCEL, "end a job", contracts.JobGet, contracts.JobStatus),
        )
    ),
    Channel(
        subjects.DOOR_LIVE_RESULTS, contracts.JobResult, "jobs", "client",
        "A result, at the moment in which it is stored",
    ),
    Channel(subjects.REGISTER_REQUEST, contracts.RegisterRequest, "edge", "limiter", "A key is asked for", contracts.IssuedKey),
    Channel(
        subjects.REGISTER_ADMITTED, contracts.RegisterRequest, "limiter", "auth", "… from an address within its limits",
        contracts.IssuedKey,
    ),
    Channel(subjects.ACCOUNT_PROFILE, _ACCOUNT, "edge", "auth", "The caller's key", contracts.KeyRecord),
    Channel(subjects.ACCOUNT_ROTATE, _ACCOUNT, "edge", "auth", "A new secret for the caller's key", contracts.IssuedKey),
    Channel(subjects.ACCOUNT_REVOKE, _ACCOUNT, "edge", "auth", "The end of the caller's key"),
    Channel(
        subjects.ACCOUNT_ANSWERED, contracts.AnsweredAccount, "auth", "limiter", "An answer, to be sent on with the key's limits"
    ),
    Channel(subjects.ADMIN_KEYS_LIST, contracts.AdminListKeys, "edge", "auth", "A page of all keys", contracts.KeyList),
    Channel(subjects.ADMIN_KEYS_CREATE, contracts.AdminCreateKey, "edge", "auth", "A new key", contracts.IssuedKey),
    Channel(subjects.ADMIN_KEYS_GET, _ADMIN_KEY, "edge", "auth", "One key", contracts.KeyRecord),
    Channel(subjects.ADMIN_KEYS_UPDATE, contracts.AdminUpdateKey, "edge", "auth", "Change a key", contracts.KeyRecord),
    Channel(subjects.ADMIN_KEYS_DELETE, _ADMIN_KEY, "edge", "auth", "Revoke a key"),
    Channel(
        subjects.BREAKERS_LIST, contracts.BreakersListRequest, "edge", "detector_proxy", "The states of the breakers",
        contracts.BreakerReport, every_replica=True,
    ),
    Channel(
        subjects.BREAKERS_RESET_REQUEST, contracts.BreakersResetRequest, "edge", "auth", "Close a breaker, for an administrator",
        contracts.BreakerReport,
    ),
    Channel(
        subjects.BREAKERS_RESET, contracts.BreakersReset, "auth", "detector_proxy", "Close a breaker", contracts.BreakerReport,
        every_replica=True,
    ),
    Channel(
        subjects.EVENT_KEY_CHANGED, contracts.KeyChanged, "auth", "auth", "Forget what is cached of a key", every_replica=True
    ),
    Channel(
        subjects.EVENT_BREAKER_CHANGED, contracts.BreakerChanged, "detector_proxy", "anyone", "A breaker has changed its state",
        every_replica=True,
    ),
    Channel(
        subjects.EVENT_LEFT, contracts.InstanceLeft, "anyone", "edge", "A process leaves, with nothing in hand",
        every_replica=True,
    ),
    Channel(
        subjects.EVENT_TRACE_KEPT, contracts.TraceKept, "edge", "anyone", "Traces of which every process exports its spans",
        every_replica=True,
    ),
    Channel(
        subjects.USAGE_RECORDED, contracts.UsageRecorded, "detector_proxy", "auth",
        f"An admitted call, kept by the JetStream stream {subjects.USAGE_STREAM} until it is counted",
    ),
)  # fmt: skip

_ANSWERED_BY_NULL = (subjects.ACCOUNT_REVOKE, subjects.ADMIN_KEYS_DELETE, subjects.JOBS_APPEND)
_PAYLOADS = (
    contracts.JobCreate,
    contracts.JobAppend,
    contracts.JobSeal,
    contracts.JobGet,
    contracts.JobList,
    contracts.JobResults,
)
"""What stays encoded in other messages."""

_OF_CLIENTS = {channel.message.__name__ for channel in CHANNELS if "client" in (channel.sender, channel.receiver)}
"""What travels without the headers that services give each other."""

_HEADERS = {
    "type": "object",
    "required": [context.DEADLINE_HEADER],
    "properties": {
        context.DEADLINE_HEADER: {"type": "string", "description": "Epoch milliseconds; work past it is dropped"},
        context.TIME_LEFT_HEADER: {
            "type": "string",
            "description": "Milliseconds that were left when the message was sent; there is no more time than that, whatever the "
            "receiver's clock says",
        },
        context.REQUEST_ID_HEADER: {"type": "string", "pattern": f"^{context.REQUEST_ID_PATTERN.pattern}$"},
        context.TRACEPARENT_HEADER: {"type": "string", "description": "W3C Trace Context"},
        context.TIMINGS_HEADER: {"type": "string", "description": "Milliseconds by stage so far, such as auth=0.41,limiter=0.52"},
    },
}


def document() -> dict[str, Any]:
    """The AsyncAPI document, as JSON has it."""
    names = [*(kind.__name__ for kind in _kinds()), contracts.Reply.__name__]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Portcullis on NATS",
            "version": VERSION,
            "description": "A request is one message that moves from stage to stage; the last one answers the edge's inbox. "
            "Every answer is a Reply, whose `result` is what the subject's operation names, or whose `error` says why not.",
        },
        "defaultContentType": "application/json",
        "channels": {_key(channel): _channel(channel) for channel in CHANNELS}
        | {"reply": {"address": None, "messages": {"Reply": {"$ref": "#/components/messages/Reply"}}}},
        "operations": {_key(channel): _operation(channel) for channel in CHANNELS},
        "components": {
            "schemas": _schemas(_SCHEMA),
            "messages": {
                name: {
                    "name": name,
                    "payload": {"$ref": _SCHEMA.format(name=name)},
                    **({} if name in _OF_CLIENTS else {"headers": _HEADERS}),
                }
                for name in names
            },
        },
    }


def page() -> str:
    """The same for a reader: one self-contained HTML page."""
    rows = "".join(
        f"<tr><td><code>{html.escape(_address(channel))}</code></td><td>{channel.sender} → {channel.receiver}"
        f"{' (every replica)' if channel.every_replica else ''}</td>"
        f"<td>{html.escape(channel.summary)}</td><td>{_link(channel.message)}</td>"
        f"<td>{_link(channel.answer) if channel.answer else '–'}</td></tr>"
        for channel in CHANNELS
    )
    blocks = "".join(
        f'<h3 id="{name}">{name}</h3><pre>{html.escape(msgspec.json.format(msgspec.json.encode(schema)).decode())}</pre>'
        for name, schema in sorted(_schemas("{name}").items())
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Portcullis on NATS</title>'
        '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/docs/assets/page.css"></head><body>'
        "<h1>Portcullis on NATS</h1><p>A request is one message that moves from stage to stage; the last one answers the edge's "
        'inbox with a <a href="#Reply">Reply</a>. The same as <a href="/asyncapi?format=json">an AsyncAPI document</a>.</p>'
        f"<table><tr><th>Subject</th><th>From → to</th><th></th><th>Message</th><th>Result</th></tr>{rows}</table>"
        f"<h2>Messages</h2>{blocks}</body></html>"
    )


def _kinds() -> list[type[contracts.Message]]:
    used = [kind for channel in CHANNELS for kind in (channel.message, channel.answer) if kind is not None]
    return list(dict.fromkeys([*used, *_PAYLOADS]))


def _schemas(reference: str) -> dict[str, dict[str, Any]]:
    """JSON Schema of every message, by name."""
    _, schemas = msgspec.json.schema_components([*_kinds(), contracts.ErrorBody, contracts.RateState], ref_template=reference)
    # msgspec cannot describe a default that is already encoded, as Reply's is.
    schemas["Reply"] = {
        "title": "Reply",
        "description": "The answer to any request: `result` or `error`.",
        "type": "object",
        "properties": {
            "result": {"default": None},
            "error": {"anyOf": [{"$ref": reference.format(name="ErrorBody")}, {"type": "null"}], "default": None},
            "rate": {"anyOf": [{"$ref": reference.format(name="RateState")}, {"type": "null"}], "default": None},
        },
    }
    return schemas


def _link(kind: type[contracts.Message]) -> str:
    return f'<a href="#{kind.__name__}">{kind.__name__}</a>'


def _key(channel: Channel) -> str:
    return _address(channel).replace(".", "_").replace("{", "").replace("}", "")


_PARAMETERS = (
    ("key_id", "The public id of the client's key"),
    ("job_id", "What the submission was answered with"),
    ("index", "Which item, from 0"),
)


def _address(channel: Channel) -> str:
    """The subject, with names in the place of `*`, in their order."""
    address = channel.subject
    for name, _ in _PARAMETERS:
        address = address.replace("*", f"{{{name}}}", 1)
    return address


def _channel(channel: Channel) -> dict[str, Any]:
    parameters = dict(_PARAMETERS[: channel.subject.count("*")])
    own = {"parameters": {name: {"description": text} for name, text in parameters.items()}} if parameters else {}
    return {
        "address": _address(channel),
        "summary": channel.summary,
        "messages": {channel.message.__name__: {"$ref": f"#/components/messages/{channel.message.__name__}"}},
        **own,
    }


def _operation(channel: Channel) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{_key(channel)}"},
        "summary": f"{channel.summary} ({channel.sender} → {channel.receiver})",
        "messages": [{"$ref": f"#/channels/{_key(channel)}/messages/{channel.message.__name__}"}],
    }
    if not channel.every_replica and channel.receiver in subjects.SERVICES:
        operation["bindings"] = {"nats": {"queue": channel.receiver}}
    if channel.answer is not None or channel.subject in (
        subjects.ACCOUNT_REVOKE,
        subjects.ADMIN_KEYS_DELETE,
        subjects.JOBS_APPEND,
    ):
        result = channel.answer.__name__ if channel.answer else "null"
        operation["reply"] = {"channel": {"$ref": "#/channels/reply"}}
        operation["description"] = f"The reply's `result` is {result}."
    return operation
