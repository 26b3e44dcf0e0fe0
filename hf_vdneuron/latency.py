# SPDX-License-Identifier: Apache-2.0
"""How long a forward takes, measured on the device at hand: models take turns, so that drift hits them all alike."""

import platform
import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn


__all__ = ["device_name", "measure_latency", "read_clock", "text_inputs"]

#: Forwards of each model before the clock starts: caches fill, kernels are chosen.
WARMUP_ROUNDS = 2

#: Rounds of the clock. The median of 15 turns moves by a few percent on a busy machine.
ROUNDS = 15


def device_name(device: torch.device) -> str:
    """Say what a device is.

    Args:
        device: The device.

    Returns:
        Its type, and the name of the card or the architecture of the machine.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def text_inputs(*, batch_size: int, length: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Make inputs without padding for a model of text; their values do not change its speed.

    Args:
        batch_size: Sequences in the batch.
        length: Tokens of each.
        device: Where to put them.

    Returns:
        Token ids and attention mask, shape `(batch_size, length)`.
    """
    ones = torch.ones(batch_size, length, dtype=torch.long, device=device)
    return {"input_ids": ones, "attention_mask": ones}


@torch.inference_mode()
def measure_latency(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], *, rounds: int = ROUNDS
) -> dict[str, float]:
    """Time models on the same inputs, interleaved.

    Absolute times drift with whatever else the machine does; ratios between models of one call do not.

    Args:
        models: Models by name, all on the device of the inputs; put into evaluation mode.
        inputs: Keyword arguments of a forward.
        rounds: Turns of each model, at least 1.

    Returns:
        Median seconds of one forward, by name.
    """
    device = next(iter(inputs.values())).device
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, model in models.items():
            started = read_clock(device)
            model.eval()(**inputs)
            if turn >= WARMUP_ROUNDS:
                seconds[name].append(read_clock(device) - started)
    return {name: median(values) for name, values in seconds.items()}


def read_clock(device: torch.device) -> float:
    """Read a clock when all that was asked of a device is done.

    Args:
        device: The device.

    Returns:
        Seconds, to be set against those of another reading.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
