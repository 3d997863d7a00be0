"""An answer that is lost with the broker is asked for again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.actor_client import ActorClient
from broker.core import Broker
from broker.downloads import Sources
from broker.keys import allowed_keys, load_key, make_keys
from broker.server import Server, Wakeup
from protocol import messages
from protocol.config import parse_config
from protocol.messages import ActorReport

DEADLINE_SECONDS = 20


class LosesTheFirstWelcome(Server):
    """A broker that was killed after it had journalled a hello and before the answer was out, and is back: it knows the actor."""

    num_lost = 0

    def _send(self, channel: Any, identity: bytes, message: Any, *rest: Any) -> None:
        if isinstance(message, messages.ActorWelcome) and not self.num_lost:
            self.num_lost += 1
            return
        super()._send(channel, identity, message, *rest)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LosesTheFirstWelcome]:
    make_keys(tmp_path / "keys")
    broker = Broker(tmp_path / "run", "frames", parse_config({}), 16, [], time.monotonic(), time.time())
    key = load_key(tmp_path / "keys" / "broker.key")
    found = LosesTheFirstWelcome(broker, "tcp://127.0.0.1:0", key, allowed_keys(tmp_path / "keys"), Wakeup())
    thread = threading.Thread(target=found.serve)
    thread.start()
    yield found
    found.stop()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


async def test_an_actor_whose_welcome_was_lost_is_welcomed_all_the_same(server: LosesTheFirstWelcome, tmp_path: Path) -> None:
    client = ActorClient(server.address, load_key(tmp_path / "keys" / "actor.key"), "toy-0", Sources(cache=tmp_path / "cache"))
    try:
        welcome = await client.join("toy", lambda: ActorReport(-1, 0, [], 0.0, 0.0, 0, "pretending"))
    finally:
        await client.leave()
    assert (welcome.run, server.num_lost) == ("frames", 1)
