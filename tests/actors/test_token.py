"""Ray's token is made and kept for its owner alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dprlhf_ray.actors import token
from dprlhf_ray.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of one's own under the widest umask. Ray itself is not asked: it would remember the token."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0)
    yield tmp_path
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_once_and_only_its_owner_reads_it(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    token.prepare(None)
    path = home / ".ray" / "auth_token"
    made = path.read_text()
    assert len(made) == 64 and (_mode(path), _mode(path.parent)) == (0o600, 0o700)
    token.prepare(None)
    token.prepare("10.0.0.1:6379")
    assert path.read_text() == made and os.listdir(path.parent) == ["auth_token"]
    assert "".join(capfd.readouterr()) == ""


def test_a_token_that_others_can_read_is_closed_and_one_that_they_can_write_is_refused(home: Path) -> None:
    """False: the file that Ray makes, with mode 0644, stays as it is."""
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o755)
    path.write_text("t")
    path.chmod(0o644)
    token.prepare(None)
    assert _mode(path) == 0o600
    path.chmod(0o620)
    with pytest.raises(ConfigError, match=r"^Ray's token: .*mode 0620 lets other users write it: chmod go-w /"):
        token.prepare(None)
    path.chmod(0o600)
    path.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"\.ray: mode 0777 lets other users write it"):
        token.prepare(None)


def test_a_cluster_s_token_is_not_made_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^Ray's token: no file .*: copy the cluster's token there, with mode 600$"):
        token.prepare("10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "nowhere"))
    with pytest.raises(ConfigError, match=r"^RAY_AUTH_TOKEN_PATH: no file "):
        token.prepare(None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from a Secret")
    token.prepare("10.0.0.1:6379")


@pytest.mark.parametrize(
    ("address", "who"), [(None, "whoever has an account on this machine"), ("h:6379", "whoever reaches h:6379")]
)
def test_without_tokens_one_line_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], address: str | None, who: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token.prepare(address)
    assert capfd.readouterr().err == f"dprlhf: RAY_AUTH_MODE is disabled: {who} can run code in this Ray: unset it\n"
    assert not (home / ".ray").exists()


def test_where_no_token_can_be_kept_a_private_ray_gets_one_that_ends_with_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False: a home that cannot be written is a traceback, or a Ray without a token."""
    (home / "file").touch()
    monkeypatch.setenv("HOME", str(home / "file"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is put back
    token.prepare(None)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
