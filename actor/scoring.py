"""Rewards: computed in a thread, or in a process of their own, where one that never returns or crashes costs a ticket and not the actor.

A reward is a user's code, or a library given whatever a policy writes. In a thread it cannot be ended, and while it holds the interpreter (as
arithmetic on huge integers does) not even heartbeats go out: the ticket would go to the next actor, and hang that one, too.

Invariant: the two sides of a scoring process speak in turn; one that did not answer in time is killed, never spoken to again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, Final, Protocol

import msgspec

from protocol.errors import TaskError
from tasks.base import Task
from tasks.scoring import fetch_problem, score

log = logging.getLogger("actor")
REWARD_SECONDS: Final = 120.0
"""What one completion's reward may take."""
START_SECONDS: Final = 600.0
"""What loading the task may take."""
_LENGTH = struct.Struct("<I")


class Scorer(Protocol):
    """Gives completions their rewards."""

    async def score(self, prompt: int, texts: Sequence[str]) -> list[float]:
        """The rewards of completions of training problem `prompt`. Raises TaskError."""

    async def close(self) -> None:
        """Release everything."""


class ScoringThread:
    """Implements Scorer in this process."""

    def __init__(self, task: Task) -> None:
        self._task = task

    async def score(self, prompt: int, texts: Sequence[str]) -> list[float]:
        return await asyncio.to_thread(self._score, prompt, texts)

    def _score(self, prompt: int, texts: Sequence[str]) -> list[float]:
        problem = fetch_problem(self._task, prompt)
        return [score(self._task, problem, text) for text in texts]

    async def close(self) -> None:
        pass


class ScoringProcess:
    """Implements Scorer by a process that `command` starts; its standard input and output are the two directions."""

    def __init__(self, command: list[str], task: str, options: dict[str, Any], seconds: float = REWARD_SECONDS) -> None:
        self._command, self._task, self._options, self._seconds = command, task, options, seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the process and let it load the task. Raises TaskError."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._send([self._task, self._options])
        await self._answer(START_SECONDS, f"task {self._task}: loading it for scoring")

    async def score(self, prompt: int, texts: Sequence[str]) -> list[float]:
        async with self._turn:
            try:
                if self._process is None:
                    await self.start()
                self._send([prompt, list(texts)])
                return [await self._reward(prompt, text) for text in texts]
            except BaseException:
                await self._end()  # what it may still say belongs to nobody
                raise

    async def _reward(self, prompt: int, text: str) -> float:
        what = f"task {self._task}: the reward of completion {text[:120]!r} to problem {prompt}"
        return float(await self._answer(self._seconds, what))

    async def close(self) -> None:
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()

    def _send(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        data = msgspec.msgpack.encode(message)
        self._process.stdin.write(_LENGTH.pack(len(data)) + data)

    async def _answer(self, seconds: float, what: str) -> Any:
        """The next answer. Raises TaskError, in words about `what`, if it is an error or does not come within `seconds`."""
        assert self._process is not None and self._process.stdout is not None
        stdout = self._process.stdout
        try:
            async with asyncio.timeout(seconds):
                (length,) = _LENGTH.unpack(await stdout.readexactly(_LENGTH.size))
                value, error = msgspec.msgpack.decode(await stdout.readexactly(length))
        except TimeoutError:
            raise TaskError(f"{what} did not return within {seconds:g} s; its process was ended") from None
        except asyncio.IncompleteReadError:
            code = await self._process.wait()
            raise TaskError(f"{what} ended its process (exit code {code}); the actor's log may say why") from None
        if error:
            raise TaskError(error)
        return value


def serve_scores(receive: BinaryIO, send: BinaryIO, load_task: Callable[[str, dict[str, Any]], Task]) -> None:
    """The other side: a task, then problems with completions, each answered by a reward or an error, until `receive` ends.

    consumes:     the task, then requests
      waits for:    the next one
      unblocked by: the actor, or its end
    produces:     one answer for each completion
    """
    task: Task | None = None
    while (head := receive.read(_LENGTH.size)) and len(head) == _LENGTH.size:
        first, second = msgspec.msgpack.decode(receive.read(_LENGTH.unpack(head)[0]))
        try:
            if task is None:
                task = load_task(first, second)
                _reply(send, True, "")
                continue
            problem = fetch_problem(task, first)
            for text in second:
                _reply(send, score(task, problem, text), "")
        except TaskError as error:
            _reply(send, None, str(error))


def _reply(send: BinaryIO, value: object, error: str) -> None:
    data = msgspec.msgpack.encode([value, error])
    send.write(_LENGTH.pack(len(data)) + data)
    send.flush()


def take_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """This process's standard input and output for `serve_scores`; what a task prints goes to standard error from here on."""
    send = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return os.fdopen(os.dup(0), "rb"), send
