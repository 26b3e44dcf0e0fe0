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
        share_left: Share of what can be removed that it has left.
        too_small: Largest share that was found not good enough, 0 before there is one.
        is_final: Whether no other size will be tried.
    """

    state: Mapping[str, Tensor] = field(default_factory=dict)
    value: float = 0.0
    share_left: float = 1.0
    too_small: float = 0.0
    is_final: bool = False

    def forget_(self) -> None:
        """Drop what an earlier run kept."""
        self.__dict__.update(Keepsake().__dict__)

    @property
    def next_share(self) -> float:
        """Share to try next: in the middle between what was good enough and what was not."""
        return (self.share_left + self.too_small) / 2

    def take_(self, model: nn.Module, value: float, share_left: float) -> None:
        """Keep a model as it is now.

        Args:
            model: The model, masks and all.
            value: Its metric.
            share_left: Share of what can be removed that it has left.
        """
        self.state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        self.value, self.share_left = value, share_left

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
            facts = {name: fact for name, fact in self.__dict__.items() if name != "state"}
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
                self.__dict__.update(json.loads(file.metadata()[FACTS]))
                self.state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
