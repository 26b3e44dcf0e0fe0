"""Three doors to a pruned model, and what people do with a model once it is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_samples import tiny_tokenizer
from models import batch, outputs, tiny_model
from peft import LoraConfig, get_peft_model
from runs import rows
from sentence_transformers import SentenceTransformer
from test_persistence import SEVERAL_SHARDS, pruned_model, state
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_vdneuron
from hf_vdneuron import allow_plain_loading_


Door = Callable[..., PreTrainedModel]

DOORS: dict[str, Door] = {
    "package": lambda auto, folder, **options: hf_vdneuron.from_pretrained(folder, model_class=auto, **options),
    "trust": lambda auto, folder, **options: auto.from_pretrained(folder, trust_remote_code=True, **options),
    "import": lambda auto, folder, **options: auto.from_pretrained(folder, **options),
}

AUTO_CLASSES = {
    "base": AutoModel,
    "sequence_classification": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
}

#: How a model is spread: all of it in memory, and its last layer left on disk.
PLACES: dict[str, Any] = {
    "cpu": "cpu",
    "disk": {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "cpu",
             "bert.encoder.layer.2": "disk", "bert.pooler": "cpu", "classifier": "cpu"},
}  # fmt: skip

doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@pytest.fixture(scope="module", params=["ragged", "whole_sublayers"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One model for each head, saved so that every door is open; tests must not write to their folders."""
    found = {}
    for head in AUTO_CLASSES:
        torch.manual_seed(0)
        folder, model = tmp_path_factory.mktemp(head), pruned_model("bert", head, request.param)
        allow_plain_loading_(model).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        found[head] = folder, model
    return found


def same(left: nn.Module, right: nn.Module) -> bool:
    return torch.equal(outputs(left, batch()), outputs(right, batch()))


@doors
@pytest.mark.parametrize("head", AUTO_CLASSES)
def test_every_head_loads_whole(door: Door, head: str, saved: dict[str, Any]) -> None:
    folder, model = saved[head]
    loaded, info = door(AUTO_CLASSES[head], folder, output_loading_info=True)
    assert (sorted(info["missing_keys"]), sorted(info["unexpected_keys"])) == ([], [])
    assert state(loaded) == state(model)
    assert same(loaded, model)


@doors
def test_shards(door: Door, saved: dict[str, Any], tmp_path: Path) -> None:
    _, model = saved["sequence_classification"]
    model.save_pretrained(tmp_path, max_shard_size=SEVERAL_SHARDS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert state(door(AutoModelForSequenceClassification, tmp_path)) == state(model)


@doors
def test_bfloat16(door: Door, saved: dict[str, Any]) -> None:
    folder, model = saved["sequence_classification"]
    loaded = door(AutoModelForSequenceClassification, folder, dtype=torch.bfloat16)
    expected = {name: value.bfloat16() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@doors
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_device_map(door: Door, place: object, saved: dict[str, Any], tmp_path: Path) -> None:
    folder, model = saved["sequence_classification"]
    options = {"device_map": place, "offload_folder": str(tmp_path / "offloaded")}
    assert same(door(AutoModelForSequenceClassification, folder, **options), model)


@doors
def test_the_body_alone(door: Door, saved: dict[str, Any]) -> None:
    folder, model = saved["sequence_classification"]
    body = door(AutoModel, folder)
    assert type(body).__name__ == "BertModel"
    assert state(body) == state(model.bert)


@doors
def test_a_tied_decoder_stays_tied(door: Door, saved: dict[str, Any]) -> None:
    folder, _ = saved["masked_lm"]
    model = door(AutoModelForMaskedLM, folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@doors
def test_saving_again_leads_to_the_same_doors(door: Door, saved: dict[str, Any], tmp_path: Path) -> None:
    folder, model = saved["masked_lm"]
    door(AutoModelForMaskedLM, folder).save_pretrained(tmp_path)
    for other in DOORS.values():
        assert state(other(AutoModelForMaskedLM, tmp_path)) == state(model)


@doors
def test_what_comes_in_is_an_ordinary_model(door: Door, saved: dict[str, Any]) -> None:
    """No door leaves a sign of quantization behind, which would forbid to cast, train or cut it."""
    folder, model = saved["sequence_classification"]
    loaded = door(AutoModelForSequenceClassification, folder).half().float()
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    again = hf_vdneuron.prune_model_(hf_vdneuron.patch_model_(loaded))
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_the_third_door_is_closed_unless_the_saver_opens_it(tmp_path: Path) -> None:
    model = allow_plain_loading_(allow_plain_loading_(pruned_model()), allow=False)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_the_third_door_is_closed_without_the_import(saved: dict[str, Any]) -> None:
    folder, _ = saved["sequence_classification"]
    code = (
        "import sys, transformers\n"
        "try: transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "except RuntimeError as error: print('refused', 'ignore_mismatched_sizes' in str(error))\n"
        "import hf_vdneuron\n"
        "print(type(transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert run.stdout.split("\n")[:2] == ["refused True", "BertForSequenceClassification"], run.stderr


def test_a_model_that_lost_nothing_needs_no_third_door() -> None:
    with pytest.raises(ValueError, match=r"`BertModel` is not pruned, and loads plainly as it is"):
        allow_plain_loading_(tiny_model("bert"))


# ---- What people do with it ----


#: Doors that a library opens by itself, told the folder alone -> what it is told beside it.
KEYS: dict[str, dict[str, Any]] = {"trust": {"trust_remote_code": True}, "import": {}}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_pipeline(key: dict[str, Any], saved: dict[str, Any]) -> None:
    folder, model = saved["sequence_classification"]
    text = "a good film"
    (answer,) = pipeline("text-classification", model=str(folder), **key)(text)
    check_answer(answer, model, text)


def test_pipeline_of_a_loaded_model(saved: dict[str, Any]) -> None:
    folder, model = saved["sequence_classification"]
    text = "a good film"
    loaded = hf_vdneuron.from_pretrained(folder)
    (answer,) = pipeline("text-classification", model=loaded, tokenizer=tiny_tokenizer())(text)
    check_answer(answer, model, text)


@torch.no_grad()
def check_answer(answer: dict[str, Any], model: PreTrainedModel, text: str) -> None:
    probabilities = model.eval()(**tiny_tokenizer()(text, return_tensors="pt")).logits.softmax(-1)[0]
    assert answer["label"] == model.config.id2label[int(probabilities.argmax())]
    assert answer["score"] == pytest.approx(probabilities.max().item())


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_sentence_transformers(key: dict[str, Any], saved: dict[str, Any]) -> None:
    folder, model = saved["base"]
    encoder = SentenceTransformer(str(folder), device="cpu", **key)
    found = encoder.encode(["a good film"], convert_to_tensor=True)
    tokens = tiny_tokenizer()(["a good film"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(**tokens).last_hidden_state.mean(1))


@doors
def test_further_fine_tuning_with_the_plain_trainer(door: Door, saved: dict[str, Any], tmp_path: Path) -> None:
    folder, before = saved["sequence_classification"]
    model = door(AutoModelForSequenceClassification, folder)
    args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to=[], dataloader_pin_memory=False)
    trainer = Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    assert state(door(AutoModelForSequenceClassification, tmp_path / "tuned")) == state(model)
    assert state(model) != state(before)


def train_one_step(model: nn.Module) -> Tensor:
    inputs = {**batch(), "labels": torch.tensor([0, 1])}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    loss = model.train()(**inputs).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


@doors
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # adapters of empty layers
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by the old name
def test_peft_adapters(door: Door, saved: dict[str, Any]) -> None:
    folder, before = saved["sequence_classification"]
    model = door(AutoModelForSequenceClassification, folder)
    config = LoraConfig(r=2, target_modules=["intermediate.dense", "query", "value"], task_type="SEQ_CLS")
    adapted = get_peft_model(model, config)
    assert same(adapted, before)
    train_one_step(adapted)
    train_one_step(adapted)
    expected = outputs(adapted, batch())
    assert not torch.equal(expected, outputs(before, batch()))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged, batch()), expected, rtol=1e-4, atol=1e-4)


@doors
def test_compile(door: Door, saved: dict[str, Any]) -> None:
    folder, model = saved["sequence_classification"]
    compiled = torch.compile(door(AutoModelForSequenceClassification, folder), backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, batch()), outputs(model, batch()))
