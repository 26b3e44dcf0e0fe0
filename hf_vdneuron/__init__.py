# SPDX-License-Identifier: Apache-2.0
"""Variational dropout over heads and neurons: makes transformers models really smaller.

A module is imported when one of its names is first used, so that loading a pruned model brings no training code along.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_vdneuron.architectures import find_sublayers
    from hf_vdneuron.config import Grouping, PriorType, VDConfig
    from hf_vdneuron.discovery import discover
    from hf_vdneuron.elbo import em_step_, kl_divergence, set_variational_, variational_layers
    from hf_vdneuron.hub import push_folder
    from hf_vdneuron.masks import RelevanceMask, mask_model_, read_mask
    from hf_vdneuron.one_shot import sparsify
    from hf_vdneuron.patching import patch_model_, unpatch_model_
    from hf_vdneuron.persistence import from_pretrained
    from hf_vdneuron.plain_loading import allow_plain_loading_
    from hf_vdneuron.pruning import prune_model_
    from hf_vdneuron.relevance import irrelevant_weight_share, relevance_mask, unit_relevance
    from hf_vdneuron.selection import Alignment, Layout
    from hf_vdneuron.trainer import VDTrainer
    from hf_vdneuron.training_args import VDTrainingArguments
    from hf_vdneuron.vocabulary import trim_vocabulary

__all__ = [  # noqa: RUF022  # in the order of use
    # The whole way: fine-tune, sparsify, prune, recover
    "VDTrainer",
    "VDTrainingArguments",
    "VDConfig",
    "PriorType",
    "Grouping",
    "Alignment",
    "Layout",
    # Without training
    "sparsify",
    "trim_vocabulary",
    # Load what came out, and show it to others
    "from_pretrained",
    "allow_plain_loading_",
    "push_folder",
    # Its pieces, for those who compose
    "discover",
    "find_sublayers",
    "patch_model_",
    "unpatch_model_",
    "variational_layers",
    "set_variational_",
    "kl_divergence",
    "em_step_",
    "unit_relevance",
    "relevance_mask",
    "irrelevant_weight_share",
    "RelevanceMask",
    "mask_model_",
    "read_mask",
    "prune_model_",
    "__version__",
]

__version__ = "0.1.0"

_HOMES = {
    "architectures": ("find_sublayers",),
    "config": ("Grouping", "PriorType", "VDConfig"),
    "discovery": ("discover",),
    "elbo": ("em_step_", "kl_divergence", "set_variational_", "variational_layers"),
    "hub": ("push_folder",),
    "masks": ("RelevanceMask", "mask_model_", "read_mask"),
    "one_shot": ("sparsify",),
    "patching": ("patch_model_", "unpatch_model_"),
    "persistence": ("from_pretrained",),
    "plain_loading": ("allow_plain_loading_",),
    "pruning": ("prune_model_",),
    "relevance": ("irrelevant_weight_share", "relevance_mask", "unit_relevance"),
    "selection": ("Alignment", "Layout"),
    "trainer": ("VDTrainer",),
    "training_args": ("VDTrainingArguments",),
    "vocabulary": ("trim_vocabulary",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import the module that holds a public name."""
    if name not in _HOME:
        raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


# The third door: from now on transformers alone loads what opted in. It brings no training code along either.
import_module(f"{__name__}.plain_loading")
