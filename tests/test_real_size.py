"""`scripts/real_size.py`: memory is that of the process, every step runs, and half of the units go."""

import re
import sys

import numpy as np
import pytest
import real_size
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_vdneuron.architectures import find_sublayers


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux says it")

MEGABYTES = 64


def hold_memory() -> real_size.Cost:
    """Take memory for a while, let go of it, and measure that."""

    def work() -> None:
        block = np.ones(MEGABYTES * 2**20, dtype=np.uint8)
        real_size.time.sleep(50 * real_size.INTERVAL)  # the watcher may have to wait for its turn
        assert block[-1] == 1

    return real_size.measure(work)


def test_memory_that_was_let_go_of_counts() -> None:
    cost = real_size.in_own_process(hold_memory)
    assert cost.bytes == pytest.approx(MEGABYTES * 2**20, rel=0.2)
    assert cost.seconds >= 50 * real_size.INTERVAL


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 0}, "`vocab_size` is 0, expected at least 1"),
        ({"hidden_size": 2016}, "`hidden_size` is 2016, expected a multiple of 64"),
        ({"num_key_value_heads": 5}, "`num_attention_heads` is 32, expected a multiple of 5"),
        ({"num_key_value_heads": 1}, "`num_key_value_heads` is 1, expected a multiple of 2"),
        ({"intermediate_size": 9}, "`intermediate_size` is 9, expected a multiple of 2"),
    ],
    ids=["none", "heads_in_width", "keys_in_heads", "keys", "neurons"],
)
def test_sizes_that_cannot_be_halved_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        real_size.Sizes(**sizes)


def test_half_of_the_units_go_and_layers_differ() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8
    )
    model = AutoModelForCausalLM.from_config(config)
    mask = real_size.half(model)
    assert [len(mask.kept_units(part)) for part in find_sublayers(model)] == [2, 5, 2, 5]
    assert all(torch.equal(keep[0], torch.ones_like(keep[0])) for keep in mask.keep.values())


def test_every_step_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    real_size.main([f"--{name}={value}" for name, value in sizes.items()])
    out = capsys.readouterr().out
    steps = re.findall(r"^(\w[\w, ]+?)  +[\d.]+ s +-?[\d.]+ GB +-?[\d.]+x$", out, flags=re.MULTILINE)
    assert steps == [
        "build and save",
        "load",
        "load, patch and write",
        "load, prune and save",
        "load the pruned model",
    ]
    assert re.search(r"pruned 0\.00 GB \(0\.\d\dx\)", out)
    assert re.search(r"takes \d+\.\d\d times as long", out)
