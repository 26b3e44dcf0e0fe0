"""`scripts/lenet.py`: it trains, removes and tabulates on a few fake images, and never mixes settings."""

import gzip
import importlib.util
import json
import struct
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.jobs import append_run, read_runs
from hypothesis import given
from hypothesis import strategies as st

from hf_vdneuron.masks import RelevanceMask


SCRIPT = Path(__file__).parents[1] / "scripts" / "lenet.py"
NUM_IMAGES = 50


def import_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lenet", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["lenet"] = module  # where dataclasses look up the types of inherited fields
    spec.loader.exec_module(module)
    return module


lenet = import_script()


def write_idx(file: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    file.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of noise, as MNIST stores them; a bar that moves with the label makes them learnable."""
    folder = tmp_path_factory.mktemp("mnist")
    images = np.random.RandomState(0).randint(0, 64, (NUM_IMAGES, 28, 28), dtype=np.uint8)
    labels = np.arange(NUM_IMAGES, dtype=np.uint8) % 10
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 4] = 255
    write_idx(folder / "t10k-images-idx3-ubyte.gz", images)
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "new_folder" / "lenet.jsonl"


def flags(data_dir: Path, results: Path, *more: str) -> list[str]:
    few = ["--epochs", "1", "--seeds", "0", "--num_folds", "1"]
    return ["--data_dir", str(data_dir), "--results_file", str(results), *few, *more]


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def rows(table: str) -> dict[str, list[str]]:
    """Cells of the printed table, by prior."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    return {row[0]: row[1:] for row in cells}


def test_images_and_labels_are_read_and_cut_into_folds(data_dir: Path) -> None:
    images, labels = lenet.load_images(data_dir)
    assert images.shape == (NUM_IMAGES, 784)
    assert (images.min() >= 0, images.max()) == (True, 1)
    assert labels.tolist() == [index % 10 for index in range(NUM_IMAGES)]
    folds = list(lenet.folds(images, labels))
    assert [len(part) for part in folds[0]] == [40, 40, 10, 10]
    held_out = torch.cat([fold[2] for fold in folds])
    assert torch.equal(held_out.sum(1).sort().values, images.sum(1).sort().values)  # each image once


def test_every_prior_is_run_once(data_dir: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lenet.main(flags(data_dir, results))
    finished = lines(results)
    assert {run["prior"] for run in finished} == {"group", "mixture", "dense"}
    assert all(run["dense_accuracy"] > 50 for run in finished)
    assert all(run["seconds"] >= 0 and run["torch_version"] == torch.__version__ for run in finished)
    first = capsys.readouterr().out
    assert {prior: cells[0] for prior, cells in rows(first).items()} == {"dense": "1", "group": "1", "mixture": "1"}
    lenet.main(flags(data_dir, results))
    assert lines(results) == finished  # nothing is run twice
    assert capsys.readouterr().out == first


def test_the_network_that_is_scored_is_the_smaller_one(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule finds so early is nothing, so say it: seven neurons and three, ended on either side."""
    keep = {"0": torch.ones(2, 300, dtype=torch.bool), "2": torch.ones(2, 100, dtype=torch.bool)}
    keep["0"][0, 7:] = keep["2"][1, 3:] = False
    monkeypatch.setattr(lenet, "relevance_mask", lambda _: RelevanceMask(keep))
    job = lenet.Job("group", 0, 0, epochs=1, kl_weight=1.0, grouping="sides", group_scale=True)
    data = next(lenet.folds(*lenet.load_images(data_dir)))
    model = lenet.lenet()
    assert lenet.sparsify_(model, *data[:2], job) == (7, 3)
    assert [tuple(model[layer].weight.shape) for layer in (0, 2, 4)] == [(7, 784), (3, 7), (10, 3)]


@pytest.mark.parametrize(
    "change",
    [["--epochs", "2"], ["--kl_weight", "0.25"], ["--grouping", "rows"], ["--no-group_scale"], ["--seeds", "1"]],
    ids=lambda change: change[0],
)
def test_other_settings_are_other_runs(
    change: list[str], data_dir: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    one_prior = flags(data_dir, results, "--priors", "group")
    done: list[object] = []

    def run(job: object, _: object) -> object:
        done.append(job)
        return finished(job, accuracy=float(len(done)))

    monkeypatch.setattr(lenet, "run", run)
    lenet.main(one_prior)
    lenet.main([*one_prior, *change])
    assert len(set(done)) == len(done) == 2
    first, second = (rows(table)["group"] for table in capsys.readouterr().out.split("| prior")[1:])
    assert (first[0], second[0]) == ("1", "1")  # no table counts the other's run
    assert ("1.00" in first[4], "2.00" in second[4]) == (True, True)


def finished(job: object, accuracy: float = 90.0) -> object:
    values = {"dense_accuracy": 95.0, "accuracy": accuracy, "neurons_left": (30, 10), "seconds": None}
    return lenet.Run(**vars(job), **values, torch_version="0")


def test_work_is_shared_with_another_process(
    data_dir: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other process finishes what we have begun, and one job more."""
    argv = flags(data_dir, results, "--num_folds", "5", "--priors", "group")
    jobs = lenet.jobs_of(lenet.parse_args(argv))
    ours: list[object] = []

    def run(job: object, _: object) -> object:
        ours.append(job)
        missing = [other for other in jobs if other != job and other not in read_runs(results, lenet.Run)]
        for other in [job, *missing[:1]]:
            append_run(results, finished(other, accuracy=80.0))
        return finished(job)

    monkeypatch.setattr(lenet, "run", run)
    lenet.main(argv)
    assert len(ours) == 3  # ours and theirs, two at a time, of five
    assert Counter(run["fold"] for run in lines(results)).total() == 8
    (cells,) = rows(capsys.readouterr().out).values()
    assert cells[0] == "5"  # the same job counts once
    assert "80.00 ± 0.00" in cells[4]  # as it was written first


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_the_table_holds_mean_and_standard_error(accuracies: list[float]) -> None:
    jobs = [lenet.Job("group", 0, seed, 1, 0.5, "sides", True) for seed in range(len(accuracies))]
    runs = [finished(job, accuracy) for job, accuracy in zip(jobs, accuracies, strict=True)]
    cells = rows(lenet.summarise(runs))["group"]
    mean = np.mean(accuracies)
    assert cells[1] == "30.0 + 10.0 of 300 + 100"
    assert cells[2].startswith("90.00")
    assert float(cells[4].split(" ± ")[0]) == pytest.approx(mean, abs=0.006)
    assert float(cells[5].split(" ± ")[0]) == pytest.approx(95 - mean, abs=0.006)
    if len(runs) > 1:
        error = np.std(accuracies, ddof=1) / len(runs) ** 0.5
        assert float(cells[4].split(" ± ")[1]) == pytest.approx(error, abs=0.006)


def test_the_published_results_are_of_one_setting_each_once() -> None:
    results = lines(lenet.RESULTS_FILE)
    runs = read_runs(lenet.RESULTS_FILE, lenet.Run)
    assert len(runs) == len(results)
    settings = {(run.epochs, run.kl_weight, run.grouping, run.group_scale) for run in runs}
    assert (lenet.VARIATIONAL_EPOCHS, lenet.KL_WEIGHT, "sides", True) in settings


@pytest.mark.parametrize("wrong", [["--priors", "laplace"], ["--grouping", "columns"], ["--num_folds", "6"]])
def test_wrong_choices_are_refused(
    wrong: list[str], data_dir: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lenet.main(flags(data_dir, results, *wrong))
    assert f"{wrong[0]}: invalid choice" in capsys.readouterr().err
    assert not results.exists()
