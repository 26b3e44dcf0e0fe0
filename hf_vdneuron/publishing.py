# SPDX-License-Identifier: Apache-2.0
"""Everything that lies beside a saved model and tells of it: data, figures, page and card."""

from pathlib import Path

from transformers import PreTrainedModel

from hf_vdneuron.cli import write_json
from hf_vdneuron.drawing import save_drawings
from hf_vdneuron.figures import draw_run
from hf_vdneuron.hub import CARD_NAME, DATA_NAME, FIGURES_FOLDER, PAGE_NAME
from hf_vdneuron.model_card import render_model_card
from hf_vdneuron.report import RunReport
from hf_vdneuron.report_page import render_page


__all__ = ["save_report"]


def save_report(report: RunReport, model: PreTrainedModel, folder: Path) -> None:
    """Write `report.json`, `figures/*.png`, `report.html` and the model card `README.md`.

    Args:
        report: What came out of a run.
        model: The model that it tells of.
        folder: Where to; its name is what the model is called by.
    """
    architecture, is_cut = type(model).__name__, getattr(model.config, "vdneuron", None) is not None
    write_json(folder / DATA_NAME, report.to_dict())
    drawings = draw_run(report)
    save_drawings(drawings, folder / FIGURES_FOLDER)
    page = render_page(report, drawings, architecture=architecture, repo_id=folder.name, is_cut=is_cut)
    (folder / PAGE_NAME).write_text(page, encoding="utf-8")
    card = render_model_card(report, drawings, architecture=architecture, repo_id=folder.name, is_cut=is_cut)
    card.save(folder / CARD_NAME)
