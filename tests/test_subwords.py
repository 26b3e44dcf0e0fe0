"""Trimmed tokenizers: the same tokens on every text they were trimmed for, sane ones on all others."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from vocabularies import BOS, EOS, KINDS, MASK, PAD, SPECIAL, UNK, sentences, small_tokenizer, texts

from hf_vdneuron.subwords import Text, encoded, needed_ids, new_order, trimmed_json, unbounded


kinds = pytest.mark.parametrize("kind", KINDS)


def trimmed(tokenizer: Tokenizer, corpus: list[Text], fixed: tuple[int, ...] = ()) -> tuple[Tokenizer, list[int]]:
    data = json.loads(tokenizer.to_str())
    used = {index for ids in encoded(tokenizer, corpus) for index in ids}
    order = new_order(data, needed_ids(data, used).union(fixed), fixed)
    return Tokenizer.from_str(json.dumps(trimmed_json(data, order))), order


def pieces(tokenizer: Tokenizer, text: Text) -> list[str]:
    return [tokenizer.id_to_token(index) for index in next(encoded(tokenizer, [text]))]


def same_vocabulary(tokenizer: Tokenizer, small: Tokenizer, order: list[int]) -> bool:
    return small.get_vocab() == {tokenizer.id_to_token(old): new for new, old in enumerate(order)}


@kinds
@settings(max_examples=30)
@given(data=st.data())
def test_texts_of_the_corpus_keep_their_tokens(kind: str, data: st.DataObject) -> None:
    tokenizer = small_tokenizer(kind)
    corpus = data.draw(st.lists(texts() | st.tuples(texts(), texts()), min_size=1, max_size=4))
    small, order = trimmed(tokenizer, corpus)
    assert same_vocabulary(tokenizer, small, order)
    for text, ids in zip(corpus, encoded(small, corpus), strict=True):
        assert pieces(small, text) == pieces(tokenizer, text)
        assert [order[index] for index in ids] == next(encoded(tokenizer, [text]))


@kinds
def test_much_text_and_few_tokens(kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    corpus = list(sentences()[:20])
    small, order = trimmed(tokenizer, corpus)
    assert len(order) < tokenizer.get_vocab_size()
    assert [pieces(small, text) for text in corpus] == [pieces(tokenizer, text) for text in corpus]


@kinds
@settings(max_examples=15)
@given(text=texts(), other=texts())
def test_other_texts_give_tokens_too(kind: str, text: str, other: str) -> None:
    tokenizer = small_tokenizer(kind)
    small, _ = trimmed(tokenizer, [text])
    assert set(pieces(small, other)) <= set(pieces(tokenizer, other)) | small.get_vocab().keys()
    assert "<unk>" not in pieces(small, text) or "<unk>" in pieces(tokenizer, text)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram_bytes"])
@settings(max_examples=15)
@given(text=st.text(), other=st.text())
def test_bytes_spell_whatever_comes(kind: str, text: str, other: str) -> None:
    tokenizer = small_tokenizer(kind)
    small, _ = trimmed(tokenizer, [text])
    before, after = (one.decode(one.encode(other).ids) for one in (tokenizer, small))
    assert after == before


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level", "word_ends", "continued", "byte_fallback", "unigram"])
def test_unseen_words_of_known_characters_are_cut_smaller(kind: str) -> None:
    small, _ = trimmed(small_tokenizer(kind), ["assertion of everything", "mock a bit"])
    assert "<unk>" not in pieces(small, "thereof")


def test_merged_tokens_keep_what_they_are_merged_from() -> None:
    tokens = ["<unk>", "a", "b", "c", "d", "ab", "cd", "bc", "abc", "abcd", "x"]
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("c", "d"), ("abc", "d"), ("ab", "cd")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    small, _ = trimmed(tokenizer, ["abcd"])
    # "abcd" comes from "a" + "bc", then "d"; "ab" and "cd" never come up, as "bc" has the first rank.
    assert small.get_vocab().keys() == {"<unk>", "a", "b", "c", "d", "bc", "abc", "abcd"}
    assert json.loads(small.to_str())["model"]["merges"] == [["b", "c"], ["a", "bc"], ["abc", "d"]]


def test_words_that_are_not_merged_need_no_merges() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")], ignore_merges=True))
    small, _ = trimmed(tokenizer, ["abc"])
    assert pieces(small, "abc") == ["abc"]


def test_unknown_characters_stay_as_expensive() -> None:
    scores = [("<unk>", 0.0), ("x", -30.0), ("xy", -30.0), ("xxx", -1.0), ("rare", -100.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    small, _ = trimmed(tokenizer, ["xxxy", "xxx"])
    # Without "rare" an unknown "y" would cost 40 instead of 110, and "xxx" + "y" less than "x" + "x" + "xy".
    assert pieces(small, "xxxy") == ["x", "x", "xy"]


def test_special_tokens_keep_their_numbers_if_there_are_as_many() -> None:
    tokenizer = small_tokenizer("wordpiece")
    small, order = trimmed(tokenizer, ["a"])
    assert [small.token_to_id(token) for token in SPECIAL] == [PAD, EOS, UNK, BOS, MASK]
    tokenizer.add_special_tokens(["<late>"])
    tokenizer.add_tokens(["later"])
    small, order = trimmed(tokenizer, ["a"], fixed=(7,))
    assert order[7] == 7
    assert order[-2:] == [tokenizer.token_to_id("<late>"), tokenizer.token_to_id("later")]
    assert same_vocabulary(tokenizer, small, order)
    assert pieces(small, "a <late> later") == pieces(tokenizer, "a <late> later")


@settings(max_examples=30)
@given(st.data())
def test_order_closes_ranks(data: st.DataObject) -> None:
    json_data = json.loads(small_tokenizer("words").to_str())
    size = len(json_data["model"]["vocab"])
    added = set(range(len(SPECIAL)))
    kept = data.draw(st.sets(st.integers(0, size + 20))) | added
    fixed = data.draw(st.sets(st.sampled_from(sorted(kept))))
    order = new_order(json_data, kept, fixed)
    assert sorted(order) == sorted(kept)
    inside = [old for old in order if old < size]
    assert order[: len(inside)] == inside
    assert all(order[index] == index for index in added | fixed if index < len(inside))
    moved = [old for new, old in enumerate(order) if new != old]
    assert moved == sorted(moved)


@pytest.mark.parametrize(
    "processor",
    [
        processors.BertProcessing(("</s>", EOS), ("<s>", BOS)),
        processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)),
        processors.Sequence([
            processors.ByteLevel(),
            processors.TemplateProcessing(
                single="a $A", pair="a $A <s> $B", special_tokens=[("a", 40), ("<s>", BOS), ("<mask>", MASK)]
            ),
        ]),
    ],
    ids=["bert", "roberta", "sequence"],
)
def test_tokens_around_texts(processor: processors.PostProcessor) -> None:
    tokenizer = small_tokenizer("byte_level")
    tokenizer.post_processor = processor
    small, order = trimmed(tokenizer, ["mock"])
    for text in ("mock", ("mock", "mock")):
        ids = next(encoded(small, [text]))
        assert [order[index] for index in ids] == next(encoded(tokenizer, [text]))


def test_padding_and_truncation_stay_and_do_not_count() -> None:
    tokenizer = small_tokenizer("wordpiece")
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>", length=3)
    text = sentences()[0]
    assert len(next(encoded(unbounded(tokenizer), [text]))) > 3
    data = json.loads(tokenizer.to_str())
    used = set(next(encoded(unbounded(tokenizer), [text])))
    small = Tokenizer.from_str(json.dumps(trimmed_json(data, new_order(data, needed_ids(data, used), ()))))
    assert (small.truncation, small.padding) == (tokenizer.truncation, tokenizer.padding)
    assert pieces(small, text) == pieces(tokenizer, text)


def test_special_tokens_in_texts_may_count_as_text() -> None:
    tokenizer = small_tokenizer("wordpiece")
    tokenizer.encode_special_tokens = True
    assert "<mask>" not in pieces(unbounded(tokenizer), "a <mask>")


def test_random_tokenizers_are_refused() -> None:
    data = json.loads(Tokenizer(models.BPE({"a": 0}, [], dropout=0.1)).to_str())
    with pytest.raises(ValueError, match=r"at random: `dropout` is 0\.1"):
        needed_ids(data, {0})
