"""The data that needs no hub: 10,605 movie-review snippets, each rated by 15 to 20 people, from the package registry.

They come with the *source* distribution of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert, "VADER: A Parsimonious
Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014). The snippets are public; the quick start
*treats* the private part as if it were private. The raters are not named, so the privacy unit can only be one record.

The file holds the favourable reviews first (rows 0 to about 5,150), then the others, and neighbouring snippets can come
from one review. So the public part is a contiguous block at the end of each half, cut in two: one to evaluate on, one
to train on. Gaps of rows that nobody uses keep the three parts from sharing a review.

Pairs are made of the same rows: row i of a part's favourable block with row i of its other block, a pairing that
depends on row numbers only. Chosen is the one that people rated higher. A pair's text, which stages of other kinds
read, is its first snippet, whichever is the better. Reviews and pairs of one part are the same data under other ids.
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
REVIEW_PAIRS = "embedded:review-pairs"
PUBLIC_PAIRS = "embedded:public-pairs"
PUBLIC_TRAINING = "embedded:public-training"

_GAP = 5
_PRIVATE = (range(0, 4350 - _GAP), range(5150 + _GAP, 9805 - _GAP))
_EVALUATION = (range(4350, 4750), range(9805, 10205))
_TRAINING = (range(4750 + _GAP, 5150), range(10205 + _GAP, 10605))
_BLOCKS = {
    MOVIE_REVIEWS: _PRIVATE,
    REVIEW_PAIRS: _PRIVATE,
    PUBLIC_OPENINGS: _EVALUATION,
    PUBLIC_PAIRS: _EVALUATION,
    PUBLIC_TRAINING: _TRAINING,
}
_PAIRS = (REVIEW_PAIRS, PUBLIC_PAIRS)
ROWS = 10_605
POPULATION = {s: (min if s in _PAIRS else sum)(map(len, blocks)) for s, blocks in _BLOCKS.items()}

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
    """Rows of one embedded part in file order: {"id", "text", "rating"}, or of pairs {"id", "text", "chosen",
    "rejected"} with null responses where the two are rated alike."""
    with prepare_reviews().open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    first, second = ([rows[row] for row in block] for block in _BLOCKS[source])
    if source in _PAIRS:
        return [_pair(a, b, i % 2 == 0) for i, (a, b) in enumerate(zip(first, second, strict=False))]
    return first + second


def part(source: str) -> str:
    """The embedded source that holds the same snippets as single rows."""
    return {REVIEW_PAIRS: MOVIE_REVIEWS, PUBLIC_PAIRS: PUBLIC_OPENINGS}.get(source, source)


def _pair(a: dict[str, Any], b: dict[str, Any], favourable: bool) -> dict[str, Any]:
    """favourable: whether the text is that of the favourable part; by row number, as all else of the pairing."""
    worse, better = sorted((a, b), key=lambda row: float(row["rating"]))
    alike = a["rating"] == b["rating"]
    return {
        "id": f"{a['id']}-{b['id']}",
        "text": (a if favourable else b)["text"],
        "chosen": None if alike else better["text"],
        "rejected": None if alike else worse["text"],
    }


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
