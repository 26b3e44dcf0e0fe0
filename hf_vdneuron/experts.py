# SPDX-License-Identifier: Apache-2.0
"""Experts of a mixture: parameters with an axis for the experts, seen as the matrices of one feed-forward block.

The experts of a layer lie in two parameters, `gate_up_proj` of shape `(experts, 2 * neurons, hidden)` and `down_proj`
of shape `(experts, hidden, neurons)`, and in no layer. Put side by side they are one block whose neurons belong to
some expert each: neuron `i` of expert `e` is unit `e * neurons + i`. `ExpertMatrix` shows either parameter as the
matrix of such a block, so that all that works on matrices works on it.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vdneuron.functional import whole
from hf_vdneuron.modeling_vdneuron_experts import is_experts


__all__ = ["DOWN", "GATE_UP", "ExpertMatrix", "find_module", "set_weight_"]

#: Names of the two matrices below the module that holds the experts.
GATE_UP, DOWN = "gate_up", "down"


class _Storage(NamedTuple):
    """How the parameter of a matrix is laid out: its name, the axis that neurons lie along, and how many times."""

    parameter: str
    axis: int
    halves: int


_STORAGE = {GATE_UP: _Storage("gate_up_proj", 1, 2), DOWN: _Storage("down_proj", 2, 1)}


class ExpertMatrix(nn.Module):
    """One matrix of all experts of a layer, as a linear layer without a bias has it.

    Its rows, of `down` its columns, are those of all experts behind one another: of `gate_up` first every gate, then
    every neuron.

    Args:
        experts: The module that holds the parameters.
        matrix: Which one, `GATE_UP` or `DOWN`.
    """

    bias: Tensor | None = None

    def __init__(self, experts: nn.Module, matrix: str) -> None:
        super().__init__()
        self._owner = (experts,)  # which is no part of it
        self.matrix = matrix

    @property
    def experts(self) -> nn.Module:
        """The module that holds the parameter."""
        return self._owner[0]

    @property
    def name(self) -> str:
        """Name of the parameter there."""
        return _STORAGE[self.matrix].parameter

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, shape `(experts, 2 * neurons, hidden)` or `(experts, hidden, neurons)`."""
        return self.experts.get_parameter(self.name)

    @property
    def weight(self) -> Tensor:
        """A copy of the parameter as a matrix, shape `(out, in)`; gradients go through it."""
        return self.flat(whole(self.parameter))

    def flat(self, stored: Tensor) -> Tensor:
        """Turn values as they are stored into a matrix.

        Args:
            stored: Values in the shape of the parameter.

        Returns:
            Shape `(2 * experts * neurons, hidden)` or `(hidden, experts * neurons)`.
        """
        _, axis, halves = _STORAGE[self.matrix]
        apart = stored.unflatten(axis, (halves, stored.shape[axis] // halves))
        return apart.movedim(0, axis).flatten(axis - 1, axis + 1)

    def stored(self, flat: Tensor) -> Tensor:
        """Turn a matrix into values as they are stored, with as many neurons for each expert as it holds.

        Args:
            flat: Shape `(2 * experts * neurons, hidden)` or `(hidden, experts * neurons)`.

        Returns:
            Values in the shape of the parameter, apart from the number of neurons.
        """
        axis = _STORAGE[self.matrix].axis
        return self._by_expert(flat).movedim(axis, 0).flatten(axis, axis + 1).contiguous()

    def of_expert(self, flat: Tensor, expert: int) -> Tensor:
        """Take the part of one expert out of a matrix.

        Args:
            flat: Shape `(2 * experts * neurons, hidden)` or `(hidden, experts * neurons)`.
            expert: Its index.

        Returns:
            Shape `(2 * neurons, hidden)` or `(hidden, neurons)`.
        """
        axis = _STORAGE[self.matrix].axis
        return self._by_expert(flat).select(axis, expert).flatten(axis - 1, axis)

    def _by_expert(self, flat: Tensor) -> Tensor:
        _, axis, halves = _STORAGE[self.matrix]
        num_experts = self.parameter.shape[0]
        return flat.unflatten(axis - 1, (halves, num_experts, flat.shape[axis - 1] // (halves * num_experts)))

    @torch.no_grad()
    def replace_(self, flat: Tensor) -> None:
        """Give the experts another matrix, with more or fewer neurons or as many, in place.

        Args:
            flat: The matrix.
        """
        old = self.parameter
        stored = self.stored(flat)
        if stored.shape == old.shape:
            old.copy_(stored)
            return
        setattr(self.experts, self.name, nn.Parameter(stored, requires_grad=old.requires_grad))
        _, axis, halves = _STORAGE[self.matrix]
        vars(self.experts)["intermediate_dim"] = stored.shape[axis] // halves

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the matrix: every token meets every expert.

        Args:
            inputs: Shape `(..., in)`.

        Returns:
            Shape `(..., out)`.
        """
        return F.linear(inputs, self.weight)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Look up a module, or a matrix of experts, which is made up where it is no module.

    Args:
        model: Any model.
        path: Path of the module in it; of a matrix the path of the experts, a dot, and `GATE_UP` or `DOWN`.

    Returns:
        The module or the matrix.
    """
    parent, _, name = path.rpartition(".")
    if name in _STORAGE:
        experts = model.get_submodule(parent)
        if is_experts(experts) and name not in experts._modules:
            return ExpertMatrix(experts, name)
    return model.get_submodule(path)


@torch.no_grad()
def set_weight_(layer: nn.Module, weight: Tensor) -> None:
    """Put values into the weight of a layer or a matrix of experts, in place.

    Args:
        layer: The layer.
        weight: Values in the shape of its weight.
    """
    if isinstance(layer, ExpertMatrix):
        layer.replace_(weight)
    else:
        cast(Tensor, layer.weight).copy_(weight)
