# SPDX-License-Identifier: Apache-2.0
r"""How sharply the loss of a fine-tuned model depends on its weights, and on the scales of its heads and neurons.

Near a minimum the expected loss of a posterior around it is that of the minimum plus
:math:`\tfrac12 \sum h\, s^2` over weights and :math:`\tfrac12 \sum H_g (\gamma_g - 1)^2` over groups. Both curvatures
are estimated by squared gradients of single examples, the diagonal of the empirical Fisher information.

What a unit always says, whatever the input, the bias of the layer that reads it can say instead. So the scale of what
is read counts for its deviations from its mean alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.layers import VariationalLayer, feature_axis
from hf_vdneuron.sublayers import Axis
from hf_vdneuron.variational_experts import all_experts


__all__ = ["Batches", "Curvature", "Loss", "estimate_curvature"]

#: Keyword arguments of a forward, labels among them, batch by batch; tensors have the batch along their first axis.
Batches = Iterable[Mapping[str, Any]]

#: Function `(model, batch) -> loss`, a scalar that is a mean over the examples of the batch.
Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Curvature:
    """Second derivatives of the loss of one example, mean over examples, from first ones.

    Args:
        weights: Path of each variational layer -> second derivative by each of its weights, in their shape, not
            negative.
        scores: Path of each variational layer -> first derivative of each example's loss by the scale of each group's
            means, shape `(num_examples, num_groups)`; with a layer that reads units and has a bias, while this takes
            over what is constant.
    """

    weights: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """Path of each variational layer -> second derivative by each scale, shape `(num_groups,)`."""
        return {path: scores.square().mean(0) for path, scores in self.scores.items()}


class _Call(NamedTuple):
    """One use of a layer in a forward: what goes in and comes out, in the graph of the loss."""

    path: str
    inputs: Tensor
    outputs: Tensor


class _Signals(NamedTuple):
    """What goes through a layer, and the gradients of the loss by it; by inputs only if they are units."""

    inputs: Tensor
    outputs: Tensor
    by_outputs: Tensor
    by_inputs: Tensor | None = None


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Let a model compute the loss of its batch.

    Args:
        model: The model.
        batch: Keyword arguments of its forward, labels among them.

    Returns:
        The loss.

    Raises:
        ValueError: If it gives none.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ValueError(f"A batch with {', '.join(batch)} gives no loss: expected `labels` in every batch.")
    return loss


def estimate_curvature(model: nn.Module, batches: Batches, *, loss: Loss = own_loss) -> Curvature:
    r"""Estimate the curvature of the loss from gradients of single examples.

    .. math::
        h_{ij} = \mathbb E_n \sum_t \delta_{nti}^2 x_{ntj}^2, \qquad
        H_g = \mathbb E_n \Big( \sum_{ij \in g} \mu_{ij} \frac{\partial L_n}{\partial \mu_{ij}} \Big)^2

    for inputs :math:`x` and gradients :math:`\delta` of the outputs at position :math:`t` of example :math:`n`. Over
    positions the squares are summed, as noise is drawn per position in training (Kingma 2015). Where a linear layer
    reads the units of :math:`g` and has a bias, this keeps its outputs what they are on average while the scale moves:

    .. math:: H_g = \mathbb E_n \Big( \sum_{ij \in g} \mu_{ij} \sum_t \delta_{nti} (x_{ntj} - \bar x_j) \Big)^2

    with the mean :math:`\bar x` over all positions that the loss depends on (11).

    Args:
        model: A patched model; put into evaluation mode.
        batches: Examples with labels.
        loss: Its loss of a batch; by default what its forward returns as `loss`. A mean over tokens counts long
            examples for more.

    Returns:
        The curvature of every variational layer.

    Raises:
        ValueError: If there is no batch, or one gives no loss.

    References:
        Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", 2022,
        https://arxiv.org/abs/2204.09656, whose diagonal Fisher information of masks is :math:`H_g` on the out-side,
        with no bias to help.
    """
    model.eval()
    layers = variational_layers(model)
    weights = {path: torch.zeros_like(layer.log_var, requires_grad=False) for path, layer in layers.items()}
    scores = {path: _Scores(layer) for path, layer in layers.items()}
    count = 0
    for batch in batches:
        calls, total, size = _forward(model, layers, batch, loss)
        for path, signals in _signals(calls, total, layers):
            squares = (signals.inputs.square(), signals.by_outputs.square())
            with torch.autocast(signals.inputs.device.type, enabled=False):  # squares take twice the exponents
                weights[path] += layers[path].weight_gradient(*squares)
            scores[path].add(signals, first=count, batch_size=size)
        count += size
    if count == 0:
        raise ValueError("There is no batch: expected at least one, and a few hundred examples in all.")
    return Curvature(
        {path: total / count for path, total in weights.items()},
        {path: its.value(count) for path, its in scores.items()},
    )


def _forward(
    model: nn.Module, layers: Mapping[str, VariationalLayer], batch: Mapping[str, Any], loss: Loss
) -> tuple[list[_Call], Tensor, int]:
    """Run a batch, and note what goes through each layer, the loss summed over examples, and their number."""
    calls: list[_Call] = []

    def let_in(_: VariationalLayer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():  # whatever the model does without
            # A copy, so that the gradient is by what this layer alone reads.
            return (_with_gradient(inputs[0]).clone(), *inputs[1:])

    def note(layer: VariationalLayer, inputs: tuple[Tensor, ...], outputs: Tensor, *, path: str) -> Tensor:
        noted = _with_gradient(outputs)
        calls.append(_Call(path, inputs[0], noted))
        with torch.enable_grad():
            return noted.clone()  # as what comes next may work in place

    with ExitStack() as hooks, torch.enable_grad(), all_experts(model):
        for path, layer in layers.items():
            if _reads_units(layer):
                hooks.callback(layer.register_forward_pre_hook(let_in).remove)
            hooks.callback(layer.register_forward_hook(partial(note, path=path)).remove)
        mean = loss(model, batch)
        size = next(len(values) for values in batch.values() if isinstance(values, Tensor) and values.ndim)
        return calls, size * mean, size


def _with_gradient(signal: Tensor) -> Tensor:
    """Put what has no gradient, in a model that is frozen in part or whole, at the start of a graph."""
    return signal if signal.requires_grad else signal.detach().requires_grad_()


def _reads_units(layer: VariationalLayer) -> bool:
    """Tell whether the groups of a layer are what it reads, or what it makes."""
    return layer.group_axis != feature_axis(layer, Axis.OUT)


def _signals(
    calls: list[_Call], total: Tensor, layers: Mapping[str, VariationalLayer]
) -> Iterator[tuple[str, _Signals]]:
    """Go back through the graph of a loss; yield path and signals call by call, and forget them."""
    readers = [call for call in calls if _reads_units(layers[call.path])]
    ends = [call.outputs for call in calls] + [call.inputs for call in readers]
    # The loss of one example depends on its own activations only.
    # What nothing reads any more, behind an earlier cut, has no gradient.
    gradients = [*torch.autograd.grad(total, ends, materialize_grads=True)]
    del ends, readers
    while calls:
        path, inputs, outputs = calls.pop()
        by_inputs = gradients.pop() if _reads_units(layers[path]) else None
        by_outputs = gradients.pop(len(calls))
        # Narrower floats than those of the posterior do not hold sums over all positions.
        given = [signal for signal in (inputs, outputs, by_outputs, by_inputs) if signal is not None]
        yield path, _Signals(*(signal.detach().to(layers[path].log_var) for signal in given))


class _Scores:
    """Derivatives of the loss of each example by the scales of a layer, put together call by call.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: VariationalLayer) -> None:
        self.layer = layer
        is_linear = isinstance(layer, nn.Linear | Conv1D)
        #: Whether the bias can say what the inputs say on average; behind a padded convolution it cannot at the edges.
        self.is_centred = _reads_units(layer) and is_linear and layer.bias is not None
        # By the number of the first example of a batch: a layer can be called several times in one.
        self.by_group: dict[int, Tensor] = {}
        self.slopes: dict[int, Tensor] = {}
        self.total, self.num_positions = torch.zeros(()), 0

    def add(self, signals: _Signals, *, first: int, batch_size: int) -> None:
        """Count a call in, for examples that begin with the one numbered `first`."""
        by_example = partial(self._by_example, batch_size=batch_size)
        if signals.by_inputs is None:
            by_feature = by_example(signals.outputs * signals.by_outputs)
            if self.layer.bias is not None:  # which no scale scales
                by_feature = by_feature - self.layer.bias.detach() * by_example(signals.by_outputs)
        else:
            by_feature = by_example(signals.inputs * signals.by_inputs)
            self.slopes[first] = by_example(signals.by_inputs) + self.slopes.get(first, 0)
        self.by_group[first] = self.layer.prior.sum_groups(by_feature) + self.by_group.get(first, 0)
        if self.is_centred:
            matters = signals.by_outputs.ne(0).any(-1)
            self.total = self.total.to(signals.inputs) + signals.inputs[matters].sum(0)
            self.num_positions += int(matters.sum())

    def _by_example(self, signal: Tensor, batch_size: int) -> Tensor:
        """Sum over the positions of each example, shape `(batch_size, num_features)`."""
        axis = 1 if isinstance(self.layer, nn.Conv1d | nn.Conv2d) else signal.ndim - 1
        by_feature = signal.movedim(axis, 1).unsqueeze(-1).flatten(2).sum(2)
        if len(by_feature) % batch_size == 0:  # tokens or windows of all examples can lie along one axis
            by_feature = by_feature.unflatten(0, (batch_size, len(by_feature) // batch_size)).sum(1)
        return by_feature

    def value(self, num_examples: int) -> Tensor:
        """Put all together, shape `(num_examples, num_groups)`."""
        if not self.by_group:  # of a layer that no example comes to
            return self.layer.log_var.new_zeros(num_examples, self.layer.prior.num_groups)
        scores = torch.cat(list(self.by_group.values()))
        if not (self.is_centred and self.num_positions):
            return scores
        constant = torch.cat(list(self.slopes.values())) * (self.total / self.num_positions)
        return scores - self.layer.prior.sum_groups(constant)
