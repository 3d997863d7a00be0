"""`replay --actor TICKET`: the real actor generates a recorded group again."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import blake3
import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import cli as command_line
from broker.history import read_history
from deploy.replay_actor import compare, replay_ticket, ticket_lines
from protocol.errors import ConfigError, WeightsError
from protocol.groups import Group, decode_group, encode_group
from protocol.journal import open_read_only, read_payload
from tests.replay.recording import listing

FIRST, LAST = 0, 39
"""Ten batches of four. The first batch is all of version 0, without which there is no other; a later group may span versions."""


def group_of(run: Path, ticket: int) -> Group:
    path = run / "journal.sqlite"
    with closing(open_read_only(path)) as journal:
        payload = read_payload(journal, path, ticket)
    assert payload is not None
    return decode_group(payload)


def put_group(run: Path, group: Group) -> None:
    """Replace the recorded group of its ticket."""
    payload = encode_group(group)
    with closing(sqlite3.connect(run / "journal.sqlite", isolation_level=None)) as journal:
        journal.execute(
            "UPDATE groups SET payload = ?, digest = ? WHERE ticket = ?", (payload, blake3.blake3(payload).digest(), group.ticket)
        )


@pytest.mark.parametrize("ticket", [FIRST, 17, LAST])
def test_the_same_seed_under_the_same_version_gives_the_same_tokens_and_log_probabilities(plain_recording: Path, ticket: int) -> None:
    before = listing(plain_recording)
    found = replay_ticket(plain_recording, ticket, None)
    assert found.is_same
    assert found.recorded.oldest_version == found.again.oldest_version
    assert sum(one.num_comparable for one in found.completions) > 0
    assert all((one.first_difference, one.largest_gap) == (None, 0.0) for one in found.completions)
    if ticket == FIRST:
        np.testing.assert_array_equal(found.again.token_ids, found.recorded.token_ids)
        np.testing.assert_array_equal(found.again.logprobs, found.recorded.logprobs)
    assert found.largest_gap < 1e-4
    assert any("all the same" in line for line in ticket_lines(found))
    assert listing(plain_recording) == before


def test_a_token_that_is_another_one_is_found_at_its_place_and_is_exit_code_6(recording: Path) -> None:
    group = group_of(recording, FIRST)
    tokens = group.token_ids.copy()
    which = int(np.argmax(group.num_tokens > 1))
    place = int(group.num_tokens[:which].sum()) + 1  # the second token of the first completion that has one
    tokens[place] = 3 if tokens[place] != 3 else 4
    put_group(recording, msgspec.structs.replace(group, token_ids=tokens))
    found = replay_ticket(recording, FIRST, None)
    assert [one.first_difference for one in found.completions] == [1 if index == which else None for index in range(4)]
    done = CliRunner().invoke(command_line.app, ["replay", str(recording), "--actor", str(FIRST)])
    assert done.exit_code == 6
    assert f"completion {which}: " in done.output and "another token at place 1" in done.output


def test_a_log_probability_that_is_another_one_is_found(recording: Path) -> None:
    group = group_of(recording, FIRST)
    logprobs = group.logprobs.copy()
    logprobs[0] -= np.float32(0.5)
    put_group(recording, msgspec.structs.replace(group, logprobs=logprobs))
    found = replay_ticket(recording, FIRST, None)
    assert not found.is_same
    assert found.largest_gap == pytest.approx(0.5, abs=1e-3)
    assert found.completions[0].largest_gap == pytest.approx(0.5, abs=1e-3)


def test_a_group_that_spans_versions_is_compared_up_to_the_change_and_scored_under_each(recording: Path) -> None:
    """The last token of every completion is relabelled: what follows the change is not compared, and has the wrong version."""
    group = group_of(recording, FIRST)
    versions, newest = group.versions.copy(), group.oldest_version + 1
    ends = np.cumsum(group.num_tokens) - 1
    versions[ends] = newest
    assert newest in read_history(recording / "journal.sqlite").publications.by_number
    put_group(recording, msgspec.structs.replace(group, versions=versions))
    found = replay_ticket(recording, FIRST, None)
    assert [one.num_comparable for one in found.completions] == (group.num_tokens - 1).tolist()
    assert all(one.first_difference is None for one in found.completions)
    assert found.largest_gap > 0  # by one step of the learner
    assert f"versions {group.oldest_version} to {newest}" in ticket_lines(found)[0]


def test_a_ticket_without_a_group_and_an_engine_that_is_none_are_named(plain_recording: Path) -> None:
    with pytest.raises(ConfigError, match=r"--actor.*4000"):
        replay_ticket(plain_recording, 4000, None)
    with pytest.raises(ConfigError, match="--engine"):
        replay_ticket(plain_recording, 1, "abacus")


def test_a_version_whose_files_are_gone_is_named(recording: Path) -> None:
    blob = read_history(recording / "journal.sqlite").publications.by_number[2].fact.delta
    assert blob is not None
    (recording / "blobs" / blob.digest).unlink()
    with pytest.raises(WeightsError, match=blob.digest[:16]):
        replay_ticket(recording, LAST, None)


def test_a_completion_that_ends_elsewhere_differs_where_the_shorter_one_ends(plain_recording: Path) -> None:
    recorded = group_of(plain_recording, 0)
    lengths = recorded.num_tokens
    keep = np.concatenate([np.arange(start, start + max(1, n - 1)) for start, n in zip(np.cumsum(lengths) - lengths, lengths, strict=True)])
    shorter = msgspec.structs.replace(
        recorded,
        num_tokens=np.maximum(1, lengths - 1),
        token_ids=recorded.token_ids[keep],
        logprobs=recorded.logprobs[keep],
        versions=recorded.versions[keep],
    )
    expected: list[Any] = [int(n) - 1 if n > 1 else None for n in lengths]
    assert [one.first_difference for one in compare(recorded, shorter)] == expected
    assert [one.first_difference for one in compare(shorter, recorded)] == expected


@pytest.mark.system
def test_a_group_of_vllm_is_generated_again_by_vllm(
    soak: bool, train: Callable[..., Any], settings: Callable[..., Any], tiny_policy: Path, tmp_path: Path
) -> None:
    if not soak:
        pytest.skip("starts vLLM twice: with --soak")
    pytest.importorskip("vllm")
    policy = with_wider_heads(tiny_policy, tmp_path / "wide")
    train(settings(run={"steps": 2}, policy={"path": str(policy), "max_lag": 0}, actor={"num_actors": 1, "engine": "vllm"}))
    found = replay_ticket(tmp_path / "run", 0, None)
    assert found.recorded.engine.startswith("vllm") and found.again.engine.startswith("vllm")
    assert found.is_same


def with_wider_heads(policy: Path, folder: Path) -> Path:
    """A random policy with the same tokenizer and heads of 32, for which vLLM has an attention on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(policy, folder)
    config = LlamaConfig.from_pretrained(policy, hidden_size=64, head_dim=32)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
