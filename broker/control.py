"""The administrator's view of a broker: status, scale, stop."""

from __future__ import annotations

import os
import time
from typing import Any

import zmq

from broker.keys import KeyFile
from broker.server import make_identity
from broker.sockets import Channel, Renewal, client_socket, endpoint, send_or_drop, wait_connected
from protocol import codec, messages
from protocol.errors import BrokerUnreachable, RequestRefused


class ControlClient:
    """One connection to the control channel; every request is answered or raises BrokerUnreachable.

    What would have to be journalled raises RequestRefused while the broker has no room for it.
    """

    def __init__(self, address: str, key: KeyFile, seconds: float = 10.0) -> None:
        """Connect within `seconds`. Raises BrokerUnreachable or AccessRefused."""
        self._address = address
        self._context: zmq.Context[Any] = zmq.Context()
        identity = make_identity("admin", os.urandom(6).hex())
        self._socket = client_socket(self._context, address, Channel.CONTROL, key, identity)
        try:
            wait_connected(self._socket, address, Channel.CONTROL, "admin", seconds)
        except BaseException:
            self.close()
            raise
        self._renewal, self._heard_at = Renewal(self._socket, endpoint(address, Channel.CONTROL)), time.monotonic()

    def status(self, seconds: float = 5.0) -> messages.RunStatus:
        """The state of the run."""
        answer = self._ask(messages.GetStatus(), seconds)
        assert isinstance(answer, messages.RunStatus)
        return answer

    def set_actors(self, num_actors: int) -> None:
        """Ask the run's supervisor for this many actors."""
        self._ask(messages.SetActors(num_actors), 5.0)

    def stop(self, reason: str) -> None:
        """End the run in order."""
        self._ask(messages.StopRun(reason), 5.0)

    def shut_down(self) -> None:
        """End the broker itself."""
        self._ask(messages.ShutDown(), 5.0)

    def close(self) -> None:
        """Release the connection."""
        self._socket.close(linger=200)
        self._context.term()

    def _ask(self, request: messages.ControlMessage, seconds: float) -> messages.FromControl:
        wanted = messages.RunStatus if isinstance(request, messages.GetStatus) else messages.Done
        if send_or_drop(self._socket, codec.encode(request), int(seconds * 1000)):
            while self._socket.poll(int(seconds * 1000)):
                answer, _ = codec.to_control.decode(self._socket.recv_multipart())
                self._heard_at = time.monotonic()
                if isinstance(answer, wanted):
                    return answer
                if isinstance(answer, messages.NotNow):
                    raise RequestRefused(answer.request, answer.reason)
        self._renewal.consider(self._heard_at, time.monotonic())
        raise BrokerUnreachable(self._address, seconds, type(request).__name__)
