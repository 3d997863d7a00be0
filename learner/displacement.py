"""How far the weights have moved: distances and angles between the weights of different steps, from small linear sketches of them.

A count sketch (Charikar, Chen, Farach-Colton 2002; as a feature hash, Weinberger et al. 2009) adds each weight with a random sign to one of k
buckets. It is linear, so the sketch of a difference is the difference of sketches, and it keeps inner products: <S x, S y> is unbiased for <x, y>
with a standard deviation of at most sqrt(2/k) |x| |y|: below 0.3 % of a norm and 0.003 of a cosine at the smallest k. A policy of
no more than k weights is copied, and all is exact.

Invariant: a trace holds the sketch of theta_0, of theta_t, and of theta_s for those s < t that `keeps` names, and no other copy of the weights.
Every rank sketches its share of the weights, and the sum is the same on all, whatever their number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from learner.ranks import Ranks

MIN_BUCKETS = 1 << 18
WEIGHTS_PER_BUCKET = 256
"""More where memory for so many buckets is short: a step reads the weights in about as many pieces."""
BYTES_PER_WEIGHT = 1.5
"""What all sketches together may take, in fp32; the two of theta_0 and theta_t are in fp64."""
CPU_PIECE = 1 << 15
"""Weights added at a time on a CPU, so that all that is read twice stays in its cache; accelerators want few kernels instead."""
SEED = 20260701
RECENT = 32
"""Distances over up to so many steps are measured whatever the pacing is; powers of two of them (see `Trace.distances`)."""
_DISPLACED = "displaced/"


class _Piece(NamedTuple):
    """A run of one parameter's weights, [begin, end), that is added to the buckets from `bucket` on with the signs from `sign` on."""

    parameter: int
    begin: int
    end: int
    bucket: int
    sign: int


class Sketcher:
    """Sketches the weights of one model: always the same buckets and signs, by position alone."""

    def __init__(self, parameters: list[torch.Tensor], num_buckets: int, ranks: Ranks) -> None:
        """`num_buckets` is that of the function below, which depends on how many sketches will be held."""
        self._parameters, self._ranks = parameters, ranks
        self.num_buckets = num_buckets
        self._device = parameters[0].device
        chance = torch.Generator().manual_seed(SEED)
        signs = torch.randint(0, 2, (2 * num_buckets,), generator=chance, dtype=torch.int8)
        self._signs = (2 * signs - 1).to(torch.float32).to(self._device)
        num_rows = -(-sum(parameter.numel() for parameter in parameters) // num_buckets)
        starts = torch.randint(0, num_buckets, (num_rows, 2), generator=chance).tolist()
        self._pieces = self._cut(starts)[ranks.rank :: ranks.world_size]

    def _cut(self, starts: list[list[int]]) -> list[_Piece]:
        """All weights in one line, cut into rows of as many as there are buckets. A row has each bucket once; which bucket it begins with, and which
        sign, is random (`starts`), so that weights at like places, as of a column or of every layer, meet no more often than others."""
        pieces, position = [], 0
        longest = CPU_PIECE if self._device.type == "cpu" else self.num_buckets
        for index, parameter in enumerate(self._parameters):
            begin = 0
            while begin < parameter.numel():
                row, place = divmod(position, self.num_buckets)
                bucket = (starts[row][0] + place) % self.num_buckets
                end = min(parameter.numel(), begin + min(self.num_buckets - max(place, bucket), longest))
                pieces.append(_Piece(index, begin, end, bucket, starts[row][1] + place))
                position, begin = position + end - begin, end
        return pieces

    @torch.no_grad()
    def sketch(self) -> torch.Tensor:
        """The sketch of the present weights, fp64 (num_buckets,), the same on every rank. In fp64 because updates are small beside weights."""
        buckets = torch.zeros(self.num_buckets, dtype=torch.float64, device=self._device)
        for piece in self._pieces:
            weights = self._parameters[piece.parameter].detach().flatten()[piece.begin : piece.end]
            size = piece.end - piece.begin
            buckets[piece.bucket : piece.bucket + size] += weights * self._signs[piece.sign : piece.sign + size]
        self._ranks.sum_(buckets)
        return buckets


def num_buckets(num_weights: int, num_kept: int) -> int:
    """k: one for so many weights, or as many as there is memory for; no fewer than MIN_BUCKETS, and all weights have one where they are no more."""
    if num_weights <= MIN_BUCKETS:
        return num_weights
    fits = int(BYTES_PER_WEIGHT * num_weights / (4 * (num_kept + 6)))
    return max(MIN_BUCKETS, min(fits, num_weights // WEIGHTS_PER_BUCKET))


class Moved(NamedTuple):
    """What an optimizer step did to the weights. Norms are Euclidean, over all trained weights."""

    update_norm: float
    """|theta_{t+1} - theta_t|, the *applied* update."""
    cosine: float | None
    """Of this applied update with the one before (Grad CosSim of the paper's section 4); None where one of them is missing or zero."""
    displacement: float
    """|theta_{t+1} - theta_0|."""


class Trace:
    """The way of a policy through its weights."""

    def __init__(self, sketcher: Sketcher, step: int, max_lag: int, sync_every: int) -> None:
        """Starts at the present weights, those of `step`; they count as theta_0 until `load` says otherwise."""
        self._sketcher, self._max_lag, self._sync_every = sketcher, max_lag, sync_every
        self.step = step
        self._origin = sketcher.sketch()
        self._displaced: dict[int, torch.Tensor] = {step: torch.zeros_like(self._origin, dtype=torch.float32)}
        self._update: torch.Tensor | None = None

    def keeps(self, step: int) -> bool:
        """Whether the sketch of theta_`step` is needed from now on: it may have sampled a batch, or is recent."""
        return self.step - step <= RECENT or (step % self._sync_every == 0 and self.step - step <= self._max_lag + self._sync_every)

    def advance(self) -> Moved:
        """The optimizer has turned theta_t into theta_{t+1}: measure what it did."""
        before, previous = self._displaced[self.step], self._update
        displaced = (self._sketcher.sketch() - self._origin).float()
        update = displaced - before
        self.step += 1
        self._displaced[self.step], self._update = displaced, update
        for step in [step for step in self._displaced if not self.keeps(step)]:
            del self._displaced[step]
        return Moved(_norm(update), None if previous is None else _cosine(update, previous), _norm(displaced))

    def distance(self, step: int) -> float | None:
        """|theta_t - theta_step| to an earlier step; None if its sketch is not held."""
        if step not in self._displaced:
            return None
        return _norm(self._displaced[self.step] - self._displaced[step])

    def distances(self) -> dict[int, float]:
        """|theta_t - theta_{t-k}| by k, for every power of two k up to RECENT."""
        lags = [1 << power for power in range(RECENT.bit_length())]
        return {lag: distance for lag in lags if (distance := self.distance(self.step - lag)) is not None}

    # --- checkpoints

    def state(self) -> dict[str, torch.Tensor]:
        """Everything to go on from, by name."""
        update = {} if self._update is None else {"update": self._update}
        return {"origin": self._origin, **update} | {f"{_DISPLACED}{step}": tensor for step, tensor in self._displaced.items()}

    @property
    def num_bytes(self) -> int:
        """Of `state`."""
        return sum(tensor.nbytes for tensor in self.state().values())

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave at this very step with this very model."""
        self._origin = state["origin"].to(self._origin)
        self._update = state["update"].to(self._origin.device) if "update" in state else None
        found = {int(name.removeprefix(_DISPLACED)): tensor for name, tensor in state.items() if name.startswith(_DISPLACED)}
        self._displaced = {step: tensor.to(self._origin.device) for step, tensor in found.items()}


def _norm(vector: torch.Tensor) -> float:
    """In fp64: in fp32 a sum over millions of squares is off by more than the sketch is."""
    return float(vector.norm(dtype=torch.float64))


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float | None:
    norms = _norm(one) * _norm(other)
    if norms == 0 or not math.isfinite(norms):
        return None
    return max(-1.0, min(1.0, float((one * other).sum(dtype=torch.float64)) / norms))
