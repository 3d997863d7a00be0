"""What a replay found, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.replay import Difference, StepRow

if TYPE_CHECKING:
    from broker.history import History
    from deploy.replay import Replay

NUM_TENSORS_SHOWN = 10
COMPARED = ("objective", "ratio", "clip_fraction", "effective_sample_size", "kl_behaviour", "kl_reference", "entropy", "grad_norm", "lr")
"""Metrics shown side by side; --out keeps them all."""


def explain(difference: Difference) -> str:
    """Where a replay left the recorded run: step, tensors, elements."""
    head = (
        f"version {difference.version}, taken at step {difference.step}, has root {difference.root[:16]}, "
        f"recorded was {difference.recorded_root[:16]}"
    )
    if difference.why:
        return f"{head}. Which tensors differ cannot be told: {difference.why}"
    elements = sum(tensor.num_different for tensor in difference.tensors)
    lines = [f"{head}: {elements} elements in {len(difference.tensors)} tensors differ, drift {difference.drift:.2%}"]
    lines += [
        f"  {tensor.name}: {tensor.num_different} of {tensor.num_elements} elements, by up to {tensor.largest_ulps} ulps"
        for tensor in difference.tensors[:NUM_TENSORS_SHOWN]
    ]
    more = len(difference.tensors) - NUM_TENSORS_SHOWN
    return "\n".join([*lines, f"  and {more} more tensors"] if more > 0 else lines)


def summary_lines(replay: Replay) -> list[str]:
    """What a replay of the run came to."""
    results = replay.results
    compared, equal = sum(r.num_compared for r in results), sum(r.num_equal for r in results)
    lines = [f"replayed {results[-1].end - replay.first} steps in {replay.wall_seconds:.1f} s{_ratio(replay)}"]
    if replay.overrides:
        return lines
    if compared == equal:
        lines.append(f"all {compared} versions have the recorded root")
    else:
        drift = max(r.largest_drift for r in results)
        lines.append(
            f"{equal} of {compared} versions have the recorded root; the largest drift of the others is {drift:.2%}, which is within bounds"
        )
    unrecorded = sum(r.num_unrecorded for r in results)
    if unrecorded:
        lines.append(f"{unrecorded} versions could not be compared: the run ended before it published them")
    return lines


def _ratio(replay: Replay) -> str:
    """How long that was against the run itself, where all of it was replayed."""
    busy = replay.history.busy_seconds
    if not busy or replay.first > 0 or replay.end < replay.history.num_steps:
        return ""
    ours = sum(result.busy_seconds for result in replay.results)
    return f" (the learner was busy for {ours:.1f} s; in the run, {busy:.1f} s): {replay.wall_seconds / busy:.2f} times as long"


def side_by_side(replay: Replay, first: int) -> list[str]:
    """Metrics of the run and of the replay from step `first` on: means over the first, middle and last tenth, and held-out rewards.

    Empty where there is nothing to compare: every version of the replay was the run's.
    """
    if not replay.overrides and all(result.is_exact for result in replay.results):
        return []
    head = ("off-policy", "what-if") if replay.overrides else ("", "replayed")
    rows = [row for row in replay.rows if row.step >= first]
    tenth = max(1, len(rows) // 10)
    parts = [rows[:tenth], rows[(len(rows) - tenth) // 2 :][:tenth], rows[-tenth:]]
    lines = [
        _line("means over steps", [cell for part in parts for cell in (f"{part[0].step}-{part[-1].step}", "")]),
        _line(head[0], ["recorded", head[1]] * len(parts)),
    ]
    for name in COMPARED:
        if any(name in row.metrics for row in rows):
            pairs = [(_recorded(replay.history, part, name), _mean([row.metrics.get(name) for row in part])) for part in parts]
            lines.append(_line(name, [cell for pair in pairs for cell in pair]))
    for step, reward in sorted({step: reward for result in replay.results for step, reward in result.evaluations.items()}.items()):
        if step >= first:
            lines.append(_line(f"held-out, step {step}", [_number(replay.history.evaluations.get(step)), _number(reward)]))
    return lines


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<22}" + "".join(f"{cell:>{13 if place % 2 == 0 else 11}}" for place, cell in enumerate(cells))


def _recorded(history: History, part: Sequence[StepRow], name: str) -> str:
    return _mean([history.steps[row.step].metrics.get(name) for row in part])


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(sum(known) / len(known) if known else None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
