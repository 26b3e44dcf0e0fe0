# SPDX-License-Identifier: Apache-2.0
"""What a run falls back on: the smallest model so far that was good enough, in memory and in its checkpoints."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


__all__ = ["Keepsake"]

#: Its file in a checkpoint.
KEEPSAKE_FILE = "keepsake.safetensors"

#: Where in its metadata the rest is.
FACTS = "facts"


@dataclass
class Keepsake:
    """The smallest model so far that was good enough, which a run that goes wrong ends with.

    Args:
        state: Its state dict, on the CPU; empty before there is one.
        value: Its metric.
        speedup: Dense over kept multiply-accumulates of heads and neurons.
        is_final: Whether no smaller one will be tried.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)
    value: float = 0.0
    speedup: float = 1.0
    is_final: bool = False

    def forget_(self) -> None:
        """Drop what an earlier run kept."""
        self.state, self.value, self.speedup, self.is_final = {}, 0.0, 1.0, False

    def take_(self, model: nn.Module, value: float, speedup: float) -> None:
        """Keep a model as it is now.

        Args:
            model: The model, masks and all.
            value: Its metric.
            speedup: Its speed-up.
        """
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self.value, self.speedup = value, speedup

    def give_back_(self, model: nn.Module) -> None:
        """Make a model the one that was kept, in place.

        Args:
            model: The model.
        """
        model.load_state_dict(self.state)

    def save(self, checkpoint: str | Path) -> None:
        """Put it into a checkpoint, if there is one.

        Args:
            checkpoint: Folder of a checkpoint.
        """
        if self.state:
            facts = {"value": self.value, "speedup": self.speedup, "is_final": self.is_final}
            save_file(dict(self.state), Path(checkpoint) / KEEPSAKE_FILE, {FACTS: json.dumps(facts)})

    def load_(self, checkpoint: str | Path) -> None:
        """Take it back from a checkpoint; it is forgotten where there is none.

        Args:
            checkpoint: Folder of a checkpoint.
        """
        self.forget_()
        path = Path(checkpoint) / KEEPSAKE_FILE
        if path.exists():
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()[FACTS])
                self.state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            self.value, self.speedup, self.is_final = facts["value"], facts["speedup"], facts["is_final"]
