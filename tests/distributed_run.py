"""One process of a run: started by test_distributed.py with `accelerate launch`, or called there as it is.

It writes what it saw to `FOLDER/rank-N.pt`: gradients of one step, masks and weights in the end, the log.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import leave
from runs import make_trainer, rows, tiny_bert
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from hf_vdneuron import phases
from hf_vdneuron.masks import read_mask
from hf_vdneuron.pruned_twin import PrunedTwin


class Gradients(TrainerCallback):
    """Keeps the gradients of one step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **run: Any) -> None:
        if state.global_step == self.step:
            named = run["model"].named_parameters()
            self.found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def run(folder: Path, options: dict[str, Any]) -> None:
    """Train, without noise if asked for, and write what was seen."""
    torch.set_num_threads(1)
    options = dict(options)
    gradients = Gradients(options.pop("step"))
    is_language_model = options.pop("language_model", False)
    model = tiny_bert(BertForMaskedLM if is_language_model else BertForSequenceClassification)
    data = rows(language_model=is_language_model)
    with pytest.MonkeyPatch.context() as patch:
        if not options.pop("noise"):
            switch_ = phases.set_variational_
            patch.setattr(
                phases, "set_variational_", lambda model, **values: switch_(model, **(values | {"noise": False}))
            )
        give_back = PrunedTwin.hand_back_
        handed_back: list[PrunedTwin] = []
        patch.setattr(PrunedTwin, "hand_back_", lambda twin: (handed_back.append(twin), give_back(twin)))
        trainer = make_trainer(folder, model, data=data, trainer_options={"callbacks": [gradients]}, **options)
        trainer.train()
    seen = {
        "gradients": gradients.found,
        "kept": dict(read_mask(trainer.model).keep),
        "weights": trainer.model.state_dict(),
        "log": trainer.state.log_history,
        "small_steps": len(handed_back),
    }
    torch.save(seen, folder / f"rank-{trainer.args.process_index}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
