"""Classes: a backend chosen by what it can do, where it is reached and how much room it has."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from tests.conftest import wait_until
from tests.unit.conftest import Lab
from volumed.config import BackendSettings, ClassSettings, parse
from volumed.core.placement import Needs, choose_backend
from volumed.driver import Capability, Capacity, Probe
from volumed.errors import (
    AlreadyExists,
    BackendUnavailable,
    CapacityExhausted,
    ConfigError,
    InvalidRequest,
    NotSupported,
)
from volumed.frontends.volume_options import read_create
from volumed.model import VolumeMode
from volumed.testing.memory import MemoryDriver
from volumed.units import GIB

Make = Callable[..., Lab]
ROOM = {"one": 5 * GIB, "two": 50 * GIB, "three": 500 * GIB}


class _Roomy(MemoryDriver):
    capabilities = MemoryDriver.capabilities | {Capability.SIZE}

    def capacity(self) -> Capacity:
        self.before("capacity")
        return Capacity(total=1000 * GIB, available=ROOM[self.backend])

    def probe(self) -> Probe:
        return super().probe()._replace(topology={"zone": "a" if self.backend != "three" else "b"})


def fast(**settings: object) -> dict[str, ClassSettings]:
    return {"fast": ClassSettings(**{"backends": ("one", "two"), **settings})}  # type: ignore[arg-type]


@pytest.fixture
def lab(make_lab: Make) -> Lab:
    backends = {name: BackendSettings(driver="memory") for name in ROOM}
    classes = fast(size="2g", options={"color": "red"}, mount_options="noatime") | {
        "near": ClassSettings(backends=("three", "one"), topology={"zone": "a"}),
        "any": ClassSettings(backends=("one", "two", "three")),
    }
    return make_lab(driver=_Roomy, backends=backends, classes=classes)


def test_the_roomiest_of_those_that_can(lab: Lab) -> None:
    assert lab.create("a", class_name="any").backend == "three"
    assert lab.create("b", class_name="near").backend == "one"
    assert lab.create("c", class_name="fast").backend == "two"
    lab.core.backends.get("two").unavailable("the cable is out")
    assert lab.create("d", class_name="fast").backend == "one"
    lab.core.backends.get("one").unavailable("the cable is out")
    with pytest.raises(BackendUnavailable, match="backend one: cannot be used now: the cable is out; backend two"):
        lab.create("e", class_name="fast")


def test_a_volume_is_as_its_class_says_unless_somebody_says_otherwise(lab: Lab) -> None:
    usual = lab.create("usual", class_name="fast")
    assert (usual.size, usual.options, usual.mount_options) == (2 * GIB, {"color": "red"}, ("noatime",))
    assert usual.class_name == "fast"
    other = lab.create("other", class_name="fast", size=GIB, options={"color": "blue"}, mount_options=("nosuid",))
    assert (other.size, other.options, other.mount_options) == (GIB, {"color": "blue"}, ("nosuid",))
    assert lab.create("usual", class_name="fast").id == usual.id
    with pytest.raises(AlreadyExists, match="another class"):
        lab.create("usual", class_name="any")


def test_a_copy_is_where_its_original_is_and_of_its_class(lab: Lab) -> None:
    original = lab.create("usual", class_name="fast")
    copy = lab.create("copy", source="usual")
    assert (copy.backend, copy.class_name, copy.size) == (original.backend, "fast", 2 * GIB)
    with pytest.raises(InvalidRequest, match="class near has no backend two"):
        lab.create("elsewhere", source="usual", class_name="near")


def test_a_backend_of_the_class_can_be_named(lab: Lab) -> None:
    assert lab.create("a", class_name="fast", backend="one").backend == "one"
    with pytest.raises(InvalidRequest, match="class fast has no backend three.*its backends are: one, two"):
        lab.create("b", class_name="fast", backend="three")


def test_an_unknown_class_is_refused_with_the_nearest(lab: Lab) -> None:
    with pytest.raises(InvalidRequest, match="there is no class 'fats'. did you mean 'fast'"):
        lab.create("a", class_name="fats")
    assert lab.core.repository.volumes() == []


def test_what_a_class_requires_its_backends_must_be_able_to(make_lab: Make) -> None:
    backends = {
        "one": BackendSettings(driver="memory"),
        "two": BackendSettings(driver="memory", disabled_capabilities=("snapshot",)),
    }
    lab = make_lab(driver=_Roomy, backends=backends, classes=fast(requires=("snapshot",)))
    assert lab.create("a", class_name="fast").backend == "one"
    assert lab.create("b").backend == "one"


def test_a_place_that_no_backend_reaches(lab: Lab) -> None:
    with pytest.raises(CapacityExhausted, match="cannot be reached from where"):
        lab.create("a", class_name="fast", places=({"zone": "b"},))
    assert lab.create("b", class_name="any", places=({"zone": "b"},)).backend == "three"
    assert lab.create("c", class_name="any", places=({"zone": "a"}, {"zone": "x"})).backend == "two"


def test_a_volume_too_large_for_all_goes_where_most_is(lab: Lab) -> None:
    """Thin storage may bear it; what cannot, refuses by itself."""
    assert lab.create("a", class_name="fast", size=100 * GIB).backend == "two"


def test_one_that_tells_no_room_is_better_than_one_without(lab: Lab) -> None:
    lab.core.backends.get("two").measured = None
    needs = Needs(mode=VolumeMode.FILESYSTEM, size=10 * GIB)
    chosen = choose_backend(lab.core.backends, needs, here={}, among=("one", "two"))
    assert chosen.name == "two"
    assert choose_backend(lab.core.backends, needs._replace(size=GIB), here={}, among=("one", "two")).name == "one"


def test_docker_says_it_as_an_option() -> None:
    assert read_create("data", {"class": "fast"}, driver_options=()).class_name == "fast"


def test_reasons_of_each_backend(lab: Lab) -> None:
    with pytest.raises(NotSupported, match="backend one: .*fs=xfs.*backend two: .*fs=xfs"):
        lab.create("a", class_name="fast", filesystem="xfs")


# Settings
CONFIG = '[backends.one]\ndriver = "memory"\n[classes.fast]\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('backends = ["on"]', r"x.toml:4: classes.fast.backends: there is no 'on'. did you mean 'one'"),
        ("backends = []", "x.toml:4: .*names no backend"),
        ('backend = ["one"]', "x.toml:4: .*there is no key 'backend'. did you mean 'backends'"),
        ('backends = ["one"]\nrequires = ["snapshots"]', "x.toml:5: .*did you mean 'snapshot'"),
        ('backends = ["one"]\nsize = "big"', "x.toml:5: classes.fast.size"),
        ('backends = ["one"]\nfs = "ext5"', "x.toml:5: .*there is no 'ext5'. did you mean 'ext4'"),
        ('backends = "one"', "x.toml:4: .*array"),
        ("", "x.toml:3: .*backends"),
    ],
)
def test_a_wrong_class_is_told_with_line_and_nearest(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(CONFIG + text, source="x.toml")


def test_an_option_that_no_driver_of_the_class_knows(make_lab: Make) -> None:
    with pytest.raises(ConfigError, match="no driver of class fast has an option 'colour'. did you mean 'color'"):
        make_lab(classes=fast(options={"colour": "red"}))


# Probing
def test_capacity_and_health_are_those_of_the_last_probe(lab: Lab) -> None:
    backend = lab.core.backends.get("one")
    assert backend.measured is not None
    assert backend.measured.available == 5 * GIB
    since = backend.health.since
    lab.driver("one").fail("probe", BackendUnavailable("the cable is out"))
    lab.core._prober.look(patience=5.0)
    assert (backend.health.ok, backend.health.error) == (False, "the cable is out")
    assert backend.health.since != since
    fell_ill = backend.health.since
    lab.core._prober.look(patience=5.0)
    assert backend.health.since == fell_ill
    assert b'volumed_backend_available_bytes{backend="one"} 5.36870912e+09' in lab.core.metrics.render()


def test_looks_that_hang_do_not_use_up_the_workers(make_lab: Make) -> None:
    lab = make_lab(driver=_Roomy, backends={"one": BackendSettings(driver="memory", workers=2)})
    release, looks = threading.Event(), 0

    def hang(method: str) -> None:
        nonlocal looks
        if method == "probe":
            looks += 1
            release.wait(30)

    lab.driver().before = hang
    for _ in range(5):
        lab.core._prober.look(patience=0.05)
    backend = lab.core.backends.get("one")
    try:
        assert looks == 1
        assert not backend.health.ok
        assert backend.call(lambda: "served") == "served"
    finally:
        release.set()
    wait_until(lambda: backend.health.ok)
