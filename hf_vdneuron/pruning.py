# SPDX-License-Identifier: Apache-2.0
"""Cut masked heads and neurons out of a model: fewer rows, fewer columns, the same outputs.

What a removed unit still emitted, a constant, moves into the bias of the layer that read it. The result is made of
plain torch layers and is an ordinary model of smaller sizes.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.discovered import Discovery, remembered
from hf_vdneuron.exactness import agree, run_alike, tensors_in
from hf_vdneuron.experts import ExpertMatrix, find_module
from hf_vdneuron.layers import DenseLayer, dense_layer, feature_axis
from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
from hf_vdneuron.modeling_vdneuron_structure import FEATURE_COUNTS, rescale_epsilon_, takes_bias_per_head
from hf_vdneuron.patching import unpatch_model_
from hf_vdneuron.precision import leave_mixed_precision_
from hf_vdneuron.structure import as_pruned_model_
from hf_vdneuron.sublayers import Axis, Role, Slice, Sublayer


__all__ = ["features_left", "prune_model_", "prunes_exactly"]


@torch.no_grad()
def prune_model_(model: nn.Module, mask: RelevanceMask | None = None) -> nn.Module:
    """Remove the units that a mask ends, in place and for good.

    In evaluation mode the pruned model computes what the masked model does. A patched model is unpatched first: its
    weights become their posterior means.

    Args:
        model: A patched or dense model of a supported type, or a plain PyTorch chain.
        mask: What to keep; by default the mask that a patched model carries.

    Returns:
        The same model, smaller. A transformers model now saves itself with its structure and loads through
        `hf_vdneuron.from_pretrained`.

    Raises:
        ValueError: If the mask does not fit the model, or leaves a block with fewer units than it can run with; or if
            its units were discovered, and without them it would not say what the masked model says.
    """
    mask = read_mask(model) if mask is None else mask
    _require_enough(model, mask)
    discovery = remembered(model)
    if discovery is not None:
        _require_exact(model, mask, discovery)
    return _cut_units_(unpatch_model_(mask_model_(model, mask)), mask)


@torch.no_grad()
def prunes_exactly(model: PreTrainedModel, mask: RelevanceMask, inputs: Mapping[str, Any]) -> bool:
    """Try a removal on a copy.

    Args:
        model: A patched or dense model; it is left as it is.
        mask: What to keep.
        inputs: Keyword arguments of its forward pass, on its device.

    Returns:
        Whether the pruned model runs and all its outputs, in float32, are those of the masked one.

    Raises:
        OutOfMemoryError: If there is none for it.
    """
    trial = cast(PreTrainedModel, unpatch_model_(mask_model_(deepcopy(model), mask)).float().eval())
    leave_mixed_precision_(trial)
    trial.config.output_attentions = False  # which are those of the heads left
    masked = [value.clone() for value in tensors_in(run_alike(trial, inputs))]
    try:
        pruned = run_alike(_cut_units_(trial, mask), inputs)
        return agree(tensors_in(pruned), masked)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model does that was cut where it cannot be
        return False


def features_left(model: nn.Module, sublayer: Sublayer, kept: Tensor) -> Iterator[tuple[nn.Module, Slice, Tensor]]:
    """List what is left of everything that units are cut out of.

    Args:
        model: A patched or dense model.
        sublayer: A sub-layer of it.
        kept: Indices of the units that stay, in order, shape `(num_kept,)`.

    Yields:
        A module, one of the sub-layer's slices of it, and the features that stay along the axis of all these slices.
    """
    removed = _others(sublayer.num_units, kept)
    # All slices of a fused matrix at once, as a cut moves the features behind it.
    fused: dict[tuple[str, str], list[Slice]] = {}
    for part in sublayer.slices:
        fused.setdefault((part.module, part.parameter), []).append(part)
    for (path, _), parts in fused.items():
        module = find_module(model, path)
        gone = torch.cat([part.features(removed).flatten() for part in parts])
        yield module, parts[0], _others(_num_features(module, parts[0]), gone)


def _num_features(module: nn.Module, part: Slice) -> int:
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        return module.num_features
    values = cast(Tensor, getattr(module, part.parameter))
    return values.shape[-1 if part.role in (Role.NORM, Role.BIAS) else feature_axis(module, part.axis)]


def _require_exact(model: nn.Module, mask: RelevanceMask, discovery: Discovery) -> None:
    """Refuse a removal from a discovered block that does not prove exact, before anything is cut."""
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in discovery.inputs.items()
    }
    if isinstance(model, PreTrainedModel) and not prunes_exactly(model, mask, inputs):
        raise ValueError(
            f"A pruned `{type(model).__name__}` would not say what the masked one says, as what was discovered in it "
            "does not hold for this mask: nothing was cut. Write a row for its model type in "
            "`hf_vdneuron/architectures.py`, or leave blocks out with `exclude` in the config."
        )


def _cut_units_(model: nn.Module, mask: RelevanceMask) -> nn.Module:
    """Cut what a mask ends out of a model of plain layers."""
    for sublayer in find_sublayers(model):
        kept = mask.units_left(sublayer)
        if len(kept) < sublayer.num_units:
            _remove_units_(model, sublayer, kept)
    return as_pruned_model_(model) if isinstance(model, PreTrainedModel) else model


def _require_enough(model: nn.Module, mask: RelevanceMask) -> None:
    """Refuse what could not run, such as a convolution without channels, before anything is cut."""
    for sublayer in find_sublayers(model):
        kept = len(mask.kept_units(sublayer))
        if kept < min(sublayer.minimum, sublayer.num_units):
            raise ValueError(
                f"The mask leaves {kept} {sublayer.unit}s of `{sublayer.path}`, which cannot run with fewer than "
                f"{sublayer.minimum}: keep some more."
            )


def _remove_units_(model: nn.Module, sublayer: Sublayer, kept: Tensor) -> None:
    if sublayer.foldable:
        _fold_constant_(model, sublayer, _others(sublayer.num_units, kept))
    for module, part, features in features_left(model, sublayer, kept):
        _cut_(module, part, features)
    if sublayer.attention is not None:
        _remember_heads_(model.get_submodule(sublayer.attention), sublayer, kept)
    for path, attribute, factor in sublayer.attributes:
        setattr(model.get_submodule(path), attribute, factor * len(kept))


def _remember_heads_(attention: nn.Module, sublayer: Sublayer, kept: Tensor) -> None:
    """Let attention know which of its native heads it kept, if it is handed a bias for each of them."""
    if not takes_bias_per_head(attention):
        return
    heads_per_unit = sublayer.out_side.slices[0].size // sublayer.sides[0].slices[0].size
    heads = (kept.unsqueeze(1) * heads_per_unit + torch.arange(heads_per_unit)).flatten().tolist()
    before = getattr(attention, "kept_heads", range(sublayer.num_units * heads_per_unit))
    vars(attention)["kept_heads"] = [before[head] for head in heads]


def _fold_constant_(model: nn.Module, sublayer: Sublayer, removed: Tensor) -> None:
    """Add what the removed units still emit to the bias of the layer that reads them.

    A unit with a zero out-side emits something that nothing reads, and its product below is zero.
    """
    made, read = (side.slices[0] for side in sublayer.sides)
    reader = dense_layer(model, read.module)
    constant = _constant(model, sublayer)[made.features(removed)]
    # A flattened map gives its reader several features per unit, and a value goes to several heads: the same to each.
    constant = constant.repeat(1, read.size // made.size).flatten()
    columns = _select(reader, Axis.IN, read.features(removed).flatten())
    weight = columns.t() if isinstance(reader, Conv1D) else columns.flatten(2).sum(2) if columns.ndim > 2 else columns
    reader.bias.add_(weight @ constant)  # type: ignore[union-attr]  # a foldable sub-layer's reader has a bias


def _constant(model: nn.Module, sublayer: Sublayer) -> Tensor:
    """Compute what units with zero in-side weights emit: `act(bias)`, or the value bias, shape `(num_features,)`."""
    made = sublayer.sides[0].slices[0]
    maker = dense_layer(model, made.module)
    bias = (
        maker.weight.new_zeros(maker.weight.shape[feature_axis(maker, Axis.OUT)]) if maker.bias is None else maker.bias
    )
    if sublayer.constant is not None:
        outside = model.get_submodule(sublayer.constant.module).get_parameter(sublayer.constant.parameter)
        rows = made.features(torch.arange(sublayer.num_units)).flatten().to(bias.device)
        bias = bias.index_add(0, rows, outside)
    is_map = isinstance(maker, nn.Conv1d | nn.Conv2d)
    # A copy, as an activation may work in place.
    signal = bias.detach().clone().view(1, -1, *(1,) * (maker.weight.ndim - 2 if is_map else 0))
    for path in sublayer.activations:
        signal = _apply_in_eval(attrgetter(path)(model), signal)
    return signal.flatten()


def _apply_in_eval(function: Callable[[Tensor], Tensor], signal: Tensor) -> Tensor:
    """Apply a module or function as it acts in evaluation, where batch norms use their running statistics."""
    if not isinstance(function, nn.Module):
        return function(signal)
    training = function.training
    try:
        return function.eval()(signal)
    finally:
        function.train(training)


def _select(layer: DenseLayer, axis: Axis, features: Tensor) -> Tensor:
    return layer.weight.index_select(feature_axis(layer, axis), features.to(layer.weight.device))


def _cut_(module: nn.Module, part: Slice, kept: Tensor) -> None:
    """Leave one module nothing but some of its features, in place."""
    if part.role is Role.BIAS:
        values = module.get_parameter(part.parameter)
        _replace_(module, part.parameter, values[..., kept.to(values.device)])
        return
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        _cut_norm_(module, kept)
        return
    if part.role is Role.NORM:
        _cut_joint_norm_(module, kept)
        return
    layer = dense_layer(module, "")
    if isinstance(layer, ExpertMatrix):
        layer.replace_(_select(layer, part.axis, kept))
        return
    _replace_(layer, "weight", _select(layer, part.axis, kept))
    if part.axis is Axis.OUT and layer.bias is not None:
        _replace_(layer, "bias", layer.bias[kept.to(layer.bias.device)])
    counts = next(names for kind, names in FEATURE_COUNTS.items() if isinstance(layer, kind))
    setattr(layer, counts[feature_axis(layer, part.axis)], len(kept))
    if part.role is Role.DEPTHWISE:
        layer.in_channels = layer.groups = len(kept)


def _cut_norm_(norm: nn.BatchNorm1d | nn.BatchNorm2d, kept: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = getattr(norm, name)
        if values is not None:
            _replace_(norm, name, values[kept.to(values.device)])
    norm.num_features = len(kept)


def _cut_joint_norm_(norm: nn.Module, kept: Tensor) -> None:
    r"""Take features that are zero out of a norm over all of them, where :math:`n` of :math:`m` are left.

    .. math::
        \frac{w x}{\sqrt{\tfrac1m \sum x^2 + \epsilon}}
        = \frac{\sqrt{m / n}\, w x}{\sqrt{\tfrac1n \sum x^2 + \tfrac mn \epsilon}}
    """
    weight = norm.get_parameter("weight")
    _replace_(norm, "weight", weight[kept.to(weight.device)] * (len(weight) / max(1, len(kept))) ** 0.5)
    rescale_epsilon_(norm, len(weight), len(kept))


def _others(number: int, some: Tensor) -> Tensor:
    """List all but some of a number of units or features, in order."""
    return torch.ones(number, dtype=torch.bool).index_fill_(0, some, False).nonzero()[:, 0]


def _replace_(module: nn.Module, name: str, values: Tensor) -> None:
    """Put smaller values where a parameter or buffer was; a parameter stays as trainable as it was."""
    old = getattr(module, name)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(values, requires_grad=old.requires_grad) if is_parameter else values)
