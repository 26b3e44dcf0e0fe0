"""Pruned models leave PyTorch like any others: one call of `torch.export` or `torch.onnx.export`, for all shapes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import FAMILIES, RAGGED, WHOLE_SUBLAYERS, KeptUnits, dense_model, keep_units, mask_of
from torch import Tensor
from transformers import PreTrainedModel

from hf_vdneuron.pruning import prune_model_


#: Batches and lengths that were not exported; RoBERTa's positions end at 14.
SHAPES = ((1, 3), (5, 13), (3, 8))
TOLERANCE = 1e-4

#: What is left: whole sub-layers, as all heads of one layer are gone and all neurons of another one, or some of each.
KEPT: dict[str, KeptUnits] = {"whole": WHOLE_SUBLAYERS, "ragged": RAGGED}

ANY_SHAPE = {
    name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in ("input_ids", "attention_mask")
}

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="`torch.onnx.export` needs onnx and onnxscript, and the check onnxruntime",
)


def pruned_model(family: str, kept: KeptUnits, *, attention: str = "sdpa") -> PreTrainedModel:
    model = dense_model(family, "sequence_classification")
    prune_model_(model, mask_of(keep_units(model, kept, side=0)))
    model.set_attn_implementation(attention)
    return model.eval()


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Some sentences, the last one padded."""
    ids = torch.randint(2, 20, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("family", "attention"), [*((family, "sdpa") for family in FAMILIES), ("bert", "eager")])
def test_torch_export(family: str, attention: str, tmp_path: Path) -> None:
    model = pruned_model(family, KEPT["whole"], attention=attention)
    program = torch.export.export(model, (), inputs(2, 6), dynamic_shapes=ANY_SHAPE)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        for some in (inputs(*shape) for shape in SHAPES):
            torch.testing.assert_close(loaded(**some).logits, model(**some).logits, rtol=0, atol=TOLERANCE)


@needs_onnx
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch about itself
@pytest.mark.parametrize(("family", "kept"), [*((family, "whole") for family in FAMILIES), ("bert", "ragged")])
def test_onnx(family: str, kept: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = pruned_model(family, KEPT[kept])
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (), file, kwargs=inputs(2, 6), dynamic_shapes=ANY_SHAPE, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    with torch.no_grad():
        for some in (inputs(*shape) for shape in SHAPES):
            (found,) = session.run(None, {name: values.numpy() for name, values in some.items()})
            torch.testing.assert_close(torch.from_numpy(found), model(**some).logits, rtol=0, atol=TOLERANCE)
