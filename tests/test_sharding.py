"""A dense copy of a model in pieces is tried by test_distributed.py, on two processes; here, of a whole one."""

import pytest
import torch
from runs import rows, tiny_bert
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_vdneuron.elbo import variational_layers
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.sharding import dense_copy, is_sharded


def test_a_copy_is_dense_and_leaves_the_model_alone() -> None:
    model = patch_model_(tiny_bert()).eval()
    copy = dense_copy(model)
    assert not is_sharded(model)
    assert variational_layers(model)
    assert not variational_layers(copy)
    batch = {name: torch.stack([row[name] for row in rows()[:4]]) for name in ("input_ids",)}
    assert torch.equal(copy(**batch).logits, model(**batch).logits)
    assert not {id(tensor) for tensor in copy.parameters()} & {id(tensor) for tensor in model.parameters()}


def test_a_chain_in_pieces_is_refused() -> None:
    class ShardedChain(FSDPModule, nn.Sequential):
        """As `fully_shard` makes it, which needs processes."""

        def __new__(cls) -> "ShardedChain":
            return object.__new__(cls)

    with pytest.raises(TypeError, match="sharded `ShardedChain`: expected one of transformers"):
        dense_copy(ShardedChain())
