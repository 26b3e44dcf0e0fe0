# SPDX-License-Identifier: Apache-2.0
"""Where plain PyTorch chains keep their neurons: nested `nn.Sequential` of layers that act on one feature at a time.

Every linear layer or convolution but the last makes a sub-layer: its output neurons or channels are the units, the
next layer's inputs read them. What stands between may mix positions, never features.
"""

from dataclasses import dataclass, field

from torch import nn

from hf_vdneuron.sublayers import Axis, Role, Side, SideName, Slice, Sublayer, Unit


__all__ = ["find_chain_sublayers"]

_Weighted = nn.Linear | nn.Conv1d | nn.Conv2d

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


@dataclass
class _Producer:
    """A layer whose output features have not met their reader yet."""

    path: str
    num_units: int
    norms: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    padded: bool = False


def _leaves(model: nn.Sequential, prefix: str = "") -> list[tuple[str, nn.Module]]:
    found = []
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        found += _leaves(child, f"{path}.") if type(child) is nn.Sequential else [(path, child)]
    return found


def _is_zero_padded(module: nn.Module) -> bool:
    """Tell whether a layer reads zeros beyond the border, where a constant map stops being constant."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        padding = module.padding
        padded = padding != "valid" if isinstance(padding, str) else any(padding)
        return padded and module.padding_mode == "zeros"
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        return any(padding) and module.count_include_pad
    return False


def _num_features(module: _Weighted) -> tuple[int, int]:
    """Return the numbers of output and input features."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels


def _join(producer: _Producer, path: str, reader: _Weighted) -> Sublayer:
    """Build the sub-layer between a layer and the one that reads it."""
    num_inputs = _num_features(reader)[1]
    # A flattened map gives its reader several inputs per channel, one behind another.
    size, rest = divmod(num_inputs, producer.num_units)
    if rest:
        raise ValueError(
            f"Layer `{path}` reads {num_inputs} features, which is not a multiple of the {producer.num_units} that "
            f"`{producer.path}` makes: the chain does not run in the order of its modules."
        )
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
        foldable=reader.bias is not None and not producer.padded and not _is_zero_padded(reader),
    )


def find_chain_sublayers(model: nn.Sequential) -> list[Sublayer]:
    """Find the removable neurons and channels of a plain PyTorch chain.

    Args:
        model: Nested `nn.Sequential` of linear layers, ungrouped convolutions, batch norms, elementwise activations,
            poolings, flatten and dropout.

    Returns:
        One sub-layer for each linear layer or convolution but the last, in order.

    Raises:
        TypeError: If the chain holds anything else.
        ValueError: If two neighbouring layers do not fit together.
    """
    sublayers: list[Sublayer] = []
    producer: _Producer | None = None
    for path, module in _leaves(model):
        if isinstance(module, _Weighted):
            _require_ungrouped(path, module)
            if producer is not None:
                sublayers.append(_join(producer, path, module))
            producer = _Producer(path, _num_features(module)[0])
        elif isinstance(module, _ACTIVATIONS + _NORMS + _POOLINGS + _NEUTRAL):
            if producer is not None:
                _pass_through_(producer, path, module)
        else:
            raise TypeError(
                f"Module `{path}` is a `{type(module).__name__}`, which may mix features. A chain can hold nested "
                "`nn.Sequential` of Linear, Conv1d, Conv2d, BatchNorm, elementwise activations, pooling, Flatten and "
                "Dropout; wrap anything else in a `transformers` model."
            )
    return sublayers


def _require_ungrouped(path: str, module: _Weighted) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
        raise TypeError(
            f"Convolution `{path}` has `groups={module.groups}`: its inputs and outputs must be removed together, "
            "which is not supported. Expected `groups=1`."
        )


def _pass_through_(producer: _Producer, path: str, module: nn.Module) -> None:
    """Note what a module between two layers does to a constant."""
    if isinstance(module, _NORMS):
        producer.norms.append(path)
    if isinstance(module, _NORMS + _ACTIVATIONS):
        producer.activations.append(path)
    producer.padded |= _is_zero_padded(module)
