# SPDX-License-Identifier: Apache-2.0
"""A masked model trained through a pruned one: a step then costs what the pruned model's does.

A masked layer multiplies by its zeros. A pruned twin holds the same numbers without them, so that it gives the same
loss and the same gradients for less, but for the draws of dropout. The masked model stays the one that is trained:
optimizer, checkpoints and masks are its own. Before each forward pass the twin takes over its weights, and behind it
hands back the gradients.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.experts import ExpertMatrix, find_module
from hf_vdneuron.layers import VariationalLayer, VDExpertMatrix, feature_axis
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.pruning import features_left, prune_model_
from hf_vdneuron.sublayers import Axis, Role


__all__ = ["PrunedTwin"]

_LOGGER = logging.getLogger(__name__)

#: Name of a parameter -> axis -> features of it that are left.
_Left = Mapping[str, Mapping[int, Tensor]]


class PrunedTwin:
    """A pruned copy of a masked model, which shares with it all parameters outside of the layers that masks can reach.

    Attributes:
        model: The copy.
    """

    def __init__(self, masked: nn.Module, model: nn.Module, left: _Left) -> None:
        self.model = model
        self._masked = masked
        self._left = left
        # Attention that has lost all of its heads has no parameters.
        self._cut = [(name, parameter) for name, parameter in model.named_parameters() if name in left]
        self._taken: list[Tensor] = []

    @classmethod
    def of_(cls, masked: nn.Module) -> Self | None:
        """Make the twin of a model, whose ended units stop to emit constants: the biases behind them take these over.

        Args:
            masked: A patched model. It computes what it did, and every unit that was ended is so on all sides.

        Returns:
            Its twin. None if the masks end nothing, if removing what they end takes more than leaving features out,
            or, with a warning, if the model cannot be pruned.
        """
        mask = read_mask(masked)
        left = _features_left(masked, mask)
        if left is None or not any(left.values()) or _are_tied(masked, left):
            return None
        tensors = (*masked.named_parameters(), *masked.named_buffers())
        shared = {id(tensor): tensor for name, tensor in tensors if name not in left}
        try:
            model = prune_model_(deepcopy(masked, cast(dict[int, Any], shared)), mask)
        except ValueError as error:
            _LOGGER.warning("Recovery trains the model under its masks, as it cannot be pruned: %s", error)
            return None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias") and name in left:
                    everything = torch.arange(len(parameter), device=parameter.device)
                    masked.get_parameter(name).index_copy_(0, left[name].get(0, everything), parameter)
        mask_model_(masked, RelevanceMask({path: keep.all(0).expand_as(keep) for path, keep in mask.keep.items()}))
        return cls(masked, model, left)

    def take_over_(self) -> None:
        """Take over the weights of the masked model as they are now."""
        layers = {_weight_name(path, layer): layer for path, layer in variational_layers(self._masked).items()}
        self._taken = []
        for name, parameter in self._cut:
            layer = layers.get(name)
            values = self._masked.get_parameter(name) if layer is None else layer.mean
            for axis, features in self._left[name].items():
                values = values.index_select(axis, features)
            if isinstance(layer, VDExpertMatrix):
                values = layer.stored(values)
            parameter.data, parameter.grad = values.detach(), None
            # What is empty would be waited for by data parallelism.
            parameter.requires_grad_(values.requires_grad and values.numel() > 0)
            self._taken.append(values)

    def hand_back_(self) -> None:
        """Add the gradients of a backward pass to those of the masked model, and forget them."""
        pairs = [
            (taken, parameter)
            for taken, (_, parameter) in zip(self._taken, self._cut, strict=True)
            if taken.requires_grad and parameter.grad is not None
        ]
        torch.autograd.backward([taken for taken, _ in pairs], [cast(Tensor, one.grad) for _, one in pairs])
        for _, parameter in pairs:
            parameter.grad = None
        self._taken = []


def _features_left(model: nn.Module, mask: RelevanceMask) -> _Left | None:
    """List what a mask leaves of the parameters that it can reach; None if what it does to them is more than that."""
    left: dict[str, dict[int, Tensor]] = {}
    for path, layer in variational_layers(model).items():
        left |= {_weight_name(path, layer): {}} | ({} if layer.bias is None else {f"{path}.bias": {}})
    for sublayer in find_sublayers(model):
        kept = mask.units_left(sublayer)
        if len(kept) == sublayer.num_units:
            continue
        ends = [find_module(model, part.module) for side in sublayer.sides for part in side.slices]
        if not all(isinstance(module, VariationalLayer) for module in ends):  # any other forgets that it is masked
            return None
        for module, part, features in features_left(model, sublayer, kept):
            if part.role is Role.NORM:
                return None
            name = f"{part.module}.{part.parameter}" if part.role is Role.BIAS else _weight_name(part.module, module)
            axis = -1 if part.role is Role.BIAS else feature_axis(module, part.axis)
            features = features.to(model.get_parameter(name).device)
            left.setdefault(name, {})[axis] = features
            if part.role is not Role.BIAS and getattr(module, "bias", None) is not None:
                left.setdefault(f"{part.module}.bias", {}).update({0: features} if part.axis is Axis.OUT else {})
    return left


def _weight_name(path: str, layer: nn.Module) -> str:
    """Name of the parameter that holds the weight of a layer, or of all experts."""
    return f"{path.rpartition('.')[0]}.{layer.name}" if isinstance(layer, ExpertMatrix) else f"{path}.weight"


def _are_tied(model: nn.Module, left: _Left) -> bool:
    """Tell whether a parameter that masks can reach goes by several names: what one loses, the others may keep."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return any(names[id(model.get_parameter(name))] > 1 for name in left)
