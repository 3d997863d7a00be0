"""Groups that say who made them, and weights that say what they were trained on.

Invariant: whatever becomes of a group on its way, its tokens alone tell the ticket, the attempt, the process that made it and the weights it was
made with; and a change of any number in it shows.

The weights of step t hold a hash chain over everything that was trained on to get there. An actor reads the chain out of the weights it applied and
puts a fingerprint of it in every token, so a token also says which weights it was really sampled with, whatever number it gives them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import blake3
import numpy as np
from numpy.typing import NDArray

from protocol.groups import Group, decode_group
from protocol.messages import WireTicket
from protocol.weights import Tensor, Weights

GROUP_SIZE: Final = 2
NUM_HEADER: Final = 5
"""Tokens before the body: ticket, attempt, actor, incarnation, place in the group."""
MAX_BODY: Final = 10
MAX_TOKENS: Final = NUM_HEADER + MAX_BODY + 1
START: Final = blake3.blake3(b"nothing has been trained on").digest()
BODY_SIZE: Final = 400


class Contradiction(Exception):
    """A group does not agree with itself."""


class Sampled(NamedTuple):
    """One body token: the version number it claims, and the fingerprint of the weights it was made with."""

    version: int
    fingerprint: int


class Described(NamedTuple):
    """What a group says about itself."""

    ticket: int
    attempt: int
    actor: str
    incarnation: int
    body: list[Sampled]
    versions: list[int]
    """Numbers of all versions, ascending."""
    num_tokens: int


class Theta(NamedTuple):
    """Made-up weights: `chain` (32 bytes) is what they were trained on, `body` uint16[BODY_SIZE] are bf16 bits."""

    chain: bytes
    body: NDArray[np.uint16]

    def weights(self) -> Weights:
        """The tensors, as they are published."""
        return {
            "body": Tensor("BF16", (BODY_SIZE,), self.body),
            "chain": Tensor("BF16", (16,), np.frombuffer(self.chain, np.uint16).copy()),
        }

    def after(self, digests: list[bytes], salt: str) -> Theta:
        """The weights after a step on groups with these digests: a few elements of the body move, by what the chain says."""
        chain = advance(self.chain, digests, salt)
        random = np.random.default_rng(int.from_bytes(chain[:8], "big"))
        body = self.body.copy()
        for index in random.integers(0, BODY_SIZE, 5):
            body[index] += np.uint16(random.integers(1, 4))
        return Theta(chain, body)


def first_theta() -> Theta:
    """The weights that a run starts from."""
    return Theta(START, np.random.default_rng(7).integers(0x3C00, 0x3F00, BODY_SIZE).astype(np.uint16))


def advance(chain: bytes, digests: list[bytes], salt: str) -> bytes:
    """The chain after a step on groups with these digests. Steps with another salt lead elsewhere."""
    return blake3.blake3(chain + b"".join(digests) + salt.encode()).digest()


def chain_of(weights: Weights) -> bytes:
    """What weights were trained on."""
    return weights["chain"].bits.tobytes()


def fingerprint(data: bytes) -> int:
    """31 bits that fit in a token."""
    return int.from_bytes(blake3.blake3(data).digest()[:4], "big") & 0x7FFFFFFF


def make_group(
    ticket: WireTicket, actor: str, incarnation: int, body: list[Sampled], random: np.random.Generator, engine: str = "toy"
) -> Group:
    """A group of GROUP_SIZE completions with the same body; actors are called NAME-NUMBER."""
    head = [ticket.number, ticket.attempt, int(actor.rpartition("-")[2]), incarnation]
    logprobs = -random.uniform(0, 3, (GROUP_SIZE, NUM_HEADER + len(body) + 1)).astype(np.float32)
    versions = np.array([body[0].version] * NUM_HEADER + [token.version for token in body] + [body[-1].version], np.int32)
    rows = []
    for place in range(GROUP_SIZE):
        row = np.array([*head, place, *(token.fingerprint for token in body), 0], np.int32)
        row[-1] = _checksum(ticket.prompt, ticket.seed, row[:-1], versions, logprobs[place])
        rows.append(row)
    return Group(
        ticket=ticket.number,
        prompt=ticket.prompt,
        seed=ticket.seed,
        actor=actor,
        engine=engine,
        prompt_ids=np.array([ticket.prompt], np.int32),
        num_tokens=np.array([row.size for row in rows], np.int32),
        token_ids=np.concatenate(rows),
        logprobs=logprobs.reshape(-1),
        versions=np.tile(versions, GROUP_SIZE),
        rewards=random.uniform(0, 1, GROUP_SIZE).astype(np.float32),
        finish=np.zeros(GROUP_SIZE, np.uint8),
    )


def describe(payload: bytes) -> Described:
    """What a group's tokens say. Raises Contradiction if they disagree with one another or with the group around them."""
    group = decode_group(payload)
    heads, body = set(), []
    slices = group.completions()
    if len(slices) != GROUP_SIZE:
        raise Contradiction(f"it has {len(slices)} completions of {GROUP_SIZE}")
    for place, part in enumerate(slices):
        tokens, versions = group.token_ids[part], group.versions[part]
        if int(tokens[-1]) != _checksum(group.prompt, group.seed, tokens[:-1], versions, group.logprobs[part]):
            raise Contradiction(f"the checksum of completion {place} is wrong")
        if int(tokens[NUM_HEADER - 1]) != place:
            raise Contradiction(f"completion {place} says it is number {tokens[NUM_HEADER - 1]}")
        heads.add(tuple(tokens[: NUM_HEADER - 1].tolist()))
        pairs = zip(versions[NUM_HEADER:-1].tolist(), tokens[NUM_HEADER:-1].tolist(), strict=True)
        body += [Sampled(version, token) for version, token in pairs]
    if len(heads) != 1:
        raise Contradiction(f"its completions are of {len(heads)} groups: {sorted(heads)}")
    ((ticket, attempt, number, incarnation),) = heads
    actor = f"{group.actor.rpartition('-')[0]}-{number}"
    if (ticket, actor) != (group.ticket, group.actor):
        raise Contradiction(f"its tokens say ticket {ticket} by {actor}, its frame ticket {group.ticket} by {group.actor}")
    return Described(ticket, attempt, actor, incarnation, body, np.unique(group.versions).tolist(), int(group.token_ids.size))


def _checksum(prompt: int, seed: int, tokens: NDArray[np.int32], versions: NDArray[np.int32], logprobs: NDArray[np.float32]) -> int:
    where = f"{prompt}/{seed}/".encode()
    return fingerprint(where + tokens.astype("<i4").tobytes() + versions.astype("<i4").tobytes() + logprobs.astype("<f4").tobytes())
