"""One process of a run that is sharded by accelerate: started by test_distributed.py with `accelerate launch`.

Accelerate shards on accelerators only, so that processes on CPUs have to pass for some. All else is its own doing.
It writes what it saw to `FOLDER/rank-N.pt`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import leave
from runs import make_trainer, rows
from torch import Tensor

from hf_vdneuron.masks import read_mask
from hf_vdneuron.sharding import dense_copy, is_sharded


def _pass_for_accelerators_() -> None:
    init = PartialState.__init__

    def claim(self: PartialState, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = claim  # type: ignore[method-assign]


def run(folder: Path, options: dict[str, Any]) -> None:
    """Train in all phases, once more from a checkpoint, prune, save; write what was seen."""
    torch.set_num_threads(1)
    _pass_for_accelerators_()
    batch = {name: torch.stack([row[name] for row in rows()[:8]]) for name in ("input_ids",)}
    trainer = make_trainer(folder, **options)
    frozen = {name for name, _ in trainer.model.named_parameters() if "embeddings" in name}
    for name in frozen:
        trainer.model.get_parameter(name).requires_grad_(False)
    trainer.train()
    trainer.save_model(str(folder / "unpruned"))
    seen: dict[str, Any] = {"sharded": is_sharded(trainer.model), "kept": dict(read_mask(trainer.model).keep)}
    seen["masked"] = _logits(trainer.model, batch)
    seen["teacher"] = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    seen["whole"] = dense_copy(trainer.model).state_dict()
    resumed = make_trainer(folder / "resumed", **options)
    for name in frozen:
        resumed.model.get_parameter(name).requires_grad_(False)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{options['save_steps']}"))
    seen["resumed"] = dense_copy(resumed.model).state_dict()
    pruned = trainer.prune()
    seen["frozen"] = {name for name, own in pruned.named_parameters() if not own.requires_grad} == frozen
    seen["pruned"] = _logits(pruned, batch)
    trainer.save_model(str(folder / "model"))
    torch.save(seen, folder / f"rank-{trainer.args.process_index}.pt")


@torch.no_grad()
def _logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave()
