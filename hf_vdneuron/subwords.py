# SPDX-License-Identifier: Apache-2.0
"""A fast tokenizer with fewer tokens that still cuts every text of a corpus into the same pieces.

Works on the JSON that the `tokenizers` library reads and writes. Which tokens may go depends on how the pieces of a
word are found. Fewer tokens only take choices away, so it is enough that each choice made on the corpus stays the
best:

- WordPiece takes the longest token that fits, WordLevel the word. Among fewer tokens the same one is the longest.
- BPE merges the pair of lowest rank. Pieces that end up apart were never merged, so each is merged as if it stood
  alone. All that it goes through on the way stays, and with it every merge between tokens that stay.
- Unigram takes the pieces of the highest total score, the first ones if several are equal. An unknown character counts
  10 below the token of the lowest score: that token stays too, or unknown characters would become cheaper.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


__all__ = ["Text", "encoded", "needed_ids", "new_order", "trimmed_json", "unbounded"]

#: A text, or a pair of texts that are encoded together.
Text = str | tuple[str, str]

#: Texts that are encoded at once, on all cores.
_CHUNK = 1000

#: How tokenizers with byte fallback spell the bytes of a character that has no token.
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def unbounded(backend: Tokenizer) -> Tokenizer:
    """Copy a tokenizer without its limits: it neither truncates nor pads.

    Args:
        backend: The tokenizer; it is left as it is.

    Returns:
        The copy.
    """
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = backend.encode_special_tokens
    copy.no_truncation()
    copy.no_padding()
    return copy


def encoded(backend: Tokenizer, texts: Sequence[Text]) -> Iterator[list[int]]:
    """Encode texts, with the special tokens around them.

    Args:
        backend: The tokenizer.
        texts: The texts.

    Yields:
        Ids of the tokens of each text.
    """
    for start in range(0, len(texts), _CHUNK):
        yield from (encoding.ids for encoding in backend.encode_batch_fast(texts[start : start + _CHUNK]))


def needed_ids(data: dict[str, Any], used: Collection[int]) -> set[int]:
    """Find the tokens that must stay so that texts made of some tokens are cut as before.

    What was never seen is cut into smaller pieces, down to the characters that were seen, or bytes: they stay too.

    Args:
        data: JSON of the tokenizer.
        used: Ids of the tokens that the texts are made of.

    Returns:
        Their ids, those of all that they are made of, and of all special and added tokens.

    Raises:
        ValueError: If the tokenizer cuts words at random.
    """
    model = data["model"]
    if model.get("dropout"):
        raise ValueError(f"its BPE skips merges at random: `dropout` is {model['dropout']}, expected None")
    ids = _vocabulary(model)
    tokens = {token for token, index in ids.items() if index in used}
    if model["type"] == "BPE":
        tokens |= _merged_from(model, tokens)
    tokens |= _characters(data, tokens)
    if model.get("byte_fallback"):
        tokens |= _BYTES
    return {ids[token] for token in tokens & ids.keys()} | set(used) | _named_ids(data)


def new_order(data: dict[str, Any], kept: Collection[int], fixed: Collection[int]) -> list[int]:
    """Number the tokens that stay.

    Classes of transformers know some tokens by number, so what is fixed stays where it is as long as there are so many
    ids left. All others close ranks.

    Args:
        data: JSON of the tokenizer.
        kept: Ids of what stays; some may be known to the model only.
        fixed: Ids that should not change, some of those kept. Added tokens are meant too.

    Returns:
        New id -> old id.
    """
    known = set(_vocabulary(data["model"]).values())
    inside = known.intersection(kept)
    added = _added_ids(data) - known
    still = {index for index in _added_ids(data).union(fixed) if index < len(inside)} & inside
    moving = iter(sorted(inside - still))
    order = [index if index in still else next(moving) for index in range(len(inside))]
    return order + sorted(added) + sorted(set(kept) - inside - added)


def trimmed_json(data: dict[str, Any], order: list[int]) -> dict[str, Any]:
    """Write a tokenizer that has only some of the tokens.

    Args:
        data: JSON of the tokenizer; it is left as it is.
        order: New id -> old id.

    Returns:
        JSON of the new tokenizer.
    """
    new_ids = {old: new for new, old in enumerate(order)}
    added = [{**token, "id": new_ids[token["id"]]} for token in data["added_tokens"]]
    padding = data["padding"] and {**data["padding"], "pad_id": new_ids[data["padding"]["pad_id"]]}
    return {
        **data,
        "padding": padding,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "post_processor": data["post_processor"] and _renumbered(data["post_processor"], new_ids),
        "model": _trimmed_model(data["model"], order, new_ids),
    }


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Read the ids of all tokens but those added outside the model."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: tokens with their scores, by id
        return {token: index for index, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _named_ids(data: dict[str, Any]) -> set[int]:
    """List the tokens that a tokenizer has a use of its own for."""
    model, ids = data["model"], _vocabulary(data["model"])
    named = _added_ids(data) | set(_inserted_ids(data["post_processor"] or {}))
    if model.get("unk_token") in ids:
        named.add(ids[model["unk_token"]])
    if model["type"] == "Unigram":
        named |= {index for index in [model["unk_id"]] if index is not None}
        named.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
    return named | ({data["padding"]["pad_id"]} if data["padding"] else set())


def _added_ids(data: dict[str, Any]) -> set[int]:
    return {token["id"] for token in data["added_tokens"]}


def _affixes(model: dict[str, Any]) -> tuple[str, str]:
    """Read what marks a piece that continues a word, and one that ends it."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _characters(data: dict[str, Any], tokens: Iterable[str]) -> set[str]:
    """List how all characters of some tokens are written as tokens, and all bytes where characters stand for them."""
    prefix, suffix = _affixes(data["model"])
    characters = set("".join(tokens))
    if "ByteLevel" in {*_types(data["normalizer"]), *_types(data["pre_tokenizer"])}:
        characters |= set(ByteLevel.alphabet())
    return {form for one in characters for form in (one, prefix + one, one + suffix, prefix + one + suffix)}


def _types(part: object) -> Iterator[str]:
    """List the types of a part of the tokenizer and of all that it is made of."""
    if isinstance(part, dict):
        yield from [part["type"]] if "type" in part else []
        part = list(part.values())
    if isinstance(part, list):
        for child in part:
            yield from _types(child)


def _merged_from(model: dict[str, Any], tokens: Iterable[str]) -> set[str]:
    """List all that some tokens go through while they are merged from their characters."""
    prefix, suffix = _affixes(model)
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    seen = set()
    for token in tokens:
        symbols = _symbols(token, prefix, suffix)
        seen.update(symbols)
        while pairs := [(ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks]:
            _, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1].removeprefix(prefix)]
            seen.add(symbols[at])
    return seen


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    """Spell a token as BPE does before the first merge: each character with its marks."""
    is_last = suffix != "" and token.endswith(suffix)
    is_first = not (prefix and token.startswith(prefix))
    symbols = [prefix + one for one in token.removeprefix(prefix).removesuffix(suffix)]
    if symbols and is_first:
        symbols[0] = symbols[0].removeprefix(prefix)
    if symbols and is_last:
        symbols[-1] += suffix
    return symbols


def _trimmed_model(model: dict[str, Any], order: list[int], new_ids: dict[int, int]) -> dict[str, Any]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        entries = [vocabulary[index] for index in order if index < len(vocabulary)]
        unknown = model["unk_id"]
        return {**model, "vocab": entries, "unk_id": None if unknown is None else new_ids[unknown]}
    tokens = {token: new_ids[index] for token, index in vocabulary.items() if index in new_ids}
    trimmed = {**model, "vocab": dict(sorted(tokens.items(), key=lambda entry: entry[1]))}
    if "merges" in model:
        prefix, _ = _affixes(model)
        merges = ((left, right, left + right.removeprefix(prefix)) for left, right in model["merges"])
        trimmed["merges"] = [[left, right] for left, right, made in merges if {left, right, made} <= tokens.keys()]
    return trimmed


def _inserted_ids(processor: Mapping[str, Any]) -> Iterator[int]:
    """List the ids that a post-processor puts around texts."""
    for part in processor.get("processors", []):
        yield from _inserted_ids(part)
    for entry in processor.get("special_tokens", {}).values():
        yield from entry["ids"]
    yield from (processor[name][1] for name in ("sep", "cls") if name in processor)


def _renumbered(processor: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Rewrite the ids in a post-processor."""
    renumbered = dict(processor)
    if "processors" in processor:
        renumbered["processors"] = [_renumbered(part, new_ids) for part in processor["processors"]]
    if "special_tokens" in processor:
        renumbered["special_tokens"] = {
            token: {**entry, "ids": [new_ids[index] for index in entry["ids"]]}
            for token, entry in processor["special_tokens"].items()
        }
    for name in {"sep", "cls"} & processor.keys():
        token, index = processor[name]
        renumbered[name] = [token, new_ids[index]]
    return renumbered
