"""Keys of encrypted volumes: where they are told, in which order they are tried, and that they go nowhere else. The
kernel's part: tests/vm/guest/test_encryption.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.unit.conftest import Lab
from volumed.config import BackendSettings, KeySettings, parse
from volumed.core.encryption import Encryption, overhead
from volumed.driver import Completed
from volumed.errors import (
    BackendUnavailable,
    ConfigError,
    IntegrityError,
    InvalidRequest,
    NotSupported,
    PermissionDenied,
)
from volumed.host import luks
from volumed.model import Volume, VolumeId, VolumeMode, VolumeState, now
from volumed.testing.fake_host import FakeHost
from volumed.units import MIB

DEVICE = Path("/dev/somewhere")


OLD, NEW = "the-old-key-0123456789-0123456789", "the-new-key-0123456789-0123456789"
WRITTEN = {"old": OLD, "new": NEW}


def told_key(volume_id: str) -> str:
    return f"the-key-of-{volume_id}-0123456789-0123456789"


class LuksHost(FakeHost):
    """cryptsetup, as far as key slots go. `slots` by device."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.slots: dict[str, list[str]] = {}
        self.folder = folder
        self.words: list[str] = []

    def private_folder(self, name: str) -> Path:
        return self.folder

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        timeout: float = 60.0,
        stdin: str | None = None,
        env: Mapping[str, str] | None = None,
        secrets: Sequence[str] = (),
        check: bool = True,
    ) -> Completed:
        words = [str(word) for word in argv]
        self.words += words
        if words[0] != "cryptsetup":
            return Completed(0, f"{told_key(words[1])}\n", "")
        key, verb = stdin or "", words[1]
        device = next(word for word in words if word.startswith("/dev/"))
        if verb == "luksFormat":
            self.slots[device] = [key]
            return Completed(0, "", "")
        if device not in self.slots:
            return Completed(1, "", f"Device {device} is not a valid LUKS device.")
        if key not in self.slots[device]:
            return Completed(2, "", "No key available with this passphrase.")
        if verb == "luksAddKey":
            self.slots[device].append(Path(words[-1]).read_text())
        if verb == "luksRemoveKey":
            self.slots[device].remove(key)
            assert self.slots[device], "nothing opens it any more"
        return Completed(0, "", "")


@pytest.fixture
def host(tmp_path: Path) -> LuksHost:
    (tmp_path / "private").mkdir()
    return LuksHost(tmp_path / "private")


def key_file(folder: Path, name: str) -> str:
    (folder / name).write_text(f"{WRITTEN[name]}\n")
    return f"file:{folder / name}"


def made(host: LuksHost, folder: Path, **more: object) -> Encryption:
    settings = KeySettings(key=key_file(folder, "new"), old=(key_file(folder, "old"),), **more)  # type: ignore[arg-type]
    return Encryption({"main": settings, "told": KeySettings(command=("tell", "{id}"))}, host)


def volume(encryption: str = "main", volume_id: str = "v1") -> Volume:
    return Volume(
        id=VolumeId(volume_id),
        name="data",
        backend="one",
        state=VolumeState.READY,
        created=now(),
        encryption=encryption,
        mode=VolumeMode.BLOCK,
    )


def test_a_volume_that_is_not_encrypted_passes_through(host: LuksHost, tmp_path: Path) -> None:
    plain = volume("")
    encryption = made(host, tmp_path)
    assert encryption.opened(plain, DEVICE) == encryption.node(plain, DEVICE) == DEVICE
    encryption.format(plain, DEVICE)
    encryption.rekey(plain, DEVICE)
    encryption.close(plain)
    assert (host.words, overhead(plain)) == ([], 0)


def test_the_newest_key_is_given_and_each_is_tried(host: LuksHost, tmp_path: Path) -> None:
    encryption = made(host, tmp_path)
    encryption.format(volume(), DEVICE)
    assert host.slots == {str(DEVICE): [NEW]}
    assert encryption.opened(volume(), DEVICE) == Path("/dev/mapper/volumed-v1-crypt")
    host.slots[str(DEVICE)] = [OLD]
    encryption.opened(volume(), DEVICE)
    assert "--allow-discards" in host.words
    host.slots[str(DEVICE)] = ["somebodys"]
    with pytest.raises(
        PermissionDenied, match=r"volume data: no key of the name 'main' opens it.*`old` of \[keys.main\]"
    ):
        encryption.opened(volume(), DEVICE)
    del host.slots[str(DEVICE)]
    with pytest.raises(IntegrityError, match="no LUKS header"):
        encryption.opened(volume(), DEVICE)


def test_rotation_leaves_the_newest_alone(host: LuksHost, tmp_path: Path) -> None:
    encryption = made(host, tmp_path)
    for slots in ([OLD], [OLD, NEW], [NEW], [NEW, "recovery"]):
        host.slots[str(DEVICE)] = list(slots)
        encryption.rekey(volume(), DEVICE)
        expected = [NEW, "recovery"] if "recovery" in slots else [NEW]  # an operator's own slot stays
        assert host.slots[str(DEVICE)] == expected
    assert list(host.folder.iterdir()) == []


def test_a_key_that_fits_nothing_changes_nothing(host: LuksHost, tmp_path: Path) -> None:
    host.slots[str(DEVICE)] = ["somebodys"]
    with pytest.raises(PermissionDenied):
        made(host, tmp_path).rekey(volume(), DEVICE)
    assert host.slots[str(DEVICE)] == ["somebodys"]


def test_a_key_that_could_be_guessed_is_given_to_no_volume(host: LuksHost, tmp_path: Path) -> None:
    encryption = made(host, tmp_path)
    (tmp_path / "new").write_text("a password of 31 characters....")
    for give in (encryption.format, encryption.rekey):
        with pytest.raises(ConfigError, match=r"volume data: the key 'main' is shorter than 32.*openssl rand -hex 32"):
            give(volume(), DEVICE)
    assert host.slots == {}


def test_a_copy_is_given_its_own_key(host: LuksHost, tmp_path: Path) -> None:
    encryption = made(host, tmp_path)
    encryption.format(volume("told", "v1"), DEVICE)
    encryption.rekey(volume("told", "v2"), DEVICE, origin=volume("told", "v1"))
    assert host.slots[str(DEVICE)] == [told_key("v2")]
    encryption.rekey(volume("main", "v2"), DEVICE, origin=volume("told", "v2"))
    assert host.slots[str(DEVICE)] == [NEW]


def test_no_key_is_ever_an_argument(host: LuksHost, tmp_path: Path) -> None:
    encryption = made(host, tmp_path)
    encryption.format(volume(), DEVICE)
    host.slots[str(DEVICE)] = [OLD]
    encryption.opened(volume(), DEVICE)
    encryption.rekey(volume(), DEVICE)
    assert OLD not in " ".join(host.words)
    assert NEW not in " ".join(host.words)


def test_a_key_that_is_nowhere(host: LuksHost, tmp_path: Path) -> None:
    encryption = made(host, tmp_path)
    (tmp_path / "new").unlink()
    with pytest.raises(ConfigError, match=f"volume data: the secret in {tmp_path}/new cannot be read"):
        encryption.format(volume(), DEVICE)
    with pytest.raises(ConfigError, match=r"the key 'gone', which the settings do not have.*\[keys.gone\]"):
        encryption.opened(volume("gone"), DEVICE)


def test_a_rotation_that_was_cut_short_is_finished(
    make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab()
    made_volume = lab.create()
    with lab.core.repository.transaction() as transaction:
        transaction.put(_encrypted(lab, made_volume))
    calls: list[str] = []

    def rekey(found: Volume, backend: object) -> None:
        calls.append(found.name)
        if len(calls) < 3:
            raise BackendUnavailable("the cable is out")

    monkeypatch.setattr(lab.core.journal._provision, "rekey", rekey)
    with pytest.raises(BackendUnavailable):
        lab.core.volumes.rotate("data")
    (operation,) = lab.core.repository.operations()
    assert (operation.kind, operation.error) == ("rotate", "the cable is out")
    lab.core.journal.recover()
    assert (calls, lab.core.repository.operations()) == (["data"] * 3, [])
    lab.create("plain")
    with pytest.raises(InvalidRequest, match="volume plain: is not encrypted"):
        lab.core.volumes.rotate("plain")


def _encrypted(lab: Lab, found: Volume) -> Volume:
    current = lab.core.repository.volume(found.id)
    assert current is not None
    return msgspec.structs.replace(current, encryption="main")


# What is asked for
def test_folders_cannot_be_encrypted(make_lab: Callable[..., Lab], tmp_path: Path) -> None:
    keys = {"main": KeySettings(key=key_file(tmp_path, "new"))}
    lab = make_lab(keys=keys)
    with pytest.raises(NotSupported, match="folders, which cannot be encrypted"):
        lab.create(encryption="main")
    with pytest.raises(InvalidRequest, match="there is no key 'mian'. did you mean 'main'"):
        lab.create(encryption="mian")
    with pytest.raises(ConfigError, match="folders, which cannot be encrypted"):
        make_lab(keys=keys, backends={"one": BackendSettings(driver="memory", encrypt="main")})
    lab.create("plain")
    with pytest.raises(InvalidRequest, match="is not encrypted, and neither can its copy be"):
        lab.create("copy", source="plain", encryption="main")


KEYS = '[keys.main]\nkey = "file:/k"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[keys.a]\nkye = "file:/k"', "x.toml:2: .*there is no key 'kye'. did you mean 'key'"),
        ("[keys.a]\nold = []", "x.toml:1: .*give `key` or `command`"),
        ('[keys.a]\nkey = "file:/k"\ncommand = ["tell"]', "x.toml:1: .*give `key` or `command`"),
        ('[keys.a]\nkey = "hunter2"', "x.toml:2: .*say where the secret lies"),
        ("[keys]\na = 3", "x.toml:2: .*must be a table"),
        (KEYS + '[backends.b]\ndriver = "image"\nencrypt = "mian"', "x.toml:5: .*there is no key 'mian'. did you"),
        (KEYS + '[backends.b]\ndriver = "image"\nencrypt = 3', "x.toml:5: .*name of a key"),
        (
            KEYS + '[backends.b]\ndriver = "image"\n[classes.c]\nbackends = ["b"]\nencrypt = "x"',
            "x.toml:7: .*there is no key 'x'",
        ),
    ],
)
def test_wrong_settings_are_told_and_never_the_key(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        parse(text, source="x.toml")
    assert "hunter2" not in str(error.value)


def test_the_header_is_not_the_volumes_to_use() -> None:
    assert overhead(volume()) == luks.OVERHEAD == 16 * MIB
