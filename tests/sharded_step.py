"""One process of a step with parameters in pieces; started by test_distributed.py with `torch.distributed.run`.

It writes the KL, the gathered gradients, the moved priors and the relevance to `FOLDER/rank-N.pt`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from processes import leave
from runs import rows, tiny_bert
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_vdneuron.elbo import em_step_, kl_divergence, set_variational_
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.relevance import expected_units, relevance_mask, unit_relevance


KL_WEIGHT = 0.01

GLOBAL_BATCH = 8


def batch(rank: int = 0, num_processes: int = 1) -> dict[str, Tensor]:
    """One process's share of the global batch."""
    size = GLOBAL_BATCH // num_processes
    part = rows()[rank * size : (rank + 1) * size]
    return {name: torch.stack([row[name] for row in part]) for name in part[0]}


def step(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Take one backward pass and one step of EM without noise; what came of it."""
    set_variational_(model, noise=False, collect_kl=True)
    loss = model.train()(**inputs).loss
    kl = kl_divergence(model)
    (loss + KL_WEIGHT * kl).backward()
    em_step_(model)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "kl": kl.detach(),
        "gradients": {
            name: getattr(grad, "full_tensor", lambda grad=grad: grad)() for name, grad in gradients.items()
        },
        "priors": {name: buffer for name, buffer in model.named_buffers() if ".prior." in name},
        "expected": expected_units(model),
        "relevance": unit_relevance(model),
        "kept": dict(relevance_mask(model).keep),
    }


def main(folder: Path) -> None:
    """Shard every layer and the rest, step, and write what came of it."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model, mesh = patch_model_(tiny_bert()), init_device_mesh("cpu", (size,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(step(model, batch(rank, size)), folder / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
