"""The door for models: what was saved comes in and scores the same, what is damaged or misfits is refused."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from glue_samples import BATCH_SIZE, MAX_LENGTH, evaluate, rows_of, tiny_classifier, tiny_tokenizer
from models import CONFIGS, cut_
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM

from hf_vdneuron.evaluation import evaluate_glue
from hf_vdneuron.glue import GLUE_TASKS
from hf_vdneuron.loading import load_classifier, load_model, read_classifier_config
from hf_vdneuron.structure import as_pruned_model_


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_a_saved_classifier_scores_the_same(family: str, pruned: bool, tmp_path: Path) -> None:
    task, model = GLUE_TASKS["sst2"], tiny_classifier(2, family)
    if pruned:
        model = as_pruned_model_(cut_(model))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert read_classifier_config(str(tmp_path)).num_labels == 2
    loaded, tokenizer = load_classifier(str(tmp_path))
    rows = rows_of(task)
    result = evaluate_glue(loaded, tokenizer, task, rows, max_length=MAX_LENGTH, batch_size=BATCH_SIZE)
    assert result == evaluate(model, task, rows)


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    AutoModel.from_config(CONFIGS["bert"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds \['BertModel'\], expected a class ending in ForSequenceClass.*: fine"
    ):
        read_classifier_config(str(tmp_path))


def test_a_folder_that_is_not_there_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give a folder with a saved model.*\(there is no such folder\)$"):
        read_classifier_config(str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["no/such-model", "not there at all"])
def test_a_model_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot load `model_name_or_path` '{name}': give a folder"):
        read_classifier_config(name)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_blank_tokenizer_is_refused(family: str, tmp_path: Path) -> None:
    tiny_classifier(2, family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot load the tokenizer of `model_name_or_path` '{tmp_path}': save it"):
        load_classifier(str(tmp_path))


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_classifier(2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot load the tokenizer of"):
        load_classifier(str(tmp_path))


def cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.intermediate.dense.weight"))
    save_file(
        {key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


WRONG_WEIGHTS = [
    pytest.param(cut_short, "deserializing header", id="short file"),
    pytest.param(lambda folder: change_config(folder, intermediate_size=7), "", id="other sizes"),
    pytest.param(drop_a_weight, "its files lack the weights", id="missing weight"),
    pytest.param(pickle_weights, "no file named model.safetensors", id="pickle"),
]

WRONG_CONFIGS = [
    pytest.param({"hidden_size": "abc"}, "Field 'hidden_size' expected int", id="wrong type"),
    pytest.param({"model_type": "zzz"}, "model type `zzz`", id="unknown type"),
    pytest.param(
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}, "contains custom code", id="remote code"
    ),
]


@pytest.mark.parametrize("trust_remote_code", [False, True], ids=["package", "remote code"])
@pytest.mark.parametrize(("damage", "message"), WRONG_WEIGHTS)
def test_a_damaged_classifier_is_refused(
    damage: Callable[[Path], None],
    message: str,
    trust_remote_code: bool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tiny_classifier(2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"cannot load `model_name_or_path` '{tmp_path}': save or.*{message}"):
        load_classifier(str(tmp_path), trust_remote_code=trust_remote_code)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("head", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize(("damage", "message"), WRONG_WEIGHTS)
def test_a_damaged_start_model_is_refused(
    damage: Callable[[Path], None], message: str, head: type, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head.from_config(deepcopy(CONFIGS["bert"])).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    damage(tmp_path)
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"cannot load `model_name_or_path` '{tmp_path}': save or.*{message}"):
        load_model(str(tmp_path), GLUE_TASKS["sst2"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("load", [lambda path: load_model(path, GLUE_TASKS["sst2"]), read_classifier_config])
@pytest.mark.parametrize(("changes", "message"), WRONG_CONFIGS)
def test_a_wrong_config_is_refused_without_asking(
    changes: dict[str, Any],
    message: str,
    load: Callable[[str], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_classifier(2).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match=f"(?s)cannot load `model_name_or_path` '{tmp_path}': give.*{message}"):
        load(str(tmp_path))


@pytest.mark.parametrize("head", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_start_model_gets_a_classifier_silently(
    family: str, head: type, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    head.from_config(deepcopy(CONFIGS[family])).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    model, tokenizer = load_model(str(tmp_path), GLUE_TASKS["mnli"])
    assert capfd.readouterr() == ("", "")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.id2label == dict(enumerate(GLUE_TASKS["mnli"].label_names))
    assert model(**tokenizer("a b", return_tensors="pt")).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(
            ["NEUTRAL", "CONTRADICTION", "ENTAILMENT"], ["NEUTRAL", "CONTRADICTION", "ENTAILMENT"], id="known"
        ),
        pytest.param(["a", "b", "c"], ["entailment", "neutral", "contradiction"], id="others"),
    ],
)
def test_a_start_classifier_keeps_its_order_of_labels(names: list[str], expected: list[str], tmp_path: Path) -> None:
    saved = tiny_classifier(3, label_names=names)
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), GLUE_TASKS["mnli"])
    assert list(model.config.id2label.values()) == expected
    assert torch.equal(model.classifier.weight, saved.classifier.weight)


def test_a_start_classifier_for_other_labels_is_refused(tmp_path: Path) -> None:
    tiny_classifier(3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    message = rf"`model_name_or_path` '{tmp_path}' is a classifier with 3 labels, but sst2 needs 2 .*: start from"
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path), GLUE_TASKS["sst2"])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pruned_model_is_a_start_model(family: str, tmp_path: Path) -> None:
    saved = as_pruned_model_(cut_(tiny_classifier(2, family)))
    saved.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), GLUE_TASKS["sst2"])
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
