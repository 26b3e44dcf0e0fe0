# SPDX-License-Identifier: Apache-2.0
"""What the table of architectures is written in: layouts of attention and feed-forward blocks, and stacks of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter

from torch import nn

from hf_vdneuron.experts import DOWN, GATE_UP, ExpertMatrix
from hf_vdneuron.layers import dense_layer, feature_axis
from hf_vdneuron.sublayers import Axis, RelativePositions, Role, Side, SideName, Slice, Sublayer, Unit


__all__ = ["AttentionLayout", "ExpertsLayout", "FeedForwardLayout", "Stack"]


#: What DeBERTa calls the comparison of queries with relative positions, and that of keys.
_COMPARISONS = frozenset({"c2p", "p2c"})


@dataclass(frozen=True)
class RelativeLayout:
    """Where an attention block says how it is told of relative positions. All are attributes of its core.

    Args:
        span: Holds how far they reach to either side. A core without it is not told of any.
        comparisons: Names what is compared with them: `c2p` for queries, `p2c` for keys.
        shared: Says whether the projections to queries and keys make them too.
        follow_length: No attribute: whether those that reach beyond the sequence are left out.
    """

    span: str
    comparisons: str = "pos_att_type"
    shared: str = "share_att_key"
    follow_length: bool = False

    def found(self, core: nn.Module) -> RelativePositions | None:
        """Look them up.

        Args:
            core: Module that computes attention.

        Returns:
            The relative positions, or None if there are none.
        """
        if not hasattr(core, self.span):
            return None
        comparisons = _COMPARISONS.intersection(getattr(core, self.comparisons))
        return RelativePositions(
            getattr(core, self.span), len(comparisons), self.follow_length, getattr(core, self.shared, False)
        )


@dataclass(frozen=True)
class AttentionLayout:
    """Where an attention block keeps its heads.

    Heads that share a key and a value, as in grouped-query attention, are one unit. How many there are, and how many
    share, follows from the shapes of the weights.

    Args:
        core: Module that computes attention and cannot run without a head, relative to the transformer layer.
        qkv: Projections in the core to queries, keys and values, in this order; or the one that makes all three.
        output: Layer whose columns read the heads, relative to the transformer layer.
        head_size: Attribute of the core that holds the size of one head.
        heads: Its attributes that hold the number of heads.
        groups: Its attributes that hold the number of keys.
        widths: Its attributes that hold the number of heads times their size.
        interleaved: How a projection that makes all three orders its rows: the queries, key and value of one unit
            after those of another, or all queries, then all keys, then all values.
        positions: Projections in the core of relative positions, with rows like those of queries. A model can lack
            them.
        relative: What the core says of them.
        query_bias: Parameter of the core that is added to the queries.
        value_bias: Parameter of the core that is added to the values.
        bias_table: Parameter below the core that holds a bias of attention scores for each head, along its last axis.
        norms: Norms in the core of queries and keys that take the mean over *all* heads. There a removed head has to
            count as zero, so that one ends only together with its queries and keys.
        mixing: Attributes of the core that say, where they are true, that heads are mixed and cannot be told apart.
        turning: Attributes of the core that say, where they are true, that values turn with their position. A bias of
            theirs is no constant then, which the output's bias could take over.
        window: Attribute below the core that holds the sides of what a query looks at, where that is no whole map.
        reduction: Attribute of the core that holds how many positions, along either side of a map, share one key.
        memory: Attribute below the core that holds how many positions keys are made from, where those are none of the
            text's.
        name: Name of the sub-layer.
        optional: Whether some models of the type lack the block.
    """

    core: str
    qkv: tuple[str, ...]
    output: str
    head_size: str
    heads: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    interleaved: bool = False
    positions: tuple[str, ...] = ()
    relative: RelativeLayout | None = None
    query_bias: str | None = None
    value_bias: str | None = None
    bias_table: str | None = None
    norms: tuple[str, str] | None = None
    mixing: tuple[str, ...] = ()
    turning: tuple[str, ...] = ()
    window: str | None = None
    reduction: str | None = None
    memory: str | None = None
    name: str = "attention"
    optional: bool = False

    def sublayer(self, model: nn.Module, layer: str) -> Sublayer | None:
        """Locate the block in one layer of a model.

        Args:
            model: Model that the paths start from.
            layer: Path of the transformer layer.

        Returns:
            The sub-layer, or None if the layer lacks it.

        Raises:
            ValueError: If its heads cannot be removed exactly.
        """
        core = f"{layer}.{self.core}"
        if self.optional and not _has_modules(model, core, f"{layer}.{self.output}"):
            return None
        columns, query, key, value = self._slices(model, layer)
        module = model.get_submodule(core)
        self._require_separable(model, core, query)
        joined, apart = ((query, key), ()) if self.norms else ((), (query, key))
        bias = _bias(core, self.value_bias, value)
        factors = ((self.heads, query.size // value.size), (self.groups, 1), (self.widths, query.size))
        return Sublayer(
            path=f"{layer}.{self.name}",
            unit=Unit.HEAD,
            num_units=_num_features(model, columns) // columns.size,
            sides=(Side(SideName.IN, (value, *joined)), Side(SideName.OUT, (columns, *joined))),
            companions=(*apart, *self._extras(model, core, query, key), *bias),
            foldable=dense_layer(model, columns.module).bias is not None
            and not any(getattr(module, name) for name in self.turning),
            attributes=tuple((core, name, factor) for names, factor in factors for name in names),
            attention=core,
            constant=bias[0] if bias else None,
            relative=None if self.relative is None else self.relative.found(module),
            window=None if self.window is None else min(attrgetter(self.window)(module)),
            reduction=1 if self.reduction is None else getattr(module, self.reduction) ** 2,
            memory=None if self.memory is None else attrgetter(self.memory)(module),
        )

    def _slices(self, model: nn.Module, layer: str) -> tuple[Slice, Slice, Slice, Slice]:
        """Find the columns that read the heads, and the rows of queries, keys and values."""
        size = getattr(model.get_submodule(f"{layer}.{self.core}"), self.head_size)
        columns = Slice(f"{layer}.{self.output}", Role.ATTENTION_OUTPUT, Axis.IN, size)
        paths = [f"{layer}.{self.core}.{name}" for name in self.qkv]
        value = Slice(paths[-1], Role.VALUE, Axis.OUT, size)
        # As many rows as there are queries, then rows of keys and of values, of which there can be fewer.
        queries, values = _num_features(model, columns), _num_features(model, value)
        if len(paths) == 1:
            values = (values - queries) // 2
            paths = paths * 3
        wide = size * (queries // values) if values else size
        fused = {} if len(self.qkv) > 1 else self._offsets(queries, values, wide, size)
        query, key, value = (
            Slice(path, role, Axis.OUT, wide if role is Role.QUERY else size, *fused.get(role, ()))
            for path, role in zip(paths, (Role.QUERY, Role.KEY, Role.VALUE), strict=True)
        )
        return Slice(columns.module, columns.role, columns.axis, wide), query, key, value

    def _offsets(self, queries: int, values: int, wide: int, size: int) -> dict[Role, tuple[int, int]]:
        """Tell the stride and offset of each role's rows in a projection that makes all three."""
        if self.interleaved:
            stride = wide + 2 * size
            return {Role.QUERY: (stride, 0), Role.KEY: (stride, wide), Role.VALUE: (stride, wide + size)}
        return {Role.QUERY: (wide, 0), Role.KEY: (size, queries), Role.VALUE: (size, queries + values)}

    def _extras(self, model: nn.Module, core: str, query: Slice, key: Slice) -> Iterator[Slice]:
        """List what else goes with a head, apart from the bias of its values."""
        for name in self.positions:
            if _has_modules(model, f"{core}.{name}"):
                yield Slice(f"{core}.{name}", Role.POSITION, Axis.OUT, query.size)
        for name, part in zip(self.norms or (), (query, key), strict=False):
            yield Slice(f"{core}.{name}", Role.NORM, Axis.OUT, part.size)
        yield from _bias(core, self.query_bias, query)
        if self.bias_table is not None:
            owner, _, name = f"{core}.{self.bias_table}".rpartition(".")
            yield Slice(owner, Role.BIAS, Axis.OUT, query.size // key.size, parameter=name)

    def _require_separable(self, model: nn.Module, core: str, query: Slice) -> None:
        module = model.get_submodule(core)
        for name in self.mixing:
            if getattr(module, name):
                raise ValueError(
                    f"The heads of `{core}` cannot be removed exactly, as its `{name}` mixes them: expected a model "
                    f"whose config has `{name}=False`."
                )
        if self.norms and dense_layer(model, query.module).bias is not None:
            raise ValueError(
                f"The heads of `{core}` cannot be removed exactly: queries and keys are normalised over all heads, "
                "and what is left of a removed one, its biases, would count in the norm. Expected projections "
                "without a bias (`attention_bias=False`)."
            )


@dataclass(frozen=True)
class FeedForwardLayout:
    """Where a feed-forward block keeps its neurons. Paths are relative to one transformer layer.

    Args:
        intermediate: Linear layer whose rows are the neurons.
        output: Linear layer whose columns read the neurons.
        activation: Module or function applied to them, if there is no gate.
        gate: Linear layer whose rows, once activated, multiply the neurons; or that of the neurons again, if its first
            half makes gates and its second half neurons. Without its rows a neuron gives nothing, whatever its gate.
        depthwise: Convolution of each neuron with itself between the two, if there is one. It is padded, so that a
            constant does not stay one.
        norm: Batch norm of each neuron between the two, if there is one.
        name: Name of the sub-layer.
        optional: Whether some models of the type lack the block.
    """

    intermediate: str
    output: str
    activation: str | None = None
    gate: str | None = None
    depthwise: str | None = None
    norm: str | None = None
    name: str = "feed_forward"
    optional: bool = False

    def sublayer(self, model: nn.Module, layer: str) -> Sublayer | None:
        """Locate the block in one layer of a model.

        Args:
            model: Model that the paths start from.
            layer: Path of the transformer layer.

        Returns:
            The sub-layer, or None if the layer lacks it.
        """
        if self.optional and not _has_modules(model, f"{layer}.{self.intermediate}", f"{layer}.{self.output}"):
            return None
        columns = Slice(f"{layer}.{self.output}", Role.OUTPUT, Axis.IN)
        num_units = _num_features(model, columns)
        offset = num_units if self.gate == self.intermediate else 0
        rows = Slice(f"{layer}.{self.intermediate}", Role.INTERMEDIATE, Axis.OUT, offset=offset)
        between = ((self.gate, Role.GATE), (self.depthwise, Role.DEPTHWISE), (self.norm, Role.NORM))
        varies = self.gate or self.depthwise or self.norm
        is_map = self.depthwise is not None or isinstance(dense_layer(model, rows.module), nn.Conv1d | nn.Conv2d)
        return Sublayer(
            path=f"{layer}.{self.name}",
            unit=Unit.NEURON,
            num_units=num_units,
            sides=(Side(SideName.IN, (rows,)), Side(SideName.OUT, (columns,))),
            companions=tuple(Slice(f"{layer}.{path}", role, Axis.OUT) for path, role in between if path),
            activations=(f"{layer}.{self.activation}",) if self.activation else (),
            # A bias of a gated neuron is multiplied by a gate that varies: no constant.
            foldable=not varies and dense_layer(model, columns.module).bias is not None,
            minimum=int(is_map),  # PyTorch cannot run a convolution without channels
        )


@dataclass(frozen=True)
class ExpertsLayout:
    """Where a mixture of gated experts keeps their neurons. Paths are relative to one transformer layer.

    Its units are the neurons of all experts, each one of its own; an expert itself stays, and so does the router.

    Args:
        experts: Module that holds the parameters of all experts.
        router: Module that sends tokens to them.
        top_k: Attribute of the router that holds to how many.
        name: Name of the sub-layer.
        optional: Whether some layers lack the block.
    """

    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    top_k: str = "top_k"
    name: str = "feed_forward"
    optional: bool = False

    def sublayer(self, model: nn.Module, layer: str) -> Sublayer | None:
        """Locate the block in one layer of a model.

        Args:
            model: Model that the paths start from.
            layer: Path of the transformer layer.

        Returns:
            The sub-layer, or None if the layer lacks it.
        """
        path = f"{layer}.{self.experts}"
        if self.optional and not _has_modules(model, path):
            return None
        num_experts, _, per_expert = ExpertMatrix(model.get_submodule(path), DOWN).parameter.shape
        num_units = num_experts * per_expert
        rows = Slice(f"{path}.{GATE_UP}", Role.INTERMEDIATE, Axis.OUT, offset=num_units)
        columns = Slice(f"{path}.{DOWN}", Role.OUTPUT, Axis.IN)
        return Sublayer(
            path=f"{layer}.{self.name}",
            unit=Unit.NEURON,
            num_units=num_units,
            sides=(Side(SideName.IN, (rows,)), Side(SideName.OUT, (columns,))),
            companions=(Slice(rows.module, Role.GATE, Axis.OUT),),
            foldable=False,
            num_experts=num_experts,
            experts_per_token=getattr(model.get_submodule(f"{layer}.{self.router}"), self.top_k),
        )


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, and what each of them holds.

    Args:
        layers: Path of the module list of layers, relative to the base model; `*` stands for every module of a list.
        blocks: Layouts of the blocks in each layer, in the order of the forward pass.
        shared: Attributes of the config that hold the number of passes, and the number of modules in the outermost
            list that share them: each makes several passes in a row.
        shrink: How many times fewer positions each module in the outermost list sees than the one before.
        length: Attribute below the base model that holds how many positions its layers see, where those are not tokens
            of the text that the model reads as well.
        optional: Whether some models of the type lack the stack.
    """

    layers: str
    blocks: tuple[AttentionLayout | FeedForwardLayout | ExpertsLayout, ...]
    shared: tuple[str, str] | None = None
    shrink: int = 1
    length: str | None = None
    optional: bool = False

    def sublayers(self, model: nn.Module, prefix: str = "") -> Iterator[Sublayer]:
        """Locate all blocks of a model.

        Args:
            model: Model that the paths start from.
            prefix: Path of the base model in it, empty or ending in a dot.

        Yields:
            The sub-layers, in the order of the forward pass.
        """
        first, *rest = f"{prefix}{self.layers}".split(".*.")
        if self.optional and not _has_modules(model, first):
            return
        length = None if self.length is None else attrgetter(f"{prefix}{self.length}")(model)
        for index, _ in model.get_submodule(first).named_children():
            repeats, positions = self._num_passes(model, int(index)), self.shrink ** -int(index)
            for layer in _expand(model, f"{first}.{index}", rest):
                for block in self.blocks:
                    sublayer = block.sublayer(model, layer)
                    if sublayer is not None:
                        yield replace(sublayer, repeats=repeats, positions=positions, length=length)

    def _num_passes(self, model: nn.Module, index: int) -> int:
        """Count the passes that one of the outermost modules makes."""
        if self.shared is None:
            return 1
        num_passes, num_modules = (getattr(model.config, name) for name in self.shared)
        return sum(int(number * num_modules / num_passes) == index for number in range(num_passes))


def _expand(model: nn.Module, path: str, rest: list[str]) -> Iterator[str]:
    """List the layers below a module, over every list on the way to them."""
    if not rest:
        yield path
        return
    below = f"{path}.{rest[0]}"
    for index, _ in model.get_submodule(below).named_children():
        yield from _expand(model, f"{below}.{index}", rest[1:])


def _bias(core: str, name: str | None, part: Slice) -> tuple[Slice, ...]:
    """The slice of a bias that lies in the core itself, if there is one."""
    return () if name is None else (Slice(core, Role.BIAS, Axis.OUT, part.size, parameter=name),)


def _num_features(model: nn.Module, part: Slice) -> int:
    layer = dense_layer(model, part.module)
    return layer.weight.shape[feature_axis(layer, part.axis)]


def _has_modules(model: nn.Module, *paths: str) -> bool:
    """Tell whether a model has all these modules, and not None in the place of one."""
    try:
        for path in paths:
            model.get_submodule(path)
    except AttributeError:
        return False
    return True
