"""Saving and loading: every door gives the saved model to the last bit, and damage is one clear error."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import (
    AUTO_CLASSES,
    CONFIGS,
    RAGGED,
    WHOLE_SUBLAYERS,
    KeptUnits,
    batch,
    dense_model,
    keep_units,
    mask_of,
    outputs,
)
from safetensors.torch import load_file, save_file
from strangers import WITHOUT_THE_PACKAGE
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM, PreTrainedModel, RobertaModel

from hf_vdneuron.modeling_vdneuron import CODE_FILES, PrunedModel, pruned_class
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.pruning import prune_model_


ROWS = [(family, head, "ragged") for family in CONFIGS for head in AUTO_CLASSES]
ROWS += [(family, "sequence_classification", "whole_sublayers") for family in CONFIGS]
KEPT: dict[str, KeptUnits] = {"ragged": RAGGED, "whole_sublayers": WHOLE_SUBLAYERS}
SEVERAL_SHARDS = "2KB"
CODE = {path.name for path in CODE_FILES}

rows = pytest.mark.parametrize("row", ROWS, ids=["-".join(row) for row in ROWS])
families = pytest.mark.parametrize("family", CONFIGS)

#: Loads each row with transformers alone. The file of answers stands beside the model; the verdict is printed.
DOOR_TWO = (
    f"{WITHOUT_THE_PACKAGE}"
    """
import json
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file

@torch.no_grad()
def same(model, answers):
    output = model(input_ids=answers["input_ids"], attention_mask=answers["attention_mask"])[0]
    return torch.equal(output, answers["output"])

torch.set_num_threads(1)
verdicts = {}
for folder in map(Path, sys.argv[1:]):
    answers = load_file(folder / "answers.safetensors")
    auto = getattr(transformers, (folder / "auto_class.txt").read_text())
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    again = folder / "again"
    model.save_pretrained(again)
    body = transformers.AutoModel.from_pretrained(again, trust_remote_code=True)
    verdicts[str(folder)] = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "same": same(model, answers),
        "same_again": same(auto.from_pretrained(again, trust_remote_code=True), answers),
        "body": type(body).__name__,
        "imported": [name for name in sys.modules if name.split(".")[0] == "hf_vdneuron"],
    }
print(json.dumps(verdicts))
"""
)


def pruned_model(family: str = "bert", head: str = "sequence_classification", kept: str = "ragged") -> PrunedModel:
    dense = dense_model(family, head)
    return prune_model_(dense, mask_of(keep_units(dense, KEPT[kept], side=0)))


def state(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, list[Any]]]:
    """What has to survive, comparable by ==."""
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], tuple[Path, PrunedModel]]:
    """All rows, saved once; tests must not write to them."""
    root = tmp_path_factory.mktemp("saved")
    models = {}
    for row in ROWS:
        torch.manual_seed(0)
        folder, model = root / "-".join(row), pruned_model(*row)
        model.save_pretrained(folder)
        models[row] = folder, model
    return models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model to damage."""
    pruned_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@rows
def test_door_one_gives_the_saved_model(row: tuple[str, str, str], saved: dict[Any, Any]) -> None:
    folder, model = saved[row]
    loaded, info = from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    assert not loaded.training
    assert state(loaded) == state(model)
    assert torch.equal(outputs(loaded, batch()), outputs(model, batch()))


@pytest.fixture(scope="module")
def door_two(saved: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process without the package found out about all rows."""
    root = tmp_path_factory.mktemp("door_two")
    for row, (folder, model) in saved.items():
        shutil.copytree(folder, root / folder.name)
        with torch.no_grad():
            output = model(**batch())[0]
        save_file({**batch(), "output": output}, root / folder.name / "answers.safetensors")
        (root / folder.name / "auto_class.txt").write_text(AUTO_CLASSES[row[1]].__name__)
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    folders = [str(path) for path in root.iterdir() if path.is_dir()]
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", DOOR_TWO, *folders],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return {Path(path).name: verdict for path, verdict in json.loads(process.stdout).items()}


@rows
def test_door_two_gives_the_saved_model(row: tuple[str, str, str], door_two: dict[str, dict[str, Any]]) -> None:
    body = type(dense_model(row[0])).__name__
    assert door_two["-".join(row)] == {
        "missing": [],
        "unexpected": [],
        "same": True,
        "same_again": True,
        "body": body,
        "imported": [],
    }


@rows
def test_neither_door_raises(row: tuple[str, str, str], saved: dict[Any, Any]) -> None:
    for auto_class in {AutoModel, AUTO_CLASSES[row[1]]}:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            auto_class.from_pretrained(saved[row][0])


@families
def test_saved_files(family: str, saved: dict[Any, Any]) -> None:
    folder, _ = saved[family, "masked_lm", "ragged"]
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", *CODE} <= files
    assert not [name for name in files if name.startswith(".") or name.endswith(".bin")]
    tensors = load_file(folder / "model.safetensors")
    assert any(tensor.numel() == 0 for tensor in tensors.values())  # what is removed stays under its native name
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {auto_class.__name__ for auto_class in AUTO_CLASSES.values()} <= auto_map.keys()


def test_auto_map_keeps_what_is_not_ours(tmp_path: Path) -> None:
    model = pruned_model()
    model.config.auto_map = {"AutoTokenizer": ["me/repo--tokenizer.Tokenizer", None], "AutoModel": "old.Model"}
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoTokenizer"] == ["me/repo--tokenizer.Tokenizer", None]
    assert auto_map["AutoModel"] == "modeling_vdneuron.BertModel"


@families
def test_sharded_save(family: str, tmp_path: Path) -> None:
    model = pruned_model(family)
    model.save_pretrained(tmp_path, max_shard_size=SEVERAL_SHARDS)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert state(from_pretrained(tmp_path)) == state(model)


def test_later_save_replaces_an_earlier_one(tmp_path: Path) -> None:
    first, second = pruned_model(), pruned_model(kept="whole_sublayers")
    for model, size in ((first, "1GB"), (second, SEVERAL_SHARDS), (first, "5KB"), (second, "1GB")):
        (tmp_path / "tokenizer.json").write_text("{}")
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert state(from_pretrained(tmp_path)) == state(model)
        assert (tmp_path / "tokenizer.json").exists()
    assert len(list(tmp_path.glob("*.safetensors*"))) == 1


@families
def test_dtype_is_kept(family: str, tmp_path: Path) -> None:
    model = pruned_model(family)
    model.save_pretrained(tmp_path / "fp32")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    expected = state(model)
    assert state(from_pretrained(tmp_path / "bf16")) == expected
    assert state(from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)) == expected


@families
def test_resaved_model(family: str, tmp_path: Path) -> None:
    model = pruned_model(family, "masked_lm")
    model.save_pretrained(tmp_path / "1")
    from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    assert state(from_pretrained(tmp_path / "2")) == state(model)
    assert {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "2").iterdir()
    }


@families
def test_body_alone(family: str, saved: dict[Any, Any], tmp_path: Path) -> None:
    folder, model = saved[family, "sequence_classification", "ragged"]
    expected = state(model.base_model)
    deepcopy(model).base_model.save_pretrained(tmp_path)  # the body of a model saves itself too
    for source, options in ((folder, {"model_class": AutoModel}), (tmp_path, {})):
        body, info = from_pretrained(source, output_loading_info=True, **options)
        assert isinstance(body, PrunedModel)
        assert {name.split(".")[0] for name in info["missing_keys"]} <= {"pooler"}  # some heads leave it out
        assert {name: value for name, value in state(body).items() if name in expected} == expected


@pytest.mark.parametrize(
    "model_class",
    [AutoModelForMaskedLM, BertForMaskedLM, pruned_class(BertForMaskedLM)],
    ids=["auto", "native", "pruned"],
)
def test_other_head(model_class: type, saved: dict[Any, Any]) -> None:
    folder, model = saved["bert", "sequence_classification", "ragged"]
    other, info = from_pretrained(folder, model_class=model_class, output_loading_info=True)
    assert type(other) is pruned_class(BertForMaskedLM)
    assert all(name.startswith("cls.") for name in info["missing_keys"])
    assert state(other.bert.encoder) == state(model.bert.encoder)
    decoder = other.cls.predictions.decoder.weight
    assert decoder is other.bert.embeddings.word_embeddings.weight


@families
def test_dense_model(family: str, tmp_path: Path) -> None:
    dense = dense_model(family, "masked_lm")
    dense.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(dense)
    assert state(loaded) == state(dense)


@pytest.mark.parametrize("size", ["1GB", SEVERAL_SHARDS], ids=["one_file", "shards"])
def test_save_that_is_killed_while_writing_leaves_the_earlier_one(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = pruned_model(), pruned_model()
    earlier.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(path.name for path in tmp_path.iterdir())
    writes = iter([transformers.modeling_utils.safe_save_file] if size == SEVERAL_SHARDS else [])

    def write(*args: Any, **kwargs: Any) -> None:
        for write_one in writes:
            return write_one(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write)
    with pytest.raises(KeyboardInterrupt):
        later.save_pretrained(tmp_path, max_shard_size=size)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert state(from_pretrained(tmp_path)) == state(earlier)


@pytest.mark.parametrize("moves", range(len(CODE) + 3))
def test_save_that_is_killed_while_moving_is_never_half_loaded(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = pruned_model(), pruned_model()
    earlier.save_pretrained(tmp_path)
    replace, moved = Path.replace, []

    def move(source: Path, target: Path) -> Path:
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(source)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", move)
    if moves < len(CODE) + 2:  # weights, code, config
        with pytest.raises(KeyboardInterrupt):
            later.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="Cannot load"):
            from_pretrained(tmp_path)
    else:
        later.save_pretrained(tmp_path)
        assert state(from_pretrained(tmp_path)) == state(later)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[str]]]:
    """Files that were uploaded, by repository; nothing leaves the machine."""
    repositories: dict[str, set[str]] = {}

    def create_commit(repo_id: str, operations: list[Any], **_: Any) -> None:
        repositories.setdefault(repo_id, set()).update(operation.path_in_repo for operation in operations)

    api = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id), create_commit=create_commit
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: api)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: card)
    return repositories


@pytest.mark.parametrize(
    "push",
    [
        lambda model, folder: model.push_to_hub("me/model"),
        lambda model, folder: model.save_pretrained(
            folder, push_to_hub=True, repo_id="me/model", max_shard_size="1GB"
        ),
    ],
    ids=["push_to_hub", "save_pretrained"],
)
def test_push_uploads_the_code_too(
    push: Callable[[PrunedModel, Path], None], uploads: dict[str, set[str]], tmp_path: Path
) -> None:
    push(pruned_model(), tmp_path)
    assert uploads == {"me/model": {"config.json", "model.safetensors", *CODE, "README.md"}}


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def replace_by_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def list_pickles_as_shards(folder: Path) -> None:
    replace_by_pickles(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(["bert.pooler.dense.bias"], "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def name_pickles_in_config(folder: Path) -> None:
    replace_by_pickles(folder)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    edit_config(folder, transformers_weights="adapter_model.bin")


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.0.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def damage_index(**changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        from_pretrained(folder).save_pretrained(folder, max_shard_size=SEVERAL_SHARDS)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | changes))

    return damage


def lose_a_shard(folder: Path) -> None:
    from_pretrained(folder).save_pretrained(folder, max_shard_size=SEVERAL_SHARDS)
    next(folder.glob("model-00002*")).unlink()


def change_structure(folder: Path, **changes: Any) -> None:
    structure = json.loads((folder / "config.json").read_text())["vdneuron"]
    edit_config(folder, vdneuron=structure | changes)


def describe_other_shapes(folder: Path) -> None:
    structure = json.loads((folder / "config.json").read_text())["vdneuron"]
    structure["shapes"]["encoder.layer.0.attention.self.query"] = [4, 16]
    edit_config(folder, vdneuron=structure)


def describe_other_heads(folder: Path) -> None:
    structure = json.loads((folder / "config.json").read_text())["vdneuron"]
    structure["attributes"]["encoder.layer.0.attention.self"] = {"num_attention_heads": 0, "all_head_size": 3}
    edit_config(folder, vdneuron=structure)


def replace_by_nothing(folder: Path) -> None:
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no_folder": shutil.rmtree,
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "config_not_json": lambda folder: (folder / "config.json").write_text("{"),
    "config_null": lambda folder: (folder / "config.json").write_text("null"),
    "config_not_utf8": lambda folder: (folder / "config.json").write_bytes(b"\xff"),
    "config_wrong_type": lambda folder: edit_config(folder, hidden_size="16"),
    "unknown_model_type": lambda folder: edit_config(folder, model_type="x", auto_map={"AutoConfig": "x.Y"}),
    "no_architecture": lambda folder: edit_config(folder, architectures=None),
    "architecture_not_a_list": lambda folder: edit_config(folder, architectures="BertModel"),
    "architecture_not_a_name": lambda folder: edit_config(folder, architectures=[["BertModel"]]),
    "architecture_not_a_model": lambda folder: edit_config(folder, architectures=["BertConfig"]),
    "architecture_not_a_class": lambda folder: edit_config(folder, architectures=["utils"]),
    "architecture_abstract": lambda folder: edit_config(folder, architectures=["PreTrainedModel"]),
    "architecture_of_other_type": lambda folder: edit_config(folder, architectures=["RobertaModel"]),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights_empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights_truncated": truncate,
    "weights_pickled": replace_by_pickles,
    "shards_pickled": list_pickles_as_shards,
    "named_weights_pickled": name_pickles_in_config,
    "adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "shard_missing": lose_a_shard,
    "weight_missing": lose_a_weight,
    "index_empty": damage_index(weight_map={}),
    "index_without_metadata": damage_index(metadata=None),
    "index_damaged": lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
    "structure_damaged": lambda folder: change_structure(folder, shapes=[]),
    "structure_enlarges": lambda folder: change_structure(folder, shapes={"pooler.dense": [10**12, 16]}),
    "structure_of_later_version": lambda folder: change_structure(folder, version=2),
    "structure_lost": lambda folder: edit_config(folder, vdneuron=None),
    "structure_of_other_weights": describe_other_shapes,
    "attributes_of_other_weights": describe_other_heads,
    "far_too_many_layers": lambda folder: edit_config(folder, num_hidden_layers=10**9),
    "far_too_many_layers_in_a_part": lambda folder: edit_config(folder, text_config={"decoder_layers": 10**9}),
    "far_too_many_labels": lambda folder: edit_config(folder, num_labels=10**9),
    "far_too_wide": lambda folder: edit_config(folder, hidden_size=10**9, intermediate_size=10**9),
    "no_layer_and_no_weights": replace_by_nothing,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DAMAGE[damage](folder)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ValueError, match=rf"Cannot load `{folder}`: .*[.?!] Expected .* again\.$"):
        from_pretrained(folder)


@pytest.mark.parametrize("size", ["1GB", SEVERAL_SHARDS], ids=["one_file", "shards"])
@pytest.mark.parametrize("counts", [{"num_hidden_layers": 10**6}, {"num_labels": 10**9}], ids=str)
def test_a_config_that_outgrows_its_files_builds_nothing(
    counts: dict[str, int], size: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_pretrained(folder).save_pretrained(folder, max_shard_size=size)
    edit_config(folder, **counts)
    monkeypatch.setattr(transformers.BertConfig, "__init__", lambda *_, **__: pytest.fail("a config was built"))
    (name,) = counts
    with pytest.raises(
        ValueError, match=rf"its config says `{name}` is {counts[name]}, but its files hold \d+ tensors"
    ):
        from_pretrained(folder)


def test_code_in_the_repository_never_runs(folder: Path) -> None:
    (folder / "modeling_vdneuron.py").write_text("raise SystemExit('ran')")
    edit_config(
        folder,
        attn_implementation="somebody/kernel",
        auto_map={"AutoConfig": "modeling_vdneuron.X", "AutoModel": "x.X"},
    )
    assert from_pretrained(folder).config._attn_implementation == "sdpa"
    assert from_pretrained(folder, attn_implementation="eager").config._attn_implementation == "eager"
    edit_config(folder, model_type="unknown")
    with pytest.raises(ValueError, match="its config cannot be read"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "argument", [{"trust_remote_code": True}, {"use_safetensors": False}, {"weights_only": False}]
)
def test_safety_is_not_optional(argument: dict[str, bool], folder: Path) -> None:
    with pytest.raises(TypeError, match=next(iter(argument))):
        from_pretrained(folder, **argument)


@pytest.mark.parametrize("model_class", [RobertaModel, dict, transformers.AutoModelForCTC])
def test_model_class_must_fit(model_class: type, folder: Path) -> None:
    with pytest.raises(
        ValueError, match="expected a class of transformers that a `BertConfig` builds, got `model_class`"
    ):
        from_pretrained(folder, model_class=model_class)
