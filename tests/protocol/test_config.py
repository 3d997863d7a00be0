from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from protocol.config import Config, config_json, load_config, parse_config
from protocol.errors import ConfigError
from protocol.pacing import smallest_max_lag


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("data", "field", "suggestion"),
    [
        ({"learner": {"learning_rate": 1}}, "learner.learning_rate", "known here"),
        ({"learner": {"lrr": 1}}, "learner.lrr", "did you mean 'lr'?"),
        ({"policy": {"max_lagg": 1}}, "policy.max_lagg", "did you mean 'max_lag'?"),
        ({"rollouts": {}}, "rollouts", "did you mean 'rollout'?"),
        ({"steps": 3}, "steps", "known here"),
    ],
)
def test_an_unknown_field_is_named_and_a_known_one_suggested(data: dict[str, Any], field: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(data)
    assert caught.value.field == field
    assert suggestion in caught.value.fix and field in str(caught.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("learner", "lr", -1),
        ("learner", "lr", "fast"),
        ("learner", "schedule", "sometimes"),
        ("rollout", "group_size", 1),
        ("rollout", "group_size", 2.5),
        ("policy", "reuse", 0),
        ("policy", "max_lag", -1),
        ("run", "name", "../escape"),
        ("run", "name", "a\n"),
        ("run", "steps", 0),
        ("loss", "clip_low", 1.0),
        ("broker", "address", "ipc:///tmp/x"),
        ("actor", "num_actors", 5000),
        ("learner", "lr", float("nan")),
    ],
)
def test_a_wrong_value_is_named_with_its_field(section: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({section: {field: value}})
    assert caught.value.field == f"{section}.{field}"
    assert caught.value.value is value or caught.value.value == value
    assert caught.value.problem and caught.value.fix


@pytest.mark.parametrize("section", ["run", "policy", "learner"])
def test_a_section_that_is_no_section_is_a_config_error(section: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({section: 3})
    assert caught.value.field == section


@given(reuse=st.integers(1, 9), sync_every=st.integers(1, 9) | st.none(), max_lag=st.integers(0, 20) | st.none())
def test_a_bound_below_the_smallest_is_refused_and_the_smallest_named(reuse: int, sync_every: int | None, max_lag: int | None) -> None:
    data = {"policy": {"reuse": reuse, "sync_every": sync_every, "max_lag": max_lag}}
    smallest = smallest_max_lag(reuse, reuse if sync_every is None else sync_every)
    if max_lag is not None and max_lag < smallest:
        with pytest.raises(ConfigError) as caught:
            parse_config(data)
        assert caught.value.field == "policy.max_lag" and f"max_lag = {smallest} " in caught.value.fix
    else:
        assert parse_config(data).pacing.max_lag == (smallest if max_lag is None else max_lag)


def test_the_defaults_are_synchronous() -> None:
    pacing = Config().pacing
    assert (pacing.max_lag, pacing.reuse, pacing.sync_every, pacing.window) == (0, 1, 1, 1)


def test_reuse_alone_gives_the_papers_cycles() -> None:
    pacing = parse_config({"policy": {"reuse": 8}}).pacing
    assert (pacing.max_lag, pacing.reuse, pacing.sync_every) == (7, 8, 8)


def test_a_hidden_size_that_heads_cannot_share_is_refused_with_a_size_that_works() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"supervised": {"hidden_size": 100, "heads": 3}})
    assert caught.value.field == "supervised.hidden_size" and "multiple of 6" in caught.value.fix


# --- files and overrides


def test_overrides_win_over_the_file_and_are_read_as_toml(tmp_path: Path) -> None:
    path = written(tmp_path, "[learner]\nlr = 1e-3\n[run]\nname = 'file'\n")
    found = load_config(
        path,
        [
            "learner.lr=1e-5",
            "run.name = spaced ",
            "policy.path=org/model-1",
            "task.name=arithmetic",
            "task.digits=3",
            'run.directory="a b"',
        ],
    )
    assert found.learner.lr == 1e-5 and found.run.name == "spaced" and found.policy.path == "org/model-1"
    assert found.task.options == {"digits": 3} and found.run.directory == "a b"


@pytest.mark.parametrize("override", ["", "lr", "lr=3", "learner.=3", "learner", "=", "."])
def test_an_override_that_is_no_assignment_to_a_field_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, ""), [override])


@pytest.mark.parametrize("override", ["learner.lr.x=3", "nothing.lr=3", "learner.lrr=3", "learner.lr=quick", ".lr=3", "learner.lr="])
def test_a_wrong_override_is_a_config_error_like_a_wrong_line(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, ""), [override])


def test_an_override_of_a_section_that_the_file_made_a_number_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(written(tmp_path, "learner = 3\n"), ["learner.lr=1e-5"])


@pytest.mark.parametrize("text", ["[run\n", "run = ", "a = 1\na = 2\n", "\x00"])
def test_a_file_that_is_no_toml_is_a_config_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert caught.value.field == "config file"


def test_a_file_that_is_not_there_or_no_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path / "bytes.toml"):
        with pytest.raises(ConfigError):
            load_config(path)


def test_a_folder_in_place_of_a_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_config(tmp_path)


# --- JSON


def test_the_default_configuration_survives_json() -> None:
    assert parse_config(json.loads(config_json(Config()))) == Config()


@settings(max_examples=60, deadline=None)
@given(
    lr=st.floats(1e-12, 10),
    seed=st.integers(0, 2**62),
    window=st.integers(1, 4),
    options=st.dictionaries(
        st.sampled_from(["digits", "path", "rows"]),
        st.integers() | st.text(max_size=5) | st.booleans() | st.lists(st.integers(), max_size=3),
    ),
)
def test_a_configuration_survives_json(lr: float, seed: int, window: int, options: dict[str, Any]) -> None:
    original = parse_config({"learner": {"lr": lr}, "run": {"seed": seed}, "policy": {"window": window}, "task": {"name": "x", **options}})
    found = parse_config(json.loads(config_json(original)))
    assert found == original and found.task.options == options


@pytest.mark.parametrize(
    ("section", "field"), [("loss", "importance_cap"), ("loss", "clip_high"), ("learner", "max_grad_norm"), ("learner", "lr")]
)
def test_an_infinite_value_is_refused_or_survives_json(section: str, field: str) -> None:
    try:
        original = parse_config({section: {field: float("inf")}})
    except ConfigError as error:
        assert error.field == f"{section}.{field}"
        return
    assert parse_config(json.loads(config_json(original))) == original


def test_a_configuration_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.steps = 3  # type: ignore[misc]


def test_every_field_has_a_default_so_that_an_empty_file_is_a_run(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == Config()
    for name, hint in typing.get_type_hints(Config).items():
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            assert isinstance(getattr(Config(), name), hint)


@pytest.mark.parametrize("text", ["[" * 2000, "{a = " * 2000, "9" * 5000, "0x" + "f" * 5000, "[" * 900 + "]" * 900])
def test_numbers_and_nesting_without_end_are_a_config_error_in_a_file_and_in_an_override(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[run]\nseed = {text}\n")
    with pytest.raises(ConfigError):
        load_config(path)
    with pytest.raises(ConfigError):
        load_config(path, [f"run.seed={text}"])


@pytest.mark.parametrize("field", ["run.seed", "run.steps", "policy.max_lag", "rollout.groups_per_batch"])
def test_a_number_that_no_message_can_carry_is_refused_with_its_field(field: str) -> None:
    section, _, name = field.partition(".")
    with pytest.raises(ConfigError) as caught:
        parse_config({section: {name: (1 << 62) + 1}})
    assert caught.value.field == field


@pytest.mark.parametrize("text", ["limit = 0x" + "f" * 5000, ".".join("a" * 400) + " = 1"])
def test_options_of_a_task_that_json_cannot_hold_are_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f"[task]\nname = 'other'\n{text}\n")
    with pytest.raises(ConfigError, match="other"):
        config_json(load_config(path))


def test_a_run_s_own_configuration_reads_as_a_file_and_takes_overrides(tmp_path: Path) -> None:
    original = parse_config({"task": {"name": "arithmetic", "digits": 1}, "learner": {"lr": 3e-5}, "policy": {"reuse": 4}})
    path = tmp_path / "config.json"
    path.write_text(config_json(original))
    assert load_config(path) == original
    assert load_config(path, ["run.steps=7", "policy.reuse=2"]).pacing.num_steps == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"run": ', "is not valid JSON"),
        ("[run]\nsteps = 3\n", "is not valid JSON"),
        ("[]", "is not an object of sections"),
        ("null", "is not an object of sections"),
        ('"text"', "is not an object of sections"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_json_file_that_is_no_configuration_is_a_config_error(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    for overrides in ([], ["run.steps=3"]):
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        assert (caught.value.field, caught.value.value) == ("config file", str(path))
        assert said in caught.value.problem


def test_numbers_that_are_no_json_are_refused_by_their_field(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"learner": {"lr": NaN}}')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.field == "learner.lr"
