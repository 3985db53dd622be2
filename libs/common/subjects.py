"""Every NATS subject, queue group and stream, and who may use it. The only place where a subject is spelt."""

from __future__ import annotations

from dataclasses import dataclass

INBOX_PREFIX = "_INBOX"

# The path of a detection: each stage takes the one and forwards the next.
DETECT_REQUEST = "detect.v1.request"
DETECT_AUTHENTICATED = "detect.v1.authenticated"
DETECT_ADMITTED = "detect.v1.admitted"

# Many texts. Their units are taken first (edge → auth → limiter, which answers an `Admission`), at once or not at all; then they
# go straight to the proxy, several in a message, on a subject of their own: interactive requests have theirs, and go first.
BATCH_REQUEST = "batch.v1.request"
BATCH_AUTHENTICATED = "batch.v1.authenticated"
BATCH_ITEMS = "batch.v1.items"
# The same for work that was accepted earlier (jobs → auth → limiter): the key is known by its id, and as much is taken as there
# is room for.
BATCH_TAKE = "batch.v1.take"

# Jobs: many texts that are accepted now and judged as the key's limits allow. Every call passes auth, which forwards it on the
# subject of its operation.
JOBS_REQUEST = "jobs.v1.request"
JOBS_CREATE = "jobs.v1.create"
JOBS_APPEND = "jobs.v1.append"
JOBS_SEAL = "jobs.v1.seal"
JOBS_GET = "jobs.v1.get"
JOBS_LIST = "jobs.v1.list"
JOBS_RESULTS = "jobs.v1.results"
JOBS_CANCEL = "jobs.v1.cancel"
JOBS_OPERATIONS = {
    "create": JOBS_CREATE,
    "append": JOBS_APPEND,
    "seal": JOBS_SEAL,
    "get": JOBS_GET,
    "list": JOBS_LIST,
    "results": JOBS_RESULTS,
    "cancel": JOBS_CANCEL,
}
# The door for clients that connect to NATS with their API key: what each may ask, in the name of the key whose id stands in the
# place of `*`. The server lets nobody else publish there (`door_permissions`), so the subject says who asks.
DOOR_SUBMIT = "jobs.v1.*.submit"
DOOR_STATUS = "jobs.v1.*.status"
DOOR_LIST = "jobs.v1.*.list"
DOOR_RESULTS = "jobs.v1.*.results"
DOOR_CANCEL = "jobs.v1.*.cancel"
# … and where it sees its results, as they are stored.
DOOR_LIVE_RESULTS = "jobs.v1.*.*.results.*"
DOOR_OPERATIONS = (DOOR_SUBMIT, DOOR_STATUS, DOOR_LIST, DOOR_RESULTS, DOOR_CANCEL)
# Whom the server does not know it asks auth about, which answers the address given; only the server publishes there.
AUTH_CALLOUT = "$SYS.REQ.USER.AUTH"
AUTH_CALLOUT_REPLIES = "$SYS._INBOX.>"
# The connections of the services' account, from every server; and the end of one (by the server's id), which auth alone may ask.
CONNECTIONS = "$SYS.REQ.ACCOUNT.PING.CONNZ"
KICK = "$SYS.REQ.SERVER.*.KICK"

# What JetStream keeps of them; only the service `jobs` touches it.
JOB_ITEMS_STREAM = "JOB_ITEMS"
JOB_RESULTS_STREAM = "JOB_RESULTS"
JOB_DEAD_STREAM = "JOB_DEAD"
JOB_HOOKS_STREAM = "JOB_HOOKS"
JOB_BUCKET = "JOBS"

# Keys. A registration passes the limiter first (it is limited per address), then auth.
REGISTER_REQUEST = "account.v1.register.request"
REGISTER_ADMITTED = "account.v1.register.admitted"
ACCOUNT_PROFILE = "account.v1.profile"
ACCOUNT_ROTATE = "account.v1.rotate"
ACCOUNT_REVOKE = "account.v1.revoke"
# Auth's answer to a keyed call passes the limiter, which adds the state of the key's limits and replies.
ACCOUNT_ANSWERED = "account.v1.answered"

ADMIN_KEYS_LIST = "admin.v1.keys.list"
ADMIN_KEYS_CREATE = "admin.v1.keys.create"
ADMIN_KEYS_GET = "admin.v1.keys.get"
ADMIN_KEYS_UPDATE = "admin.v1.keys.update"
ADMIN_KEYS_DELETE = "admin.v1.keys.delete"

# Breakers live in every replica of the proxy: lists and resets are broadcast and every replica answers. A reset passes auth.
BREAKERS_LIST = "breakers.v1.list"
BREAKERS_RESET_REQUEST = "admin.v1.breakers.reset"
BREAKERS_RESET = "breakers.v1.reset"

# Events, for whoever listens.
EVENT_KEY_CHANGED = "events.v1.key.changed"
EVENT_BREAKER_CHANGED = "events.v1.breaker.changed"

# Traces that are worth keeping, told by the processes in which they began to all others.
EVENT_TRACE_KEPT = "events.v1.trace.kept"
TRACES_BEGIN_IN = frozenset({"edge", "jobs"})

# A process that has drained says so before it goes; whoever disappears without a word has died with work in hand.
EVENT_LEFT = "events.v1.instance.left"
# The NATS account of all services, and the server's own word that a connection of it has ended (imported from the system
# account, see infra/embedded/servers.py).
ACCOUNT = "PORTCULLIS"
CLIENT_DISCONNECTED = f"$SYS.ACCOUNT.{ACCOUNT}.DISCONNECT"

# Usage, kept by JetStream until auth has written it to PostgreSQL.
USAGE_RECORDED = "usage.v1.recorded"
USAGE_STREAM = "USAGE"

DEFAULT_POOL = "fallback"
# Asks the workers of every pool how they are; each answers with the name of its own.
POOL_PING = "$SRV.PING.portcullis-fallback-model"
# Asks every process what goes through it (NATS ADR-32).
EVERYBODYS_STATS = "$SRV.STATS"

SERVICES = ("edge", "auth", "limiter", "detector_proxy", "fallback_model", "jobs", "console")
MICRO = ("PING", "INFO", "STATS")
"""What is asked about services (NATS ADR-32)."""


# Whose death concerns the requests that a service has pending: the stages that may have had them in hand.
DEPENDS_ON: dict[str, frozenset[str]] = {
    "edge": frozenset({"auth", "limiter", "detector_proxy", "jobs"}),
    "jobs": frozenset({"auth", "limiter", "detector_proxy"}),
    "detector_proxy": frozenset({"fallback_model"}),
}


def micro_name(service: str) -> str:
    """How a service is called where it is asked about (`MICRO`)."""
    return f"portcullis-{service}".replace("_", "-")


def connection_name(service: str, instance: str) -> str:
    """How a process's NATS connection is called; `service_of` reads it back."""
    return f"portcullis:{service}:{instance}"


def service_of(connection: str) -> tuple[str, str] | None:
    """(service, instance) of a connection name, or None when it is not one of ours."""
    parts = connection.split(":")
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "portcullis" else None


def model_pool(pool: str) -> str:
    """The subject on which the workers of `pool` take texts."""
    return f"model.v1.{pool}"


def model_pool_batch(pool: str) -> str:
    """The subject on which the workers of `pool` take many texts at a time."""
    return f"model.v1.{pool}.batch"


def inbox(service: str, instance: str) -> str:
    """The private inbox of one process of `service`; its answers arrive below it."""
    return f"{INBOX_PREFIX}.{service}.{instance}"


def job_subject(key_id: str, job_id: str, kind: str, index: int | None = None) -> str:
    """Where a job's `items`, `results`, `dead` and `hook` are kept; `index` None: all of that kind."""
    return f"jobs.v1.{key_id}.{job_id}.{kind}.{'*' if index is None else index}"


def key_of(door: str) -> str:
    """The key in whose name a message came to the door."""
    return door.split(".")[2]


def client_inbox(key_id: str) -> str:
    """The inbox prefix of clients that have connected with a key. No service is called like a key (12 characters)."""
    return f"{INBOX_PREFIX}.{key_id}"


CLIENT_USER_PREFIX = "key:"


def client_user(key_id: str) -> str:
    """The NATS user as which a client that has connected with a key is listed and reported. No service's user is called so."""
    return CLIENT_USER_PREFIX + key_id


def kick(server_id: str) -> str:
    """Where a server is asked to end a connection of its own."""
    return KICK.replace("*", server_id)


@dataclass(frozen=True, slots=True)
class Permissions:
    """What a service's NATS user may publish and subscribe to; everything else is refused by the server."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def door_permissions(key_id: str) -> Permissions:
    """What a client may do that has connected with an API key: ask in its name, and read its answers and its results."""
    return Permissions(
        publish=tuple(operation.replace("*", key_id, 1) for operation in DOOR_OPERATIONS),
        subscribe=(f"jobs.v1.{key_id}.*.results.>", f"{client_inbox(key_id)}.>"),
    )


def _service(name: str, publish: tuple[str, ...], subscribe: tuple[str, ...]) -> Permissions:
    # Replies go to inboxes that cannot be guessed (instance and token); only a service's own can be read.
    return Permissions(
        publish=(f"{INBOX_PREFIX}.>", EVENT_LEFT, *((EVENT_TRACE_KEPT,) if name in TRACES_BEGIN_IN else ()), *publish),
        subscribe=(
            f"{INBOX_PREFIX}.{name}.>",
            # Not `$SRV.*`: for the server, that includes the subscription `$SRV.>`.
            *(f"$SRV.{asked}{of}" for asked in MICRO for of in ("", f".{micro_name(name)}", f".{micro_name(name)}.*")),
            EVENT_TRACE_KEPT,
            *((EVENT_LEFT, CLIENT_DISCONNECTED) if name in DEPENDS_ON else ()),
            *subscribe,
        ),
    )


PERMISSIONS: dict[str, Permissions] = {
    "edge": _service(
        "edge",
        publish=(
            DETECT_REQUEST,
            BATCH_REQUEST,
            BATCH_ITEMS,
            JOBS_REQUEST,
            REGISTER_REQUEST,
            ACCOUNT_PROFILE,
            ACCOUNT_ROTATE,
            ACCOUNT_REVOKE,
            ADMIN_KEYS_LIST,
            ADMIN_KEYS_CREATE,
            ADMIN_KEYS_GET,
            ADMIN_KEYS_UPDATE,
            ADMIN_KEYS_DELETE,
            BREAKERS_LIST,
            BREAKERS_RESET_REQUEST,
            "$SRV.PING",
        ),
        subscribe=(EVENT_BREAKER_CHANGED,),
    ),
    "auth": _service(
        "auth",
        publish=(
            DETECT_AUTHENTICATED,
            BATCH_AUTHENTICATED,
            *JOBS_OPERATIONS.values(),
            ACCOUNT_ANSWERED,
            BREAKERS_RESET,
            EVENT_KEY_CHANGED,
            AUTH_CALLOUT_REPLIES,
            CONNECTIONS,
            KICK,
            f"$JS.API.STREAM.INFO.{USAGE_STREAM}",
            f"$JS.API.STREAM.CREATE.{USAGE_STREAM}",
            f"$JS.API.CONSUMER.CREATE.{USAGE_STREAM}.>",
            f"$JS.API.CONSUMER.INFO.{USAGE_STREAM}.>",
            f"$JS.API.CONSUMER.MSG.NEXT.{USAGE_STREAM}.>",
        ),
        subscribe=(
            DETECT_REQUEST,
            BATCH_REQUEST,
            BATCH_TAKE,
            JOBS_REQUEST,
            REGISTER_ADMITTED,
            ACCOUNT_PROFILE,
            ACCOUNT_ROTATE,
            ACCOUNT_REVOKE,
            ADMIN_KEYS_LIST,
            ADMIN_KEYS_CREATE,
            ADMIN_KEYS_GET,
            ADMIN_KEYS_UPDATE,
            ADMIN_KEYS_DELETE,
            BREAKERS_RESET_REQUEST,
            EVENT_KEY_CHANGED,
            AUTH_CALLOUT,
        ),
    ),
    "limiter": _service(
        "limiter",
        publish=(DETECT_ADMITTED, REGISTER_ADMITTED),
        subscribe=(DETECT_AUTHENTICATED, BATCH_AUTHENTICATED, REGISTER_REQUEST, ACCOUNT_ANSWERED),
    ),
    "detector_proxy": _service(
        "detector_proxy",
        publish=("model.v1.*", "model.v1.*.batch", USAGE_RECORDED, EVENT_BREAKER_CHANGED, POOL_PING),
        subscribe=(DETECT_ADMITTED, BATCH_ITEMS, BREAKERS_LIST, BREAKERS_RESET, EVENT_BREAKER_CHANGED),
    ),
    "jobs": _service(
        "jobs",
        publish=(
            BATCH_TAKE,
            BATCH_ITEMS,
            ACCOUNT_ANSWERED,
            "jobs.v1.*.*.>",
            f"$KV.{JOB_BUCKET}.>",
            *(
                f"$JS.API.{call}"
                for stream in (JOB_ITEMS_STREAM, JOB_RESULTS_STREAM, JOB_DEAD_STREAM, JOB_HOOKS_STREAM, f"KV_{JOB_BUCKET}")
                for call in (
                    f"STREAM.INFO.{stream}",
                    f"STREAM.CREATE.{stream}",
                    f"STREAM.PURGE.{stream}",
                    f"STREAM.MSG.GET.{stream}",
                    f"CONSUMER.CREATE.{stream}.>",
                    f"CONSUMER.INFO.{stream}.>",
                    f"CONSUMER.DELETE.{stream}.>",
                    f"CONSUMER.LIST.{stream}",
                    f"CONSUMER.MSG.NEXT.{stream}.>",
                )
            ),
            f"$JS.ACK.{JOB_ITEMS_STREAM}.>",
            f"$JS.ACK.{JOB_HOOKS_STREAM}.>",
        ),
        subscribe=(*JOBS_OPERATIONS.values(), *DOOR_OPERATIONS),
    ),
    "fallback_model": _service("fallback_model", publish=(), subscribe=("model.v1.*", "model.v1.*.batch")),
    "console": _service("console", publish=(EVERYBODYS_STATS, BREAKERS_LIST), subscribe=(EVENT_LEFT, EVENT_BREAKER_CHANGED)),
}
