"""Where the learner computes: what the configuration names, or a clear word on why not."""

from __future__ import annotations

import pytest
import torch

from deploy.wiring import learner_device
from protocol.config import parse_config
from protocol.errors import ConfigError


def test_a_device_that_torch_knows_is_taken() -> None:
    assert learner_device(parse_config({"learner": {"device": "cpu"}})) == torch.device("cpu")


@pytest.mark.parametrize("device", ["bogus", "cpu:x", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])])
def test_a_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    with pytest.raises(ConfigError, match=f"learner.device = '{device}'"):
        learner_device(parse_config({"learner": {"device": device}}))
