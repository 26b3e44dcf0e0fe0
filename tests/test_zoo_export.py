"""A pruned model of every row leaves PyTorch as a dense one does: by `torch.export` and, as ONNX, to onnxruntime."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo import ROWS, answer, masks, zoo_batch, zoo_model

from hf_vdneuron.pruning import prune_model_


pytestmark = pytest.mark.slow

TOLERANCE = 1e-4

#: Rows that are no ONNX, pruned or not, and why.
NO_ONNX = {
    "falcon_alibi": "onnxruntime multiplies no bfloat16, in which Falcon makes its alibi",
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe"], "grouped matrix products have no form in ONNX"),
}

rows = pytest.mark.parametrize("row", ROWS)


class Answer(nn.Module):
    """Gives the logits alone, and no cache, which `torch.export` knows not how to return."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Tensor:
        return answer(self.model(**inputs))


def exportable(row: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A pruned model with some inputs: a decoder's are not made from labels, which no export has."""
    model = zoo_model(row)
    prune_model_(model, masks(model)["ragged"]).eval()
    for config in (model.config, getattr(getattr(model, "decoder", None), "config", model.config)):
        config.use_cache = False
    inputs = {
        name: value for name, value in zoo_batch(model).items() if isinstance(value, Tensor) and name != "labels"
    }
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long)
    return Answer(model).eval(), inputs


@rows
def test_torch_export(row: str) -> None:
    model, inputs = exportable(row)
    program = torch.export.export(model, (), inputs).module()
    torch.testing.assert_close(program(**inputs), model(**inputs), rtol=0, atol=TOLERANCE)


@rows
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="`torch.onnx.export` needs onnx and onnxscript, and the check onnxruntime",
)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch about itself
def test_onnx(row: str, tmp_path: Path) -> None:
    if row in NO_ONNX:
        pytest.skip(NO_ONNX[row])
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = exportable(row)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (), file, kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    known = {entry.name for entry in session.get_inputs()}
    (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in known})
    torch.testing.assert_close(torch.from_numpy(found), model(**inputs), rtol=0, atol=TOLERANCE)
