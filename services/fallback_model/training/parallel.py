# ruff: noqa: S314, S603, S607, SIM905  # of trust: packages of the distribution, and constant commands
"""Collects sentences in two languages, from the packages of Debian and one of npm: what the encoder learns languages by.

`python -m services.fallback_model.training.parallel OUT.jsonl.xz` (Debian's `apt-get`, `dpkg-deb` and npm must be there; about
1.5 GB are downloaded into a temporary directory). One line per English text: `{"en": str, "to": {language: translation}}`.

| origin | licence |
|---|---|
| LibreOffice help and user interface | MPL-2.0 |
| GNOME help | CC BY-SA 3.0 |
| Debian Administrator's Handbook | GPL-2+ or CC BY-SA 3.0 |
| descriptions of Debian packages | as each package's |
| MediaWiki's and GNOME's user interface | GPL-2+ |
| Element's user interface (matrix-react-sdk) | Apache-2.0 |
"""

from __future__ import annotations

import gettext
import hashlib
import html
import json
import lzma
import random
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

LANGUAGES: Final = ("ar bn cs da de el es fa fr he hi id it ja ko nl pl pt ro ru sv th tr uk vi zh").split()
_HELP: Final = ("cs da de el es fr hi id it ja ko nl pl pt pt-br ru sv tr vi zh-cn zh-tw").split()
_INTERFACE: Final = ("ar bn el fa he hi id ja ko pt ro ru th tr uk vi zh-cn").split()
_PACKAGES: Final = [
    "libreoffice-help-en-us",
    *(f"libreoffice-help-{language}" for language in _HELP),
    *(f"libreoffice-l10n-{language}" for language in _INTERFACE),
    *("gnome-user-docs", "mediawiki", "debian-handbook", "evolution-common", "gnome-control-center-data", "nautilus-data"),
]
_APT_HELPER: Final = "/usr/lib/apt/apt-helper"
_DESCRIBED: Final = ("cs da de el es fr it ja ko nl pl pt_BR ru sv tr uk vi zh_CN").split()
_ELEMENT: Final = "matrix-react-sdk@3.70.0"
_BLOCK: Final = re.compile(r'<(p|h[1-6]|td|a)\b[^>]*?\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)
_PARAGRAPH: Final = re.compile(r'<(div class="para"|h[1-6][^>]*)>(.*?)</(?:div|h[1-6])>', re.DOTALL)
_TAG: Final = re.compile(r"<[^>]*>")
_MARKS: Final = re.compile(r"[_~&](?=\w)|\{\{PLURAL:[^}]*\}\}")
_SPACE: Final = re.compile(r"\s+")
_FEWEST, _MOST = 12, 420
_CHARACTERS_PER_LANGUAGE: Final = 2_400_000
_SHARE_OF_AN_ORIGIN: Final = 0.4

Pairs = Iterator[tuple[str, str, str]]
"""Language, English text, its translation."""


def _language(name: str) -> str:
    return re.split(r"[-_@]", name)[0].lower()


def _plain(text: str) -> str:
    return _SPACE.sub(" ", html.unescape(_TAG.sub("", text))).strip()


def _libreoffice_help(root: Path) -> Pairs:
    """Paragraphs carry the same id in all languages."""
    found: dict[str, dict[str, str]] = {}
    for package in ("en-us", *_HELP):
        texts: dict[str, str] = {}
        for page in (root / f"libreoffice-help-{package}/usr/share/libreoffice/help").rglob("text/**/*.html"):
            place = str(page).rsplit("/text/", 1)[1]
            for _, key, content in _BLOCK.findall(page.read_text("utf-8", "replace")):
                texts[f"{place}#{key}"] = _plain(content)
        found[package] = texts
    english = found.pop("en-us")
    for package, texts in found.items():
        for key, text in texts.items():
            if key in english:
                yield _language(package), english[key], text


def _catalogues(root: Path) -> Pairs:
    """Compiled messages of GNU gettext: the English text is the key."""
    for path in sorted(root.rglob("LC_MESSAGES/*.mo")):
        language = _language(path.parent.parent.name)
        try:
            catalogue = gettext.GNUTranslations(path.open("rb"))
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        for key, text in catalogue._catalog.items():  # type: ignore[attr-defined]  # no other way to go through all of them
            if isinstance(key, str) and key:
                yield language, _MARKS.sub("", key.rsplit("\x04", 1)[-1].split("|", 1)[-1]), _MARKS.sub("", text)


def _gnome_help(root: Path) -> Pairs:
    """Pages of Mallard: the paragraphs of two languages follow each other alike."""
    folder = root / "gnome-user-docs/usr/share/help"
    for page in sorted((folder / "C").rglob("*.page")):
        english = _mallard(page)
        for other in folder.iterdir():
            same = other / page.relative_to(folder / "C")
            if other.name != "C" and same.exists() and len(translated := _mallard(same)) == len(english):
                yield from ((_language(other.name), one, two) for one, two in zip(english, translated, strict=True))


def _mallard(page: Path) -> list[str]:
    try:
        tree = ElementTree.parse(page)
    except ElementTree.ParseError:
        return []
    wanted = {f"{{http://projectmallard.org/1.0/}}{name}" for name in ("p", "title", "desc")}
    return [_SPACE.sub(" ", "".join(found.itertext())).strip() for found in tree.iter() if found.tag in wanted]


def _handbook(root: Path) -> Pairs:
    folder = root / "debian-handbook/usr/share/doc/debian-handbook/html"
    for page in sorted((folder / "en-US").glob("*.html")):
        english = _paragraphs(page)
        for other in folder.iterdir():
            same = other / page.name
            if other.name != "en-US" and same.exists() and len(translated := _paragraphs(same)) == len(english):
                yield from ((_language(other.name), one, two) for one, two in zip(english, translated, strict=True))


def _paragraphs(page: Path) -> list[str]:
    return [_plain(content) for _, content in _PARAGRAPH.findall(page.read_text("utf-8", "replace"))]


def _messages(folder: Path, english: str) -> Pairs:
    """A folder of JSON files, one per language, each from the name of a message to its text."""
    base = json.loads((folder / english).read_text("utf-8"))
    for path in sorted(folder.glob("*.json")):
        other = json.loads(path.read_text("utf-8"))
        for key, text in other.items():
            if isinstance(text, str) and isinstance(base.get(key), str) and path.name != english:
                yield _language(path.stem), _MARKS.sub("", _plain(base[key])), _MARKS.sub("", _plain(text))


def _descriptions(root: Path) -> Pairs:
    english = dict(_described(root, "en"))
    for name in _DESCRIBED:
        for digest, text in _described(root, name):
            there = english.get(digest)
            if there and len(there) == len(text):
                yield from ((_language(name), one, two) for one, two in zip(there, text, strict=True))


def _described(root: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """Digest of the English description → the short one and the paragraphs of the long one."""
    path = next((root / "lists").glob(f"*_main_i18n_Translation-{name.replace('_', '%5f')}*"))
    content = subprocess.run([_APT_HELPER, "cat-file", str(path)], check=True, capture_output=True).stdout.decode(
        "utf-8", "replace"
    )
    for record in content.split("\n\n"):
        match = re.search(r"^Description-md5: (\w+)\nDescription-\w+: (.*?)\n(.*)", record, re.DOTALL | re.MULTILINE)
        if match:
            paragraphs = re.split(r"\n \.\n", match[3])
            yield match[1], [match[2], *(_SPACE.sub(" ", paragraph).strip() for paragraph in paragraphs)]


def _is_of_use(language: str, english: str, text: str) -> bool:
    if language not in LANGUAGES or english == text or "�" in text or ("%" in english and len(english) < 40):
        return False
    if not (_FEWEST <= len(english) <= _MOST and len(text) <= 2 * _MOST and english.count(" ") >= 2):
        return False
    letters = sum(char.isalpha() or char.isspace() for char in english)
    return letters > 0.8 * len(english) and 0.15 < len(text) / len(english) < 2.5


def collect(root: Path) -> dict[str, dict[str, str]]:
    """English text → language → translation, of each language as much, from no origin more than a part."""
    origins = {
        "help": _libreoffice_help(root),
        "catalogues": _catalogues(root),
        "gnome": _gnome_help(root),
        "handbook": _handbook(root),
        "mediawiki": _messages(root / "mediawiki/usr/share/mediawiki/languages/i18n", "en.json"),
        "element": _messages(root / "element/package/src/i18n/strings", "en_EN.json"),
        "descriptions": _descriptions(root),
    }
    by_language: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for origin, pairs in origins.items():
        for language, english, text in pairs:
            if _is_of_use(language, english, text):
                by_language[language][origin].setdefault(english, text)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for language, by_origin in sorted(by_language.items()):
        for english, text in _chosen(by_origin):
            found[english].setdefault(language, text)
    return found


def _chosen(by_origin: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """The smallest origin whole, then the next, each within its share, and the rest from whatever is left.

    Which texts are taken hangs on a digest of the English one, so that all languages take the same ones and it is stored once.
    """
    room, rest = _CHARACTERS_PER_LANGUAGE, []
    for _, pairs in sorted(by_origin.items(), key=lambda item: len(item[1])):
        own = _CHARACTERS_PER_LANGUAGE * _SHARE_OF_AN_ORIGIN
        for english, text in sorted(pairs.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
            if own > 0 and room > 0:
                own, room = own - len(english) - len(text), room - len(english) - len(text)
                yield english, text
            else:
                rest.append((english, text))
    for english, text in rest:
        if room <= 0:
            return
        room -= len(english) + len(text)
        yield english, text


def write(found: dict[str, dict[str, str]], out: Path) -> None:
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    with lzma.open(out, "wt", encoding="utf-8", preset=6) as file:
        for english in texts:
            file.write(json.dumps({"en": english, "to": found[english]}, ensure_ascii=False) + "\n")


def read(path: Path) -> list[tuple[str, str, str]]:
    """All pairs of a file that `write` made: language, English text, translation."""
    pairs = []
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            pairs += [(language, row["en"], text) for language, text in row["to"].items()]
    return pairs


def download(root: Path) -> None:
    """Raises `subprocess.CalledProcessError` where a package cannot be had."""
    debs = root / "debs"
    debs.mkdir(parents=True)
    subprocess.run(["apt-get", "download", *_PACKAGES], cwd=debs, check=True)
    for deb in debs.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(deb), str(root / deb.name.split("_")[0])], check=True)
        deb.unlink()
    (root / "lists" / "partial").mkdir(parents=True)
    languages = f"Acquire::Languages={','.join(['en', *_DESCRIBED])}"
    subprocess.run(["apt-get", "update", "-o", f"Dir::State::Lists={root / 'lists'}", "-o", languages], check=True)
    (root / "element").mkdir()
    subprocess.run(["npm", "pack", "--silent", _ELEMENT], cwd=root / "element", check=True)
    archive = next((root / "element").glob("*.tgz"))
    subprocess.run(["tar", "xzf", str(archive), "-C", str(root / "element")], check=True)


def main() -> int:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        download(root)
        found = collect(root)
    write(found, out)
    pairs = sum(map(len, found.values()))
    print(f"{pairs} translations of {len(found)} English texts in {out}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
