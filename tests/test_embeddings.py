"""Models with fewer tokens: the same outputs, whatever else in them counts or names tokens."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from models import RAGGED, dense_model, keep_units, mask_of, randomised_, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    ViTConfig,
    ViTModel,
)

from hf_vdneuron.embeddings import configured_ids, vocabulary_size, with_tokens
from hf_vdneuron.patching import patch_model_
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.structure import find_structure


SIZE, KEPT = 40, 24
_BODY = {"vocab_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
_BERT = {**_BODY, "intermediate_size": 12, "max_position_embeddings": 16}
_SEQ2SEQ = {"vocab_size": SIZE, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}

#: What models are built from, and how. Each keeps its vocabulary elsewhere.
CASES: dict[str, tuple[type, Any]] = {
    "bert classifier": (AutoModelForSequenceClassification, BertConfig(**_BERT)),
    "bert, head tied with a bias": (AutoModelForMaskedLM, BertConfig(**_BERT)),
    "roberta, positions from the padding": (AutoModelForMaskedLM, RobertaConfig(**_BERT, pad_token_id=1)),
    "gpt2, tied": (
        AutoModelForCausalLM,
        GPT2Config(vocab_size=SIZE, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=30, eos_token_id=30),
    ),
    "llama, not tied": (
        AutoModelForCausalLM,
        LlamaConfig(**_BERT, eos_token_id=[30, 31], bos_token_id=2, tie_word_embeddings=False),
    ),
    "llama, tied": (AutoModelForCausalLM, LlamaConfig(**_BERT, tie_word_embeddings=True)),
    "t5, three times tied": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=SIZE, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0),
    ),
    "bart, bias in a buffer": (
        AutoModelForSeq2SeqLM,
        BartConfig(**_SEQ2SEQ, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
                   decoder_ffn_dim=8, max_position_embeddings=16, forced_eos_token_id=2),
    ),
}  # fmt: skip

cases = pytest.mark.parametrize("case", CASES)


def made(case: str) -> PreTrainedModel:
    auto, config = CASES[case]
    model = randomised_(auto.from_config(deepcopy(config))).double()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def some_order(model: PreTrainedModel) -> list[int]:
    """Keep the first ones in place, as the padding among them, and others in any order."""
    rest = [index for index in torch.randperm(SIZE).tolist() if index > 3]
    named = [index for index in rest if index in configured_ids(model)]
    others = [index for index in rest if index not in named]
    return [0, 1, 2, 3, *others[: KEPT - 4 - len(named)], *named]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **inputs).logits


@cases
def test_outputs_stay(case: str) -> None:
    model = made(case)
    order = some_order(model)
    small, kept = with_tokens(model, order), torch.tensor(order)
    ids = torch.randint(KEPT, (3, 7))  # (batch, tokens), new ones
    before, after = logits(model, kept[ids]), logits(small, ids)
    if "classifier" in case:
        assert torch.equal(after, before)
    else:
        torch.testing.assert_close(after, before[..., kept], rtol=0, atol=1e-12)


@cases
def test_the_copy_is_what_its_config_says(case: str) -> None:
    model = made(case)
    before = deepcopy(model.state_dict())
    small = with_tokens(model, some_order(model))
    assert vocabulary_size(small) == KEPT
    assert not find_structure(small).shapes
    assert small.get_input_embeddings().num_embeddings == KEPT
    built = type(small)(small.config)
    assert {name: value.shape for name, value in built.named_buffers()} == {
        name: value.shape for name, value in small.named_buffers()
    }
    assert small.num_parameters() == built.num_parameters()
    assert [str(module) for module in small.modules()] == [str(module) for module in built.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert vocabulary_size(model) == SIZE


@cases
def test_ids_in_configs_follow(case: str) -> None:
    model = made(case)
    order = some_order(model)
    small = with_tokens(model, order)
    assert {order[index] for index in configured_ids(small)} == configured_ids(model)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        for part in ("config", "generation_config"):
            old, new = (getattr(getattr(one, part, None), name, None) for one in (model, small))
            assert old == ([order[index] for index in new] if isinstance(new, list) else new and order[new])


def test_generation_settings_follow() -> None:
    model = made("llama, tied")
    model.generation_config.update(bad_words_ids=[[20, 21], [22]], suppress_tokens=[23], pad_token_id=999)
    order = some_order(model)
    assert {20, 21, 22, 23} <= set(order)
    small = with_tokens(model, order).generation_config
    assert [[order[index] for index in words] for words in small.bad_words_ids] == [[20, 21], [22]]
    assert [order[index] for index in small.suppress_tokens] == [23]
    assert small.pad_token_id == 999  # it named no token before either
    assert model.generation_config.suppress_tokens == [23]


@pytest.mark.parametrize("case", ["llama, not tied", "t5, three times tied", "bart, bias in a buffer"])
def test_texts_are_written_as_if_the_others_were_forbidden(case: str) -> None:
    model = made(case)
    order = some_order(model)
    small, kept = with_tokens(model, order), torch.tensor(order)
    ids = torch.randint(4, KEPT, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    forbidden = sorted(set(range(SIZE)) - set(order))
    before = model.generate(kept[ids], suppress_tokens=forbidden, **options)
    assert torch.equal(kept[small.generate(ids, **options)], before)


@pytest.mark.parametrize("case", ["bert, head tied with a bias", "llama, tied", "t5, three times tied"])
def test_ties_hold(case: str) -> None:
    small = with_tokens(made(case), list(range(KEPT)))
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_pruned_models(family: str) -> None:
    dense = dense_model(family, "sequence_classification")
    model = prune_model_(dense, mask_of(keep_units(dense, RAGGED, side=0))).eval()
    order = [0, 1, 2, 3, 10, 9, 8, 15]
    small = with_tokens(model, order)
    ids = torch.tensor([[2, 4, 5, 6, 7]])
    assert type(small) is type(model)
    assert torch.equal(logits(small, ids), logits(model, torch.tensor(order)[ids]))
    assert find_structure(small) == find_structure(model)


def test_the_rest_stays_as_it_was() -> None:
    model = tiny_model("bert", "masked_lm", dtype=torch.bfloat16).train()
    model.get_input_embeddings().weight.requires_grad = False
    small = with_tokens(model, [0, 5, 3])
    assert small.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert not small.get_input_embeddings().weight.requires_grad
    assert small.get_input_embeddings().padding_idx == 0
    assert small.config is small.bert.config is small.bert.encoder.layer[0].attention.self.config
    assert small.config._attn_implementation == model.config._attn_implementation


def test_nothing_trimmed_is_a_copy() -> None:
    model = made("bert classifier")
    copy = with_tokens(model, list(range(SIZE)))
    assert copy is not model
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in model.state_dict().items())


def test_padding_may_not_move_where_positions_are_counted_from_it() -> None:
    model = made("roberta, positions from the padding")
    with pytest.raises(ValueError, match=r"embeddings\.position_embeddings` counts positions from the number"):
        with_tokens(model, [0, 2, 1, 3])
    assert with_tokens(made("llama, tied"), [0, 2, 1, 3])


@pytest.mark.parametrize("name", ["sequence_bias", "forced_decoder_ids"])
def test_ids_among_other_numbers_are_refused(name: str) -> None:
    model = made("gpt2, tied")
    setattr(model.generation_config, name, [[[3], -1.0]])
    with pytest.raises(ValueError, match=rf"`{name}` of its GenerationConfig .* got \[\[\[3\], -1\.0\]\]"):
        configured_ids(model)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="Cannot trim a `ViTModel`: expected a transformers model whose config has"):
        vocabulary_size(ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)))
    with pytest.raises(TypeError, match="Cannot trim a `Linear`"):
        vocabulary_size(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Unpatch it"):
        with_tokens(patch_model_(tiny_model("bert", dtype=torch.float32)), [0, 1])
    one, other = BertConfig(**_BERT), BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)
    both = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(one, other))
    with pytest.raises(ValueError, match=r"`encoder.embeddings.word_embeddings.weight` is built otherwise"):
        with_tokens(both, [0, 1])
