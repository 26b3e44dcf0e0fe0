# SPDX-License-Identifier: Apache-2.0
"""Where each model type keeps its heads and neurons: one row per layout, and nothing else knows.

To add an architecture, write its row and put its model types into `ARCHITECTURES`; patching, pruning, saving and the
exactness tests then work for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_vdneuron.chains import find_chain_sublayers
from hf_vdneuron.sublayers import Axis, Role, Side, SideName, Slice, Sublayer, Unit


__all__ = ["ARCHITECTURES", "Architecture", "AttentionLayout", "FeedForwardLayout", "find_sublayers"]


@dataclass(frozen=True)
class AttentionLayout:
    """Where an attention block keeps its heads. Paths are relative to one transformer layer.

    Args:
        query: Linear layer whose rows are the heads' queries.
        key: The same for keys.
        value: The same for values.
        output: Linear layer whose columns read the heads.
        core: Module that computes attention and cannot run without a head.
        head_size: Attribute of `core` that holds the size of one head.
        num_heads: Attribute of `core` that holds the number of heads.
        width: Attribute of `core` that holds the number of heads times their size.
        name: Name of the sub-layer.
        optional: Whether some models of the type lack the block.
    """

    query: str
    key: str
    value: str
    output: str
    core: str
    head_size: str
    num_heads: str
    width: str
    name: str = "attention"
    optional: bool = False

    def sublayer(self, model: nn.Module, layer: str) -> Sublayer | None:
        """Locate the block in one layer of a model.

        Args:
            model: Model that the paths start from.
            layer: Path of the transformer layer.

        Returns:
            The sub-layer, or None if the layer lacks it.
        """
        if self.optional and not hasattr(model.get_submodule(layer), self.core.partition(".")[0]):
            return None
        core = f"{layer}.{self.core}"
        size = getattr(model.get_submodule(core), self.head_size)
        rows = {
            role: Slice(f"{layer}.{path}", role, Axis.OUT, size)
            for role, path in ((Role.QUERY, self.query), (Role.KEY, self.key), (Role.VALUE, self.value))
        }
        columns = Slice(f"{layer}.{self.output}", Role.ATTENTION_OUTPUT, Axis.IN, size)
        return Sublayer(
            path=f"{layer}.{self.name}",
            unit=Unit.HEAD,
            num_units=_num_rows(model, rows[Role.VALUE]) // size,
            sides=(Side(SideName.IN, (rows[Role.VALUE],)), Side(SideName.OUT, (columns,))),
            companions=(rows[Role.QUERY], rows[Role.KEY]),
            attributes=((core, self.num_heads, 1), (core, self.width, size)),
            attention=core,
        )


@dataclass(frozen=True)
class FeedForwardLayout:
    """Where a feed-forward block keeps its neurons. Paths are relative to one transformer layer.

    Args:
        intermediate: Linear layer whose rows are the neurons.
        activation: Module or function applied to them.
        output: Linear layer whose columns read the neurons.
        name: Name of the sub-layer.
    """

    intermediate: str
    activation: str
    output: str
    name: str = "feed_forward"

    def sublayer(self, model: nn.Module, layer: str) -> Sublayer:
        """Locate the block in one layer of a model.

        Args:
            model: Model that the paths start from.
            layer: Path of the transformer layer.

        Returns:
            The sub-layer.
        """
        rows = Slice(f"{layer}.{self.intermediate}", Role.INTERMEDIATE, Axis.OUT)
        columns = Slice(f"{layer}.{self.output}", Role.OUTPUT, Axis.IN)
        return Sublayer(
            path=f"{layer}.{self.name}",
            unit=Unit.NEURON,
            num_units=_num_rows(model, rows),
            sides=(Side(SideName.IN, (rows,)), Side(SideName.OUT, (columns,))),
            activations=(f"{layer}.{self.activation}",),
        )


@dataclass(frozen=True)
class Architecture:
    """One row of the table: the layers of a model and what each holds.

    Args:
        layers: Path of the module list of layers, relative to the base model.
        blocks: Layouts of the blocks in each layer, in the order of the forward pass.
    """

    layers: str
    blocks: tuple[AttentionLayout | FeedForwardLayout, ...]

    def sublayers(self, model: nn.Module, prefix: str = "") -> Iterator[Sublayer]:
        """Locate all blocks of a model.

        Args:
            model: Model that the paths start from.
            prefix: Path of the base model in it, empty or ending in a dot.

        Yields:
            The sub-layers, in the order of the forward pass.
        """
        root = f"{prefix}{self.layers}"
        for index, _ in model.get_submodule(root).named_children():
            for block in self.blocks:
                sublayer = block.sublayer(model, f"{root}.{index}")
                if sublayer is not None:
                    yield sublayer


def _num_rows(model: nn.Module, rows: Slice) -> int:
    return model.get_parameter(f"{rows.module}.weight").shape[0]


_BERT_ATTENTION = AttentionLayout(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    core="attention.self",
    head_size="attention_head_size",
    num_heads="num_attention_heads",
    width="all_head_size",
)

_BERT_CROSS_ATTENTION = AttentionLayout(
    query="crossattention.self.query",
    key="crossattention.self.key",
    value="crossattention.self.value",
    output="crossattention.output.dense",
    core="crossattention.self",
    head_size="attention_head_size",
    num_heads="num_attention_heads",
    width="all_head_size",
    name="cross_attention",
    optional=True,
)

_BERT = Architecture(
    layers="encoder.layer",
    blocks=(
        _BERT_ATTENTION,
        _BERT_CROSS_ATTENTION,
        FeedForwardLayout("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),
    ),
)

_DISTILBERT = Architecture(
    layers="transformer.layer",
    blocks=(
        AttentionLayout(
            query="attention.q_lin",
            key="attention.k_lin",
            value="attention.v_lin",
            output="attention.out_lin",
            core="attention",
            head_size="attention_head_size",
            num_heads="n_heads",
            width="dim",
        ),
        FeedForwardLayout("ffn.lin1", "ffn.activation", "ffn.lin2"),
    ),
)

#: `config.model_type` -> where its heads and neurons are.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "electra": _BERT,
    "roberta": _BERT,
}


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Find everything in a model whose units can be removed.

    It reads sizes off the weights, so a patched or an already pruned model is as good as a dense one.

    Args:
        model: A transformers model of a supported type, with or without a head, or a plain PyTorch chain.

    Returns:
        The sub-layers, in the order of the forward pass.

    Raises:
        TypeError: If the model is neither.
        ValueError: If its model type is not in the table.
    """
    if isinstance(model, nn.Sequential):
        return find_chain_sublayers(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Cannot find heads and neurons in a `{type(model).__name__}`: expected a transformers model or an "
            "`nn.Sequential`."
        )
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None:
        raise ValueError(
            f"Model type `{model.config.model_type}` is not supported. Supported: {', '.join(sorted(ARCHITECTURES))}. "
            "To add it, write its row in `hf_vdneuron/architectures.py`."
        )
    prefix = model.base_model_prefix
    return list(architecture.sublayers(model, f"{prefix}." if prefix and hasattr(model, prefix) else ""))
