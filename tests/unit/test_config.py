from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volumed.config import default_settings, load, parse
from volumed.errors import ConfigError

ROOT = Path(__file__).parents[2]
GOOD = """\
state-dir = "/srv/volumed"
history = "7d"
default-backends = ["fast"]

[docker]
group = "docker"

[backends.fast]
driver = "image"
path = "/srv/fast"
workers = 4
disabled-capabilities = ["clone"]
"""


def test_a_good_one() -> None:
    settings = parse(GOOD, source="volumed.toml")
    assert settings.state_dir == Path("/srv/volumed")
    assert settings.history == 7 * 86400
    assert settings.docker.group == "docker"
    assert settings.backends["fast"].options == {"path": "/srv/fast"}
    assert settings.backends["fast"].workers == 4
    assert settings.node
    assert settings.locate("backends", "fast", "path") == "volumed.toml:10"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('stat-dir = "/x"', "volumed.toml:1: there is no key 'stat-dir'. did you mean 'state-dir'"),
        ('\n[docker]\nsokcet = "/x"', "volumed.toml:3: .*sokcet.*did you mean 'socket'"),
        ('[log]\nlevel = "loud"', "volumed.toml:2: log.level: 'loud' is not possible. choose debug"),
        ("[backends.a]\npath = 1", "volumed.toml:1: .*backend a names no driver"),
        ("[backends.A_B]\ndriver = 'x'", "volumed.toml:1: .*'A_B' is no backend name"),
        ("[backends.a]\ndriver = 'x'\nworkers = 0", "volumed.toml:3: .*workers"),
        ("backends = 3", "volumed.toml:1: .*must be a table"),
        ('default-backends = ["fats"]\n[backends.fast]\ndriver = "x"', "volumed.toml:1: .*did you mean 'fast'"),
        ('history = "soon"', "volumed.toml:1: history: 'soon' is not a duration"),
        ("history = 0", "volumed.toml:1: history: must be more than zero"),
        ('state-dir = "here"', "volumed.toml:1: .*must be an absolute path"),
        ("state-dir = 5", "volumed.toml:1: "),
        ("docker = 5", "volumed.toml:1: .*must be a table"),
        ("= 1", "volumed.toml: is no TOML"),
        ("a = 1\na = 2", "volumed.toml: is no TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(text, source="volumed.toml")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")


def test_the_installed_settings_are_good() -> None:
    settings = load(ROOT / "systemd" / "volumed.toml")
    assert settings.backends == default_settings().backends
    assert settings.default_backends == default_settings().default_backends


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):  # and nothing else
        parse(text, source="volumed.toml")
