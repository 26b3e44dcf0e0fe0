"""What lies beside a saved model: data, figures, page and card, all of the same run."""

import json
from pathlib import Path

import pytest
import torch
from models import HEADS, tiny_model
from reports import make_report

from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.publishing import save_report
from hf_vdneuron.structure import as_pruned_model_


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "whole"])
def test_everything_is_written(is_cut: bool, tmp_path: Path) -> None:
    model, report = tiny_model("bert", "sequence_classification"), make_report()
    if is_cut:
        keep = torch.zeros(2, HEADS, dtype=torch.bool)
        as_pruned_model_(prune_model_(model, RelevanceMask({"bert.encoder.layer.0.attention": keep})))
    folder = tmp_path / "mine"
    save_report(report, model, folder)
    assert {path.name for path in folder.iterdir()} == {"README.md", "figures", "report.html", "report.json"}
    assert json.loads((folder / "report.json").read_text()) == report.to_dict()
    assert len(list((folder / "figures").iterdir())) == 11
    for name in ("README.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8").replace("&#34;", '"')
        assert 'from_pretrained("mine"' in text
        assert ("hf_vdneuron.from_pretrained" in text) == is_cut
        assert "BertForSequenceClassification" in text
