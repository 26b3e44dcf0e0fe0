# SPDX-License-Identifier: Apache-2.0
r"""What the features that a layer reads depend on: the gradients that are not zero tell.

Dependence is structural, so that one forward pass with random weights shows it; gradients of zero are exact zeros.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_vdneuron.exactness import run_alike, tensors_in
from hf_vdneuron.layers import DenseLayer, feature_axis
from hf_vdneuron.sublayers import Axis


__all__ = ["Dependence", "Rows", "randomised_twin"]

#: Seed of weights and directions that are drawn: what is found does not depend on it, but for a dead ReLU.
_SEED = 0

#: Standard deviation of norms and biases around their mean; weights are drawn so that signals keep their size.
_JITTER = 0.2

Rows = Mapping[str, tuple[int, ...]]
"""Name of a parameter -> those of its output features that something depends on, if it is some of them and not all."""


def randomised_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model and draw all its parameters anew, so that none is zero by accident.

    Args:
        model: Any model.

    Returns:
        A copy in float32, in evaluation mode, that attends in the one way that any model knows. Its activations are
        smooth where they are modules.
    """
    twin = deepcopy(model).float().eval().requires_grad_(True)
    twin.set_attn_implementation("eager")
    twin.config.output_attentions = False
    for module in list(twin.modules()):
        # What is off for all examples depends on nothing.
        smooth = {name: nn.SiLU() for name, child in module.named_children() if isinstance(child, nn.ReLU | nn.ReLU6)}
        for name, activation in smooth.items():
            setattr(module, name, activation)
    random = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in twin.parameters():
            drawn = torch.randn(parameter.shape, generator=random).to(parameter.device)
            is_vector = parameter.ndim < 2
            fan_in = max(1, prod(parameter.shape[1:]))
            parameter.copy_(parameter.mean() + _JITTER * drawn if is_vector else drawn / fan_in**0.5)
    return twin


class Dependence:
    """Runs a model once, and answers what the inputs of its layers depend on.

    Args:
        model: A dense model without accidental zeros, such as a `randomised_twin`.
        inputs: Keyword arguments of its forward pass, on its device: two examples are enough.

    Attributes:
        model: The model.
        layers: Path -> linear layer or convolution.
        read: Path of a layer -> what it reads in each of its passes; in the order of the forward pass.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
        self.model = model
        self.layers: dict[str, DenseLayer] = {
            path: module for path, module in model.named_modules() if isinstance(module, get_args(DenseLayer))
        }
        self.read: dict[str, list[Tensor]] = {}
        self._inputs = dict(inputs)
        self._random = torch.Generator().manual_seed(_SEED)
        self._watch_()

    def _watch_(self) -> None:
        with ExitStack() as hooks:
            for path, layer in self.layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(self._note_, path)))
            run_alike(self.model, self._inputs)

    def _note_(self, path: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.read.setdefault(path, []).append(args[0])

    def num_features(self, reader: str) -> int:
        """Count the features that a layer reads.

        Args:
            reader: Its path.

        Returns:
            Their number.
        """
        layer = self.layers[reader]
        return layer.weight.shape[feature_axis(layer, Axis.IN)]

    def num_positions(self, reader: str) -> int:
        """Count the positions at which a layer works in one pass.

        Args:
            reader: Its path.

        Returns:
            Their number, over all examples.
        """
        return self.read[reader][0].numel() // max(1, self.num_features(reader))

    def rows(self, reader: str, feature: int) -> Rows:
        """List which rows of which weights a feature depends on.

        Tokens are no units, and the bias of a layer goes with its rows: neither is listed.

        Args:
            reader: Path of the layer that reads it.
            feature: Its index.

        Returns:
            Rows of layers and of parameters outside of them, from the nearest module that holds some.
        """
        read = self.read[reader][0]
        if not read.requires_grad:
            return {}
        signal = self._project([read.select(self._feature_axis(reader), feature)])
        for scope in self._scopes(reader):
            rows = self._rows_within(scope, signal)
            if any(name.rpartition(".")[0] in self.layers for name in rows):
                return rows
        return {}

    def _scopes(self, reader: str) -> Iterator[str]:
        """List the prefixes of the modules around a layer that stand in a list, nearest first, then the model's."""
        path = reader
        while path:
            path, _, name = path.rpartition(".")
            if isinstance(self.model.get_submodule(path), nn.ModuleList):
                yield f"{path}.{name}."
        yield ""

    def _rows_within(self, scope: str, signal: Tensor) -> Rows:
        weights = {
            name: value
            for name, value in self.model.named_parameters()
            if name.startswith(scope) and value.ndim and not self._says_nothing(name)
        }
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            signal, list(weights.values()), retain_graph=True, allow_unused=True
        )
        rows = {}
        for name, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                continue
            depends = torch.atleast_2d(gradient.movedim(self._out_axis(name), -1)).ne(0).flatten(0, -2).any(0)
            if depends.any() and not depends.all():
                rows[name] = tuple(depends.nonzero().flatten().tolist())
        return rows

    def _says_nothing(self, name: str) -> bool:
        # The bias of keys has a gradient of zero but for rounding, as attention does not depend on it.
        owner, _, parameter = name.rpartition(".")
        is_bias = owner in self.layers and parameter != "weight"
        return is_bias or isinstance(self.model.get_submodule(owner), nn.Embedding)

    def _out_axis(self, name: str) -> int:
        """Tell along which axis of a parameter output features lie: of what is in no layer, along the last one."""
        layer = self.layers.get(name.rpartition(".")[0])
        return -1 if layer is None else feature_axis(layer, Axis.OUT)

    def is_read_elsewhere(self, reader: str, makers: Collection[str]) -> bool:
        """Tell whether anything but one layer reads what others make for it.

        Args:
            reader: Path of the layer.
            makers: Names of the parameters that make the features that it reads.

        Returns:
            Whether other layers, or the outputs of the model, still depend on these when the layer does not.
        """
        between = {reader, *(name.rpartition(".")[0] for name in makers)}
        seen: list[Tensor] = []
        with ExitStack() as hooks:
            for path, layer in self.layers.items():
                if path not in between:
                    hooks.enter_context(layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
            hooks.enter_context(
                self.layers[reader].register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
            )
            seen += tensors_in(run_alike(self.model, self._inputs))
        signal = self._project(value for value in seen if value.requires_grad)
        parameters = [self.model.get_parameter(name) for name in makers]
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(signal, parameters, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    @torch.no_grad()
    def is_ended_by(self, reader: str, maker: str, rows: Tensor) -> bool:
        """Tell whether what a layer reads says nothing any more without some rows of another.

        Args:
            reader: Path of the layer.
            maker: Path of the other layer.
            rows: Its rows, integer, shape `(num_rows,)`.

        Returns:
            Whether every feature is the same at all positions of all examples once they are zero.
        """
        layer, read = self.layers[maker], list[Tensor]()
        without = {f"{maker}.weight": layer.weight.index_fill(feature_axis(layer, Axis.OUT), rows, 0)}
        if layer.bias is not None:
            without[f"{maker}.bias"] = layer.bias.index_fill(0, rows, 0)
        with self.layers[reader].register_forward_pre_hook(lambda _, args: read.append(args[0])):
            run_alike(self.model, self._inputs, without)
        features = read[0].movedim(self._feature_axis(reader), -1).flatten(0, -2)
        return torch.allclose(features, features[:1].expand_as(features))

    def _feature_axis(self, reader: str) -> int:
        return 1 if isinstance(self.layers[reader], nn.Conv1d | nn.Conv2d) else -1

    def _project(self, values: Iterable[Tensor]) -> Tensor:
        """Sum values with random weights, so that no two of them cancel."""
        return torch.stack([
            (value * torch.randn(value.shape, generator=self._random).to(value.device)).sum() for value in values
        ]).sum()
