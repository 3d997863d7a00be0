"""Whether what is trained on is as long as what was dispatched: long completions arrive late, and those that expire are not trained on.

Groups whose fate is decided are compared: those of a batch, at the first step on it, with all that were accepted, the expired, void and resampled
ones among them. A group that waits for its batch is in neither, so as long as nothing is lost the two are equal. The length of a group that was
refused, or that never came, is not known; its ticket is counted.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from protocol import facts

WINDOW: Final = 50
"""Steps of the sliding window."""


class Decided(NamedTuple):
    """Completions of groups whose fate is decided, and their tokens: those trained on, and all."""

    num_trained: int = 0
    tokens_trained: int = 0
    num_all: int = 0
    tokens_all: int = 0

    def plus(self, other: Decided) -> Decided:
        """Both together."""
        return Decided(*map(sum, zip(self, other, strict=True)))

    def less(self, other: Decided) -> Decided:
        """These without the others."""
        return Decided(*(one - two for one, two in zip(self, other, strict=True)))

    @property
    def mean_trained(self) -> float | None:
        """Mean tokens of a completion that was trained on."""
        return self.tokens_trained / self.num_trained if self.num_trained else None

    @property
    def mean_all(self) -> float | None:
        """Mean tokens of a completion whose fate is decided."""
        return self.tokens_all / self.num_all if self.num_all else None

    @property
    def ratio(self) -> float | None:
        """The first mean by the second; None if there is nothing to compare."""
        return self.mean_trained / self.mean_all if self.mean_trained is not None and self.mean_all else None


class Lengths:
    """See the module. A group has `group_size` completions. Each step that is committed closes a window."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self.all = self.recent = Decided()
        """Over the run, and over the last WINDOW steps."""
        self.lowest_ratio: float | None = None
        """Of all windows of WINDOW steps; None if there was none."""
        self._open: dict[int, int | None] = {}
        """Every ticket that is open and in no batch: the tokens of its group, None if it has none."""
        self._batches: dict[int, list[int]] = {}
        """Of every batch that no step has used yet, the tokens of each group."""
        self._steps: deque[Decided] = deque()
        self._since = Decided()
        """What has been decided since the last step."""
        self.num_ended_without_group = 0

    @property
    def num_open_without_group(self) -> int:
        """Tickets that are dispatched, or to be dispatched again, and have no group."""
        return sum(tokens is None for tokens in self._open.values())

    def add(self, fact: facts.AnyFact) -> None:
        """Take in the next fact. What contradicts the facts before is left out."""
        match fact:
            case facts.TicketIssued():
                self._open.setdefault(fact.ticket, None)
            case facts.GroupAccepted():
                self._open[fact.ticket] = fact.num_tokens
            case facts.TicketRevoked():
                self._lose(self._open.get(fact.ticket))
                self._open[fact.ticket] = None
            case facts.TicketEnded():
                tokens = self._open.pop(fact.ticket, None)
                self.num_ended_without_group += tokens is None
                self._lose(tokens)
            case facts.BatchFormed():
                found = [self._open.pop(ticket, None) for ticket in fact.tickets]
                self._batches[fact.batch] = [tokens for tokens in found if tokens is not None]
            case facts.StepCommitted():
                self._step(self._batches.pop(fact.batch, []))

    def _lose(self, tokens: int | None) -> None:
        if tokens is not None:
            self._decide(Decided(0, 0, self._group_size, tokens))

    def _decide(self, found: Decided) -> None:
        self.all, self._since = self.all.plus(found), self._since.plus(found)

    def _step(self, trained: list[int]) -> None:
        """A step is committed, for the first time on these groups (none, if its batch was used before)."""
        completions = len(trained) * self._group_size, sum(trained)
        self._decide(Decided(*completions, *completions))
        self._steps.append(self._since)
        self.recent, self._since = self.recent.plus(self._since), Decided()
        if len(self._steps) > WINDOW:
            self.recent = self.recent.less(self._steps.popleft())
        ratio = self.recent.ratio
        if len(self._steps) == WINDOW and ratio is not None:
            self.lowest_ratio = ratio if self.lowest_ratio is None else min(self.lowest_ratio, ratio)
