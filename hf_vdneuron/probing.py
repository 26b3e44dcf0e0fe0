# SPDX-License-Identifier: Apache-2.0
"""Find the heads and neurons of any model by what its features depend on, without knowing a name in it.

A neuron depends on one row of each matrix before it; the features of a head on a block of query and key rows, the same
for all of them, and on one value row each. A residual stream or a norm over features depends on every row, and on
nothing that could go.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from hf_vdneuron.dependence import Dependence, Rows
from hf_vdneuron.modeling_vdneuron_structure import HEAD_COUNTS, KEY_COUNTS, WIDTHS
from hf_vdneuron.sublayers import Axis, Role, Side, SideName, Slice, Sublayer, Unit


__all__ = ["probe_sublayers"]

#: Features of a layer to ask about, spread evenly: of so many, two are alive behind a ReLU.
_NUM_PROBES = 8


def probe_sublayers(dependence: Dependence) -> list[Sublayer]:
    """Find the removable heads and neurons of a model of any type.

    Args:
        dependence: What depends on what in it.

    Returns:
        The sub-layers, in the order of the forward pass; each is named for the layer that reads its units. Their
        constants are not folded, as what lies between the two sides is not known.
    """
    candidates = (_heads(dependence, reader) or _neurons(dependence, reader) for reader in dependence.read)
    found = [part for part in candidates if part is not None and _can_go(dependence, part)]
    if not found or dependence.model.main_input_name != "pixel_values":  # lengths of texts are those of an example
        return found
    first = dependence.num_positions(found[0].path)
    return [replace(part, positions=dependence.num_positions(part.path) / first) for part in found]


def _can_go(dependence: Dependence, sublayer: Sublayer) -> bool:
    """Tell whether the units end with what makes them, and nothing but the reader sees them."""
    made = sublayer.sides[0].slices[0]
    rows = made.features(torch.arange(sublayer.num_units)).flatten()
    if not dependence.is_ended_by(sublayer.path, made.module, rows):
        return False
    makers = [f"{part.module}.{part.parameter}" for part in (*sublayer.sides[0].slices, *sublayer.companions)]
    return not dependence.is_read_elsewhere(sublayer.path, makers)


def _slice(dependence: Dependence, name: str, role: Role, block: "_Block") -> Slice:
    """Say what rows of a parameter are: those of a layer, of a norm, or of what lies outside of both."""
    owner, _, parameter = name.rpartition(".")
    module = dependence.model.get_submodule(owner)
    stride = None if block.stride == block.size else block.stride
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        role, parameter = Role.NORM, "weight"
    elif owner not in dependence.layers:
        role = Role.BIAS
    elif getattr(module, "groups", 1) > 1:
        role = Role.DEPTHWISE
    return Slice(owner, role, Axis.OUT, block.size, stride, block.offset, parameter)


@dataclass(frozen=True)
class _Block:
    """Rows of equal distance: unit `k` owns `offset + k * stride, ...`, `size` of them."""

    size: int
    stride: int
    offset: int


# ---- Neurons ----


def _neurons(dependence: Dependence, reader: str) -> Sublayer | None:
    """See whether every feature depends on rows of its own."""
    width = dependence.num_features(reader)
    probed = {feature: dependence.rows(reader, feature) for feature in _spread(width)}
    # An activation can be off; the others have to agree.
    offsets = [_offsets(rows, feature) for feature, rows in probed.items() if rows]
    if len(offsets) < 2 or any(one != other for one, other in pairwise(offsets)):
        return None
    blocks = ((name, _Block(1, 1, offset)) for name, found in offsets[0].items() for offset in found)
    parts = list(dict.fromkeys(_slice(dependence, name, Role.GATE, block) for name, block in blocks))
    made = [part for part in parts if part.role is Role.GATE]
    if not made or min(part.offset for part in parts) < 0:
        return None
    # The last one is never the gate, which goes through the activation before it meets the neuron.
    rows = replace(made[-1], role=Role.INTERMEDIATE)
    return Sublayer(
        path=reader,
        unit=Unit.NEURON,
        num_units=width,
        sides=(Side(SideName.IN, (rows,)), Side(SideName.OUT, (Slice(reader, Role.OUTPUT, Axis.IN),))),
        companions=tuple(part for part in parts if part is not made[-1]),
        foldable=False,
        repeats=len(dependence.read[reader]),
    )


def _spread(width: int) -> list[int]:
    """Choose some features to ask about: neighbours, and others up to the last."""
    return sorted({index * (width - 1) // (_NUM_PROBES - 1) for index in range(_NUM_PROBES)} | {min(1, width - 1)})


def _offsets(rows: Rows, feature: int) -> Rows:
    return {name: tuple(row - feature for row in found) for name, found in rows.items()}


# ---- Heads ----


@dataclass(frozen=True)
class _Head:
    """What one head depends on.

    Args:
        value: Name of the weight that makes its values.
        own: Name of a parameter -> first of the rows of which each feature has one of its own.
        shared: Name of a parameter, and number of the block in it -> first of the rows that all features share.
    """

    value: str
    own: Mapping[str, int]
    shared: Mapping[tuple[str, int], int]


def _heads(dependence: Dependence, reader: str) -> Sublayer | None:
    """See whether blocks of features depend on blocks of rows."""
    width = dependence.num_features(reader)
    size = _head_size(dependence, reader, width)
    if size is None or size == width or width % size:
        return None
    heads = [_head(dependence, reader, feature, size) for feature in range(0, width, size)]
    found = [head for head in heads if head is not None]
    return _join(dependence, reader, size, found) if len(found) == len(heads) else None


def _head_size(dependence: Dependence, reader: str, width: int) -> int | None:
    """Count the features that depend on the same block of rows as the first one."""
    if width < 2:
        return None
    first = _common(dependence.rows(reader, 0), dependence.rows(reader, 1))
    if not any(len(rows) > 1 for rows in first.values()):
        return None
    same, different = 1, width
    while different - same > 1:
        middle = (same + different) // 2
        if _common(dependence.rows(reader, middle), first) == first:
            same = middle
        else:
            different = middle
    return different


def _head(dependence: Dependence, reader: str, feature: int, size: int) -> _Head | None:
    """Tell the rows that a head's features share from those of its first one."""
    rows = dependence.rows(reader, feature)
    shared = _common(rows, dependence.rows(reader, feature + 1))
    rest = {name: [row for row in found if row not in shared.get(name, ())] for name, found in rows.items()}
    own = {name: found[0] for name, found in rest.items() if len(found) == 1}
    values = [name for name in own if name.rpartition(".")[0] in dependence.layers]
    if len(values) != 1:
        return None
    blocks = {
        (name, index): start for name, found in shared.items() for index, start in enumerate(_starts(found, size))
    }
    return _Head(values[0], own, blocks)


def _common(one: Rows, other: Rows) -> Rows:
    both = {name: tuple(row for row in rows if row in set(other.get(name, ()))) for name, rows in one.items()}
    return {name: rows for name, rows in both.items() if rows}


def _starts(rows: Sequence[int], size: int) -> Iterator[int]:
    """Split rows into blocks of a head's size; one value per head, as in a table of biases, is a block itself."""
    yield from rows if len(rows) == 1 else rows[::size]


def _join(dependence: Dependence, reader: str, size: int, heads: Sequence[_Head]) -> Sublayer | None:
    """Make units of the heads that share a value, if what they own lies at equal distances."""
    per_unit = sum(head.own == heads[0].own for head in heads)
    num_units, rest = divmod(len(heads), per_unit)
    kinds = [(head.value, head.own.keys(), head.shared.keys()) for head in heads]
    if rest or num_units < 2 or any(one != other for one, other in pairwise(kinds)):
        return None
    units = [heads[start : start + per_unit] for start in range(0, len(heads), per_unit)]
    own = {name: _fit([[head.own[name] for head in unit] for unit in units], size) for name in heads[0].own}
    shared = {key: _fit([[head.shared[key] for head in unit] for unit in units], size) for key in heads[0].shared}
    parts = [_slice(dependence, name, Role.VALUE, block) for name, block in own.items() if block]
    parts += [
        _slice(dependence, name, role, block)
        for ((name, _), block), role in zip(shared.items(), _roles(len(shared)), strict=True)
        if block
    ]
    if len(parts) < len(own) + len(shared):
        return None
    values = next(part for part in parts if f"{part.module}.{part.parameter}" == heads[0].value)
    core = _common_parent(dependence, [*heads[0].own, *(name for name, _ in heads[0].shared)])
    return Sublayer(
        path=reader,
        unit=Unit.HEAD,
        num_units=num_units,
        sides=(
            Side(SideName.IN, (values,)),
            Side(SideName.OUT, (Slice(reader, Role.ATTENTION_OUTPUT, Axis.IN, size * per_unit),)),
        ),
        companions=tuple(part for part in parts if part is not values),
        foldable=False,
        attributes=tuple(_attributes(dependence, core, num_units, per_unit, size)),
        attention=core,
        repeats=len(dependence.read[reader]),
    )


def _roles(number: int) -> list[Role]:
    """Name the shared blocks: models make queries before keys, and whatever else after them."""
    return [Role.QUERY, Role.KEY, *[Role.POSITION] * number][:number]


def _fit(starts: Sequence[Sequence[int]], size: int) -> _Block | None:
    """Find the block of each unit, from the first rows of its heads, if they are packed and at equal distances."""
    unique = [sorted(set(unit)) for unit in starts]
    strides = {later[0] - earlier[0] for earlier, later in pairwise(unique)}
    is_packed = all(unit == list(range(unit[0], unit[0] + size * len(unique[0]), size)) for unit in unique)
    if len(strides) != 1 or not is_packed or min(strides) < 1:
        return None
    is_single = strides == {1}  # one value per head
    return _Block(len(unique[0]) if is_single else size * len(unique[0]), strides.pop(), unique[0][0])


def _common_parent(dependence: Dependence, parameters: Sequence[str]) -> str:
    """Return the path of the smallest module around the layers of these parameters, or around them if in none."""
    owners = (name.rpartition(".")[0] for name in parameters)
    paths = [owner.rpartition(".")[0] if owner in dependence.layers else owner for owner in owners]
    shared = []
    for names in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _attributes(
    dependence: Dependence, core: str, num_units: int, per_unit: int, size: int
) -> Iterator[tuple[str, str, int]]:
    """List the attributes of an attention module that count its heads, by their names and values."""
    values = vars(dependence.model.get_submodule(core))
    factors = {HEAD_COUNTS: per_unit, KEY_COUNTS: 1, WIDTHS: per_unit * size}
    for names, factor in factors.items():
        yield from ((core, name, factor) for name in names if values.get(name) == factor * num_units)
