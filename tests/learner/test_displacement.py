"""Displacement: exact for small policies, within the stated error for large ones, on any number of ranks, and going on after a restart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from learner.displacement import MIN_BUCKETS, RECENT, Moved, Sketcher, Trace, num_buckets
from learner.ranks import OneRank, Ranks

SMALL = [(7, 5), (11,), (3, 4)]
LARGE = [(512, 1024), (1000,), (1024, 384), (77, 1024)]
Vector = NDArray[np.float64]


def make_parameters(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, generator=generator) for shape in shapes]


def size_of(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def apply(parameters: Sequence[torch.Tensor], update: Vector) -> None:
    """Add an update, given in one line, to the weights in fp32."""
    begin = 0
    for parameter in parameters:
        part = torch.from_numpy(update[begin : begin + parameter.numel()]).float()
        parameter.add_(part.view_as(parameter))
        begin += parameter.numel()


def flat(parameters: Sequence[torch.Tensor]) -> Vector:
    found: Vector = np.concatenate([parameter.numpy().ravel() for parameter in parameters]).astype(np.float64)
    return found


def updates(size: int, count: int, seed: int = 1, scale: float = 1e-3) -> list[Vector]:
    """Random updates that turn slowly, as those of an optimizer with momentum do."""
    rng = np.random.default_rng(seed)
    found, momentum = [], np.zeros(size)
    for _ in range(count):
        momentum = 0.7 * momentum + rng.standard_normal(size)
        found.append(scale * momentum)
    return found


def make_trace(
    parameters: list[torch.Tensor], buckets: int, ranks: Ranks | None = None, step: int = 0, lag: int = 3, sync: int = 1
) -> Trace:
    return Trace(Sketcher(parameters, buckets, ranks or OneRank()), step, lag, sync)


def cosine(one: Vector, other: Vector) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def errors_of_squares(buckets: int, shapes: Sequence[tuple[int, ...]], vectors: Sequence[Vector]) -> list[float]:
    """(|S x|^2 - |x|^2) / |x|^2 for each x."""
    parameters = [torch.zeros(shape) for shape in shapes]
    sketcher, found = Sketcher(parameters, buckets, OneRank()), []
    for vector in vectors:
        for parameter in parameters:
            parameter.zero_()
        apply(parameters, vector)
        exact = float((flat(parameters) ** 2).sum())
        found.append(float(sketcher.sketch().square().sum()) / exact - 1)
    return found


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values))


# --- small policies


def test_a_small_policy_is_measured_exactly() -> None:
    size, parameters = size_of(SMALL), make_parameters(SMALL)
    assert num_buckets(size, 40) == size
    trace = make_trace(parameters, num_buckets(size, 40))
    weights = [flat(parameters)]
    for step, update in enumerate(updates(size, 50)):
        apply(parameters, update)
        moved = trace.advance()
        weights.append(flat(parameters))
        assert moved.update_norm == pytest.approx(np.linalg.norm(weights[-1] - weights[-2]), rel=1e-5)
        assert moved.displacement == pytest.approx(np.linalg.norm(weights[-1] - weights[0]), rel=1e-6)
        if step == 0:
            assert moved.cosine is None
        else:
            assert moved.cosine == pytest.approx(cosine(weights[-1] - weights[-2], weights[-2] - weights[-3]), abs=1e-5)
        for lag, distance in trace.distances().items():
            assert distance == pytest.approx(np.linalg.norm(weights[-1] - weights[-1 - lag]), rel=1e-5)
        assert list(trace.distances()) == [lag for lag in (1, 2, 4, 8, 16, 32) if lag <= step + 1]


def test_updates_of_a_billionth_of_the_weights_are_seen() -> None:
    parameters = [torch.tensor([1.0, -3.0, 1e-30]), torch.zeros(2)]
    trace = make_trace(parameters, 5)
    parameters[1][0] = 3e-9
    parameters[0][2] = 4e-9
    assert trace.advance().update_norm == pytest.approx(5e-9, rel=1e-5)


def test_no_cosine_is_made_of_an_update_of_zero() -> None:
    parameters = make_parameters(SMALL)
    trace = make_trace(parameters, size_of(SMALL))
    (one, two, three) = updates(size_of(SMALL), 3)
    apply(parameters, one)
    trace.advance()
    moved = trace.advance()
    assert (moved.update_norm, moved.cosine) == (0.0, None)
    assert moved.displacement == pytest.approx(np.linalg.norm(one), rel=1e-4)
    apply(parameters, two)
    assert trace.advance().cosine is None
    apply(parameters, three)
    assert trace.advance().cosine is not None


def test_opposite_and_equal_updates_have_cosines_of_one() -> None:
    parameters = [torch.zeros(100, 100)]
    trace = make_trace(parameters, 1000)
    (update,) = updates(10_000, 1)
    found = []
    for factor in (1.0, 1.0, -1.0):
        apply(parameters, factor * update)
        found.append(trace.advance().cosine)
    assert found[1:] == [pytest.approx(1, abs=1e-5), pytest.approx(-1, abs=1e-5)]
    assert all(-1 <= value <= 1 for value in found[1:] if value is not None)


def test_norms_and_cosines_of_millions_of_buckets_keep_their_digits() -> None:
    size = 5_000_000
    parameters = [torch.zeros(size)]
    trace = make_trace(parameters, size)
    for sign in (1.0, 0.5):
        parameters[0] += sign * 1e-3
        parameters[0][: size // 2] += 2e-3
        moved = trace.advance()
    update, before = (np.repeat([sign * 1e-3 + 2e-3, sign * 1e-3], size // 2) for sign in (0.5, 1.0))
    assert moved.update_norm == pytest.approx(float(np.linalg.norm(update)), rel=1e-6)
    assert moved.displacement == pytest.approx(float(np.linalg.norm(update + before)), rel=1e-6)
    assert moved.cosine == pytest.approx(cosine(update, before), abs=1e-6)
    assert trace.distance(1) == pytest.approx(moved.update_norm, rel=1e-6)


# --- large policies


@pytest.mark.parametrize("scale", [1e-3, 3e-8])
def test_norms_and_cosines_of_a_large_policy_are_within_the_stated_error(scale: float) -> None:
    """Also where updates are a few last places of the weights."""
    size, parameters = size_of(LARGE), make_parameters(LARGE)
    assert num_buckets(size, 40) == MIN_BUCKETS < size
    trace = make_trace(parameters, num_buckets(size, 40))
    weights, norms, cosines, distances = [flat(parameters)], [], [], []
    for update in updates(size, 12, scale=scale):
        apply(parameters, update)
        moved = trace.advance()
        weights.append(flat(parameters))
        norms.append(moved.update_norm / float(np.linalg.norm(weights[-1] - weights[-2])) - 1)
        norms.append(moved.displacement / float(np.linalg.norm(weights[-1] - weights[0])) - 1)
        distances += [distance / float(np.linalg.norm(weights[-1] - weights[-1 - lag])) - 1 for lag, distance in trace.distances().items()]
        if moved.cosine is not None:
            cosines.append(moved.cosine - cosine(weights[-1] - weights[-2], weights[-2] - weights[-3]))
    for errors in (norms, cosines, distances):
        assert root_mean_square(errors) < 0.003
        assert root_mean_square(errors) > 1e-6, "a sketch that is exact here is no sketch"


@pytest.mark.parametrize("buckets", [1024, 4096, 16384])
def test_the_error_is_that_of_a_sketch_of_so_many_buckets(buckets: int) -> None:
    errors = errors_of_squares(buckets, LARGE, updates(size_of(LARGE), 60))
    assert 0.5 < root_mean_square(errors) / math.sqrt(2 / buckets) < 1.4
    assert abs(sum(errors) / len(errors)) < 5 * math.sqrt(2 / buckets / len(errors)), "unbiased"


def column(size: int, width: int, index: int, heavy: float = 1.0) -> Vector:
    """One entry of each `width` is heavy, the others are not quite zero."""
    found = np.full(size, 1e-4)
    found[index::width] = heavy
    return found


@pytest.mark.parametrize("buckets", [4096, 16384])
def test_a_heavy_column_repeated_in_every_row_is_measured_as_well_as_any_update(buckets: int) -> None:
    """Rows of a matrix as wide as there are buckets, half of that, and as the matrices are: no column may fall into one bucket or a few."""
    size = size_of(LARGE)
    for width in (buckets, buckets // 2, 2 * buckets, 1024, 1023):
        errors = errors_of_squares(buckets, LARGE, [column(size, width, index) for index in range(0, width, width // 16)])
        # All columns of such a width have the same rows meet, so their errors are one draw.
        assert root_mean_square(errors) < 3.5 * math.sqrt(2 / buckets), width


@pytest.mark.parametrize("buckets", [4096, 16384])
def test_equal_entries_are_measured_as_well_as_any_update(buckets: int) -> None:
    size = size_of(LARGE)
    signs = np.where(np.arange(size) % 2, 1.0, -1.0)
    rows = np.where(np.arange(size) // buckets % 2, 1.0, -1.0)
    errors = errors_of_squares(buckets, LARGE, [np.ones(size), signs, rows, np.where(np.arange(size) < size // 2, 1.0, -1.0)])
    assert root_mean_square(errors) < 2 * math.sqrt(2 / buckets)


@pytest.mark.parametrize("buckets", [1024, 4096])
def test_an_update_of_a_single_layer_is_measured_as_well_as_any(buckets: int) -> None:
    size, vectors = size_of(LARGE), []
    for seed, (begin, count) in enumerate([(0, 524_288), (524_288, 1000), (525_288, 393_216), (918_504, 78_848)] * 4):
        vector = np.zeros(size)
        vector[begin : begin + count] = np.random.default_rng(seed).standard_normal(count)
        vectors.append(vector)
    assert root_mean_square(errors_of_squares(buckets, LARGE, vectors)) < 1.5 * math.sqrt(2 / buckets)


def test_a_single_weight_is_measured_exactly_wherever_it_stands() -> None:
    size = size_of(LARGE)
    vectors = [np.eye(1, size, place)[0] * 0.5 for place in (0, 1, 1023, 1024, 524_287, 524_288, 525_288, size - 1)]
    assert errors_of_squares(1000, LARGE, vectors) == [0.0] * len(vectors)


def test_sketches_are_linear() -> None:
    size = size_of(LARGE)
    one, other = (np.round(1e6 * vector) / 2**20 for vector in updates(size, 2))
    parameters = [torch.zeros(shape) for shape in LARGE]
    sketcher = Sketcher(parameters, 5000, OneRank())
    found = []
    for update in (one, other):
        apply(parameters, update)
        found.append(sketcher.sketch())
    for parameter in parameters:
        parameter.zero_()
    apply(parameters, other)
    assert torch.allclose(found[1], found[0] + sketcher.sketch(), rtol=0, atol=1e-9)
    for parameter in parameters:
        parameter.mul_(-4)
    assert torch.allclose(sketcher.sketch(), -4 * (found[1] - found[0]), rtol=0, atol=1e-9)


# --- ranks


def assert_alike(found: Sequence[Moved], expected: Sequence[Moved]) -> None:
    """The same but for the order of sums."""
    for one, other in zip(found, expected, strict=True):
        assert (one.cosine is None) == (other.cosine is None)
        assert [value or 0.0 for value in one] == pytest.approx([value or 0.0 for value in other], rel=1e-5)


@pytest.mark.parametrize(("shapes", "buckets"), [(SMALL, size_of(SMALL)), (LARGE, 4096)], ids=["small", "large"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_measure_what_one_measures_alone(
    shapes: list[tuple[int, ...]], buckets: int, world_size: int, on_ranks: Callable[..., list[Any]]
) -> None:
    steps = updates(size_of(shapes), 4)

    def measure(ranks: Ranks) -> list[tuple[Moved, dict[int, float]]]:
        parameters, found = make_parameters(shapes), []
        trace = make_trace(parameters, buckets, ranks)
        for update in steps:
            apply(parameters, update)
            found.append((trace.advance(), trace.distances()))
        return found

    alone, together = measure(OneRank()), on_ranks(world_size, measure)
    assert all(found == together[0] for found in together), "bit for bit the same on every rank"
    assert_alike([moved for moved, _ in together[0]], [moved for moved, _ in alone])
    assert [distances for _, distances in together[0]] == [pytest.approx(distances, rel=1e-5) for _, distances in alone]


# --- what is kept


@pytest.mark.parametrize(("lag", "sync", "start"), [(0, 1, 0), (3, 1, 5), (7, 8, 0), (50, 1, 0), (100, 16, 3)])
def test_exactly_the_steps_that_are_named_are_kept(lag: int, sync: int, start: int) -> None:
    parameters = make_parameters(SMALL)
    trace = make_trace(parameters, size_of(SMALL), step=start, lag=lag, sync=sync)
    for step in range(start + 1, start + 200):
        apply(parameters, np.full(size_of(SMALL), 1e-3))
        trace.advance()
        held = [at for at in range(step + 1) if trace.distance(at) is not None]
        named = [at for at in range(start, step + 1) if step - at <= RECENT or (at % sync == 0 and step - at <= lag + sync)]
        assert held == named == [at for at in range(start, step + 1) if trace.keeps(at)]
        versions = [at for at in range(start, step + 1) if at % sync == 0 and step - at <= lag]
        assert set(versions) <= set(held), "what may have sampled a batch of this step"
        assert sum(name.startswith("displaced/") for name in trace.state()) == len(held)


@pytest.mark.parametrize("num_weights", [1_000_000_000, 1_240_000_000, 8_000_000_000, 70_000_000_000])
@pytest.mark.parametrize("num_kept", [34, 66, 162, 400])
def test_all_sketches_of_a_large_policy_take_less_than_two_bytes_per_weight(num_weights: int, num_kept: int) -> None:
    # One in fp64 for theta_0, another while a step is measured; in fp32 those kept, the last update, two signs.
    bytes_per_bucket = 8 + 8 + 4 * num_kept + 4 + 2 * 4
    assert num_buckets(num_weights, num_kept) * bytes_per_bucket < 2 * num_weights
    assert MIN_BUCKETS <= num_buckets(num_weights, num_kept) <= num_weights


@pytest.mark.parametrize("num_weights", [1, 1000, MIN_BUCKETS, MIN_BUCKETS + 1, 10_000_000, 60_000_000])
def test_a_policy_has_a_bucket_per_weight_or_the_smallest_number_at_least(num_weights: int) -> None:
    assert num_buckets(num_weights, 34) == min(num_weights, MIN_BUCKETS)


# --- checkpoints


@pytest.mark.parametrize(("shapes", "buckets"), [(SMALL, size_of(SMALL)), (LARGE, 2048)], ids=["small", "large"])
@pytest.mark.parametrize("before", [0, 1, 40])
def test_a_resumed_trace_gives_the_numbers_of_one_that_never_stopped(shapes: list[tuple[int, ...]], buckets: int, before: int) -> None:
    steps = updates(size_of(shapes), before + 3)
    parameters = make_parameters(shapes)
    trace = make_trace(parameters, buckets)
    for update in steps[:before]:
        apply(parameters, update)
        trace.advance()
    kept = {name: tensor.clone() for name, tensor in trace.state().items()}
    again = [parameter.clone() for parameter in parameters]
    resumed = make_trace(again, buckets, step=before)
    resumed.load(kept)
    assert resumed.state().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in resumed.state().items())
    for update in steps[before:]:
        apply(parameters, update)
        apply(again, update)
        assert resumed.advance() == trace.advance()
        assert resumed.distances() == trace.distances()
        assert [resumed.distance(at) for at in range(before + 3)] == [trace.distance(at) for at in range(before + 3)]


def test_a_trace_goes_on_with_another_number_of_ranks(on_ranks: Callable[..., list[Any]]) -> None:
    steps = updates(size_of(LARGE), 6)

    def go_on(ranks: Ranks, parameters: list[torch.Tensor], trace: Trace, ahead: list[Vector]) -> list[Moved]:
        found = []
        for update in ahead:
            apply(parameters, update)
            found.append(trace.advance())
        return found

    def first(ranks: Ranks) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        parameters = make_parameters(LARGE)
        trace = make_trace(parameters, 4096, ranks)
        go_on(ranks, parameters, trace, steps[:3])
        return parameters, trace.state()

    parameters, state = on_ranks(3, first)[0]

    def second(ranks: Ranks) -> list[Moved]:
        mine = [parameter.clone() for parameter in parameters]
        trace = make_trace(mine, 4096, ranks, step=3)
        trace.load(state)
        return go_on(ranks, mine, trace, steps[3:])

    whole = make_parameters(LARGE)
    expected = go_on(OneRank(), whole, make_trace(whole, 4096), steps)[3:]
    for world_size in (1, 2):
        for found in on_ranks(world_size, second):
            assert_alike(found, expected)
