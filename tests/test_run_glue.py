"""`scripts/run_glue.py`: results of the tasks asked for, or one line that says what to do."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from glue_samples import NUM_ROWS, tiny_classifier, tiny_tokenizer, write_task
from models import CONFIGS, cut_
from transformers import AutoModel

from hf_vdneuron.glue import GLUE_TASKS, glue_task
from hf_vdneuron.structure import as_pruned_model_


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_glue.py"


def import_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_glue = import_script()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all tasks, a variant, and classifiers with 1, 2 and 3 labels; tests must not write to it."""
    root = tmp_path_factory.mktemp("samples")
    for task in [*GLUE_TASKS.values(), glue_task("qnli_devsplit")]:
        write_task(root / "data", task)
    models = {str(num_labels): tiny_classifier(num_labels) for num_labels in (1, 2, 3)}
    models["pruned"] = as_pruned_model_(cut_(tiny_classifier(2)))
    models["base"] = AutoModel.from_config(CONFIGS["bert"])
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    models["2"].save_pretrained(root / "no_tokenizer")
    models["2"].save_pretrained(root / "damaged")
    tiny_tokenizer().save_pretrained(root / "damaged")
    weights = root / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return root


def flags(samples: Path, output_dir: Path, **changes: Any) -> list[str]:
    values = {
        "model_name_or_path": samples / "2",
        "task_name": "sst2",
        "dataset_dir": samples / "data",
        "output_dir": output_dir,
        "max_length": 16,
        "device": "cpu",
        **changes,
    }
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def results_of(samples: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    run_glue.main(flags(samples, output_dir, **changes))
    return json.loads((output_dir / "eval_results.json").read_text())


@pytest.mark.parametrize("name", [*GLUE_TASKS, "qnli_devsplit"])
def test_a_task_is_scored(name: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = glue_task(name)
    results = results_of(samples, tmp_path, task_name=name, model_name_or_path=samples / str(task.num_labels))
    assert results["tasks"].keys() == {name}
    assert results["score"] == pytest.approx(sum(results[metric] for metric in task.metrics) / len(task.metrics))
    assert results["num_examples"] == NUM_ROWS * len(task.validation_splits)
    assert results["split"] == "+".join(task.validation_splits)
    assert results["skipped"] == []
    assert results["environment"].keys() >= {"device", "torch", "transformers", "python"}
    table = capsys.readouterr().out
    for metric in task.metrics:
        assert re.search(rf"{metric} +{100 * results[metric]:.2f}\n", table)


def test_all_tasks_that_fit_are_scored(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = results_of(samples, tmp_path, task_name="all", max_eval_samples=4)
    assert list(results["tasks"]) == ["cola", "mrpc", "qnli", "qnli_devsplit", "qqp", "rte", "sst2", "wnli"]
    assert results["skipped"] == ["mnli", "stsb"]
    assert {result["num_examples"] for result in results["tasks"].values()} == {4}
    assert results["score"] == pytest.approx(sum(result["score"] for result in results["tasks"].values()) / 8)
    assert "another number of labels: mnli, stsb" in capsys.readouterr().out


def test_the_standard_error_is_told_if_asked_for(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = results_of(samples, tmp_path, num_resamples=50)
    assert results["standard_error"] > 0
    assert results["num_resamples"] == 50
    assert f"standard_error  {100 * results['standard_error']:7.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"task_name": "imdb"}, "expected one of cola, sst2, mrpc, stsb, qqp", id="unknown task"),
        pytest.param({"model_name_or_path": "no/such"}, "cannot load `model_name_or_path` 'no/such'", id="no model"),
        pytest.param({"model_name_or_path": "{root}/base"}, "fine-tune it on the task first", id="no classifier"),
        pytest.param({"model_name_or_path": "{root}/no_tokenizer"}, "cannot load the tokenizer", id="no tokenizer"),
        pytest.param({"model_name_or_path": "{root}/damaged"}, "cannot load `model_name_or_path`", id="damaged"),
        pytest.param(
            {"model_name_or_path": "{root}/damaged", "trust_remote_code": True},
            "cannot load `model_name_or_path`",
            id="damaged, remote code",
        ),
        pytest.param({"max_length": 17}, "`max_length` is 17, but the model reads at most 16", id="too long"),
        pytest.param({"model_name_or_path": "{root}/3"}, "sst2 needs a model with 2", id="number of labels"),
        pytest.param({"dataset_dir": "{root}/1"}, "sst2/validation.parquet does not exist", id="no data"),
        pytest.param({"dataset_dir": "{root}/1", "task_name": "all"}, "expected folders named as", id="no tasks"),
        pytest.param({"dataset_dir": None, "task_name": "rte_x"}, "is not on the Hub", id="variant on the Hub"),
        pytest.param(
            {"output_dir": "{root}/2/config.json"},
            "is not writable: choose another folder (`config.json` is a file)",
            id="output is a file",
        ),
        pytest.param({"device": "toaster"}, "`device` 'toaster' cannot be used", id="no device"),
        pytest.param({"max_eval_samples": 0}, "`max_eval_samples` is 0, expected at least 1", id="no samples"),
        pytest.param({"num_resamples": 1}, "`num_resamples` is 1, expected at least 2", id="no spread"),
        pytest.param({"per_device_eval_batch_size": "x"}, "invalid int value", id="wrong type"),
        pytest.param({"speed": 2}, "unknown arguments ['--speed=2']", id="unknown flag"),
    ],
)
def test_a_mistake_is_one_line_and_no_file(
    changes: dict[str, Any], message: str, samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {
        name: value.format(root=samples) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(SystemExit) as end:
        run_glue.main(flags(samples, **{"output_dir": tmp_path / "out", **changes}))
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert end.value.code == 2
    assert message in line
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"sentence": None}, "lacks the columns ['sentence']: found ['label', 'idx']", id="column"),
        pytest.param({"label": [-1] * NUM_ROWS}, "column `label`: found -1 in row 0", id="label"),
        pytest.param({"sentence": [], "label": [], "idx": []}, "is empty, expected at least one row", id="empty"),
    ],
)
def test_wrong_rows_are_one_line_and_no_file(
    columns: dict[str, Any], message: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, GLUE_TASKS["sst2"], **columns)
    with pytest.raises(SystemExit) as end:
        run_glue.main(flags(samples, tmp_path / "out", dataset_dir=tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert f"{tmp_path}/sst2/validation.parquet" in line
    assert message in line
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_one_line_and_no_file(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("hf_vdneuron.glue.load_dataset", load_dataset)
    with pytest.raises(SystemExit) as end:
        run_glue.main(flags(samples, tmp_path / "out", dataset_dir=None))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert "check the connection, or give `dataset_dir`" in line
    assert not (tmp_path / "out").exists()


def test_both_doors_give_the_same_score_in_new_processes(samples: Path, tmp_path: Path) -> None:
    """A pruned model loads with the package here, and with transformers and its own code in another process."""
    here = results_of(samples, tmp_path / "here", model_name_or_path=samples / "pruned", task_name="mrpc")
    there = flags(
        samples,
        tmp_path / "there",
        model_name_or_path=samples / "pruned",
        task_name="mrpc",
        trust_remote_code=True,
    )
    process = subprocess.run(
        [sys.executable, SCRIPT, *there],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("task  examples")
    results = json.loads((tmp_path / "there" / "eval_results.json").read_text())
    assert results["tasks"] == here["tasks"]
    assert list((tmp_path / "modules").rglob("modeling_vdneuron.py"))
