"""`inspect` shows what a recording holds: every group is found by what is asked of it, and told in full."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from analysis.listing import follow_events
from analysis.recording import Recording
from analysis.text import printable
from protocol import facts
from protocol.errors import ConfigError, JournalError
from tests.analysis.recorded import start

ROOT = Path(__file__).resolve().parent.parent.parent
Inspect = Callable[..., Result]


def rows(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def tickets(result: Result) -> list[int]:
    return [row["ticket"] for row in rows(result)]


# --- the whole


def test_a_recording_is_shown_at_a_glance(eventful: Path, inspect: Inspect) -> None:
    shown = inspect(eventful).stdout
    assert "recorded, journal format" in shown
    assert "8 of 8, 8 batches, 10 versions in 2 lineages" in shown
    assert "18 accepted, 126 tokens" in shown
    assert "max_lag 2" in shown
    found = json.loads(inspect(eventful, "--json").stdout)
    assert found["facts"]["StepCommitted"] == 9
    assert (found["lineages"], found["actors"], found["ended"]) == ([0, 1], ["a", "b"], True)
    assert found["num_events"] == sum(found["facts"].values())


def test_only_the_journal_is_needed(eventful: Path, inspect: Inspect, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(eventful / "journal.sqlite", tmp_path / "bare")
    assert "18 accepted" in inspect(tmp_path / "bare").stdout
    assert len(rows(inspect("groups", tmp_path / "bare", "--json"))) == 18
    assert "not checked" in inspect("verify", tmp_path / "bare").stdout
    shown = inspect("group", tmp_path / "bare", 9).stdout
    assert "9 10 3 11" in shown
    assert "token ids are shown, not text: run.json names no tokenizer.json" in shown


def test_a_run_that_goes_on_is_shown_up_to_now(tmp_path: Path, inspect: Inspect) -> None:
    run = start(tmp_path / "run", 5)
    run.step(0)
    assert "1 of 5, 1 batches" in inspect(tmp_path / "run").stdout
    run.step(1)
    assert "2 of 5, 2 batches" in inspect(tmp_path / "run").stdout
    assert "not ended" in inspect(tmp_path / "run").stdout
    assert {row["outcome"] for row in rows(inspect("groups", tmp_path / "run", "--json"))} == {"consumed", "queued"}
    inspect("verify", tmp_path / "run")
    run.broker.close()


def test_a_directory_without_a_journal_is_refused_with_what_to_give(tmp_path: Path, inspect: Inspect) -> None:
    with pytest.raises(JournalError, match="Give the directory of a run"):
        inspect(tmp_path / "nothing")


# --- groups


def test_groups_tell_who_made_them_from_what_and_what_became_of_them(eventful: Path, inspect: Inspect) -> None:
    found = {(row["ticket"], row["attempt"]): row for row in rows(inspect("groups", eventful, "--json"))}
    mixed = found[9, 1]
    assert (mixed["actor"], mixed["engine"], mixed["oldest_version"], mixed["newest_version"]) == ("a", "scripted/cpu", 2, 3)
    assert (mixed["batch"], mixed["step"], mixed["lag"], mixed["num_tokens"], mixed["reward"]) == (4, 4, 2, 7, 1.0)
    assert mixed["outcome"] == "consumed"
    assert (found[13, 1]["outcome"], found[13, 1]["batch"]) == ("sampled again", None)
    assert (found[13, 2]["outcome"], found[13, 2]["batch"]) == ("consumed", 6)
    line = next(line for line in inspect("groups", eventful, "--ticket", 9).stdout.splitlines() if line.split()[0] == "9")
    assert line.split() == ["9", "1", "a", "scripted/cpu", "2..3", "4", "2", "7", "1.000", "consumed"]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (["--ticket", "13"], [13, 13]),
        (["--batch", "4"], [9, 10]),
        (["--step", "5"], [11, 12]),
        (["--actor", "b"], [0, 4, 5, 11, 12]),
        (["--version", "2"], [9]),
        (["--version", "4"], [13, 15]),
        (["--min-reward", "0.9", "--actor", "b"], [0, 12]),
        (["--max-reward", "0.6", "--batch", "0"], [1]),
        (["--min-lag", "2"], [4, 5, 9, 11, 12]),
        (["--min-lag", "2", "--version", "0"], [4, 5]),
    ],
)
def test_groups_are_found_by_what_is_asked(eventful: Path, inspect: Inspect, condition: list[str], expected: list[int]) -> None:
    assert tickets(inspect("groups", eventful, "--json", *condition)) == expected


def test_refused_results_are_listed_with_their_reasons(eventful: Path, inspect: Inspect) -> None:
    found = [(row["ticket"], row["actor"], row["outcome"]) for row in rows(inspect("groups", eventful, "--refused", "--json"))]
    assert found == [(0, "a", "refused: invalid: malformed"), (0, "b", "refused: already ended"), (14, "a", "refused: stale")]
    assert tickets(inspect("groups", eventful, "--refused", "--actor", "b", "--json")) == [0]
    assert tickets(inspect("groups", eventful, "--refused", "--ticket", 14, "--json")) == [14]


def test_a_list_that_is_cut_off_says_so(eventful: Path, inspect: Inspect) -> None:
    cut = inspect("groups", eventful, "--limit", 3, "--json")
    assert tickets(cut) == [1, 2, 3]
    assert "--limit 0 shows all" in cut.stderr
    assert inspect("groups", eventful, "--limit", 18).stderr == ""
    assert "there is none" in inspect("groups", eventful, "--actor", "nobody").stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["groups", "--version", "77"], "a number from 0 to 9"),
        (["groups", "--refused", "--batch", "1"], "leave out this condition"),
        (["events", "--fact", "StepComitted"], "did you mean StepCommitted"),
        (["events", "--follow", "--until", "3"], "leave out one of them"),
        (["group", "999"], "a ticket from 0 to 17"),
    ],
)
def test_what_cannot_be_found_is_refused_with_what_there_is(eventful: Path, inspect: Inspect, arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inspect(arguments[0], eventful, *arguments[1:])


# --- one ticket


def test_one_ticket_is_told_in_full(eventful: Path, inspect: Inspect) -> None:
    shown = inspect("group", eventful, 9).stdout
    assert "made by    a (scripted/cpu), attempt 1, from versions 2..3, the oldest of step 2" in shown
    assert "batch 4, at steps 4 (lag 2)" in shown
    assert "    | 9+3=" in shown
    assert "completion 1: reward 1, 4 tokens, full" in shown
    assert "logprob" not in shown
    found = json.loads(inspect("group", eventful, 9, "--tokens", "--json").stdout)
    tokens = [token for completion in found["completions"] for token in completion["tokens"]]
    assert [token["version"] for token in tokens] == [2, 2, 2, 2, 3, 3, 3]
    assert all(token["text"] == "0123456789+="[token["id"]] for token in tokens)
    assert all(-1 < token["logprob"] < 0 for token in tokens)
    assert [completion["text"] for completion in found["completions"]] == [
        "".join(token["text"] for token in completion["tokens"]) for completion in found["completions"]
    ]
    assert found["accepted"] > found["issued"]


def test_the_history_of_a_ticket_has_all_its_attempts(eventful: Path, inspect: Inspect) -> None:
    def history(ticket: int) -> list[str]:
        return [event["fact"] for event in json.loads(inspect("group", eventful, ticket, "--json").stdout)["history"]]

    assert history(13) == ["TicketIssued", "GroupAccepted", "TicketRevoked", "TicketIssued", "GroupAccepted", "BatchFormed"]
    assert history(6) == [*["TicketIssued", "AttemptFailed", "TicketRevoked"] * 2, "TicketIssued", "AttemptFailed", "TicketEnded"]
    assert "ticket 6: failed" in inspect("group", eventful, 6).stdout
    assert "ticket 14: expired" in inspect("group", eventful, 14).stdout


def test_without_the_run_s_tokenizer_ids_are_shown_and_the_reason_is_told(copy: Path, inspect: Inspect, tmp_path: Path) -> None:
    digest = json.loads((copy / "run.json").read_text())["policy_files"][0][1][0]
    good = shutil.copy(copy / "blobs" / digest, tmp_path / "good.json")
    (copy / "blobs" / digest).write_bytes(b"{}")
    shown = inspect("group", copy, 9).stdout
    assert "    | 9 10 3 11" in shown
    assert "is damaged; give a copy with --tokenizer" in shown
    (copy / "blobs" / digest).unlink()
    assert "is not among the run's blobs" in inspect("group", copy, 9).stdout
    assert "    | 9+3=" in inspect("group", copy, 9, "--tokenizer", good).stdout
    (tmp_path / "bad.json").write_text("[1, 2]")
    assert "is not a tokenizer file" in inspect("group", copy, 9, "--tokenizer", tmp_path / "bad.json").stdout


def test_texts_cannot_steer_a_terminal() -> None:
    assert printable("one\ntwo\x1b[2J\u202e") == "one\ntwo\\x1b[2J\\u202e"


# --- batches and events


def test_batches_tell_which_steps_used_them(eventful: Path, inspect: Inspect) -> None:
    found = rows(inspect("batches", eventful, "--json"))
    assert [row["tickets"] for row in found[:3]] == [[0, 1], [2, 3], [4, 5]]
    assert [row["steps"] for row in found] == [[step] for step in range(8)]
    assert [row["num_repeated"] for row in found] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert (found[4]["oldest_version"], found[4]["newest_version"], found[4]["lag"], found[4]["reward"]) == (2, 3, 2, 0.75)
    assert "9..10" in inspect("batches", eventful).stdout


def test_events_are_found_by_name_number_and_ticket(eventful: Path, inspect: Inspect) -> None:
    every = rows(inspect("events", eventful, "--json"))
    assert [event["lsn"] for event in every] == list(range(1, len(every) + 1))
    assert [event["lsn"] for event in rows(inspect("events", eventful, "--since", 5, "--until", 7, "--json"))] == [5, 6, 7]
    assert {event["fact"] for event in rows(inspect("events", eventful, "--fact", "StepCommitted", "--json"))} == {"StepCommitted"}
    assert [event["fact"] for event in rows(inspect("events", eventful, "--ticket", 2, "--json"))] == [
        "TicketIssued",
        "GroupAccepted",
        "BatchFormed",
    ]
    assert "TicketEnded      ticket=6 outcome=failed reason=reward raised" in inspect("events", eventful).stdout


def test_following_gives_each_new_event_once_and_ends_with_the_run(tmp_path: Path) -> None:
    run = start(tmp_path / "run", 2)
    moves = iter([lambda: run.step(0), lambda: None, lambda: run.step(1), lambda: run.finish(2)])

    def move() -> None:
        next(moves)()

    with Recording(tmp_path / "run") as recording:
        seen = [entry.lsn for entry in follow_events(recording, None, 1, None, move)]
        assert seen == list(range(1, recording.last_lsn + 1))
        assert isinstance(list(recording.facts())[-1].fact, facts.ActorLeft)
        named = list(follow_events(recording, "StepCommitted", 1, None, lambda: pytest.fail("the run has ended")))
    assert [entry.fact.step for entry in named if isinstance(entry.fact, facts.StepCommitted)] == [0, 1]


def test_help_needs_no_heavy_library() -> None:
    heavy = {"torch", "zmq", "rich", "numpy", "pyarrow", "tokenizers"}
    for command in ([], ["groups"], ["export"]):
        code = (
            f"import sys, cli\nsys.argv = ['cli.py', 'inspect', *{command!r}, '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
            f"print('heavy', *({heavy!r} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "heavy"


# --- a policy that is really trained


def test_a_run_of_real_learner_and_actors_is_whole_and_has_its_texts(
    settings: Callable[..., dict[str, Any]], inspect: Inspect, tmp_path: Path
) -> None:
    from deploy.prepare import prepare_run
    from deploy.wiring import run_serial
    from protocol.config import parse_config

    heard: list[str] = []
    run = prepare_run(parse_config(settings(run={"name": "real", "steps": 3, "seed": 1, "directory": str(tmp_path)})), None, heard.append)
    run_serial(run)
    assert "3 of 3, 3 batches, 4 versions" in inspect(run.path).stdout
    assert "BROKEN" not in inspect("verify", run.path).stdout
    found = json.loads(inspect("group", run.path, 0, "--json").stdout)
    assert found["engine"].startswith("transformers")
    assert found["prompt_text"].startswith("<s>")
    assert len(found["completions"]) == 4
    assert found["without_text"] == ""
