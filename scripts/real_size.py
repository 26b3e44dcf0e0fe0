# SPDX-License-Identifier: Apache-2.0
"""Measure what a large model costs on its way: patched, pruned, saved and loaded, each in a process of its own.

    python scripts/real_size.py

The model is a random Llama of a billion parameters in float32, half of whose heads and neurons go. Memory is the most
that a process had of its own at any time, beyond what it started with: pages of a file that is only read can be
dropped at will, and are not counted. Linux only.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.cli import check_counts, one_line_errors, parse_args, print_table
from hf_vdneuron.latency import measure_latency
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.pruning import prune_model_


#: Where Linux says how much memory of a process is its own.
STATUS = Path("/proc/self/status")
OWN_MEMORY = "RssAnon:"

#: Seconds between two looks at it.
INTERVAL = 0.01

#: Tokens that both models read when they are timed.
NUM_TOKENS = 16


@dataclass
class Sizes:
    """Sizes of the model."""

    hidden_size: int = field(default=2048, metadata={"help": "Width of the residual stream."})
    num_hidden_layers: int = field(default=16, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=32, metadata={"help": "Heads of a layer."})
    num_key_value_heads: int = field(default=8, metadata={"help": "Keys that they share."})
    intermediate_size: int = field(default=8192, metadata={"help": "Neurons of a layer."})
    vocab_size: int = field(default=32_000, metadata={"help": "Tokens."})

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: If one is below 1, or does not divide as it has to.
        """
        check_counts(self, *vars(self))
        # Rotary positions turn the features of a head in pairs, and half of the keys and neurons go.
        for name, step in (
            ("hidden_size", 2 * self.num_attention_heads),
            ("num_attention_heads", self.num_key_value_heads),
            ("num_key_value_heads", 2),
            ("intermediate_size", 2),
        ):
            if getattr(self, name) % step:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected a multiple of {step}")


@dataclass(frozen=True)
class Cost:
    """What a step took.

    Args:
        seconds: How long.
        bytes: Most memory of its own that the process had, beyond what it started with.
    """

    seconds: float
    bytes: int


def own_memory() -> int:
    """Read how many bytes of this process are backed by no file.

    Returns:
        Their number.
    """
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(OWN_MEMORY))
    return 1024 * int(line.split()[1])


def measure(work: Callable[[], object]) -> Cost:
    """Do something, and watch the memory of this process meanwhile.

    Args:
        work: What to do.

    Returns:
        Its cost.
    """
    before, peak, done = own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    try:
        work()
    finally:
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
    return Cost(seconds, max(peak, own_memory()) - before)


def in_own_process(step: Callable[..., Cost], *args: object) -> Cost:
    """Take a step in a new process, where nothing that was there before is let go of meanwhile.

    Args:
        step: What measures itself; a function of a module.
        args: What it is given.

    Returns:
        Its cost.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(step, *args).result()


def half(model: nn.Module) -> RelevanceMask:
    """Keep every other unit of each layer, and one more in each layer than in the one before.

    Args:
        model: The model.

    Returns:
        The mask.
    """
    keep = {}
    for index, part in enumerate(find_sublayers(model)):
        keep[part.path] = torch.ones(len(part.sides), part.num_units, dtype=torch.bool)
        keep[part.path][-1, ::2] = False
        keep[part.path][-1, 0] = index % 2 == 1
    return RelevanceMask(keep)


# ---- Steps, each in a process of its own ----


def build(sizes: Sizes, folder: Path) -> Cost:
    """Make the model and save it.

    Args:
        sizes: Its sizes.
        folder: Where to.

    Returns:
        What that took.
    """

    def work() -> None:
        config = LlamaConfig(**vars(sizes), tie_word_embeddings=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)

    return measure(work)


def patch(folder: Path) -> Cost:
    """Load the model, make it variational and write to each of its parameters, as the first step of training does.

    Args:
        folder: Where it lies.

    Returns:
        What that took.
    """

    @torch.no_grad()
    def work() -> None:
        for parameter in patch_model_(from_pretrained(folder)).parameters():
            parameter.mul_(1)  # until then a weight is a page of the file

    return measure(work)


def prune(folder: Path, pruned: Path) -> Cost:
    """Load the model, cut it and save what is left.

    Args:
        folder: Where it lies.
        pruned: Where what is left goes.

    Returns:
        What that took.
    """

    def work() -> None:
        model = from_pretrained(folder)
        prune_model_(model, half(model))
        model.save_pretrained(pruned)

    return measure(work)


def load(folder: Path) -> Cost:
    """Load a model, pruned or not.

    Args:
        folder: Where it lies.

    Returns:
        What that took.
    """
    return measure(lambda: from_pretrained(folder))


def size(folder: Path) -> int:
    """Count the bytes of all weights in a folder.

    Args:
        folder: The folder.

    Returns:
        Their number.
    """
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def forward_ratio(sizes: Sizes, pruned: Path) -> float:
    """Time a pruned model beside a dense one that was built at its mean sizes, in turns.

    Args:
        sizes: Sizes of the complete model.
        pruned: Folder of the pruned one.

    Returns:
        Seconds of the pruned model over those of the dense one.
    """
    small = LlamaConfig(
        **{
            **vars(sizes),
            "num_attention_heads": sizes.num_attention_heads // 2,
            "num_key_value_heads": sizes.num_key_value_heads // 2,
            "intermediate_size": sizes.intermediate_size // 2,
            "head_dim": sizes.hidden_size // sizes.num_attention_heads,
        },
        tie_word_embeddings=True,
    )
    models = {"dense": AutoModelForCausalLM.from_config(small), "pruned": from_pretrained(pruned)}
    inputs = {"input_ids": torch.ones(1, NUM_TOKENS, dtype=torch.long)}
    seconds = measure_latency(models, inputs)
    return seconds["pruned"] / seconds["dense"]


@one_line_errors
def main(argv: list[str]) -> None:
    """Measure every step, and print the table.

    Args:
        argv: Arguments without the program's name.
    """
    (sizes,) = parse_args((Sizes,), argv, description=__doc__)
    with tempfile.TemporaryDirectory() as root:
        dense, pruned = Path(root, "dense"), Path(root, "pruned")

        costs = {
            "build and save": in_own_process(build, sizes, dense),
            "load": in_own_process(load, dense),
            "load, patch and write": in_own_process(patch, dense),
            "load, prune and save": in_own_process(prune, dense, pruned),
            "load the pruned model": in_own_process(load, pruned),
        }
        whole, left = size(dense), size(pruned)
        ratio = forward_ratio(sizes, pruned)
    rows = [
        [name, f"{cost.seconds:.1f} s", f"{1e-9 * cost.bytes:.2f} GB", f"{cost.bytes / whole:.2f}x"]
        for name, cost in costs.items()
    ]
    print_table(["step", "time", "memory", "of the model"], rows)
    print(f"\nweights: {1e-9 * whole:.2f} GB, pruned {1e-9 * left:.2f} GB ({left / whole:.2f}x)")
    print(f"a forward of the pruned model takes {ratio:.2f} times as long as one of a dense model of its mean sizes")


if __name__ == "__main__":
    main(sys.argv[1:])
