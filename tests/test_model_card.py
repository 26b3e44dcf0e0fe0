"""Cards say, before all else, how to load the model; then what was removed, what that cost and how to repeat it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from models import HEADS, tiny_model
from transformers import AutoModelForSequenceClassification

from hf_vdneuron.figures import draw_run
from hf_vdneuron.how_to_load import LOAD_ERROR
from hf_vdneuron.masks import RelevanceMask
from hf_vdneuron.model_card import render_model_card
from hf_vdneuron.pruning import prune_model_
from hf_vdneuron.report import Curve, ModelReport, RunReport, ScoreReport, SpeedReport, TrainingReport
from hf_vdneuron.schedules import PhasePlan


REPORT = RunReport(
    base_model="org/tiny",
    task="mrpc",
    target="dropout rate above 0.99",
    command="python scripts/sparsify.py --task_name mrpc",
    dense=ModelReport(0.9, "bf16 autocast", 5044, 20176, [4, 4, 4], [6, 6, 6]),
    pruned=ModelReport(0.875, "fp32", 3242, 12968, [0, 4, 4], [6, 5, 6]),
    kept_heads=[[], [0, 1, 2, 3], [0, 1, 2, 3]],
    score_after_cut=None,
    evaluation=ScoreReport({"accuracy": 0.9, "f1": 0.85}, "validation", 408, 128, 8),
    speedup=SpeedReport(1.84, 1.5, 0.003, 0.002, 1, 128),
    training=TrainingReport(PhasePlan(2, 3, 1), {"nll": Curve([1, 2], [0.7, 0.6])}, None),
    seeds={"training": 3, "data order": 4},
    train_seconds=61.7,
    device="cpu (x86_64)",
    versions={"python": "3.11.7", "torch": "2.13.0"},
)

TOP = r"""---
base_model: org/tiny
library_name: transformers
pipeline_tag: text-classification
tags:
(?:- .+\n)+model-index:
- name: me/x
  results:
(?:.+\n)+---

# org/tiny, sparsified on mrpc

"""

CUT = r"""\*\*How to load it\.\*\* Some layers are smaller than the config says, so a plain
`BertForSequenceClassification\.from_pretrained` stops with

```text
RuntimeError: .+
```

Do \*\*not\*\* set `ignore_mismatched_sizes=True`: .+
.+

```python
import hf_vdneuron

model = hf_vdneuron\.from_pretrained\("me/x"\)
```

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification\.from_pretrained\("me/x", trust_remote_code=True\)
```
"""

WHOLE = r"""\*\*How to load it\.\*\* Nothing was removed in the end, so this is an ordinary
`BertForSequenceClassification`:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification\.from_pretrained\("me/x"\)
```
"""

ORDINARY = WHOLE.replace("Nothing was removed in the end", "Its config says what is left")

REST = r"""
## What was removed

\| \| dense \| this model \|
\|---\|---\|---\|
\| score on mrpc \| 90\.00 \| 87\.50 \|
\| score right after the cut, before recovery \| \| not measured \|
\| parameters \| 5,044 \| 3,242 \|
\| bytes \| 20,176 \| 12,968 \|
\| heads per layer \| 4, 4, 4 \| 0, 4, 4 \|
\| neurons per layer \| 6, 6, 6 \| 6, 5, 6 \|

Speed-up of the body in multiply-accumulates: \*\*1\.84x\*\*\. Measured on
cpu \(x86_64\) in fp32, batch 1, 128 tokens:
\*\*1\.50x\*\* for the whole model\.

Scores are the mean of the task's metrics on validation \(408
examples\)\. The dense model and the one right after the cut were scored in bf16 autocast, this one in
fp32, loaded from its files, in batches of 8 cut to
128 tokens\.

\| \| \|
\|---\|---\|
\| !\[Heads .+ 8 of 12 remain: 0, 4, 4\.\]\(figures/heads\.png\) \| !\[Neurons .+\]\(figures/neurons\.png\) \|
\| !\[Cost against .+\]\(figures/cost\.png\) \| !\[Score\. .+ dense 90\.00, .+ 87\.50\.\]\(figures/score\.png\) \|
\| !\[Loss\. .+\]\(figures/loss\.png\) \|

The same as a page, in light and dark: `report\.html`\.

## How it was made

.+ \(target: dropout rate above 0\.99\):
.+ This command repeats it,
with local folders by their names alone:

```bash
python scripts/sparsify\.py --task_name mrpc
```

- Base model: org/tiny
- Task: mrpc
- Seeds: training 3, data order 4
- Training: 62 s on cpu \(x86_64\)
- Versions: python 3\.11\.7, torch 2\.13\.0

## Limits

.+
"""


#: Nothing was removed.
COMPLETE = replace(REPORT, pruned=REPORT.dense)


def render(report: RunReport = REPORT, *, is_cut: bool = True) -> str:
    names = {"architecture": "BertForSequenceClassification", "repo_id": "me/x"}
    return str(render_model_card(report, draw_run(report), is_cut=is_cut, **names)) + "\n"


@pytest.mark.parametrize(
    ("is_cut", "opening"), [(True, CUT), (False, ORDINARY)], ids=["cut", "cut to what its config says"]
)
def test_card_follows_its_pattern(is_cut: bool, opening: str) -> None:
    assert re.fullmatch(TOP + opening + REST, render(is_cut=is_cut))


def test_card_of_a_model_that_lost_nothing() -> None:
    card = render(COMPLETE, is_cut=False)
    assert re.search(WHOLE, card)
    assert "pruned" not in ModelCard(card).data.tags


def test_card_quotes_what_a_plain_load_says(tmp_path: Path) -> None:
    keep = RelevanceMask({"bert.encoder.layer.0.attention": torch.zeros(2, HEADS, dtype=torch.bool)})
    prune_model_(tiny_model("bert", "sequence_classification"), keep).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError) as error:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert f"RuntimeError: {error.value}" == LOAD_ERROR
    assert LOAD_ERROR in render()


def test_metadata_can_be_indexed() -> None:
    data = ModelCard(render()).data
    assert "pruned" in data.tags
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [
        ("accuracy", 0.9),
        ("f1", 0.85),
    ]
    assert {result.dataset_type for result in data.eval_results} == {"nyu-mll/glue"}
    assert {result.dataset_config for result in data.eval_results} == {"mrpc"}
    assert "pruned" in ModelCard(render(is_cut=False)).data.tags


def test_a_local_model_and_an_own_task_are_no_repositories() -> None:
    data = ModelCard(render(replace(REPORT, base_model="tiny", task="moods"))).data
    assert data.base_model is None
    assert {(result.dataset_type, result.dataset_config) for result in data.eval_results} == {("moods", None)}


def test_card_shows_a_score_of_zero() -> None:
    assert "before recovery | | 0.00 |" in render(replace(REPORT, score_after_cut=0.0))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        pytest.param(PhasePlan(2, 3, 1), "what the trained posterior found least relevant was", id="trained"),
        pytest.param(PhasePlan(2, 0, 4), "of a posterior in closed form misses least was", id="closed"),
    ],
)
def test_the_card_says_how_the_posterior_came_about(plan: PhasePlan, said: str) -> None:
    written = render(replace(REPORT, training=replace(REPORT.training, phases=plan)))
    assert said in " ".join(written.split())
