"""The learner's port over ZeroMQ, blocking.

Invariant: every request may be sent any number of times with the effect of once, so a request without an answer is simply sent again, and
one that is answered "not now" is asked again for as long as it takes.
Publications go over a connection of their own, beside the training loop. A third one carries heartbeats from a thread of its own, because the
others are silent while the learner computes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import zmq

from broker.blob_client import BlobClient
from broker.blobs import BlobStore
from broker.core import LEARNER, PUBLISHER
from broker.keys import KeyFile
from broker.put_off import PutOff
from broker.server import make_identity
from broker.sockets import NO_CONNECTION_SECONDS, Channel, Renewal, client_socket, endpoint, send_or_drop, wait_connected
from protocol import codec, messages
from protocol.errors import BrokerUnreachable, IncompatiblePeer, MalformedFrame, RequestRefused, TakenOver
from protocol.messages import HEARTBEAT_SECONDS, PROTOCOL_VERSION
from protocol.ports import ReceivedBatch
from protocol.weights import BlobRef

log = logging.getLogger("learner")
CONNECT_SECONDS = 20.0
RESEND_SECONDS = 1.0
GONE_SECONDS = 300.0
GROUP_CREDIT = 16
"""Payloads asked for ahead."""

R = TypeVar("R", bound=messages.Message)


class LearnerClient:
    """Implements protocol.ports.LearnerPort."""

    def __init__(self, address: str, key: KeyFile) -> None:
        """Connect. Raises BrokerUnreachable or AccessRefused."""
        self._address = address
        self._session = os.urandom(6).hex()
        self._context: zmq.Context[Any] = zmq.Context()
        identity = make_identity(LEARNER, self._session)
        self._socket = client_socket(self._context, address, Channel.LEARNER, key, identity)
        try:
            wait_connected(self._socket, address, Channel.LEARNER, "learner", CONNECT_SECONDS)
        except BaseException:
            self._socket.close(linger=0)
            self._context.term()
            raise
        self._publishing = client_socket(self._context, address, Channel.LEARNER, key, make_identity(PUBLISHER, self._session))
        where = endpoint(address, Channel.LEARNER)
        self._publishing.connect(where)
        self._renewals = {socket: Renewal(socket, where) for socket in (self._socket, self._publishing)}
        self._activity = _Activity(self._session)
        self._blobs = BlobClient(self._context, address, key, identity, put_off=self._activity.put_off)
        self._heartbeat = _Heartbeat(self._context, address, key, self._activity)
        self._heartbeat.start()
        self._stop: messages.Stop | None = None
        self._uncommitted: dict[int, messages.CommitStep] = {}
        """Steps applied and not known to be in the journal, sent again with every request for a batch."""

    def run_info(self) -> messages.RunInfo:
        """What run this is. Raises IncompatiblePeer."""
        info = self._request(messages.GetRun(), messages.RunInfo, "the run's description")
        if info.protocol != PROTOCOL_VERSION:
            raise IncompatiblePeer(PROTOCOL_VERSION, info.protocol)
        return info

    def fetch(self, blob: BlobRef, store: BlobStore) -> Path:
        """Bring a blob into `store`; its path there."""
        return self._blobs.get(blob, store)

    def join(self, step: int, world_size: int, environment: dict[str, str]) -> messages.LearnerWelcome:
        self._activity.step = step
        hello = messages.LearnerHello(PROTOCOL_VERSION, self._session, step, world_size, environment)
        return self._request(hello, messages.LearnerWelcome, "the welcome")

    def next_batch(self, step: int, while_waiting: Callable[[], None]) -> ReceivedBatch | None:
        self._activity.step = step
        # The commit before goes along with the request: the broker journals both at once, and answers neither before.
        ready = self._exchange(
            [*self._uncommitted.values(), messages.NextBatch(step)],
            messages.BatchReady,
            f"the batch of step {step}",
            _is_for(step),
            while_waiting,
            stop_ends=True,
        )
        if ready is None:
            self.confirm()
            return None
        self._uncommitted.clear()
        return ReceivedBatch(ready.batch, self._fetch_groups(ready.tickets), ready.version_steps)

    def commit(self, step: int, batch: int, lags: list[int], metrics: dict[str, float], notes: Sequence[messages.Note] = ()) -> None:
        self._uncommitted[step] = messages.CommitStep(step, batch, lags, metrics, list(notes))
        self._activity.step = step + 1

    def put_blob(self, data: bytes) -> BlobRef:
        return self._blobs.put(data)

    def publish(self, publication: messages.Publish) -> messages.Published:
        step = publication.version.step
        found = self._exchange(
            [publication],
            messages.Published,
            f"the publication of step {step}",
            _is_for(step),
            stop_ends=False,
            socket=self._publishing,
        )
        assert found is not None
        return found

    def evaluated(self, step: int, reward: float, num_prompts: int) -> None:
        request = messages.Evaluation(step, reward, num_prompts)
        self._request(request, messages.EvaluationNoted, f"the evaluation of step {step}", _is_for(step))

    def doing(self, text: str) -> None:
        self._activity.change(text)

    def done(self, step: int, summary: dict[str, float]) -> None:
        self.confirm()
        self._request(messages.LearnerDone(step, summary), messages.Goodbye, "the goodbye")

    def note(self, note: Callable[[], str]) -> None:
        """Heartbeats also say what `note` gives, if that is not empty; asked from another thread."""
        self._activity.note = note

    def close(self) -> None:
        self._heartbeat.stop()
        self._blobs.close()
        self._publishing.close(linger=200)
        self._socket.close(linger=200)
        self._context.term()

    # --- requests

    def _fetch_groups(self, tickets: list[int]) -> list[bytes]:
        """The payloads of `tickets`, with GROUP_CREDIT requests under way at most."""
        payloads: dict[int, bytes] = {}
        asked: set[int] = set()
        heard_at = time.monotonic()
        while len(payloads) < len(tickets):
            wanted = [ticket for ticket in tickets if ticket not in payloads and ticket not in asked]
            for ticket in wanted[: GROUP_CREDIT - len(asked)]:
                self._send(messages.GetGroup(ticket))
                asked.add(ticket)
            received = self._receive(self._socket, "groups", heard_at)
            if received is None:
                asked.clear()
                continue
            heard_at = time.monotonic()
            message, payload = received
            if isinstance(message, messages.GroupData) and message.ticket in tickets:
                payloads[message.ticket] = bytes(payload)
                asked.discard(message.ticket)
            self._note(message)
        return [payloads[ticket] for ticket in tickets]

    def _request(self, request: messages.Message, answer: type[R], waiting_for: str, fits: Callable[[R], bool] | None = None) -> R:
        found = self._exchange([request], answer, waiting_for, fits, stop_ends=False)
        assert found is not None
        return found

    def confirm(self) -> None:
        for step, commit in list(self._uncommitted.items()):
            self._request(commit, messages.Committed, f"the commit of step {step}", _is_for(step))
            del self._uncommitted[step]

    def _exchange(
        self,
        requests: list[messages.Message],
        answer: type[R],
        waiting_for: str,
        fits: Callable[[R], bool] | None = None,
        while_waiting: Callable[[], None] = lambda: None,
        *,
        stop_ends: bool,
        socket: zmq.Socket[Any] | None = None,
    ) -> R | None:
        """Send `requests`, again and again, until an `answer` comes. With `stop_ends`, None once the broker says stop."""
        socket = socket or self._socket
        sent_at = float("-inf")
        heard_at = time.monotonic()
        while not (stop_ends and self._stop is not None):
            if time.monotonic() - sent_at >= RESEND_SECONDS:
                for request in requests:
                    send_or_drop(socket, codec.encode(request))
                sent_at = time.monotonic()
            while_waiting()
            received = self._receive(socket, waiting_for, heard_at)
            if received is not None:
                heard_at = time.monotonic()
                message, _ = received
                if isinstance(message, answer) and (fits is None or fits(message)):
                    self._activity.put_off.over()
                    return message
                self._note(message)
        return None

    def _note(self, message: messages.ToLearner) -> None:
        """Take in what was not the answer waited for."""
        match message:
            case messages.Stop():
                self._stop = message
            case messages.HelloRefused(reason, protocol):
                if protocol != PROTOCOL_VERSION:
                    raise IncompatiblePeer(PROTOCOL_VERSION, protocol)
                raise RequestRefused("hello", reason)
            case messages.LearnerRefused(request, reason=messages.TAKEN_OVER):
                raise TakenOver(request)
            case messages.LearnerRefused(request, reason):
                raise RequestRefused(request, reason)
            case messages.NotNow(request, reason):
                self._activity.put_off.told(request, reason, time.monotonic())
            case messages.BatchPending():
                self._activity.waiting_for = message.waiting_for

    def _receive(self, socket: zmq.Socket[Any], waiting_for: str, heard_at: float) -> tuple[messages.ToLearner, bytes | memoryview] | None:
        """The next message within RESEND_SECONDS. Raises BrokerUnreachable once the broker has been silent for too long."""
        if socket.poll(int(RESEND_SECONDS * 1000)):
            try:
                return codec.to_learner.decode(socket.recv_multipart())
            except MalformedFrame as error:
                log.warning("ignored a message of the broker: %s", error)
                return messages.Committed(0), b""  # it was heard, and said nothing that is waited for
        silent = time.monotonic() - heard_at
        self._renewals[socket].consider(heard_at, time.monotonic())
        if silent > 5 * RESEND_SECONDS:
            log.warning("waiting for %s, the broker at %s was last heard %.0f s ago", waiting_for, self._address, silent)
        if silent > GONE_SECONDS:
            raise BrokerUnreachable(self._address, silent, waiting_for)
        return None

    def _send(self, message: messages.Message) -> None:
        """Send, or drop if the broker is away: requests are repeated."""
        send_or_drop(self._socket, codec.encode(message))


def _is_for(step: int) -> Callable[[messages.Committed | messages.Published | messages.BatchReady | messages.EvaluationNoted], bool]:
    """Whether an answer is about `step`, and not a second answer to a request that was sent twice."""
    return lambda answer: answer.step == step


class _Activity:
    """What the learner is doing, and for what share of the time it was busy."""

    def __init__(self, session: str) -> None:
        self.session, self.step, self.waiting_for = session, 0, ""
        self.put_off = PutOff(log)
        self.note: Callable[[], str] = lambda: ""
        self._text, self._since = "", time.monotonic()
        self._started, self._busy = self._since, 0.0
        self._lock = threading.Lock()

    def change(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if self._text:
                self._busy += now - self._since
            self._text, self._since = text, now

    def report(self) -> messages.LearnerReport:
        with self._lock:
            now = time.monotonic()
            busy = self._busy + (now - self._since if self._text else 0.0)
            waiting_for = self.put_off.reason or self.waiting_for or "the broker"
            doing = self._text or f"waiting for {now - self._since:.1f} s: {waiting_for}"
            doing = f"{self._text}, put off: {self.put_off.reason}" if self._text and self.put_off.reason else doing
            note = self.note()
            doing = f"{doing} ({note})" if note else doing
            return messages.LearnerReport(self.session, self.step, busy, now - self._started, doing[:4096])


class _Heartbeat(threading.Thread):
    """Sends a report every second on a connection of its own, until stopped."""

    def __init__(self, context: zmq.Context[Any], address: str, key: KeyFile, activity: _Activity) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._activity, self._stopped = activity, threading.Event()
        identity = make_identity("heartbeat", activity.session)
        self._socket = client_socket(context, address, Channel.LEARNER, key, identity)
        self._where = endpoint(address, Channel.LEARNER)
        self._socket.connect(self._where)

    def run(self) -> None:
        renewal, sent_at = Renewal(self._socket, self._where), time.monotonic()
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            if send_or_drop(self._socket, codec.encode(self._activity.report()), 0):
                sent_at = time.monotonic()
            # Nothing answers here; without a connection nothing can be sent.
            renewal.consider(sent_at, time.monotonic(), NO_CONNECTION_SECONDS)
        self._socket.close(linger=0)

    def stop(self) -> None:
        self._stopped.set()
        self.join()
