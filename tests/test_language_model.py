"""`scripts/language_model.py`: a tiny Llama on a few words, and the real one where it is at hand."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import language_model
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from vocabularies import sentences, small_tokenizer

import hf_vdneuron
from hf_vdneuron.budget import units_left


DATA = Path(__file__).parents[2] / "shared" / "data"
REAL_MODEL, REAL_TEXT = DATA / "weights" / "stories260K", DATA / "lm" / "tinyshakespeare.txt"

needs_data = pytest.mark.skipif(
    not (REAL_MODEL.exists() and REAL_TEXT.exists()), reason="stories260K and tinyshakespeare are not there"
)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Folder with a tiny model and its tokenizer, beside a text."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer("byte_level"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("\n".join(sentences() * 20), encoding="utf-8")
    return tmp_path


def flags(folder: Path, *more: str) -> list[str]:
    values = {
        "model_name_or_path": folder / "llama",
        "text_file": folder / "text.txt",
        "output_dir": folder / "out",
        "block_length": 16,
        "max_new_tokens": 4,
        "max_steps": 12,
        "logging_steps": 100,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "target_speedup": 1.5,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + [*more]


def perplexities(table: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"perplexity,? ([\w ,-]+?)  +([\d.]+)\n", table)}


@pytest.mark.parametrize("layout", ["free", "uniform"])
def test_a_language_model_is_cut_scored_saved_and_writes(
    layout: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language_model.main(flags(llama, "--layout", layout, "--prompt", "the"))
    printed = capsys.readouterr().out
    found = perplexities(printed)
    assert list(found) == ["pretrained", "fine-tuned", "right after the cut", "in the end"]
    model = hf_vdneuron.from_pretrained(llama / "out")
    are_alike = all(len(set(counts)) == 1 for counts in units_left(model).values())
    assert are_alike or layout == "free"
    assert (type(model) is LlamaForCausalLM) == are_alike
    assert printed.rpartition("\n\n")[2].startswith("the")
    tokenizer = AutoTokenizer.from_pretrained(llama / "llama")
    arguments = language_model.TextArguments(str(llama / "llama"), llama / "text.txt", block_length=16)
    _, held_out = language_model.read_blocks(arguments, tokenizer)
    with torch.no_grad():
        losses = [model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss for row in held_out]
    assert found["in the end"] == pytest.approx(torch.stack(losses).mean().exp().item(), rel=2e-2)


def test_nothing_of_the_held_out_text_is_trained_on(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama / "llama")
    arguments = language_model.TextArguments(str(llama / "llama"), llama / "text.txt", block_length=16)
    train, held_out = language_model.read_blocks(arguments, tokenizer)
    ids = torch.cat([row["input_ids"] for row in train + held_out])
    text = tokenizer((llama / "text.txt").read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert ids.tolist() == text[: len(ids)]
    assert len(text) - len(ids) < 16
    assert len(held_out) == -(-len(train + held_out) // 10)


def cut_short(folder: Path) -> None:
    weights = folder / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def put_an_encoder(folder: Path, model_class: type[PreTrainedModel]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(AutoTokenizer.from_pretrained(folder / "llama")), **sizes)
    model_class(config).save_pretrained(folder / "llama")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda folder: (folder / "text.txt").write_text("the", encoding="utf-8"),
            r"`text_file` has \d+ tokens: expected at least two blocks of 16",
            id="short_text",
        ),
        pytest.param(
            lambda folder: (folder / "text.txt").write_bytes(b"\xff\xfe"),
            r"`text_file` \S+text\.txt is no text in UTF-8: convert it first \(.+\)",
            id="bytes",
        ),
        pytest.param(
            lambda folder: (folder / "text.txt").unlink(), r"\[Errno 2\] No such file .+text\.txt'", id="no_text"
        ),
        pytest.param(
            lambda folder: shutil.rmtree(folder / "llama"),
            r"cannot load `model_name_or_path` '\S+llama': give a folder .+ \(there is no such folder\)",
            id="no_model",
        ),
        pytest.param(
            cut_short,
            r"cannot load `model_name_or_path` '\S+llama': save or download it again \(.+\)",
            id="half_a_model",
        ),
        pytest.param(
            lambda folder: put_an_encoder(folder, BertModel),
            r"cannot load `model_name_or_path` '\S+llama': .+ \(its files lack the weights \['cls\..+\)",
            id="no_head",
        ),
        pytest.param(
            lambda folder: put_an_encoder(folder, BertForMaskedLM),
            r"`model_name_or_path` holds a BertLMHeadModel that looks ahead: expected a causal language model, .+",
            id="looks_ahead",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    spoil: Callable[[Path], object], message: str, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(llama)
    capsys.readouterr()  # bars of what was spoilt
    with pytest.raises(SystemExit):
        language_model.main(flags(llama))
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
    assert not (llama / "out").exists()


def test_a_block_of_one_token_predicts_nothing(llama: Path) -> None:
    with pytest.raises(ValueError, match="`block_length` is 1, expected at least 2"):
        language_model.TextArguments(str(llama), llama, block_length=1)


@needs_data
def test_a_real_llama_stays_an_ordinary_one_and_writes_the_same_with_and_without_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sixty steps: far from trained, but far better than before, and worse only by what was cut."""
    (tmp_path / "text.txt").write_text(REAL_TEXT.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    (tmp_path / "llama").symlink_to(REAL_MODEL)
    more = [
        "--layout",
        "uniform",
        "--round_heads_to",
        "2",
        "--round_neurons_to",
        "4",
        "--max_steps",
        "60",
        "--learning_rate",
        "2e-3",
    ]
    language_model.main(flags(tmp_path, *more, "--prompt", "KING:"))
    found = perplexities(capsys.readouterr().out)
    assert found["fine-tuned"] < found["in the end"] < 0.8 * found["right after the cut"]
    assert found["in the end"] < 0.5 * found["pretrained"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is LlamaForCausalLM
    assert model.num_parameters() < 0.8 * AutoModelForCausalLM.from_pretrained(REAL_MODEL).num_parameters()
    prompt = AutoTokenizer.from_pretrained(tmp_path / "out")("KING:", return_tensors="pt")
    options = {"max_new_tokens": 30, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), model.generate(**prompt, **options, use_cache=False))
