"""The pieces of a download: every byte once, never more than the credit under way, whatever happens in between."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.pieces import CREDIT, PIECE_SECONDS, SMALLEST_BYTES, Piece, Pieces
from protocol.messages import CHUNK_BYTES

FAST = 1e12


def test_a_file_without_bytes_is_asked_for_once_and_then_complete() -> None:
    pieces = Pieces(0)
    assert not pieces.is_complete
    assert pieces.ask() == [Piece(0, 0)]
    assert pieces.ask() == []
    assert pieces.receive(0, 0)
    assert pieces.is_complete


def test_a_small_file_is_one_piece() -> None:
    pieces = Pieces(1000)
    assert pieces.ask() == [Piece(0, 1000)]
    assert pieces.receive(0, 1000)
    assert pieces.is_complete


def test_pieces_are_asked_for_in_order_and_up_to_the_credit() -> None:
    pieces = Pieces(1 << 30)
    asked = pieces.ask()
    assert len(asked) == CREDIT == pieces.num_asked
    assert [piece.offset for piece in asked] == [number * asked[0].length for number in range(CREDIT)]
    assert pieces.ask() == []
    assert pieces.receive(*asked[3])
    assert len(pieces.ask()) == 1


def test_pieces_are_small_at_first_and_grow_with_what_the_link_carries_up_to_the_chunk() -> None:
    pieces = Pieces(1 << 30)
    lengths = []
    for _ in range(8):
        asked = pieces.ask()
        lengths.append(asked[-1].length)
        for piece in asked:
            assert pieces.receive(*piece)
        pieces.adapt(FAST)
    assert lengths[0] <= 2 * SMALLEST_BYTES
    assert all(later <= 2 * before for before, later in itertools.pairwise(lengths))
    assert lengths[-1] == CHUNK_BYTES


def test_pieces_shrink_with_the_link_and_never_below_the_smallest() -> None:
    pieces = Pieces(1 << 30)
    for _ in range(4):
        pieces.adapt(FAST)
    pieces.adapt(500_000 / PIECE_SECONDS)
    assert pieces.ask()[0].length == 500_000
    pieces.lose()
    pieces.adapt(1.0)
    assert pieces.ask()[0].length == SMALLEST_BYTES


@pytest.mark.parametrize("late", [(5, 10), (0, 10), (0, 1 << 20), (1 << 40, 1)])
def test_what_was_not_asked_for_like_this_is_not_taken(late: tuple[int, int]) -> None:
    pieces = Pieces(1 << 20)
    asked = pieces.ask()
    assert not pieces.receive(*late)
    assert pieces.num_asked == len(asked)


def test_a_piece_that_comes_twice_is_taken_once() -> None:
    pieces = Pieces(1 << 20)
    [first, *_] = pieces.ask()
    assert pieces.receive(*first)
    assert not pieces.receive(*first)


def test_after_a_cut_what_was_under_way_is_asked_for_again_first_and_what_came_is_not() -> None:
    pieces = Pieces(1 << 24)
    asked = pieces.ask()
    came = asked[2]
    assert pieces.receive(*came)
    pieces.lose()
    assert pieces.num_asked == 0
    again = pieces.ask()
    assert again[:2] == asked[:2]
    assert came not in again
    assert again[2:7] == asked[3:8]


STEPS = st.one_of(
    st.tuples(st.just("receive"), st.integers(0, 1 << 20)),
    st.tuples(st.just("stale"), st.integers(0, 1 << 20)),
    st.tuples(st.just("adapt"), st.floats(0, 1e9)),
    st.tuples(st.just("lose"), st.just(0)),
)


@given(size=st.integers(0, 5_000_000), steps=st.lists(STEPS, max_size=60))
def test_any_order_of_arrivals_cuts_and_paces_ends_complete_with_every_byte_taken_exactly_once(
    size: int, steps: list[tuple[str, float]]
) -> None:
    pieces = Pieces(size)
    under_way: list[Piece] = []
    before_cuts: list[Piece] = []
    taken: list[Piece] = []

    def ask() -> None:
        under_way.extend(pieces.ask())
        assert len(under_way) == pieces.num_asked <= CREDIT

    def take(piece: Piece) -> None:
        under_way.remove(piece)
        assert pieces.receive(*piece)
        taken.append(piece)

    for kind, value in steps:
        ask()
        if kind == "receive" and under_way:
            take(under_way[int(value) % len(under_way)])
        elif kind == "stale" and before_cuts:
            stale = before_cuts[int(value) % len(before_cuts)]
            if stale in under_way:  # an answer to the question before the cut is as good as one to the same question after it
                take(stale)
            else:
                assert not pieces.receive(*stale)
        elif kind == "adapt":
            pieces.adapt(value)
        elif kind == "lose":
            pieces.lose()
            before_cuts += under_way
            under_way.clear()
        if size:
            assert pieces.is_complete == (sum(piece.length for piece in taken) == size)
    while not pieces.is_complete:
        ask()
        assert under_way, "nothing is under way and nothing is asked for: a download that never ends"
        take(under_way[-1])
    assert pieces.ask() == []
    covered = sorted(taken)
    assert [piece.offset for piece in covered] == [0, *(piece.offset + piece.length for piece in covered[:-1])]
    assert covered[-1].offset + covered[-1].length == size
