"""What a person sees while a run goes on: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from protocol.lag_account import NUM_RECENT, LagParts
from protocol.messages import PeerStatus, RunStatus

PLAIN_SECONDS = 5.0
WAIT_SECONDS = 30.0
"""A run without a new step for this long is worth a line of who waits for what, and another one each time it passes again."""


class Pace:
    """Steps per second, for the time left: an exponential mean over the time between observations."""

    def __init__(self) -> None:
        self._step, self._at, self._rate = -1, 0.0, 0.0

    def seconds_left(self, status: RunStatus) -> float | None:
        """Seconds until the last step at the present pace, None as long as there is no pace."""
        if status.step > self._step > 0:  # the first step also holds everybody's start
            rate = (status.step - self._step) / max(status.elapsed_seconds - self._at, 1e-3)
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
        if status.step != self._step:
            self._step, self._at = status.step, status.elapsed_seconds
        return (status.num_steps - status.step) / self._rate if self._rate else None


class Monitor:
    """Shows statuses as they come. Use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._pace = Pace()
        self._printed_at = -PLAIN_SECONDS
        self._printed_step = -1
        self._moved_step, self._moved_at, self._waits_at = -1, 0.0, 0.0
        self._told: list[tuple[int, str]] = []

    def __enter__(self) -> Monitor:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays. On a full disk it may be lost; that must not end the run."""
        with contextlib.suppress(OSError):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, status: RunStatus) -> None:
        """The present state of the run."""
        left = self._pace.seconds_left(status)
        if self._live is not None:
            self._live.update(render(status, left))
        elif status.step != self._printed_step and status.elapsed_seconds - self._printed_at >= PLAIN_SECONDS:
            self._printed_at, self._printed_step = status.elapsed_seconds, status.step
            self.say(plain_line(status, left))
        self._show_notes(status)
        self._show_waits(status)

    def _show_notes(self, status: RunStatus) -> None:
        """What the learner noted since it was looked at last, as lines that stay."""
        for note in status.notes:
            if note not in self._told:
                self.say(f"step {note[0]}: {note[1]}")
        self._told = list(status.notes)

    def _show_waits(self, status: RunStatus) -> None:
        """A line that stays about a run that stands still, on a terminal and elsewhere."""
        now = status.elapsed_seconds
        if status.step != self._moved_step or now < self._moved_at:  # the latter after a new start of the broker
            self._moved_step, self._moved_at, self._waits_at = status.step, now, now
        elif now - self._waits_at >= WAIT_SECONDS:
            self._waits_at = now
            doing = [f"{peer.name}: {peer.doing}" for peer in (status.learner,) if peer is not None]
            self.say(f"no step for {now - self._moved_at:.0f} s: {'; '.join([*doing, *status.waits[:4]])}")


def plain_line(status: RunStatus, left: float | None) -> str:
    """One line about the run."""
    parts = [
        f"step {status.step}/{status.num_steps}",
        f"left {_duration(left)}",
        f"reward {_reward(status)}",
        f"held-out {_heldout(status)}",
        f"{_lag(status)} (largest {status.largest_lag}, S {status.max_lag})",
        stability(status),
        f"tickets {status.outstanding} out, {status.queued} queued, {status.consumed} consumed",
        f"{sum(actor.tokens_per_second for actor in status.actors):.0f} tokens/s",
        f"delta {_size(status.delta_bytes)} of {_size(status.full_bytes)}",
    ]
    return ", ".join(parts)


def render(status: RunStatus, left: float | None) -> RenderableType:
    """The live view."""
    top = Table.grid(padding=(0, 2))
    top.add_column(justify="right", style="bold")
    top.add_column()
    progress = Table.grid(padding=(0, 1))
    progress.add_row(
        ProgressBar(total=status.num_steps, completed=status.step, width=40),
        f"{status.step}/{status.num_steps}, {_duration(left)} left, {_duration(status.elapsed_seconds)} gone",
    )
    top.add_row(f"{status.run}", Text(status.phase, style="red" if status.halted else "green"))
    top.add_row("step", progress)
    top.add_row("reward", f"training {_reward(status)}   held-out {_heldout(status)}")
    shares = "  ".join(f"{lag}: {count}" for lag, count in status.lags.items()) or "nothing trained on yet"
    top.add_row("lag", f"groups trained on at each lag: {shares}   (S = {status.max_lag}, largest {status.largest_lag})")
    if status.lag_parts:
        top.add_row("", f"{_lag(status)}, mean over the last {NUM_RECENT} steps")
    top.add_row("stability", stability(status))
    for step, text in status.notes[-3:]:
        top.add_row("", Text(f"step {step}: {text}", style="yellow"))
    top.add_row("tickets", _tickets(status))
    top.add_row("weights", f"version of step {status.newest_step}, {_size(status.delta_bytes)} of {_size(status.full_bytes)} sent")
    if status.turned_away:
        top.add_row("turned away", ", ".join(f"{count} {kind}" for kind, count in status.turned_away.items()))
    peers = Table(box=None, padding=(0, 2), header_style="dim")
    for title in ("who", "sampling from step", "tickets", "tokens/s", "busy", "seen", "doing"):
        peers.add_column(title)
    if status.learner is not None:
        _add_peer(peers, status.learner, is_learner=True)
    for actor in status.actors:
        _add_peer(peers, actor, is_learner=False)
    waits = Text("\n".join(status.waits) or "nobody waits", style="dim")
    return Group(top, peers, waits)


def _add_peer(table: Table, peer: PeerStatus, *, is_learner: bool) -> None:
    sampling = "" if is_learner else f"{peer.step}" if peer.version >= 0 else "none yet"
    rate = "" if is_learner else f"{peer.tokens_per_second:.0f}"
    tickets = "" if is_learner else " ".join(map(str, peer.tickets))
    seen = f"{peer.last_seen:.1f} s ago" if peer.was_heard else f"not since the broker started, {peer.last_seen:.1f} s ago"
    table.add_row(peer.name, sampling, tickets, rate, f"{peer.busy_share:.0%}", seen, peer.doing)


def _tickets(status: RunStatus) -> str:
    refused = ", ".join(f"{count} {reason}" for reason, count in status.refused.items())
    return (
        f"{status.issued} issued = {status.outstanding} outstanding + {status.queued} queued + {status.consumed} consumed"
        f" + {status.expired} expired + {status.failed} failed + {status.void} void" + (f"   refused: {refused}" if refused else "")
    )


def _lag(status: RunStatus) -> str:
    """The lag of late and its parts; its mean at the last step, from a broker that does not tell them."""
    return LagParts(**status.lag_parts).in_words() if status.lag_parts else f"lag {status.metrics.get('lag_mean', 0):.1f}"


def stability(status: RunStatus) -> str:
    """Where the run stands on S x learning rate: the nearer constraint, the steps left, how straight it drifts."""
    found = status.metrics
    margins = {name: found[f"margin_{name}"] for name in ("batch", "horizon") if f"margin_{name}" in found}
    binding = min(margins, key=lambda name: margins[name], default=None)
    parts = ["margin unknown" if binding is None else f"margin {margins[binding]:.2g}x ({binding})"]
    if "steps_left" in found:
        parts.append(f"{found['steps_left']:.0f} steps left at this learning rate")
    if "drift_exponent" in found:
        parts.append(f"drift ~ t^{found['drift_exponent']:.2f}")
    if "drift" in found:
        parts.append(f"{found['drift']:.3g} from what sampled")
    return ", ".join(parts)


def _reward(status: RunStatus) -> str:
    return f"{status.metrics['reward']:.3f}" if "reward" in status.metrics else "none yet"


def _heldout(status: RunStatus) -> str:
    if not status.evaluations:
        return "not measured yet"
    first, last = status.evaluations[0], status.evaluations[-1]
    return f"{last[1]:.3f} at step {last[0]} (before: {first[1]:.3f})"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
