"""What services of neighbouring releases must agree on: the form of every message on the bus, and of what is stored.

`python -m tests.contract.wire` writes it to wire.v1.json, which holds what was once released; it refuses to write what would
break an agreement. A form that must change becomes another message, on a subject of the next version.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from libs.common import contracts
from services.jobs.core import JobRecord

PAGE = Path(__file__).with_name("wire.v1.json")
Forms = dict[str, dict[str, Any]]


def forms() -> Forms:
    """By message: which fields it has, of which form, and which of them must be there."""
    kinds: list[type[msgspec.Struct]] = [
        kind
        for _, kind in inspect.getmembers(contracts, inspect.isclass)
        if issubclass(kind, contracts.Message) and kind is not contracts.Message
    ]
    everything: list[type[msgspec.Struct]] = [*kinds, JobRecord]
    return {kind.__name__: _form(kind) for kind in sorted(everything, key=lambda kind: kind.__name__)}


def _form(kind: type[msgspec.Struct]) -> dict[str, Any]:
    fields = msgspec.structs.fields(kind)
    # One by one: a default that is a piece of JSON has no place in a schema of the whole.
    schemas, _ = msgspec.json.schema_components([field.type for field in fields], ref_template="{name}")
    return {
        "required": sorted(field.encode_name for field in fields if field.required),
        "fields": {field.encode_name: _plain(schema) for field, schema in zip(fields, schemas, strict=True)},
    }


def _plain(schema: Any) -> Any:
    """Without what is only said about it, and without defaults, which are the reader's."""
    if isinstance(schema, dict):
        return {name: _plain(value) for name, value in schema.items() if name not in ("description", "title", "default")}
    return [_plain(value) for value in schema] if isinstance(schema, list) else schema


def breaks(released: Forms, now: Forms) -> list[str]:
    """Where a service of the release before would not understand one of now, or the other way round."""
    found = [f"{name} is gone" for name in released.keys() - now.keys()]
    for name in released.keys() & now.keys():
        before, after = released[name], now[name]
        for field, form in before["fields"].items():
            if field not in after["fields"]:
                found.append(f"{name}.{field} is gone")
            elif after["fields"][field] != form:
                found.append(f"{name}.{field} was {json.dumps(form)} and is {json.dumps(after['fields'][field])}")
        found += [f"{name}.{field} has no default" for field in after["required"] if field not in before["required"]]
    return sorted(found)


def main() -> int:
    now = forms()
    if PAGE.exists() and (found := breaks(json.loads(PAGE.read_text()), now)):
        print("\n".join(found), file=sys.stderr)
        return 1
    PAGE.write_text(json.dumps(now, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
