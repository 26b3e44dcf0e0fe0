"""`scripts/benchmark.py` and `benchmarks/`: equal counts and budgets, rows that add up, work that is shared."""

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import benchmark
import pytest
import run_glue
import torch
from benchmarks import cell, measurements, text_cell
from benchmarks.baselines import SCORERS, keep_affordable, keep_best
from benchmarks.mask_search import MASK_SEARCHES, ONE_SHOT
from benchmarks.plots import draw_courses
from benchmarks.results import Results, Run, latency_table, lead_table, score_table
from glue_samples import tiny_classifier, write_sst2
from models import HEAD_SIZE, HEADS, tiny_model
from torch import nn
from transformers import AutoModel, BertConfig, PreTrainedModel

from hf_vdneuron import trainer
from hf_vdneuron.architectures import find_sublayers
from hf_vdneuron.budget import Costs
from hf_vdneuron.config import VDConfig
from hf_vdneuron.layers import feature_axis
from hf_vdneuron.persistence import from_pretrained
from hf_vdneuron.sublayers import Unit
from hf_vdneuron.targets import speedup_budget


Finished = tuple[Path, list[dict[str, Any]]]

LATENCY_GRID = [(1, 4), (2, 8)]
NUM_STEPS = {"dense_steps": 2, "sparsify_steps": 3, "recover_steps": 2}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and the files of SST-2."""
    root = tmp_path_factory.mktemp("samples")
    write_sst2(root)
    return root


def flags(samples: Path, output_dir: Path, *extra: str) -> list[str]:
    values = {
        "model_name_or_path": samples / "model",
        "dataset_dir": samples / "data",
        "work_dir": output_dir / "work",
        "results_file": output_dir / "results.jsonl",
        "max_length": 16,
        "use_cpu": True,
        **NUM_STEPS,
    }
    return [*(f"--{name}={value}" for name, value in values.items()), "--tasks", "sst2", "--seeds", "0", *extra]


@pytest.fixture(scope="module")
def finished(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All runs of one cell, scored by `run_glue` in this process, as starting eight takes a minute."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cell, "LATENCY_GRID", LATENCY_GRID)
        patch.setattr(measurements.subprocess, "run", lambda command, **_: run_glue.main(command[2:]))
        patch.setattr(benchmark, "commit", lambda: "abc")
        benchmark.main(flags(samples, folder))
    return folder, [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_method_makes_a_row(finished: Finished) -> None:
    _, rows = finished
    assert [row["method"] for row in rows] == [
        name for name in benchmark.METHODS if name not in benchmark.ASK_FOR_TARGET
    ]
    for row in rows:
        assert 0 <= row["score"] <= 1
        # What a user gets through either door is what the run reports, to the last digit.
        assert row["score_through"] == dict.fromkeys(("hf_vdneuron", "trust_remote_code"), row["score"])
        assert [(timing["batch_size"], timing["length"]) for timing in row["latency"]] == LATENCY_GRID


def test_baselines_keep_as_many_units(finished: Finished) -> None:
    _, rows = finished
    by_method = {row["method"]: row for row in rows}
    for name in (*SCORERS, *MASK_SEARCHES):
        assert by_method[name]["heads"] == by_method["vd"]["heads"]
        assert by_method[name]["neurons"] == by_method["vd"]["neurons"]
        assert by_method[name]["parameters"] == by_method["vd"]["parameters"]


def test_one_shot_trains_nothing(samples: Path, finished: Finished) -> None:
    folder, rows = finished
    by_method = {row["method"]: row for row in rows}
    assert by_method[ONE_SHOT]["score"] == by_method[ONE_SHOT]["score_after_cut"]
    dense, tuned, recovered = (
        from_pretrained(folder / "work" / "model" / "sst2-0" / name) for name in ("dense", ONE_SHOT, "fisher")
    )
    word_embeddings = [model.get_input_embeddings().weight for model in (dense, tuned, recovered)]
    assert torch.equal(word_embeddings[0], word_embeddings[1])
    assert not torch.equal(word_embeddings[0], word_embeddings[2])
    # The same mask, so that only the tuned gates tell the columns apart from the dense ones.
    assert by_method[ONE_SHOT]["neurons_per_layer"] == by_method["fisher"]["neurons_per_layer"]


def test_finished_runs_are_skipped(samples: Path, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = finished
    benchmark.main(flags(samples, folder))
    assert len((folder / "results.jsonl").read_text().splitlines()) == len(rows)
    assert "| sst2 |  | magnitude | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "expected"), [(None, [400, 1500]), (7, [7, 7])], ids=["by default", "as asked"])
def test_some_tasks_take_longer_to_learn(given: int | None, expected: list[int]) -> None:
    args = benchmark.BenchmarkArguments("model", dense_steps=given)
    assert [args.settings(task).dense_steps for task in ("sst2", "cola")] == expected


def test_other_settings_are_other_runs(samples: Path, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = finished
    benchmark.main(flags(samples, folder, "--recover_steps=9", "--plan"))
    plan = capsys.readouterr().out
    assert all(method in plan for method in benchmark.METHODS if method not in benchmark.ASK_FOR_TARGET)


def test_a_claimed_cell_is_left_to_its_process(samples: Path, tmp_path: Path) -> None:
    with benchmark.claim(tmp_path / "work" / "model" / "sst2-0.lock") as granted:
        assert granted
        benchmark.main(flags(samples, tmp_path))
    assert not (tmp_path / "results.jsonl").exists()


def test_a_baseline_needs_our_counts(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(flags(samples, tmp_path, "--methods", "magnitude"))
    assert "run `vd` on sst2, seed 0 first" in capsys.readouterr().err


def test_an_unknown_method_is_named(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(flags(samples, tmp_path, "--methods", "best"))
    assert "`methods` holds ['best']" in capsys.readouterr().err


def test_gates_that_learn_need_a_target(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(flags(samples, tmp_path, "--methods", "l0", "movement"))
    assert "set `target_speedups` too" in capsys.readouterr().err


@torch.no_grad()
def test_magnitude_keeps_the_largest() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    (sublayer,) = find_sublayers(model)
    expected = torch.stack([
        sum(x**2 for x in model[0].weight[unit]) + sum(x**2 for x in model[2].weight[:, unit]) for unit in range(4)
    ])
    scores = SCORERS["magnitude"](model, [], torch.Generator())
    torch.testing.assert_close(scores[sublayer.path], expected)
    mask = keep_best(model, scores, {Unit.NEURON: 2})
    assert set(mask.kept_units(sublayer).tolist()) == set(expected.topk(2).indices.tolist())


@torch.no_grad()
def test_the_magnitude_of_a_head_has_its_queries_and_keys() -> None:
    model = tiny_model("bert")
    attention = model.encoder.layer[0].attention
    rows = (attention.self.query, attention.self.key, attention.self.value)
    blocks = [
        [*(part.weight[h : h + HEAD_SIZE] for part in rows), attention.output.dense.weight[:, h : h + HEAD_SIZE]]
        for h in range(0, HEADS * HEAD_SIZE, HEAD_SIZE)
    ]
    expected = torch.stack([sum(weight.square().sum() for weight in block) for block in blocks])
    scores = SCORERS["magnitude"](model, [], torch.Generator())
    torch.testing.assert_close(scores[find_sublayers(model)[0].path], expected.float())


def test_torch_pruning_sees_our_structure() -> None:
    """Its graph finds both sides of a neuron, and queries, keys, values and outputs of a head."""
    model = tiny_classifier(2)
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]), "labels": torch.tensor([0, 1])}
    found = SCORERS["torch_pruning"](model, [batch, batch], torch.Generator())
    model(**batch).loss.backward()
    for sublayer in find_sublayers(model):
        matrices = []
        for part in sublayer.matrices:
            layer = model.get_submodule(part.module)
            effects = (layer.weight * layer.weight.grad).abs().sum(1 - feature_axis(layer, part.axis))
            matrices.append(effects.detach()[part.features(torch.arange(sublayer.num_units))].mean(1))
        expected = torch.stack(matrices).mean(0)
        torch.testing.assert_close(found[sublayer.path], expected / expected.mean(), rtol=1e-4, atol=0)


@torch.no_grad()
def test_units_compete_across_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[4].weight.mul_(100)
    sublayers = find_sublayers(model)
    mask = keep_best(model, SCORERS["magnitude"](model, [], torch.Generator()), {Unit.NEURON: 4})
    assert [len(mask.kept_units(sublayer)) for sublayer in sublayers] == [0, 4]


def test_random_follows_its_seed() -> None:
    model = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 2))
    (sublayer,) = find_sublayers(model)
    drawn = [SCORERS["random"](model, [], torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    kept = [keep_best(model, scores, {Unit.NEURON: 10}).kept_units(sublayer).tolist() for scores in drawn]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("length", [1, 512])
def test_random_is_fair_to_heads(length: int) -> None:
    config = BertConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=16, intermediate_size=256)
    model = AutoModel.from_config(config)
    costs = Costs(model, length=length)
    left: Counter[Unit] = Counter()
    for seed in range(15):
        scores = SCORERS["random"](model, [], torch.Generator().manual_seed(seed))
        mask = keep_affordable(model, scores, speedup_budget(costs, 2.0), whatever_it_costs=True)
        for sublayer in costs.sublayers:
            left[sublayer.unit] += len(mask.kept_units(sublayer)) / sublayer.num_units
    assert left[Unit.HEAD] == pytest.approx(left[Unit.NEURON], rel=0.06)


def row(method: str, seed: int, score: float, weights: int) -> dict[str, Any]:
    timing = {"batch_size": 1, "length": 32, "predicted": 2.0, "dense": 0.3, "pruned": 0.1}
    run = {**Run("sst2", seed, method)._asdict(), "score": score, "score_after_cut": score - 0.1}
    return {**run, "body_weights": weights, "latency": [timing]}


def test_tables_pair_scores_by_seed() -> None:
    rows = [row("dense", 0, 0.9, 100), row("dense", 1, 0.8, 100), row("vd", 0, 0.88, 40), row("vd", 1, 0.8, 20)]
    lines = score_table(rows).splitlines()
    assert lines[-1] == "| sst2 |  | vd | 2 | 30.00 ± 10.00 % | 74.00 ± 4.00 | 84.00 ± 4.00 | -1.00 ± 1.00 |"
    assert latency_table(rows).splitlines()[-1] == "| sst2 |  | vd | 1 | 32 | 2.00 ± 0.00x | 3.00 ± 0.00x |"


def test_leads_are_paired_by_task_and_seed() -> None:
    rows = [
        {**row(method, seed, score, 1), "task": task, "target_speedup": None if method == "dense" else 3.0}
        for task, method, seed, score in [
            ("sst2", "dense", 0, 0.8),
            ("sst2", "dense", 1, 0.5),
            ("cola", "dense", 0, 0.4),
            ("sst2", "fisher", 0, 0.6),
            ("sst2", "fisher", 1, 0.5),
            ("cola", "fisher", 0, 0.1),
            ("sst2", "vd_closed", 0, 0.7),
            ("cola", "vd_closed", 0, 0.4),
        ]
    ]
    fisher, ours = lead_table(rows, "vd_closed").splitlines()[2:]
    assert fisher == "| 3x | fisher | 2 | 2 | 50.0 % | 93.8 % | 20.00 ± 10.00 |"
    assert ours == "| 3x | vd_closed | 2 | 2 | 93.8 % |  |  |"


def test_no_share_is_told_of_a_score_that_is_not_above_zero() -> None:
    scored = {"dense": -0.1, "fisher": 0.1, "vd_closed": 0.2}
    rows = [
        {**row(method, 0, score, 1), "target_speedup": None if method == "dense" else 3.0}
        for method, score in scored.items()
    ]
    fisher, _ = lead_table(rows, "vd_closed").splitlines()[2:]
    assert fisher == "| 3x | fisher | 1 | 1 | not measured | not measured | 10.00 |"


def test_a_missing_package_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="whose package is missing: run `pip install"):
        benchmark.BenchmarkArguments("model").require_packages()
    benchmark.BenchmarkArguments("model", methods=["dense", "fisher"]).require_packages()


def test_a_dense_checkpoint_is_known_by_all_that_it_depends_on(finished: Finished) -> None:
    folder, _ = finished
    (checkpoint,) = (folder / "work" / "model" / "sst2-0").glob("dense-*")
    assert (checkpoint / "config.json").exists()
    settings = cell.Settings("models/a", 100, 16, 2, 3, 2, 1e-4, 5e-5, bf16=False, distillation=True)
    assert settings.dense_name == replace(settings, recover_steps=5).dense_name
    others: dict[str, Any] = {
        **{"dense_steps": 3, "max_train_samples": 50, "bf16": True, "max_length": 8},
        **{"dense_learning_rate": 1e-3},
    }
    names = {replace(settings, **{name: value}).dense_name for name, value in others.items()}
    assert len({settings.dense_name, *names}) == 1 + len(others)


def test_rows_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    path, run = tmp_path / "results.jsonl", Run("sst2", 0, "vd")
    Results(path, lambda _: {"steps": 1}).add(run._asdict())
    assert Results(path, lambda _: {"steps": 2}).find(run) is None
    assert Results(path, lambda _: {"steps": 1}).find(run) is not None
    assert Results(path, lambda _: {"steps": 1}).find(run._replace(target_speedup=2.0)) is None


def test_rows_from_before_a_setting_have_what_was_the_rule(tmp_path: Path) -> None:
    path, run = tmp_path / "results.jsonl", Run("sst2", 0, "vd")
    Results(path, lambda _: {"steps": 1}).add(run._asdict())
    assert Results(path, lambda _: {"steps": 1, "distillation": True}).find(run) is not None
    assert Results(path, lambda _: {"steps": 1, "distillation": False}).find(run) is None


def test_runs_without_a_teacher_are_not_mixed_with_others(
    samples: Path, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = finished
    benchmark.main(flags(samples, folder, "--table"))
    assert "| sst2 |  | vd | 1 |" in capsys.readouterr().out
    benchmark.main(flags(samples, folder, "--table", "--no_distillation"))
    assert "sst2" not in capsys.readouterr().out
    benchmark.main(flags(samples, folder, "--plan", "--no_distillation"))
    plan = capsys.readouterr().out
    assert all(row["method"] in plan for row in rows)


def test_without_distillation_nobody_is_taught(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a lesson")

    monkeypatch.setattr(trainer, "distillation_loss", refuse)
    monkeypatch.setattr(text_cell, "LATENCY_GRID", LATENCY_GRID)
    monkeypatch.setattr(benchmark, "score_in_new_process", lambda *_: 0.5)
    methods = ("vd", "random", "l0")  # a posterior, recovery alone, gates that learn
    asked = flags(samples, tmp_path, "--target_speedups", "1.2", "--methods")
    benchmark.main([*asked, *methods, "--no_distillation"])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["settings"]["distillation"]) for row in rows] == [(name, False) for name in methods]
    for name in methods:
        with pytest.raises(RuntimeError, match="a lesson"):
            benchmark.main([*asked, name])


def test_ablations_change_one_default_and_are_run_if_named(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not set(benchmark.BenchmarkArguments("model").methods) & benchmark.ABLATIONS.keys()
    defaults = asdict(VDConfig())
    for config in benchmark.ABLATIONS.values():
        assert sum(value != defaults[name] for name, value in asdict(config).items()) == 1
    asked: list[VDConfig | None] = []
    train = text_cell.TextCell.train

    def listen(
        self: text_cell.TextCell, *args: Any, vd_config: VDConfig | None = None, **more: Any
    ) -> trainer.VDTrainer:
        asked.append(vd_config)
        return train(self, *args, vd_config=vd_config, **more)

    monkeypatch.setattr(text_cell.TextCell, "train", listen)
    monkeypatch.setattr(text_cell, "LATENCY_GRID", LATENCY_GRID)
    monkeypatch.setattr(benchmark, "score_in_new_process", lambda *_: 0.5)
    benchmark.main(flags(samples, tmp_path, "--target_speedups", "1.5", "--methods", *benchmark.ABLATIONS))
    assert [config for config in asked if config is not None] == [*benchmark.ABLATIONS.values()]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == [*benchmark.ABLATIONS]
    assert all(row["speedup"] >= 1.5 for row in rows)


def test_targets_are_runs_of_their_own(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_cell, "LATENCY_GRID", LATENCY_GRID)
    monkeypatch.setattr(cell, "LOGGING_STEPS", 1)
    monkeypatch.setattr(benchmark, "score_in_new_process", lambda *_: 0.5)
    methods = ("vd", "fisher", "vd_closed", "vd_oneshot", "l0", "movement")
    asked = flags(samples, tmp_path, "--methods", *methods, "--target_speedups", "1.2", "1.5")
    benchmark.main(asked)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["target_speedup"]) for row in rows] == [
        *product(methods, [1.2]),
        *product(methods, [1.5]),
    ]
    for looser, tighter in zip(rows[: len(methods)], rows[len(methods) :], strict=True):
        assert 1.2 <= looser["speedup"] < 1.5 <= tighter["speedup"]
    assert "| sst2 | 1.2x | fisher | 1 |" in capsys.readouterr().out
    benchmark.main([*asked, f"--plots={tmp_path / 'plots'}"])
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"sst2-{name}.png" for name in ("kl_weight", "nll", "expected_removal", "expected_speedup", "scores")
    }


def test_a_picture_holds_as_many_targets_as_colours(tmp_path: Path) -> None:
    course = {name: {"steps": [1, 2], "values": [0.5, 0.6]} for name in ("kl_weight", "nll", "expected_removal")}
    rows = [
        {**Run("sst2", 0, "vd", target)._asdict(), "courses": course, "settings": {"sparsify_steps": 3}}
        for target in (1.5, 2.0, 3.0, 4.0)
    ]
    draw_courses(rows[:3], tmp_path / "three")  # a curve that a run lacks is no reason to stop
    assert {path.stem for path in (tmp_path / "three").iterdir()} == {f"sst2-{name}" for name in course}
    with pytest.raises(ValueError, match="expected at most 3 targets"):
        draw_courses(rows, tmp_path / "four")
    assert not (tmp_path / "four").exists()


def test_a_dense_checkpoint_is_saved_whole_or_not_at_all(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cell.Settings(str(samples / "model"), 24, 16, 2, 3, 2, 1e-4, 5e-5, bf16=False, distillation=True)
    data = str(samples / "data")
    one = text_cell.TextCell(settings, "sst2", 0, dataset_dir=data, work_dir=tmp_path, use_cpu=True)

    def break_off(model: PreTrainedModel, folder: Path) -> None:
        model.config.save_pretrained(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(PreTrainedModel, "save_pretrained", break_off)
        with pytest.raises(KeyboardInterrupt):
            one.dense()
    assert not (one.folder / settings.dense_name).exists()
    one.dense()
    assert (one.folder / settings.dense_name / "model.safetensors").exists()
