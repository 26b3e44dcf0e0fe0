# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts with a posterior: native modules whose two parameters became variational.

Without noise the native forward pass runs, by whichever of its implementations, on the posterior means under the
masks. Noise is drawn on pre-activations, as everywhere, for every token and each of its experts; the native
implementations have no place for that, so each expert takes its tokens in turn here.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_vdneuron.experts import DOWN, GATE_UP, ExpertMatrix
from hf_vdneuron.layers import VDExpertMatrix
from hf_vdneuron.modeling_vdneuron import native_class
from hf_vdneuron.modeling_vdneuron_experts import experts_config


__all__ = ["VDExperts", "all_experts", "join_", "leave_"]


class _View:
    """Experts as their native forward pass sees them: with other weights, and the same in all else."""

    def __init__(self, experts: nn.Module, own: dict[str, object]) -> None:
        self._experts = experts
        vars(self).update(own)

    def __getattr__(self, name: str) -> object:
        return getattr(self._experts, name)


class VDExperts(nn.Module):
    """What variational experts add to their native class; their matrices with a posterior are its children.

    Attributes:
        native: Class of transformers.
        plain: Class that the experts had before: that, or a stand-in for it.
        at_once: Whether every token meets every expert, and those that it was not sent to count for nothing. It is
            more work, but two calls of the matrices do all of it, with the tokens in order.
    """

    native: ClassVar[type[nn.Module]]
    plain: type[nn.Module]
    down_proj: nn.Parameter
    at_once: bool = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts that each token was sent to.

        Args:
            hidden_states: Tokens, shape `(tokens, hidden)`.
            top_k_index: Experts of each token, integer, shape `(tokens, k)`.
            top_k_weights: How much each of them counts, shape `(tokens, k)`.

        Returns:
            Shape `(tokens, hidden)`.
        """
        if self.at_once:
            return self._all_at_once(hidden_states, top_k_index, top_k_weights)
        layers = [layer for layer in self.children() if isinstance(layer, VDExpertMatrix)]
        means = {layer.matrix: layer.presented_mean() for layer in layers}
        if self.training and any(layer.noise for layer in layers):
            outputs = self._in_turn(hidden_states, top_k_index, top_k_weights, means)
        else:
            own: dict[str, object] = {layer.name: layer.stored(means[layer.matrix]) for layer in layers}
            seen = _View(self, {**own, "config": experts_config(vars(self)["config"], self.down_proj)})
            outputs = self.native.forward(seen, hidden_states, top_k_index, top_k_weights)
        for layer in layers:
            outputs = layer.keep_in_graph(outputs)
        return outputs

    def _matrix(self, name: str) -> ExpertMatrix:
        """Return a matrix, whether it has a posterior or not."""
        child = self._modules.get(name)
        return child if isinstance(child, ExpertMatrix) else ExpertMatrix(self, name)

    def _in_turn(self, hidden: Tensor, index: Tensor, weights: Tensor, means: dict[str, Tensor]) -> Tensor:
        """Let each expert take its tokens, with noise."""
        gate_up, down = (self._matrix(name) for name in (GATE_UP, DOWN))
        noisy = [layer for layer in (gate_up, down) if isinstance(layer, VDExpertMatrix) and layer.noise]
        variances = {layer.matrix: layer.var for layer in noisy}
        means = {GATE_UP: gate_up.weight, DOWN: down.weight, **means}

        def product(layer: ExpertMatrix, expert: int, inputs: Tensor) -> Tensor:
            outputs = F.linear(inputs, layer.of_expert(means[layer.matrix], expert))
            if not (isinstance(layer, VDExpertMatrix) and layer.noise):
                return outputs
            return layer.add_noise(outputs, inputs, layer.of_expert(variances[layer.matrix], expert))

        outputs = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            token, choice = torch.where(index == expert)
            neurons = self._gated(product(gate_up, expert, hidden[token]))
            read = product(down, expert, neurons) * weights[token, choice, None]
            outputs.index_add_(0, token, read.to(outputs.dtype))
        return outputs

    def _all_at_once(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Let every expert take every token: one block, whose neurons count as their experts do."""
        neurons = self._gated(self._matrix(GATE_UP)(hidden))
        num_experts = self._matrix(DOWN).parameter.shape[0]
        share = weights.new_zeros(len(weights), num_experts).scatter(1, index, weights)
        per_expert = neurons.shape[-1] // num_experts
        shares = share.repeat_interleave(per_expert, dim=1).to(neurons.dtype)  # of a router in float32
        read: Tensor = self._matrix(DOWN)(neurons * shares)
        return read.to(hidden.dtype)

    def _gated(self, gate_up: Tensor) -> Tensor:
        """Multiply neurons by their gates, which come first, shape `(..., 2 * neurons)` to `(..., neurons)`."""
        neurons: Tensor = self._apply_gate(gate_up)  # type: ignore[operator]  # of the native class
        return neurons

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, layer in self.named_children():
            if isinstance(layer, VDExpertMatrix):
                if layer.group_scale is not None:
                    destination[f"{prefix}{name}.direction"] = destination[f"{prefix}{layer.name}"]
                mean = layer.stored(layer.mean)
                destination[f"{prefix}{layer.name}"] = mean if keep_vars else mean.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, layer in self.named_children():
            if isinstance(layer, VDExpertMatrix):
                direction = state_dict.pop(f"{prefix}{name}.direction", None)
                if direction is not None:
                    state_dict[f"{prefix}{layer.name}"] = direction
        super()._load_from_state_dict(state_dict, prefix, *args)


class VDMixtralExperts(VDExperts, MixtralExperts):
    """Experts of Mixtral with a posterior."""

    native = MixtralExperts


class VDQwen2MoeExperts(VDExperts, Qwen2MoeExperts):
    """Experts of Qwen 2 with a posterior."""

    native = Qwen2MoeExperts


class VDQwen3MoeExperts(VDExperts, Qwen3MoeExperts):
    """Experts of Qwen 3 with a posterior."""

    native = Qwen3MoeExperts


#: Native class -> variational class. Exact classes only: a subclass may compute something else.
_VARIATIONAL: dict[type[nn.Module], type[VDExperts]] = {
    cls.native: cls for cls in (VDMixtralExperts, VDQwen2MoeExperts, VDQwen3MoeExperts)
}


def join_(layer: VDExpertMatrix) -> None:
    """Make a matrix with a posterior a part of the experts that it was made from, in place.

    Args:
        layer: The matrix.

    Raises:
        TypeError: If the experts have no variational counterpart.
    """
    experts = layer.experts
    if not isinstance(experts, VDExperts):
        native = native_class(type(experts))
        if native not in _VARIATIONAL:
            known = ", ".join(sorted(cls.__name__ for cls in _VARIATIONAL))
            raise TypeError(
                f"Cannot make a `{type(experts).__name__}` variational: expected exactly one of {known}, as another "
                "class may compute something else."
            )
        vars(experts)["plain"] = type(experts)
        experts.__class__ = _VARIATIONAL[native]
    experts.add_module(layer.matrix, layer)


def leave_(matrix: ExpertMatrix) -> None:
    """Take a matrix out of its experts again, in place; without any they are of their native class.

    Args:
        matrix: A matrix without a posterior.
    """
    experts = matrix.experts
    del experts._modules[matrix.matrix]
    if isinstance(experts, VDExperts) and not any(isinstance(child, VDExpertMatrix) for child in experts.children()):
        experts.__class__ = vars(experts).pop("plain")


@contextmanager
def all_experts(model: nn.Module) -> Generator[None]:
    """Let every token meet every expert, so that what goes through a matrix can be told by example.

    Args:
        model: A patched model.

    Yields:
        Nothing.
    """
    found = [module for module in model.modules() if isinstance(module, VDExperts)]
    try:
        for experts in found:
            experts.at_once = True
        yield
    finally:
        for experts in found:
            experts.at_once = False
