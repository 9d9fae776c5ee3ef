"""Events: kept in memory within bounds, and handed to every listener."""

from __future__ import annotations

from volumed.core import events
from volumed.core.events import Events


def test_recent_events_are_the_latest_in_order() -> None:
    stream = Events()
    for number in range(events.KEPT + 5):
        stream.publish("test.happened", "data", f"number {number}", number=number, nothing=None)
    recent = stream.recent(3)
    assert [event.fields for event in recent] == [{"number": str(events.KEPT + n)} for n in (2, 3, 4)]
    assert len(stream.recent()) == events.KEPT
    assert stream.recent(0) == []


def test_a_listener_gets_what_is_published_while_it_listens() -> None:
    stream = Events()
    stream.publish("test.before", "data", "not heard")
    with stream.subscribe() as listener:
        stream.publish("test.during", "data", "heard")
    stream.publish("test.after", "data", "not heard")
    heard = listener.get_nowait()
    assert heard is not None
    assert heard.kind == "test.during"
    assert listener.empty()
