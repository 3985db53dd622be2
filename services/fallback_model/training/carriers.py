"""Documents, tables, code, mails and tool outputs with one place for a sentence.

The same carrier is made twice, once with an attack and once with a harmless sentence in that place, so that only the
sentence can tell the two apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Final

from services.fallback_model.training.phrases import HARMLESS, expand

_WORDS: Final = [
    "status",
    "name",
    "id",
    "title",
    "summary",
    "description",
    "notes",
    "review",
    "body",
    "content",
    "result",
    "snippet",
    "comment",
    "message",
    "details",
    "address",
    "price",
    "date",
    "author",
    "rating",
    "subject",
    "bio",
]


def _value(rng: random.Random) -> object:
    return rng.choice(
        [
            rng.randrange(10_000),
            round(rng.uniform(1, 900), 2),
            rng.random() < 0.5,
            f"{rng.randrange(16**8):08x}",
            rng.choice(HARMLESS["first"]),
            rng.choice(HARMLESS["topic"]),
            rng.choice(HARMLESS["tool"]),
            f"2024-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}",
        ]
    )


def as_json(sentence: str, prose: str, rng: random.Random) -> str:
    keys = rng.sample(_WORDS, rng.randrange(2, 7))
    record: dict[str, object] = {key: _value(rng) for key in keys}
    spot = rng.choice(keys)
    record[spot] = rng.choice([sentence, f"{prose} {sentence}", f"{sentence} {prose}"])
    if rng.random() < 0.4:
        record = {rng.choice(["data", "result", "items", "response", "product"]): rng.choice([record, [record]])}
    text = json.dumps(record, indent=rng.choice([None, None, 2]), ensure_ascii=False)
    return text if rng.random() < 0.6 else str(record)


def as_table(sentence: str, prose: str, rng: random.Random) -> str:
    columns = rng.sample(_WORDS, rng.randrange(2, 5))
    rows = [[str(_value(rng)) for _ in columns] for _ in range(rng.randrange(2, 6))]
    rng.choice(rows)[rng.randrange(len(columns))] = sentence
    style = rng.randrange(3)
    if style == 0:
        return "\n".join(",".join(row) for row in [columns, *rows])
    if style == 1:
        lines = [columns, ["---"] * len(columns), *rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in lines)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{c}</th>' for c in columns)}</tr>{body}</table>"


def as_code(sentence: str, prose: str, rng: random.Random) -> str:
    name, other = rng.sample(["load", "parse", "total", "merge", "render", "check", "area", "price", "fetch", "count"], 2)
    mark = rng.choice(["# ", "// ", "-- ", '"""', "/* ", "# TODO: ", "# NOTE: "])
    close = {'"""': '"""', "/* ": " */"}.get(mark, "")
    note = f"{mark}{sentence}{close}"
    shapes = [
        f"def {name}(items):\n    {note}\n    return sum({other}(x) for x in items)\n",
        f"function {name}(a, b) {{\n  {note}\n  return {other}(a) + b;\n}}",
        f'{name} = "{sentence}"\nprint({name})\n',
        f"SELECT {name}, {other} FROM t WHERE id = {rng.randrange(99)}; {note}",  # noqa: S608  # a text, never run
        f"{note}\nfor i in range({rng.randrange(3, 30)}):\n    {name}(i)\n    {other}(i * 2)\n",
        f"version: '3'\nservices:\n  {name}:\n    image: {other}:latest  # {sentence}\n",
        f"2024-05-0{rng.randrange(1, 9)} INFO {name} ok\n2024-05-09 WARN {other}: {sentence}\n2024-05-09 INFO done",
    ]
    return rng.choice(["", "Explain this code:\n", "What does this do?\n", "Review the following:\n"]) + rng.choice(shapes)


def as_page(sentence: str, prose: str, rng: random.Random) -> str:
    hidden = rng.choice(
        [
            f"<!-- {sentence} -->",
            f"<p>{sentence}</p>",
            f'<span style="display:none">{sentence}</span>',
            f'<img alt="{sentence}" src="a.png">',
            f"<li>{sentence}</li>",
            f'<meta name="description" content="{sentence}">',
        ]
    )
    title = expand(rng.choice(["{topic}", "About {first}", "Recipe for {food}", "{tool} tips"]), HARMLESS, rng)
    parts = [f"<h1>{title}</h1>", f"<p>{prose}</p>"]
    parts.insert(rng.randrange(3), hidden)
    return f"<html><head><title>{title}</title></head><body>{''.join(parts)}</body></html>"


def as_mail(sentence: str, prose: str, rng: random.Random) -> str:
    first, second = rng.sample(HARMLESS["first"], 2)
    lines = [f"Hi {second},", prose, rng.choice(["Best,", "Regards,", "Cheers,", "Thanks,"]) + f"\n{first}"]
    lines.insert(rng.randrange(1, 4), sentence)
    head = f"From: {first.lower()}@corp.example\nTo: {second.lower()}@corp.example\nSubject: {rng.choice(HARMLESS['topic'])}\n\n"
    return (head if rng.random() < 0.6 else "") + "\n\n".join(lines)


def as_chat(sentence: str, prose: str, rng: random.Random) -> str:
    one, two = rng.choice([("user", "assistant"), ("User", "Bot"), ("Q", "A"), ("customer", "agent"), ("Human", "AI")])
    question = expand("{harmless}", HARMLESS, rng)
    turns = [f"{one}: {question}", f"{two}: {prose}", f"{one}: {sentence}"]
    if rng.random() < 0.3:
        turns.append(f"{two}: Sure.")
    return "\n".join(turns)


def as_prose(sentence: str, prose: str, rng: random.Random) -> str:
    """The sentence between two sentences of the prose, at its start or at its end."""
    cuts = [0, len(prose)] + [i + 2 for i in range(len(prose) - 2) if prose[i] in ".!?\n" and prose[i + 1] in " \n"]
    cut = rng.choice(cuts)
    gap = rng.choice([" ", " ", "\n", "\n\n", " - "])
    return (prose[:cut].rstrip() + gap + sentence + gap + prose[cut:].lstrip()).strip()


def as_task(sentence: str, prose: str, rng: random.Random) -> str:
    """A request about a quoted document."""
    ask = rng.choice(
        [
            "Summarise this:",
            "Translate the text to French:",
            "What are the main points?",
            "Write a reply to this mail:",
            "Create action items:",
            "Extract all names.",
            "Is this review positive?",
            "Rate this CV:",
            "Fix the grammar:",
            "Answer from the document below.",
            "What is this about?",
            "Classify the sentiment:",
            "Rewrite this politely:",
        ]
    )
    left, right = rng.choice(
        [("'", "'"), ('"', '"'), ("<data>\n", "\n</data>"), ("{", "}"), ("```\n", "\n```"), ("", ""), ("<<<", ">>>")]
    )
    return f"{ask} {left}{as_prose(sentence, prose, rng)}{right}"


Carrier = Callable[[str, str, random.Random], str]
CARRIERS: Final[list[tuple[Carrier, int]]] = [
    (as_prose, 30),
    (as_task, 16),
    (as_json, 16),
    (as_mail, 8),
    (as_page, 8),
    (as_table, 8),
    (as_code, 8),
    (as_chat, 6),
]


def pair(bad: str, good: str, prose: str, rng: random.Random) -> tuple[str, str]:
    """The same carrier around `bad` and around `good`; `prose` is benign text of up to about eighty words."""
    carrier = rng.choices([c for c, _ in CARRIERS], [w for _, w in CARRIERS])[0]
    seed = rng.randrange(1 << 30)
    return carrier(bad, prose, random.Random(seed)), carrier(good, prose, random.Random(seed))
