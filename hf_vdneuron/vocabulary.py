# SPDX-License-Identifier: Apache-2.0
"""Trim the vocabulary of a model and its tokenizer, together, to the tokens that a corpus uses."""

import json
import reprlib
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_vdneuron.embeddings import configured_ids, vocabulary_size, with_tokens
from hf_vdneuron.subwords import Text, encoded, needed_ids, new_order, trimmed_json, unbounded


__all__ = ["trim_vocabulary"]

_Model = TypeVar("_Model", bound=PreTrainedModel)
_Tokenizer = TypeVar("_Tokenizer", bound=PreTrainedTokenizerFast)

#: The file of a saved tokenizer that holds the JSON of the `tokenizers` library.
_TOKENIZER_FILE = "tokenizer.json"


def trim_vocabulary(model: _Model, tokenizer: _Tokenizer, corpus: Iterable[Text]) -> tuple[_Model, _Tokenizer]:
    """Keep the tokens that a corpus uses, and drop the embeddings of all others.

    On every text of the corpus the new tokenizer gives the same tokens, under new numbers; it is handed back only if
    it does. The new model computes from them what the old one did, and a language model the logits of the tokens that
    are left. On other texts, what has lost its token is cut into smaller pieces, or unknown if there are none. So take
    a corpus like the texts to come; what a model is to write must be in it too.

    Special and added tokens stay, and so do characters that were seen, all bytes where a tokenizer works on bytes, and
    tokens that a config of the model names.

    Args:
        model: A transformers model with a vocabulary, pruned or not; it is left as it is.
        tokenizer: Its fast tokenizer; it is left as it is.
        corpus: Texts, or pairs of texts. They are held in memory.

    Returns:
        A smaller model and its tokenizer, which are saved and loaded as before.

    Raises:
        TypeError: If the tokenizer is no fast one, the model none of transformers with a vocabulary, or the corpus
            holds anything but texts and pairs of them.
        ValueError: If the corpus is empty, or the tokenizer or the model cannot be trimmed exactly.
    """
    size = vocabulary_size(model)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            f"Cannot trim a `{type(tokenizer).__name__}`: expected a fast tokenizer, one that the `tokenizers` "
            "library runs and that is saved as `tokenizer.json`."
        )
    texts, named = _read(corpus), configured_ids(model)
    _require_rows(tokenizer, size)
    dense = unbounded(tokenizer.backend_tokenizer)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    used = {index for ids in encoded(dense, texts) for index in ids}
    order = new_order(data, needed_ids(data, used) | named, named)
    trimmed = _rebuilt(tokenizer, trimmed_json(data, order))
    _require_same_tokens(dense, unbounded(trimmed.backend_tokenizer), order, texts)
    return with_tokens(model, order), trimmed


def _read(corpus: Iterable[Text]) -> list[Text]:
    texts = list(corpus)
    odd = [corpus] if isinstance(corpus, str) else [text for text in texts if not _is_text(text)]
    if odd:
        raise TypeError(f"Expected a `corpus` of texts, or of pairs of texts as tuples, got {reprlib.repr(odd[0])}.")
    if not texts:
        raise ValueError("Expected texts in `corpus`, got none: nothing of the vocabulary would be left.")
    return texts


def _is_text(text: object) -> bool:
    parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
    return all(isinstance(part, str) for part in parts)


def _require_rows(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    rowless = [token for token, index in tokenizer.get_vocab().items() if index >= size]
    if rowless:
        raise ValueError(
            f"The tokenizer has tokens beyond the {size} of the model: {reprlib.repr(rowless)}. Expected a model and "
            "its own tokenizer; `model.resize_token_embeddings(len(tokenizer))` gives rows to added tokens."
        )


def _rebuilt(tokenizer: _Tokenizer, data: dict[str, Any]) -> _Tokenizer:
    """Let the class of a tokenizer load other tokens: it remembers more of them than the JSON of its backend."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, _TOKENIZER_FILE).write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder)
    trimmed.name_or_path = trimmed.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return trimmed


def _require_same_tokens(dense: Tokenizer, trimmed: Tokenizer, order: list[int], texts: list[Text]) -> None:
    """Check what was derived: classes of tokenizers may build themselves otherwise than their file says."""
    new_ids = {old: new for new, old in enumerate(order)}
    expected = {token: new_ids[index] for token, index in dense.get_vocab().items() if index in new_ids}
    odd: list[Any] = sorted(expected.items() ^ trimmed.get_vocab().items())
    if not odd:
        pairs = zip(texts, encoded(dense, texts), encoded(trimmed, texts), strict=True)
        odd = [text for text, before, after in pairs if [new_ids[index] for index in before] != after]
    if odd:
        raise ValueError(
            f"Cannot trim this tokenizer exactly: expected the same tokens as before, got others for {len(odd)} of "
            f"them or of the texts: {reprlib.repr(odd[0])}."
        )
