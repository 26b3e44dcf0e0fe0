# SPDX-License-Identifier: Apache-2.0
"""Find out what is left of a model that was cut and what it was cut from, and make it save itself that way."""

import copy
import reprlib

from torch import nn
from transformers import PreTrainedModel

from hf_vdneuron.discovered import share_
from hf_vdneuron.modeling_vdneuron import PrunedStructure, adopt_, native_class
from hf_vdneuron.skeletons import skeleton, tensor_shapes
from hf_vdneuron.stock import stock_sizes, to_stock_


__all__ = ["as_pruned_model_", "dense_twin", "find_structure"]


def as_pruned_model_(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model that was cut save itself so that it can be loaded, in place.

    One whose layers all have the same sizes, where its config can say so, becomes an ordinary model of its native
    class, which loads anywhere. Any other saves itself with its structure. A model from which nothing was cut stays
    what it is.

    Args:
        model: A transformers model, with or without a head.

    Returns:
        The same model: of its native class, or of class `pruned_class(type(model))`. Its base model likewise.

    Raises:
        ValueError: If the model differs from its native class in other ways than smaller layers.
    """
    structure = find_structure(model)
    if not structure.shapes:
        return model
    sizes = stock_sizes(model)
    if sizes is not None:
        return to_stock_(model, sizes)
    model.config.vdneuron = structure.to_json()
    adopt_(model)
    return model


def find_structure(model: PreTrainedModel) -> PrunedStructure:
    """Compare a model with its native class.

    Args:
        model: A transformers model, with or without a head.

    Returns:
        What is left of it; without shapes if nothing was cut.

    Raises:
        ValueError: If the model differs from its native class in other ways than smaller layers.
    """
    native: nn.Module = skeleton(native_class(type(model)), model.config).base_model
    cut, dense = PrunedStructure.of(model.base_model), PrunedStructure.of(native)
    structure = PrunedStructure(
        {path: shape for path, shape in cut.shapes.items() if shape != dense.shapes.get(path)},
        {path: values for path, values in cut.attributes.items() if values != dense.attributes.get(path)},
        cut.heads,
    )
    structure.apply_(native)
    difference = tensor_shapes(native).items() ^ tensor_shapes(model.base_model).items()
    if difference:
        raise ValueError(
            f"`{type(model).__name__}` cannot be saved as a pruned model: expected the layers of its native class, "
            f"some of them smaller, got other tensors: {reprlib.repr(sorted(difference))}. Unpatch the model, or undo "
            "what else was changed."
        )
    return structure


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Build the dense model that a pruned one was cut from, with random weights, on the same device.

    Args:
        model: A pruned model.

    Returns:
        A model of the native class and config.
    """
    config = copy.deepcopy(model.config)
    config.vdneuron = None
    twin: PreTrainedModel = native_class(type(model))(config).to(device=model.device, dtype=model.dtype)
    share_(model, twin)
    return twin
