# SPDX-License-Identifier: Apache-2.0
"""Print the table of supported model types, as the README shows it.

    python scripts/support_table.py

What else a model type can be, discovery finds out: see `hf_vdneuron.discover`.
"""

import sys
from collections.abc import Iterator

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
)

from hf_vdneuron.architectures import ARCHITECTURES
from hf_vdneuron.layouts import AttentionLayout, ExpertsLayout, FeedForwardLayout, Stack


HEADER = ("model types", "heads", "neurons", "generates text")


def support_rows() -> Iterator[tuple[str, str, str, str]]:
    """Tell what is removed from the models of each type, and whether they generate.

    Yields:
        Row of the table: types that keep heads and neurons in the same places; what goes; "yes" or nothing.
    """
    alike: dict[tuple[tuple[Stack, ...], bool], list[str]] = {}
    for model_type, stacks in sorted(ARCHITECTURES.items()):
        alike.setdefault((stacks, generates(model_type)), []).append(model_type)
    for (stacks, is_generating), types in alike.items():
        heads, neurons = removable(stacks)
        yield ", ".join(types), heads, neurons, "yes" if is_generating else ""


def removable(stacks: tuple[Stack, ...]) -> tuple[str, str]:
    """Name what layers lose.

    Args:
        stacks: Row of the table of architectures.

    Returns:
        Heads and neurons, empty where there are none.
    """
    blocks = [block for stack in stacks for block in stack.blocks]
    has_heads = any(isinstance(block, AttentionLayout) for block in blocks)
    has_channels = any(isinstance(block, FeedForwardLayout) and block.norm for block in blocks)
    has_experts = any(isinstance(block, ExpertsLayout) for block in blocks)
    neurons = "inner channels" if has_channels else "yes, of each expert" if has_experts else "yes"
    return "yes" if has_heads else "", neurons


def generates(model_type: str) -> bool:
    """Tell whether models of a type write text, and were not made to fill gaps.

    Args:
        model_type: Name of the type.

    Returns:
        Whether transformers has such a model.
    """
    config = type(AutoConfig.for_model(model_type))
    fills_gaps = config in MODEL_FOR_MASKED_LM_MAPPING
    pairs = (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING)
    return any(config in mapping for mapping in pairs) or (config in MODEL_FOR_CAUSAL_LM_MAPPING and not fills_gaps)


def support_table() -> str:
    """Write the table.

    Returns:
        Lines of Markdown.
    """
    rows = [HEADER, ("---",) * len(HEADER), *support_rows()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(support_table())
