"""What libzmq holds is told from byte counts alone, and whoever has it hold too much must go."""

from __future__ import annotations

import random

import pytest

from broker.accounts import (
    CROWD,
    HEARTBEAT_RATE,
    KNOCKING,
    MAX_KNOCKING,
    NUM_STRIKES,
    REPLACED,
    STALLED_SECONDS,
    STANDING_BYTES,
    STRUCK,
    TOO_MANY,
    TOO_MUCH,
    UNFINISHED,
    UNFINISHED_SECONDS,
    UNREAD,
    UNREAD_SECONDS,
    Account,
    Counts,
    verdicts,
)

BUDGET = 1 << 20
PING_BYTES = 41.0


def opened(read: int = 600, budget: int = BUDGET) -> Account:
    """A connection just after its handshake, of `read` bytes."""
    account = Account(budget, 0.0)
    account.observe(Counts(read, 0, 0, 0), 0.0)
    return account


def judged(*accounts: Account, room: int = 1 << 40, max_connections: int = 1 << 20) -> list[str]:
    return [reason for _, reason in verdicts(accounts, room, max_connections)]


def test_what_was_read_and_not_handed_over_is_held_and_beyond_the_budget_the_connection_goes() -> None:
    account = opened()
    account.observe(Counts(600 + BUDGET, 0, 0, 0), 0.001)
    assert account.held_in == pytest.approx(BUDGET, abs=1)
    assert judged(account) == []
    account.observe(Counts(600 + BUDGET + 10, 0, 0, 0), 0.002)
    assert judged(account) == [TOO_MUCH]


def test_what_is_handed_over_in_time_is_not_held_however_much_it_is() -> None:
    account = opened()
    for turn in range(1, 2000):
        account.observe(Counts(600 + turn * BUDGET // 2, (turn - 1) * BUDGET // 2, 0, 0), turn * 0.01)
        assert judged(account) == []


def test_heartbeats_of_a_month_are_not_taken_for_a_message() -> None:
    account = opened(budget=10_000)
    for hour in range(1, 24 * 30):
        account.observe(Counts(600 + int(hour * 3600 * PING_BYTES), 0, 0, 0), hour * 3600.0)
        assert account.held_in < 100
    assert judged(account) == []


def test_a_long_silence_earns_nothing_for_later() -> None:
    """Heartbeats are forgiven at their rate; what did not come cannot be had at once afterwards."""
    account = opened()
    for hour in range(1, 24 * 30):
        account.observe(Counts(600, 0, 0, 0), hour * 3600.0)
    account.observe(Counts(600 + BUDGET + 100, 0, 0, 0), 24 * 30 * 3600.0 - 3599.0)
    assert judged(account) == [TOO_MUCH]


def test_whatever_a_peer_does_it_is_never_held_for_less_than_it_holds_but_for_the_heartbeats_rate() -> None:
    """Random traffic against a model that knows what is held: messages that grow, messages that are handed over, heartbeats."""
    for seed in range(200):
        source = random.Random(seed)
        account, now = opened(), 0.0
        read, delivered, held = 600, 0, 0
        for _ in range(200):
            passed = source.choice((0.01, 0.25, 5.0))
            now += passed
            pings = int(passed * source.uniform(0, PING_BYTES))
            come = source.choice((0, 0, 100, 100_000))
            taken = source.choice((0, held, held // 2))
            read, delivered, held = read + pings + come, delivered + taken, held + come - taken
            account.observe(Counts(read, delivered, 0, 0), now)
            assert account.held_in >= held - HEARTBEAT_RATE * now - 1
            assert account.held_in <= held + PING_BYTES * now + 1


def test_bytes_that_an_earlier_connection_of_the_same_number_left_behind_do_no_harm() -> None:
    account = opened()
    account.observe(Counts(600, 500_000, 0, 0), 0.01)
    account.observe(Counts(600 + 2 * BUDGET, 500_000, 0, 0), 0.02)
    assert judged(account) == [TOO_MUCH]


def test_a_message_that_stands_still_is_unfinished_and_a_slow_one_is_not() -> None:
    slow, still = opened(), opened()
    still.observe(Counts(600 + 2 * STANDING_BYTES, 0, 0, 0), 0.0)
    for second in range(1, 100):
        slow.observe(Counts(600 + second * 5000, 0, 0, 0), float(second))
        still.observe(Counts(600 + 2 * STANDING_BYTES, 0, 0, 0), float(second))
        assert judged(slow) == []
        assert judged(still) == ([UNFINISHED] if second > UNFINISHED_SECONDS else [])


def test_a_peer_that_does_not_take_its_answers_goes_and_one_that_takes_them_slowly_stays() -> None:
    deaf, slow = opened(), opened()
    for second in range(1, 100):
        deaf.observe(Counts(600 + second * 100, second * 100, 8 << 20, 100_000), float(second))
        slow.observe(Counts(600, 0, 8 << 20, second * 1000), float(second))
        assert judged(slow) == []
        assert judged(deaf) == ([UNREAD] if second > 1 + UNREAD_SECONDS else [])
    assert deaf.held_out == (8 << 20) - 100_000


def test_a_connection_that_libzmq_has_stopped_reading_from_goes_and_one_that_it_reads_late_stays() -> None:
    stalled, late, quiet = opened(), opened(), opened()
    for look in range(1, 50):
        now = look / 4
        stalled.observe(Counts(600, 0, 0, 0, 100), now)
        late.observe(Counts(600 + look // 4 * 100, 0, 0, 0, 100), now)
        quiet.observe(Counts(600, 0, 0, 0), now)
        assert judged(late, quiet) == []
        assert judged(stalled) == ([REPLACED] if now > 0.25 + STALLED_SECONDS else [])


def test_a_process_that_stood_still_does_not_take_that_for_a_connection_that_nobody_reads_from() -> None:
    account = opened()
    account.observe(Counts(600, 0, 0, 0, 100), 0.25)
    account.observe(Counts(600, 0, 0, 0, 100), 60.0)
    assert judged(account) == []
    account.observe(Counts(700, 100, 0, 0), 60.25)
    account.observe(Counts(700, 100, 0, 0, 50), 120.0)
    assert judged(account) == []


def test_three_malformed_messages_are_too_many() -> None:
    account = opened()
    account.num_strikes = NUM_STRIKES - 1
    assert judged(account) == []
    account.num_strikes += 1
    assert judged(account) == [STRUCK]


def test_beyond_the_room_for_all_those_who_hold_most_go_until_the_rest_fits() -> None:
    accounts = [opened() for _ in range(10)]
    for size, account in enumerate(accounts):
        account.observe(Counts(600 + size * 100_000, 0, 0, 0), 0.001)
    found = verdicts(accounts, 1_500_000, 100)
    assert [round(account.held_in / 100_000) for account, _ in found] == [9, 8, 7, 6]
    assert {reason for _, reason in found} == {CROWD}
    kept = sum(account.held_in for account in accounts if account not in [gone for gone, _ in found])
    assert kept <= 1_500_000


def test_without_a_handshake_only_the_newest_stay_and_those_who_have_one_are_never_meant() -> None:
    accounts = [opened() for _ in range(50)]
    for number in range(MAX_KNOCKING + 3):
        account = Account(BUDGET, float(number))
        account.observe(Counts(11, 0, 0, 0), 1000.0)
        accounts.insert(0, account)
    found = verdicts(accounts, 1 << 40, 1 << 20)
    assert sorted(account.opened_at for account, _ in found) == [0.0, 1.0, 2.0]
    assert {reason for _, reason in found} == {KNOCKING}


def test_of_too_many_connections_those_go_that_were_silent_for_longest() -> None:
    accounts = [opened() for _ in range(5)]
    for number, account in enumerate(accounts):
        account.observe(Counts(700, 100, 0, 0), float(number))
    assert verdicts(accounts, 1 << 40, 3) == [(accounts[0], TOO_MANY), (accounts[1], TOO_MANY)]


def test_nobody_is_cut_twice() -> None:
    account = opened()
    account.observe(Counts(3 * BUDGET, 0, 0, 0), 0.001)
    account.cut_for = TOO_MUCH
    assert judged(account) == []
