# SPDX-License-Identifier: Apache-2.0
"""Where plain PyTorch chains keep their neurons: nested `nn.Sequential` of layers that act on one feature at a time.

Every linear layer or convolution but the last makes a sub-layer: its output neurons or channels are the units, the
next layer's inputs read them. What stands between may mix positions, never features.
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TypeGuard, get_args

from torch import nn

from hf_vdneuron.layers import VariationalLayer
from hf_vdneuron.sublayers import Axis, Role, Side, SideName, Slice, Sublayer, Unit


__all__ = ["find_chain_sublayers"]

_Convolution = nn.Conv1d | nn.Conv2d
_Weighted = nn.Linear | _Convolution

#: Elementwise maps: a constant input gives a constant output, feature by feature.
_ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
#: Poolings give back a constant map unchanged, apart from averages that count the padding.
_POOLINGS = (
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.MaxPool1d,
    nn.MaxPool2d,
)
_NEUTRAL = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Flatten, nn.Identity)


class _Signal(Enum):
    """How features lie in what flows between two layers."""

    NEURONS = auto()
    """Along the last axis."""
    MAP = auto()
    """Along the channel axis, before the positions."""
    FLAT = auto()
    """Along the last axis, the positions of each channel one behind another."""


@dataclass
class _Producer:
    """A layer whose output features have not met their reader yet."""

    path: str
    num_units: int
    signal: _Signal
    norms: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    foldable: bool = True


def find_chain_sublayers(model: nn.Sequential) -> list[Sublayer]:
    """Find the removable neurons and channels of a plain PyTorch chain.

    Args:
        model: Nested `nn.Sequential` of linear layers, ungrouped convolutions, batch norms, elementwise activations,
            poolings, flatten and dropout.

    Returns:
        One sub-layer for each linear layer or convolution but the last, in order.

    Raises:
        TypeError: If the chain holds anything else.
        ValueError: If two neighbouring layers do not fit together, or a layer runs twice.
    """
    sublayers: list[Sublayer] = []
    seen: set[nn.Module] = set()
    producer: _Producer | None = None
    for path, module in _leaves(model):
        if not _is_weighted(module):
            _require_known(path, module)
            if producer is not None:
                _pass_through_(producer, path, module)
            continue
        _require_plain(path, module, seen)
        seen.add(module)
        if producer is not None:
            sublayers.append(_join(producer, path, module))
        is_map = isinstance(module, _Convolution)
        producer = _Producer(path, _num_features(module)[0], _Signal.MAP if is_map else _Signal.NEURONS)
    return sublayers


def _leaves(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """List the steps of a chain in order; an activation may serve several times."""
    leaves: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        is_part = bool(leaves) and path.startswith(f"{leaves[-1][0]}.")  # of a variational layer
        if type(module) is not nn.Sequential and not is_part:
            leaves.append((path, module))
    return leaves


def _is_weighted(module: nn.Module) -> TypeGuard[_Weighted]:
    """Tell whether a module is a layer whose neurons can go; a subclass of one may compute something else."""
    return type(module) in get_args(_Weighted) or isinstance(module, VariationalLayer)


def _require_plain(path: str, layer: _Weighted, seen: set[nn.Module]) -> None:
    if layer in seen:
        raise ValueError(f"Layer `{path}` runs twice in the chain: its inputs and outputs could not be cut apart.")
    if isinstance(layer, _Convolution) and layer.groups != 1:
        raise TypeError(
            f"Convolution `{path}` has `groups={layer.groups}`: its inputs and outputs must be removed together, "
            "which is not supported. Expected `groups=1`."
        )


def _require_known(path: str, module: nn.Module) -> None:
    # Exact classes, as a subclass may compute something else.
    if type(module) not in _ACTIVATIONS + _NORMS + _POOLINGS + _NEUTRAL:
        raise TypeError(
            f"Module `{path}` is a `{type(module).__name__}`, which may mix features. A chain can hold nested "
            "`nn.Sequential` of Linear, Conv1d, Conv2d, BatchNorm, elementwise activations, pooling, Flatten and "
            "Dropout; wrap anything else in a `transformers` model."
        )


def _pass_through_(producer: _Producer, path: str, module: nn.Module) -> None:
    """Note what a module between two layers does to the features and to a constant."""
    if isinstance(module, nn.Flatten) and producer.signal is _Signal.MAP:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise TypeError(f"`{path}` flattens only some axes: expected all but the first, `nn.Flatten()`.")
        producer.signal = _Signal.FLAT
    if isinstance(module, _POOLINGS) and producer.signal is not _Signal.MAP:
        raise TypeError(f"`{path}` pools over the neurons of `{producer.path}`: expected a convolution before it.")
    if isinstance(module, _NORMS):
        if module.num_features != producer.num_units:
            raise ValueError(
                f"Norm `{path}` has {module.num_features} features, but `{producer.path}` makes {producer.num_units}: "
                "expected one feature per neuron or channel."
            )
        producer.norms.append(path)
    if isinstance(module, _NORMS + _ACTIVATIONS):
        producer.activations.append(path)
    producer.foldable &= _keeps_constants(module)


def _keeps_constants(module: nn.Module) -> bool:
    """Tell whether a constant map leaves a module as a constant map that is known in advance."""
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        pads = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        reads_zeros = any(pads) and module.count_include_pad
        return not reads_zeros and getattr(module, "divisor_override", None) is None
    if isinstance(module, _NORMS):
        return module.running_mean is not None  # otherwise evaluation normalises by the batch
    if isinstance(module, _Convolution):
        padding = module.padding
        padded = padding != "valid" if isinstance(padding, str) else any(padding)
        return not (padded and module.padding_mode == "zeros")
    return True


def _num_features(layer: _Weighted) -> tuple[int, int]:
    """Return the numbers of output and input features."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def _features_per_unit(producer: _Producer, path: str, reader: _Weighted) -> int:
    """Count how many inputs of a reader each unit fills: several where a map was flattened."""
    num_inputs = _num_features(reader)[1]
    size, rest = divmod(num_inputs, producer.num_units) if producer.num_units else (1, num_inputs)
    reads_map = isinstance(reader, _Convolution)
    fits = reads_map == (producer.signal is _Signal.MAP) and (size == 1 or producer.signal is _Signal.FLAT)
    if rest or not fits:
        raise ValueError(
            f"Layer `{path}` reads {num_inputs} features of `{producer.path}`, which makes {producer.num_units}: "
            "expected as many, or a whole multiple behind a convolution and `Flatten`."
        )
    return size


def _join(producer: _Producer, path: str, reader: _Weighted) -> Sublayer:
    """Build the sub-layer between a layer and the one that reads it."""
    size = _features_per_unit(producer, path, reader)
    return Sublayer(
        path=producer.path,
        unit=Unit.NEURON,
        num_units=producer.num_units,
        sides=(
            Side(SideName.IN, (Slice(producer.path, Role.INTERMEDIATE, Axis.OUT),)),
            Side(SideName.OUT, (Slice(path, Role.OUTPUT, Axis.IN, size),)),
        ),
        companions=tuple(Slice(norm, Role.NORM, Axis.OUT) for norm in producer.norms),
        activations=tuple(producer.activations),
        foldable=reader.bias is not None and producer.foldable and _keeps_constants(reader),
        minimum=int(producer.signal is not _Signal.NEURONS),  # PyTorch cannot run a convolution without channels
    )
