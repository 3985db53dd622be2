"""Bytes and characters written in others: base64, hex, URL escapes, character codes."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final
from urllib.parse import unquote_to_bytes

from services.fallback_model.fragments.source import Found, Source

_SIGNS: Final = re.compile(r"[^\w\s]|_")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd]")


def _is_text(decoded: str) -> bool:
    """True for something that a person or a further decoder could read, as opposed to bytes that happen to be UTF-8."""
    if len(decoded) < 6:
        return False
    signs = len(_SIGNS.findall(decoded))
    return signs <= 0.55 * len(decoded) and len(_UNPRINTABLE.findall(decoded)) <= 0.03 * len(decoded)


def _from_bytes(data: bytes) -> str | None:
    if data[1::2].count(0) * 3 > len(data):  # every other byte is zero: UTF-16, as PowerShell writes it
        decoded = data.decode("utf-16-le", "replace")
    else:
        try:
            decoded = data.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return decoded if _is_text(decoded) else None


_SHORTEST_RUN: Final = 16
_SHORTEST_BLOB: Final = 8
"""Fewer characters of base64 are less than six bytes, which `_is_text` takes for nothing."""
_BASE64: Final = re.compile(rf"[A-Za-z0-9+/_-]{{{_SHORTEST_RUN},}}(?:\r?\n[A-Za-z0-9+/_-]{{4,}})*={{0,2}}")


def find_base64(source: Source) -> Found:
    if source.longest_word < _SHORTEST_RUN:
        return
    for match in _BASE64.finditer(source.text):
        blob = match[0]
        if blob.isalpha() and (blob.islower() or blob.isupper()):
            continue
        lines = blob.split()
        candidates = [blob] if len(lines) == 1 else ["".join(lines), *(line for line in lines if len(line) >= _SHORTEST_BLOB)]
        for candidate in candidates:
            decoded = _decode_base64(candidate)
            if decoded is not None:
                yield match.start(), match.end(), decoded
                break


def _decode_base64(blob: str) -> str | None:
    # A prefix glued on ("data:...,", "b64-") shifts nothing here: the run began at the first character of the alphabet.
    blob = blob.rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    blob = blob[: len(blob) - 1] if len(blob) % 4 == 1 else blob
    try:
        return _from_bytes(base64.b64decode(blob + "=" * (-len(blob) % 4), validate=True))
    except binascii.Error:
        return None


_HEX: Final = re.compile(r"(?:(?:0x|\\x)?[0-9a-fA-F]{2}[ ,:;\n-]{0,2}){8,}")
_HEX_STRETCH: Final = re.compile(r"[0-9a-fA-Fx\\ ,:;\n-]{16,}")  # what a run stands in; found much faster
_HEX_PAIR: Final = re.compile(r"(?:0x|\\x)?([0-9a-fA-F]{2})")


def find_hex(source: Source) -> Found:
    for stretch in _HEX_STRETCH.finditer(source.text):
        for match in _HEX.finditer(source.text, *stretch.span()):
            decoded = _from_bytes(bytes.fromhex("".join(_HEX_PAIR.findall(match[0]))))
            if decoded is not None:
                yield match.start(), match.end(), decoded


_ESCAPED: Final = re.compile(r"(?:%[0-9a-fA-F]{2}[^\s%]{0,200}){2,}")
_MOST_BEFORE_ESCAPE: Final = 200


def find_url_escapes(source: Source) -> Found:
    text = source.text
    if "%" not in text:
        return
    for match in _ESCAPED.finditer(text):
        start = match.start()
        before = text[max(0, start - _MOST_BEFORE_ESCAPE) : start]
        if before and not before[-1].isspace():
            start -= len(before.split()[-1])
        decoded = _from_bytes(unquote_to_bytes(text[start : match.end()].replace("+", " ")))
        if decoded is not None:
            yield start, match.end(), decoded


# Whether the form alone says that these are character codes, the sign by which they show, and the form of a run of them. Bare
# numbers may be anything: they must spell mostly letters.
_CODES: Final = (
    (
        True,
        re.compile(r"&#|\\[uU0-7]|U\+|chr\("),
        re.compile(
            r"(?:(?:&#x?[0-9a-fA-F]{2,6};|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|U\+[0-9a-fA-F]{4,6}|chr\(\d{1,6}\)|\\[0-7]{3})"
            r"[ ,;+.]{0,3}){5,}"
        ),
    ),
    (True, re.compile(r"[01]{8}"), re.compile(r"(?<!\d)(?:[01]{8}[ ,;]{0,2}){5,}(?!\d)")),
    (False, re.compile(r"\d\d[ ,;\n-]{1,2}\d\d"), re.compile(r"(?<!\d)(?:\d{2,3}[ ,;\n-]{1,2}){7,}\d{2,3}(?!\d)")),
)
_CODE: Final = re.compile(
    r"&#x([0-9a-fA-F]+);|&#(\d+);|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})|U\+([0-9a-fA-F]+)|chr\((\d+)\)|\\([0-7]{3})|([01]{8})|(\d{2,3})"
)
_BASES: Final = (16, 10, 16, 16, 16, 10, 8, 2, 10)


def find_character_codes(source: Source) -> Found:
    for certain, sign, run in _CODES:
        if not sign.search(source.text):
            continue
        for match in run.finditer(source.text):
            chars = []
            for code in _CODE.finditer(match[0]):
                group = code.lastindex or 1
                value = int(code[group], _BASES[group - 1])
                chars.append(chr(value) if value < 0x110000 and not 0xD800 <= value <= 0xDFFF else "\x00")
            decoded = "".join(chars)
            if _is_text(decoded) and (certain or sum(map(str.isalpha, decoded)) * 2 > len(decoded)):
                yield match.start(), match.end(), decoded
