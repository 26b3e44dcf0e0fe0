"""`scripts/sparsify.py` and `docstrings.py`: the whole job on a tiny model, and one line for what goes wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from glue_samples import columns_for, tiny_classifier, tiny_tokenizer
from models import CONFIGS, cut_
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, ErnieConfig

import hf_vdneuron
from hf_vdneuron.glue import GLUE_TASKS, GlueTask
from hf_vdneuron.structure import as_pruned_model_
from hf_vdneuron.trainer import VDTrainer


SCRIPTS = Path(__file__).parents[1] / "scripts"
NUM_TRAIN, NUM_VALIDATION = 30, 24


def import_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sparsify, run_glue, docstrings = map(import_script, ("sparsify", "run_glue", "docstrings"))


def write_rows(folder: Path, task: GlueTask) -> None:
    """Write a task; its splits differ in size, so that a mean over splits is no mean over rows."""
    label = Value("float64") if task.is_regression else ClassLabel(names=list(task.label_names))
    features = Features({**dict.fromkeys(task.text_columns, Value("string")), "label": label})
    sizes = (NUM_TRAIN, NUM_VALIDATION, NUM_VALIDATION - 7)
    (folder / task.name).mkdir(parents=True)
    for split, size in zip(("train", *task.validation_splits), sizes, strict=False):
        columns = {name: values for name, values in columns_for(task, size).items() if name != "idx"}
        Dataset.from_dict(columns, features=features).to_parquet(folder / task.name / f"{split}.parquet")


def _ernie_config() -> ErnieConfig:
    """Sizes of the tiny BERT, under a type that has no row in the table of architectures."""
    values = CONFIGS["bert"].to_dict()
    return ErnieConfig(**{name: value for name, value in values.items() if name != "model_type"})


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with tasks and start models; tests must not write to it."""
    root = tmp_path_factory.mktemp("samples")
    own = GlueTask("moods", ("sentence",), ("glad", "sad", "mad"), ("accuracy",))
    for task in (*(GLUE_TASKS[name] for name in ("sst2", "stsb", "mnli")), own):
        write_rows(root / "data", task)
    (root / "data" / "junk").mkdir()
    (root / "data" / "junk" / "validation.parquet").write_bytes(b"PAR1xxxx")
    models = {
        "model": tiny_classifier(2).base_model,
        "pruned": as_pruned_model_(cut_(tiny_classifier(2))),
        "three": tiny_classifier(3),
        "unknown": AutoModel.from_config(_ernie_config()),
        "damaged": tiny_classifier(2).base_model,
        "pickled": tiny_classifier(2).base_model,
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    weights = root / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(models["pickled"].state_dict(), root / "pickled" / "pytorch_model.bin")
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


def report_of(samples: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    sparsify.main(flags(samples, output_dir, **changes))
    return json.loads((output_dir / "report.json").read_text())


#: Removes some of everything from the tiny model.
CUTTING = {"log_var_distance": 60, "kl_weight": 50, "max_steps": 20, "logging_steps": 2}


def check_story(report: dict[str, Any], folder: Path) -> None:
    """Curves, the posterior and the kept heads are in the report, and figures of them in card and page."""
    training = report["training"]
    assert training["phases"] == {"finetune_steps": 6, "sparsify_steps": 10, "recover_steps": 4}
    assert {"nll", "kl", "heads", "neurons"} <= training["curves"].keys()
    assert training["dropout_rates"]["counts"].keys() == {"head", "neuron"}
    assert [len(heads) for heads in report["kept_heads"]] == report["pruned"]["heads_per_layer"]
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"heads", "neurons", "cost", "score", "loss", "units", "kl", "dropout_rates"} <= figures
    card, page = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    for name in figures:
        assert f"(figures/{name}.png)" in card
        assert f'<figure id="{name}">' in page


@pytest.mark.parametrize("task_name", ["sst2", "stsb", "moods"])
def test_the_whole_job(task_name: str, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(samples, tmp_path, task_name=task_name, **CUTTING)
    out = capsys.readouterr().out
    assert "6 steps of fine-tuning, 10 of sparsification, 4 of recovery" in out
    assert f"{report['pruned']['parameters']:,}" in out
    for name in ("parameters", "bytes"):
        assert 0 < report["pruned"][name] < report["dense"][name]
    assert report["dense"]["heads_per_layer"] == [4, 4, 4]
    assert len(report["pruned"]["neurons_per_layer"]) == 3
    assert {"predicted", "measured"} <= report["speedup"].keys()
    assert report["task"] == task_name
    assert None not in (report["dense"]["score"], report["score_after_cut"], report["pruned"]["score"])
    assert report["seeds"] == {"training": 42, "data order": 42}
    assert {"python", "torch", "transformers"} <= report["versions"].keys()
    assert report["device"].startswith("cpu")
    assert report["train_seconds"] > 0
    assert not list(tmp_path.glob("*.bin"))
    assert not list(tmp_path.glob(".*"))
    check_story(report, tmp_path)
    model = hf_vdneuron.from_pretrained(tmp_path)
    assert model.num_parameters() == report["pruned"]["parameters"]
    inputs = AutoTokenizer.from_pretrained(tmp_path)("a b c", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, model.config.num_labels)
    assert "label" not in "".join(model.config.id2label.values()).lower()


def test_the_card_repeats_the_run_without_naming_local_folders(samples: Path, tmp_path: Path) -> None:
    report = report_of(samples, tmp_path / "out", **CUTTING)
    card = (tmp_path / "out" / "README.md").read_text()
    assert report["command"].startswith("python scripts/sparsify.py --model_name_or_path=model --task_name=sst2 ")
    assert f"```bash\n{report['command']}\n```" in card
    assert 'hf_vdneuron.from_pretrained("out")' in card
    for text in (card, (tmp_path / "out" / "report.html").read_text(encoding="utf-8"), json.dumps(report)):
        assert str(tmp_path) not in text
        assert str(samples) not in text


@pytest.mark.parametrize(("seed", "same"), [(42, True), (43, False)], ids=["same-seed", "other-seed"])
def test_a_seed_gives_one_model(samples: Path, tmp_path: Path, seed: int, same: bool) -> None:
    """The head of the model that it starts from is random too, whatever happened in the process before."""
    weights = []
    for name, own_seed in (("first", 42), ("second", seed)):
        torch.rand(len(weights) + 1)
        sparsify.main(flags(samples, tmp_path / name, seed=own_seed, **CUTTING))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert (weights[0] == weights[1]) == same


def test_a_model_that_kept_everything_is_an_ordinary_one(samples: Path, tmp_path: Path) -> None:
    report = report_of(samples, tmp_path, dropout_rate_threshold=0.999999)
    assert report["pruned"]["parameters"] == report["dense"]["parameters"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).num_parameters() > 0
    assert "Nothing was removed in the end" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        pytest.param({"task_name": "stsb", "learning_rate": 1e-2}, "fp32", id="regression"),
        pytest.param({"task_name": "stsb", "learning_rate": 1e-2, "bf16": True}, "bf16 autocast", id="bf16"),
        pytest.param({"task_name": "mnli", "per_device_eval_batch_size": 5}, "fp32", id="two validation sets"),
        pytest.param({"max_eval_samples": 5}, "fp32", id="some rows"),
    ],
)
def test_the_reported_score_is_that_of_the_saved_model(
    changes: dict[str, Any], precision: str, samples: Path, tmp_path: Path
) -> None:
    report = report_of(samples, tmp_path, **{**CUTTING, **changes})
    same = {name: changes.get(name) for name in ("max_eval_samples", "per_device_eval_batch_size")}
    values = {
        "model_name_or_path": tmp_path,
        "task_name": report["task"],
        "dataset_dir": samples / "data",
        "output_dir": tmp_path / "eval",
        "max_length": report["evaluation"]["max_length"],
        "device": "cpu",
        **same,
    }
    run_glue.main([f"--{name}={value}" for name, value in values.items() if value is not None])
    results = json.loads((tmp_path / "eval" / "eval_results.json").read_text())
    assert report["pruned"]["score"] == results["score"]
    assert report["evaluation"]["metrics"].items() <= results.items()
    for name in ("split", "num_examples"):
        assert report["evaluation"][name] == results[name]
    assert report["evaluation"]["batch_size"] == results["per_device_eval_batch_size"]
    assert (report["dense"]["precision"], report["pruned"]["precision"]) == (precision, "fp32")


def test_milestones_are_means_over_the_validation_sets(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"dense_validation_matched_score": 0.5, "dense_validation_mismatched_score": 0.25}
    monkeypatch.setattr(VDTrainer, "milestone", lambda self, name: scores.get(name))
    report = report_of(samples, tmp_path, task_name="mnli")
    assert report["dense"]["score"] == 0.375
    assert report["score_after_cut"] is None


def test_a_pruned_model_can_be_pruned_further(samples: Path, tmp_path: Path) -> None:
    start = hf_vdneuron.from_pretrained(samples / "pruned")
    report = report_of(samples, tmp_path, model_name_or_path=samples / "pruned", **CUTTING)
    assert report["dense"]["parameters"] == start.num_parameters()
    assert report["pruned"]["parameters"] < start.num_parameters()
    assert hf_vdneuron.from_pretrained(tmp_path).num_parameters() == report["pruned"]["parameters"]


def test_choices_are_made_on_a_part_of_the_training_set(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = []
    train = VDTrainer.train

    def train_and_remember(trainer: VDTrainer, **kwargs: Any) -> object:
        trainers.append(trainer)
        return train(trainer, **kwargs)

    monkeypatch.setattr(VDTrainer, "train", train_and_remember)
    choosing = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    report = report_of(
        samples, tmp_path, **choosing, load_best_model_at_end=True, metric_for_best_model="score", save_total_limit=2
    )
    (trainer,) = trainers
    assert (len(trainer.train_dataset), len(trainer.dev_dataset)) == (27, 3)
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"validation": NUM_VALIDATION}
    assert trainer.state.best_metric is not None
    # Thirds are scores of three rows: nothing on the way was scored on 24.
    on_the_way = [log["eval_score"] for log in trainer.state.log_history if "eval_score" in log]
    assert set(on_the_way) <= {0, 1 / 3, 2 / 3, 1}
    assert report["evaluation"]["num_examples"] == NUM_VALIDATION


def test_a_uniform_model_is_ordinary_and_its_card_says_so(samples: Path, tmp_path: Path) -> None:
    asked = {"heads": False, "layout": "uniform", "target_sparsity": 0.2, "log_var_distance": None}
    report = report_of(samples, tmp_path, **asked)
    left = report["pruned"]["neurons_per_layer"]
    assert len(set(left)) == 1
    assert left[0] < report["dense"]["neurons_per_layer"][0]
    card = (tmp_path / "README.md").read_text()
    assert "Its config says what is left, so this is an ordinary" in card
    assert "trust_remote_code" not in card
    assert "nothing was removed" not in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.py"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(model).__module__.startswith("transformers.")
    assert model.config.intermediate_size == left[0]


def test_a_model_of_a_type_without_a_row_is_looked_into(samples: Path, tmp_path: Path) -> None:
    report = report_of(
        samples, tmp_path, model_name_or_path=samples / "unknown", target_speedup=2.0, log_var_distance=None
    )
    assert report["speedup"]["predicted"] >= 2
    assert sum(report["pruned"]["heads_per_layer"]) < sum(report["dense"]["heads_per_layer"]) == 12
    assert sum(report["pruned"]["neurons_per_layer"]) < sum(report["dense"]["neurons_per_layer"])
    assert (tmp_path / "report.html").exists()


def test_a_tolerance_is_judged_on_a_part_of_the_training_set(samples: Path, tmp_path: Path) -> None:
    report = report_of(samples, tmp_path, max_metric_drop=0.34, sparsify_fraction=0.5)
    sizes = report["training"]["sizes"]
    # Thirds are scores of three rows.
    assert {round(3 * value, 6) for value in [sizes["dense"], sizes["final"], *sizes["values"]]} <= {0, 1, 2, 3}
    assert sizes["limit"] == pytest.approx(sizes["dense"] - 0.34)
    assert report["target"] == "max_metric_drop 0.34 of score"
    assert (tmp_path / "figures" / "sizes.png").exists()


def test_without_choices_all_rows_are_trained_on(samples: Path) -> None:
    task = GLUE_TASKS["sst2"]
    data_args = sparsify.DataArguments("model", "sst2", dataset_dir=str(samples / "data"))
    args = sparsify.VDTrainingArguments(use_cpu=True, report_to="none")
    assert {name: len(part) for name, part in sparsify.read_rows(task, data_args, args).items()} == {
        "validation": NUM_VALIDATION,
        "train": NUM_TRAIN,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"task_name": "sst3"}, "expected one of cola", id="unknown_task"),
        pytest.param({"task_name": "junk"}, "junk/validation.parquet is not a readable parquet", id="damaged_task"),
        pytest.param({"model_name_or_path": "no/such/model"}, "`model_name_or_path` 'no/such/model'", id="no_model"),
        pytest.param({"model_name_or_path": "{root}/damaged"}, "cannot load `model_name_or_path`", id="damaged_model"),
        pytest.param({"model_name_or_path": "{root}/pickled"}, "cannot load `model_name_or_path`", id="pickled_model"),
        pytest.param({"model_name_or_path": "{root}/three"}, "is a classifier with 3 labels", id="other_labels"),
        pytest.param({"dataset_dir": "nowhere"}, "does not exist", id="no_data"),
        pytest.param({"kl_ramp": 2}, "`kl_ramp` is 2", id="argument_out_of_range"),
        pytest.param({"include": "*.layer.9.*"}, "matches no sub-layer", id="pattern_without_match"),
        pytest.param({"max_length": 100_000}, "`max_length` is 100000", id="too_long"),
        pytest.param({"max_length": 0}, "`max_length` is 0, expected at least 1", id="no_token"),
        pytest.param({"max_length": -1}, "`max_length` is -1, expected at least 1", id="negative_length"),
        pytest.param({"max_train_samples": 0}, "`max_train_samples` is 0, expected", id="no_training_rows"),
        pytest.param({"max_eval_samples": 0}, "`max_eval_samples` is 0, expected", id="no_validation_rows"),
        pytest.param({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` is 0", id="empty_batch"),
        pytest.param({"num_train_epochs": 0, "max_steps": None}, "`num_train_epochs` is 0.0", id="no_epoch"),
        pytest.param({"report_to": "wandb"}, "`report_to` names wandb, not installed here", id="no_reporter"),
        pytest.param({"resume_from_checkpoint": "{root}"}, "holds no trainer_state.json", id="no_checkpoint"),
        pytest.param({"output_dir": "{root}/model/config.json"}, "is not writable", id="output_is_a_file"),
        pytest.param({"output_dir": ""}, "`output_dir` '' is not writable", id="no_output"),
    ],
)
def test_mistakes_end_in_one_line(
    changes: dict[str, Any], message: str, samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {
        name: value.format(root=samples) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(SystemExit) as end:
        sparsify.main(flags(samples, **{"output_dir": tmp_path / "new" / "out", **changes}))
    captured = capfd.readouterr()
    (line,) = captured.err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ")
    assert message in line
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_the_line_stands_alone_in_a_process_of_its_own(samples: Path, tmp_path: Path) -> None:
    """Transformers' handler of logs writes to the stream that was there first, past the capture of a test."""
    tiny_classifier(2).base_model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 7}))
    argv = flags(samples, tmp_path / "out", model_name_or_path=tmp_path / "model")
    process = subprocess.run(
        [sys.executable, SCRIPTS / "sparsify.py", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = process.stderr.splitlines()
    assert process.returncode == 2
    assert "its weights have other shapes than its config says" in line
    assert process.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_midway_leaves_no_folder(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("outputs hold NaN")

    monkeypatch.setattr(sparsify, "evaluate_glue", fail)
    with pytest.raises(SystemExit):
        sparsify.main(flags(samples, tmp_path / "out"))
    assert capsys.readouterr().err.splitlines()[-1] == "error: outputs hold NaN"
    assert not list(tmp_path.iterdir())


def write_library(folder: Path, num_docstrings: int) -> None:
    for package, words in (("glad", "joy"), ("sad", "woe")):
        (folder / package).mkdir(parents=True)
        lines = [f'def f{index}():\n    """{words} {index}."""' for index in range(num_docstrings)]
        (folder / package / "code.py").write_text("\n".join(lines))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(docstrings, "PACKAGES", ("glad", "sad", "missing"))
    monkeypatch.setattr(docstrings, "MIN_DOCSTRINGS", 5)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    return tmp_path / "lib"


def test_docstrings_make_a_task(library: Path, tmp_path: Path) -> None:
    write_library(library, 10)
    docstrings.main([str(tmp_path)])
    parts = [Dataset.from_parquet(str(path)) for path in sorted((tmp_path / "docstrings").glob("*.parquet"))]
    assert [len(part) for part in parts] == [16, 4]
    for part in parts:
        assert part.features["label"].names == ["glad", "sad"]
        assert all(row["sentence"].startswith(("joy", "woe")[row["label"]]) for row in part)


def test_too_few_docstrings_end_in_one_line(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_library(library, 4)
    with pytest.raises(SystemExit):
        docstrings.main([str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{library} has 5 docstrings in none of glad, sad, missing, expected at least 2" in line
    assert not (tmp_path / "out").exists()
