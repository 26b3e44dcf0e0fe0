"""Small tokenizers of every kind, trained on docstrings of the standard library, and texts that they have not seen."""

import json
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

from docstrings import docstrings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


SPECIAL = ["<pad>", "</s>", "<unk>", "<s>", "<mask>"]
PAD, EOS, UNK, BOS, MASK = range(len(SPECIAL))
VOCABULARY = 600

#: How a tokenizer spells the bytes of a character that it has no token for.
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_OPTIONS = {"vocab_size": VOCABULARY, "special_tokens": SPECIAL, "show_progress": False}
_BYTE_OPTIONS = _OPTIONS | {"vocab_size": VOCABULARY + len(BYTES), "special_tokens": [*SPECIAL, *BYTES]}


@cache
def sentences() -> tuple[str, ...]:
    """Real text, a line each."""
    return tuple(docstrings(Path(sysconfig.get_path("stdlib")) / "unittest"))


def _wordpiece() -> tuple[Tokenizer, trainers.Trainer]:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(**_OPTIONS)


def _words() -> tuple[Tokenizer, trainers.Trainer]:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.WordLevelTrainer(**_OPTIONS)


def _byte_level() -> tuple[Tokenizer, trainers.Trainer]:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(**_OPTIONS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _word_ends() -> tuple[Tokenizer, trainers.Trainer]:
    """CLIP's kind, on characters: the last one of a word has a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.BpeTrainer(**_OPTIONS, end_of_word_suffix="</w>")


def _continued() -> tuple[Tokenizer, trainers.Trainer]:
    """All characters of a word but the first have a mark."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer, trainers.BpeTrainer(**_OPTIONS, continuing_subword_prefix="##")


def _byte_fallback() -> tuple[Tokenizer, trainers.Trainer]:
    """Llama 2's kind: characters, and bytes where there is no character."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer, trainers.BpeTrainer(**_BYTE_OPTIONS)


def _unigram(options: dict[str, object] = _OPTIONS) -> tuple[Tokenizer, trainers.Trainer]:
    """T5's and XLM-R's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(**options, unk_token="<unk>")


def _unigram_bytes() -> tuple[Tokenizer, trainers.Trainer]:
    """As Unigram, with bytes where there is no character."""
    tokenizer, trainer = _unigram(_BYTE_OPTIONS)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer, trainer


KINDS: dict[str, Callable[[], tuple[Tokenizer, trainers.Trainer]]] = {
    "wordpiece": _wordpiece,
    "words": _words,
    "byte_level": _byte_level,
    "word_ends": _word_ends,
    "continued": _continued,
    "byte_fallback": _byte_fallback,
    "unigram": _unigram,
    "unigram_bytes": _unigram_bytes,
}


@cache
def _trained(kind: str) -> str:
    tokenizer, trainer = KINDS[kind]()
    tokenizer.train_from_iterator(sentences()[:400], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][: len(SPECIAL)]  # bytes are tokens like any other
    if kind == "unigram_bytes":
        data["model"]["byte_fallback"] = True
    return json.dumps(data)


def small_tokenizer(kind: str) -> Tokenizer:
    """A trained tokenizer that ends texts with `</s>`."""
    tokenizer = Tokenizer.from_str(_trained(kind))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("</s>", EOS), ("<s>", BOS)]
    )
    return tokenizer


@cache
def _words_of_sentences() -> list[str]:
    return sorted({word for sentence in sentences() for word in sentence.split()})


def texts() -> st.SearchStrategy[str]:
    """Draw what a tokenizer knows, what it does not, and special tokens, in one line or several."""
    words = st.sampled_from(_words_of_sentences())
    strange = st.text(max_size=6) | st.text("abcdefghäß你\U0001f600<>0x", max_size=12)
    return st.lists(words | strange | st.sampled_from(SPECIAL), max_size=8).map(" ".join)
