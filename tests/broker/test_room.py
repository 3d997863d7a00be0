"""Room on the broker's disk: the marks, and what is said about them."""

from __future__ import annotations

import logging

import pytest

from broker.put_off import SAY_SECONDS, PutOff
from broker.room import COPIES, MIB, Reserves, Room, largest_group, reserves
from protocol.config import Config, parse_config
from protocol.groups import MAX_GROUP_BYTES
from tests.broker.conftest import full_group

MARKS = Reserves(credit=80 * MIB, commit=16 * MIB)


def config(group_size: int = 4, max_tokens: int = 100, groups_per_batch: int = 8, max_lag: int = 3, window: int = 2) -> Config:
    return parse_config(
        {
            "policy": {"max_lag": max_lag, "window": window},
            "rollout": {"group_size": group_size, "max_tokens": max_tokens, "groups_per_batch": groups_per_batch},
        }
    )


@pytest.mark.parametrize(("group_size", "max_tokens"), [(2, 1), (8, 64), (16, 8192), (4096, 1)])
def test_no_group_within_its_budget_has_more_bytes_than_are_reckoned_with(group_size: int, max_tokens: int) -> None:
    longest = len(full_group(group_size, max_tokens, prompt_tokens=4000))
    assert longest <= largest_group(config(group_size, max_tokens)) < 2 * longest + (1 << 17)


def test_a_group_is_reckoned_with_no_more_bytes_than_a_message_may_carry() -> None:
    assert largest_group(config(4096, 1 << 20)) == MAX_GROUP_BYTES


def test_once_credit_has_stopped_a_group_for_every_ticket_and_a_snapshot_fit_above_the_mark_of_commits() -> None:
    settings, policy_bytes = config(), 10 * MIB
    marks = reserves(settings, policy_bytes)
    to_come = settings.pacing.run_ahead * largest_group(settings) * COPIES + 2 * policy_bytes
    assert marks.credit - marks.commit >= to_come
    assert marks.commit >= COPIES * largest_group(settings)


def test_credit_stops_before_commits_and_nothing_stops_above_both_marks() -> None:
    seen = []
    room = Room(1 << 40, MARKS)
    for free in (80 * MIB, 80 * MIB - 1, 16 * MIB, 16 * MIB - 1):
        room = room.measured(free)
        seen.append((room.allows_credit, room.allows_commits, bool(room.shortage)))
    assert seen == [(True, True, False), (False, True, True), (False, True, True), (False, False, True)]


def test_what_has_stopped_goes_on_only_somewhat_above_its_mark() -> None:
    room = Room(0, MARKS).measured(0)
    assert not room.measured(17 * MIB).allows_commits
    room = room.measured(18 * MIB)
    assert room.allows_commits and not room.allows_credit
    assert not room.measured(89 * MIB).allows_credit
    assert room.measured(90 * MIB).shortage == ""


def test_a_shortage_says_how_much_there_is_how_much_is_needed_and_what_to_do() -> None:
    room = Room(1 << 40, MARKS).measured(70 * MIB + 5)
    assert room.shortage == (
        "no room on the broker's disk: 70 MiB free, 90 MiB needed to issue tickets; "
        "free space on the disk of the run's directory, it goes on by itself"
    )
    assert "3 MiB free, 18 MiB needed to journal anything" in room.measured(3 * MIB).shortage
    assert "0 MiB free" in room.measured(-5).shortage


def test_who_is_put_off_says_so_at_once_then_now_and_then_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    put_off = PutOff(logging.getLogger("test"))
    for now in (0.0, 1.0, SAY_SECONDS - 0.1, SAY_SECONDS):
        put_off.told("publish", "no room", now)
    assert put_off.reason == "no room"
    put_off.over()
    put_off.over()
    put_off.told("publish", "no room again", SAY_SECONDS + 1)
    assert caplog.messages == [
        "publish is put off: no room",
        "publish is put off: no room",
        "it goes on",
        "publish is put off: no room again",
    ]
