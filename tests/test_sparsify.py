"""`scripts/sparsify.py` and `docstrings.py`: the whole job on a tiny model, and one line for what goes wrong."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from glue_samples import columns_for, tiny_classifier, tiny_tokenizer
from transformers import AutoModel, AutoTokenizer, GPT2Config

import hf_vdneuron
from hf_vdneuron.glue import GLUE_TASKS, GlueTask


SCRIPTS = Path(__file__).parents[1] / "scripts"


def import_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sparsify, docstrings = import_script("sparsify"), import_script("docstrings")


def write_rows(folder: Path, task: GlueTask) -> None:
    columns = {name: values for name, values in columns_for(task, 24).items() if name != "idx"}
    label = Value("float64") if task.is_regression else ClassLabel(names=list(task.label_names))
    features = Features({**dict.fromkeys(task.text_columns, Value("string")), "label": label})
    for split in ("train", *task.validation_splits):
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=features).to_parquet(folder / task.name / f"{split}.parquet")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samples")
    own = GlueTask("moods", ("sentence",), ("glad", "sad", "mad"), ("accuracy",))
    for task in (GLUE_TASKS["sst2"], GLUE_TASKS["stsb"], own):
        write_rows(root / "data", task)
    tiny_classifier(2).base_model.save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    AutoModel.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(root / "unknown")
    tiny_tokenizer().save_pretrained(root / "unknown")
    return root


def flags(samples: Path, output_dir: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": samples / "model",
        "task_name": "sst2",
        "dataset_dir": samples / "data",
        "output_dir": output_dir,
        "max_length": 16,
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "log_var_distance": 20,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


@pytest.mark.parametrize("task_name", ["sst2", "stsb", "moods"])
def test_the_whole_job(task_name: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparsify.main(flags(samples, tmp_path, task_name=task_name))
    report = json.loads((tmp_path / "report.json").read_text())
    table = capsys.readouterr().out
    assert f"{report['pruned']['parameters']:,}" in table
    assert report["pruned"]["parameters"] <= report["dense"]["parameters"]
    assert {"predicted", "measured"} <= report["speedup"].keys()
    assert report["task"] == task_name
    assert None not in (report["dense"]["score"], report["score_after_cut"], report["pruned"]["score"])
    assert not list(tmp_path.glob("*.bin"))
    model = hf_vdneuron.from_pretrained(tmp_path)
    assert model.num_parameters() == report["pruned"]["parameters"]
    inputs = AutoTokenizer.from_pretrained(tmp_path)("a b c", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, model.config.num_labels)
    assert "label" not in "".join(model.config.id2label.values()).lower()
    assert f'hf_vdneuron.from_pretrained("{tmp_path.name}")' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"task_name": "sst3"}, "expected one of cola", id="unknown_task"),
        pytest.param({"model_name_or_path": "no/such/model"}, "no/such/model", id="wrong_model"),
        pytest.param({"dataset_dir": "nowhere"}, "does not exist", id="no_data"),
        pytest.param({"kl_ramp": 2}, "`kl_ramp` is 2", id="argument_out_of_range"),
        pytest.param({"include": "*.layer.9.*"}, "matches no sub-layer", id="pattern_without_match"),
        pytest.param({"max_length": 100_000}, "`max_length` is 100000", id="too_long"),
        pytest.param({"max_train_samples": 0}, "expected at least 1", id="no_rows"),
    ],
)
def test_mistakes_end_in_one_line(
    changes: dict[str, Any], message: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        sparsify.main(flags(samples, tmp_path / "out", **changes))
    assert exit_info.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_an_unsupported_architecture_is_named(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sparsify.main(flags(samples, tmp_path / "out", model_name_or_path=samples / "unknown"))
    assert "Model type `gpt2` is not supported" in capsys.readouterr().err


def test_docstrings_make_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, words in (("glad", "joy"), ("sad", "woe")):
        (tmp_path / "lib" / package).mkdir(parents=True)
        lines = [f'def f{index}():\n    """{words} {index}."""' for index in range(10)]
        (tmp_path / "lib" / package / "code.py").write_text("\n".join(lines))
    monkeypatch.setattr(docstrings, "PACKAGES", ("glad", "sad", "missing"))
    monkeypatch.setattr(docstrings, "MIN_DOCSTRINGS", 5)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    docstrings.main([str(tmp_path)])
    parts = [Dataset.from_parquet(str(path)) for path in sorted((tmp_path / "docstrings").glob("*.parquet"))]
    assert [len(part) for part in parts] == [16, 4]
    for part in parts:
        assert part.features["label"].names == ["glad", "sad"]
        assert all(row["sentence"].startswith(("joy", "woe")[row["label"]]) for row in part)
