"""`replay --step`: one optimizer step at a time at a prompt.

consumes:     commands, one line each
  waits for:    the next one, before each step
  unblocked by: a person
produces:     what the batch holds before the step, and what the step did
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from broker.replay import ReplayPort
from protocol.config import Config
from protocol.groups import Group, decode_group

if TYPE_CHECKING:
    from learner.batch import Batch
    from learner.step import Trainer

HELP = """  enter       take the step          n K         take K steps          c   go on to the end      q   take it and stop
  g           list the groups        g TICKET    one group in full     t TICKET   its tokens     h   this help"""


class StepConsole:
    """Implements learner.observe.StepObserver, on rank 0."""

    def __init__(
        self, port: ReplayPort, policy: Path, config: Config, first: int, ask: Callable[[str], str], show: Callable[[str], None]
    ) -> None:
        """Ask from step `first` on. `ask` shows a prompt and returns a line, `show` shows a line."""
        from transformers import AutoTokenizer

        self._port, self._config, self._ask, self._show = port, config, ask, show
        self._tokenizer: Any = AutoTokenizer.from_pretrained(policy)
        self._num_to_take, self._first = 0, first
        self._batch: tuple[list[Group], list[np.ndarray[Any, Any]], Batch] | None = None
        show(HELP)

    def before(self, step: int, batch: Batch, trainer: Trainer) -> None:
        """Show the batch, and ask until a step is to be taken."""
        from learner.observe import importance_ratios

        if self._num_to_take or step < self._first:
            self._num_to_take = max(0, self._num_to_take - 1)
            return
        assert self._port.batch is not None
        groups = [decode_group(payload) for payload in self._port.batch.payloads]
        ratios = importance_ratios(trainer, batch, self._config.learner.tokens_per_microbatch, self._config.rollout.temperature)
        self._batch = groups, ratios, batch
        lags = [step - oldest for oldest in batch.oldest_steps]
        self._show(f"step {step}: batch {batch.number}, {len(groups)} groups, {batch.num_tokens} tokens, lags {min(lags)} to {max(lags)}")
        while not self._command(self._line(f"step {step}> "), step):
            pass

    def after(self, step: int, metrics: dict[str, float]) -> None:
        """Show what the step did."""
        if step < self._first:
            return
        found = metrics.get("cosine_new_batch", metrics.get("cosine_same_batch"))
        cosine = "no step before to compare with" if found is None else f"cosine to the step before {found:+.4f}"
        self._show(
            f"step {step}: gradient norm {metrics['grad_norm']:.4g}, lr {metrics['lr']:.4g}, update norm {metrics['update_norm']:.4g}, {cosine}\n"
            f"        objective {metrics['objective']:.4g}, clip fraction {metrics['clip_fraction']:.3f}, "
            f"effective sample size {metrics['effective_sample_size']:.3f}, KL to the actor {metrics['kl_behaviour']:.4g}"
        )

    def _line(self, prompt: str) -> str:
        try:
            return self._ask(prompt).strip()
        except EOFError:
            return "q"
        except UnicodeDecodeError:
            return "h"

    def _command(self, line: str, step: int) -> bool:
        """Carry out a command; whether the step is to be taken."""
        word, _, rest = line.partition(" ")
        match word:
            case "":
                return True
            case "n" if rest.isdecimal() and int(rest) > 0:
                self._num_to_take = int(rest) - 1
                return True
            case "c":
                self._num_to_take = 1 << 62
                return True
            case "q":
                self._port.stop_after(step)
                self._num_to_take = 1 << 62
                return True
            case "g" if not rest:
                self._list_groups()
            case "g" | "t" if rest.isdecimal():
                self._show_group(int(rest), tokens=word == "t")
            case _:
                self._show(HELP)
        return False

    def _list_groups(self) -> None:
        assert self._batch is not None
        groups, ratios, batch = self._batch
        place = 0
        self._show(f"{'ticket':>8} {'versions':>10} {'reward':>7} {'advantages':>18} {'ratios':>18}  prompt")
        for group in groups:
            size = group.rewards.size
            gains = [sequence.advantage for sequence in batch.sequences[place : place + size]]
            spread = np.concatenate(ratios[place : place + size])
            place += size
            versions = f"{group.oldest_version}-{group.newest_version}"
            self._show(
                f"{group.ticket:>8} {versions:>10} {group.rewards.mean():>7.3f} {min(gains):>8.3f} to {max(gains):>6.3f} "
                f"{spread.min():>8.3f} to {spread.max():>6.3f}  {self._text(group.prompt_ids)!r}"
            )

    def _show_group(self, ticket: int, *, tokens: bool) -> None:
        assert self._batch is not None
        groups, ratios, batch = self._batch
        place = 0
        for group in groups:
            if group.ticket == ticket:
                break
            place += group.rewards.size
        else:
            self._show(f"ticket {ticket} is not in this batch; `g` lists those that are")
            return
        self._show(f"ticket {ticket}: {group.actor} ({group.engine}), prompt {self._text(group.prompt_ids)!r}")
        for index, part in enumerate(group.completions()):
            ratio = ratios[place + index]
            self._show(
                f"  reward {group.rewards[index]:.3f}, advantage {batch.sequences[place + index].advantage:+.3f}, ratios {ratio.min():.3f} to "
                f"{ratio.max():.3f} (mean {ratio.mean():.3f}): {self._text(group.token_ids[part])!r}"
            )
            for token, logprob, version, one in (
                zip(group.token_ids[part], group.logprobs[part], group.versions[part], ratio, strict=True) if tokens else ()
            ):
                self._show(f"    {token:>7} {self._text([token])!r:<12} log-probability {logprob:8.4f}  version {version}  ratio {one:.4f}")

    def _text(self, ids: Any) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids]))
