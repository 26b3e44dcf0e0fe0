# SPDX-License-Identifier: Apache-2.0
"""Let a plain `AutoModel….from_pretrained` load a pruned model, wherever `hf_vdneuron` was imported.

transformers lets a registered quantizer rebuild a model before its weights come in. A model that opted in names ours,
which shrinks the layers to what is left of them, then takes back every sign of quantization: there is none.
"""

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_vdneuron.modeling_vdneuron import PrunedStructure, adopt_, native_class


__all__ = ["allow_plain_loading_"]

#: Name of our "quantizer" in a config.
METHOD = "vdneuron"


def allow_plain_loading_(model: PreTrainedModel, allow: bool = True) -> PreTrainedModel:
    """Choose whether what a pruned model saves can be loaded by transformers alone once `hf_vdneuron` is imported.

    Without the import transformers warns of an unknown quantization method and goes on as for any other pruned model:
    a plain load stops at the first smaller layer, and `trust_remote_code=True` loads it. Tools that refuse quantized
    models will refuse this one, so it is a choice.

    Args:
        model: A pruned model.
        allow: False takes it back.

    Returns:
        The same model.

    Raises:
        ValueError: If nothing was cut from the model.
    """
    if native_class(type(model)) is type(model):
        raise ValueError(
            f"`{type(model).__name__}` is not pruned, and loads plainly as it is: expected what `prune_model_` or "
            "`VDTrainer.prune` returns."
        )
    if allow:
        model.config.quantization_config = {"quant_method": METHOD}
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


@register_quantization_config(METHOD)
class SmallerLayersConfig(QuantizationConfigMixin):
    """What a config says of itself so that `SmallerLayersLoader` is asked; the sizes are in `config.vdneuron`.

    Args:
        **kwargs: Not used.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(quant_method=METHOD)  # type: ignore[arg-type]  # its own methods are an enum, ours a name


@register_quantizer(METHOD)
class SmallerLayersLoader(HfQuantizer):
    """Shrinks the layers of a native model before its weights are loaded."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # Built by a pruned class, this module's or that of the remote code, a model has the right sizes already.
        if native_class(type(model)) is type(model):
            PrunedStructure.from_config(model.config).apply_(model.base_model)
            adopt_(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leave an ordinary model behind: a flag would forbid to cast, train or quantize it."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        model.config.quantization_config = {"quant_method": METHOD}
        model.is_quantized = False  # type: ignore[assignment]  # no tensor
        del model.quantization_method
        del model.hf_quantizer

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True
