"""A process that is there and not heard is told, then ended; time in which nobody could listen does not count."""

from __future__ import annotations

from deploy.presence import ACTOR, LEARNER, Presence


def hear(presence: Presence, started_at: float, last_seen: float | None, now: float) -> bool:
    presence.observe("actor-0", started_at, last_seen, now)
    return presence.is_lost("actor-0", ACTOR, now)


def test_one_that_has_joined_is_lost_after_its_patience_and_told_once_before() -> None:
    presence = Presence()
    assert not hear(presence, 0.0, 0.5, 20.0)
    told = []
    for now in range(21, 51):
        assert not hear(presence, 0.0, None, float(now)) or now > 19.5 + ACTOR.joined
        if presence.is_news("actor-0", float(now)):
            told.append(now)
    assert told == [31]
    assert hear(presence, 0.0, None, 51.0)


def test_one_that_still_starts_has_longer() -> None:
    presence = Presence()
    assert not hear(presence, 0.0, None, 1.0)
    assert not hear(presence, 0.0, None, ACTOR.starting)
    assert not presence.is_news("actor-0", ACTOR.starting), "starting is no silence"
    assert hear(presence, 0.0, None, ACTOR.starting + 2.0)


def test_what_a_process_before_it_said_counts_for_nothing() -> None:
    presence = Presence()
    hear(presence, 0.0, 0.0, 10.0)
    assert not hear(presence, 100.0, 95.0, 101.0), "heard 95 s ago, when the process was not there yet"
    assert not hear(presence, 100.0, None, 101.0 + ACTOR.joined + 5)


def test_a_broker_that_was_away_is_nobody_s_silence() -> None:
    presence = Presence()
    hear(presence, 0.0, 0.0, 10.0)
    presence.nobody_listened(500.0)
    assert not hear(presence, 0.0, None, 501.0)
    assert hear(presence, 0.0, None, 501.0 + ACTOR.joined)


def test_a_voice_that_comes_back_starts_anew() -> None:
    presence = Presence()
    hear(presence, 0.0, 0.0, 10.0)
    hear(presence, 0.0, None, 35.0)
    assert presence.is_news("actor-0", 35.0)
    assert not hear(presence, 0.0, 0.0, 36.0)
    assert not presence.is_news("actor-0", 40.0)
    assert presence.is_news("actor-0", 47.0)


def test_one_that_the_broker_still_shows_is_told_once_too() -> None:
    presence = Presence()
    told = []
    for now in range(10, 40):
        hear(presence, 0.0, now - 10.0, float(now))
        told += [now] if presence.is_news("actor-0", float(now)) else []
    assert told == [21]


def test_a_learner_has_more_patience_than_an_actor() -> None:
    assert LEARNER.joined > ACTOR.joined
    assert LEARNER.starting > ACTOR.starting
