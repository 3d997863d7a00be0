"""What the instruments of stability cost: seconds of an optimizer step with and without learner.watch, turn and turn about in one process.

    python bench/stability.py [--hidden 512] [--layers 8] [--vocab 8192] [--sequences 32] [--tokens 64] [--steps 2] [--blocks 5] [--lag 8]

The policy has random weights; speed does not depend on their values. On an accelerator the default shape is that of Llama-3.2-1B, and the forward
pass runs in bf16. Printed are medians over the blocks: the step alone, what the watch adds to it (the sketch of the weights, and all the rest:
distances, drift exponent, governor, signs), the ratio, and the bytes per parameter that sketches hold once all that are wanted are held.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.random_policy import SHAPES
from learner.batch import Batch, Sequence
from learner.displacement import RECENT, Sketcher, num_buckets
from learner.ranks import OneRank
from learner.stability.rule import Calibration, Measured
from learner.step import Trainer
from learner.watch import Watch
from protocol.config import LossConfig, parse_config

NUM_STEPS = 10**6
GROUP = 8
WARM_UP = 130
"""Steps of the measures alone before anything is timed: by then every sketch that is wanted is held and the drift exponent is looked at."""


def make_model(options: argparse.Namespace, device: torch.device) -> Any:
    """A Llama with fp32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if options.hidden:
        heads = max(1, options.hidden // 64)
        shape = {
            "hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "num_hidden_layers": options.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": options.vocab,
        }  # fmt: skip
    else:
        shape = SHAPES["1b"]
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=4096)).eval()


def make_batch(options: argparse.Namespace, vocabulary: int, number: int) -> Batch:
    """Random completions of full length, half of whose tokens are of the oldest version allowed."""
    rng = np.random.default_rng(number)
    sequences = [
        Sequence(
            rng.integers(3, vocabulary, 32).astype(np.int32),
            rng.integers(3, vocabulary, options.tokens).astype(np.int32),
            rng.normal(-8, 0.5, options.tokens).astype(np.float32),
            float(rng.standard_normal()),
        )
        for _ in range(options.sequences)
    ]
    old, half = max(0, number - options.lag), options.sequences * options.tokens // 2
    groups = -(-options.sequences // GROUP)
    return Batch(number, sequences, list(range(groups)), [old] * groups, {"reward": 0.4}, {old: half, number: half} if old < number else {})


class Bench:
    """One learner, whose steps are watched or not."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self._options, self._device = options, device
        config = parse_config(
            {
                "run": {"steps": NUM_STEPS},
                "policy": {"max_lag": options.lag},
                "learner": {"lr": 1e-6, "tokens_per_microbatch": options.microbatch},
                "stability": {"governor": "hold", "on_collapse": "continue"},
            }
        )
        model = make_model(options, device)
        calibration = Calibration(batch=Measured(1.0, 0.5, 2.0), horizon=Measured(1e3, 1e3, 1e3))
        parameters = list(model.parameters())
        self.num_weights = sum(parameter.numel() for parameter in parameters)
        self._vocabulary = model.config.vocab_size
        self._trainer = Trainer(model, None, config.learner, LossConfig(), NUM_STEPS, 1.0, OneRank())
        self._watch = Watch(config, model, 0, calibration, OneRank(), ())
        self.num_kept = RECENT + 2 + options.lag
        self.sketcher = Sketcher(parameters, num_buckets(self.num_weights, self.num_kept), OneRank())
        self._step = self._watched = 0
        self._quiet = {"lr": 1e-6, "entropy": 2.0, "kl_behaviour": 0.0, "effective_sample_size": 1.0}

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of a call, with all that it has started on an accelerator."""
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started

    def plain(self) -> float:
        """Seconds of a step that nobody watches."""
        self._step += 1
        batch = make_batch(self._options, self._vocabulary, self._step)
        return self.seconds(lambda: self._trainer.apply(batch, self._step))

    def watched(self) -> tuple[float, float]:
        """Seconds of a step that is watched, and those of them that are the watch's."""
        self._step += 1
        inner: list[float] = []

        def apply(govern: Any) -> dict[str, float]:
            metrics: dict[str, float] = {}
            inner.append(self.seconds(lambda: metrics.update(self._trainer.apply(batch, self._step, govern))))
            return metrics

        batch = make_batch(self._options, self._vocabulary, self._watched)
        whole = self.seconds(lambda: self._watch.step(self._watched, batch, apply))
        self._watched += 1
        return whole, whole - inner[0]

    def warm_up(self) -> None:
        """Fill the windows of the watch, without steps of the optimizer, and take one real step of each kind."""
        nudged = next(iter(self._trainer.model.parameters()))
        for _ in range(WARM_UP):
            with torch.no_grad():
                nudged.view(-1)[:1000] += 1e-5
            batch = make_batch(self._options, self._vocabulary, self._watched)
            self._watch.step(self._watched, batch, lambda govern: self._quiet | {"lr": govern(1e-6, self._quiet)})
            self._watched += 1
        self.plain()
        self.watched()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def run(options: argparse.Namespace) -> dict[str, float]:
    """The figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    bench = Bench(options, device)
    bench.warm_up()
    plain, watched, added, sketch = [], [], [], []
    for _ in range(options.blocks):
        plain.append(statistics.median(bench.plain() for _ in range(options.steps)))
        pairs = [bench.watched() for _ in range(options.steps)]
        watched.append(statistics.median(whole for whole, _ in pairs))
        added.append(statistics.median(own for _, own in pairs))
        sketch.append(statistics.median(bench.seconds(bench.sketcher.sketch) for _ in range(options.steps)))
    bytes_per_bucket = 8 + 4 * (bench.num_kept + 1) + 8  # theta_0 in fp64; those kept and the last update in fp32; two signs
    step, own, sketching = statistics.median(plain), statistics.median(added), statistics.median(sketch)
    return {
        "parameters": bench.num_weights,
        "buckets": bench.sketcher.num_buckets,
        "step without, s": step,
        "step with, s": statistics.median(watched),
        "watch, s": own,
        "watch: sketch, s": sketching,
        "watch: rest, s": own - sketching,
        "watch / step": own / step,
        "with / without": statistics.median(whole / alone for whole, alone in zip(watched, plain, strict=True)),
        "bytes of sketches per parameter": bytes_per_bucket * bench.sketcher.num_buckets / bench.num_weights,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=0 if torch.cuda.is_available() else 512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=512 if torch.cuda.is_available() else 32)
    parser.add_argument("--tokens", type=int, default=256 if torch.cuda.is_available() else 64)
    parser.add_argument("--microbatch", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=2, help="of each kind in a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--lag", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    found = run(options)
    for name, value in found.items():
        print(f"{name:>32}  {value:,}" if isinstance(value, int) else f"{name:>32}  {value:.6g}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
