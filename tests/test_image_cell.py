"""Images in `scripts/benchmark.py`: the same methods and doors, on a few synthetic images."""

import json
from pathlib import Path
from typing import Any

import benchmark
import pytest
import score_images
from benchmarks import image_cell, measurements
from benchmarks.classifiers import Recipe
from cifar_samples import write_folder


NUM_TRAIN, NUM_TEST = 96, 20

METHODS = ["dense", "vd", "vd_closed", "vd_oneshot", "fisher", "taylor", "magnitude", "random", "torch_pruning"]

TINY = {"resnet": Recipe({"hidden_sizes": [16, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}, 64)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    write_folder(folder / "cifar10", NUM_TRAIN, NUM_TEST)
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cell, "MODELS", TINY)
    monkeypatch.setattr(benchmark, "commit", lambda: "abc")
    monkeypatch.setattr(image_cell, "LATENCY_BATCH_SIZES", (1, 2))
    monkeypatch.setattr(measurements.subprocess, "run", lambda command, **_: score_images.main(command[2:]))


def flags(data_dir: Path, folder: Path, *extra: str) -> list[str]:
    values = {
        "model_name_or_path": "resnet",
        "dataset_dir": data_dir,
        "work_dir": folder / "work",
        "results_file": folder / "results.jsonl",
        "max_train_samples": NUM_TRAIN,
        "dense_steps": 2,
        "sparsify_steps": 3,
        "recover_steps": 2,
        "use_cpu": True,
    }
    return [*(f"--{name}={value}" for name, value in values.items()), "--tasks", "cifar10", "--seeds", "0", *extra]


def test_every_method_shrinks_a_convolutional_net(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(flags(data_dir, tmp_path, "--target_speedups", "2", "--methods", *METHODS))
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(row["method"] for row in rows) == sorted(METHODS)
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert row["score_through"] == dict.fromkeys(("hf_vdneuron", "trust_remote_code"), row["score"])
        assert [(timing["batch_size"], timing["length"]) for timing in row["latency"]] == [(1, 64), (2, 64)]
        assert row["settings"]["model"] == "resnet"
        assert row["speedup"] >= 2 or row["method"] == "dense"
    assert "| cifar10 | 2x | vd_closed | 1 |" in capsys.readouterr().out


def test_a_saved_classifier_is_scored(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(flags(data_dir, tmp_path, "--methods", "dense"))
    values = {
        "model_name_or_path": tmp_path / "work" / "cifar10-0" / "dense",
        "data_dir": data_dir / "cifar10",
        "output_dir": tmp_path / "scores",
        "num_examples": NUM_TRAIN,
        "device": "cpu",
    }
    score_images.main([f"--{name}={value}" for name, value in values.items()])
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "scores" / "eval_results.json").read_text())["score"] == row["score"]
    assert f"accuracy on {NUM_TEST} images: {row['score']:.2%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(["--model_name_or_path", "alexnet"], "`model_name_or_path` is 'alexnet': expected", id="model"),
        pytest.param(["--max_train_samples", "1000"], "`num_examples` is 1000: expected 1 to 96", id="images"),
    ],
)
def test_what_is_wrong_is_named(
    changed: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(flags(data_dir, tmp_path, "--methods", "dense", *changed))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()


def test_images_do_not_come_from_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [flag for flag in flags(tmp_path, tmp_path) if not flag.startswith("--dataset_dir")]
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*given, "--methods", "dense"])
    assert "cifar10 needs `dataset_dir`" in capsys.readouterr().err
