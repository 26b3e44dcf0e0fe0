# SPDX-License-Identifier: Apache-2.0
"""The page a saved model is met by: how to load it, what was removed, what that cost, how to make it again."""

from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_vdneuron.drawing import Drawing
from hf_vdneuron.glue import GLUE_TASKS, HUB_DATASET
from hf_vdneuron.how_to_load import how_to_load
from hf_vdneuron.report import RunReport
from hf_vdneuron.wording import named, percent


__all__ = ["render_model_card"]

#: Class that loads what `scripts/sparsify.py` makes.
AUTO_CLASS = "AutoModelForSequenceClassification"

_TEMPLATE = """---
{{ card_data }}
---

# {{ report.base_model }}, sparsified on {{ report.task }}

{{ how_to_load }}

## What was removed

| | dense | this model |
|---|---|---|
| score on {{ report.task }} | {{ score(report.dense.score) }} | {{ score(report.pruned.score) }} |
| score right after the cut, before recovery | | {{ score(report.score_after_cut) }} |
| parameters | {{ "{:,}".format(report.dense.parameters) }} | {{ "{:,}".format(report.pruned.parameters) }} |
| bytes | {{ "{:,}".format(report.dense.bytes) }} | {{ "{:,}".format(report.pruned.bytes) }} |
| heads per layer | {{ counts(report.dense.heads_per_layer) }} | {{ counts(report.pruned.heads_per_layer) }} |
| neurons per layer | {{ counts(report.dense.neurons_per_layer) }} | {{ counts(report.pruned.neurons_per_layer) }} |

Speed-up of the body in multiply-accumulates: **{{ "%.2f" | format(report.speedup.predicted) }}x**. Measured on
{{ report.device }} in fp32, batch {{ report.speedup.batch_size }}, {{ report.speedup.length }} tokens:
**{{ "%.2f" | format(report.speedup.measured) }}x** for the whole model.

Scores are the mean of the task's metrics on {{ report.evaluation.split }} ({{ report.evaluation.num_examples }}
examples). The dense model and the one right after the cut were scored in {{ report.dense.precision }}, this one in
{{ report.pruned.precision }}, loaded from its files, in batches of {{ report.evaluation.batch_size }} cut to
{{ report.evaluation.max_length }} tokens.

| | |
|---|---|
{% for pair in drawings | batch(2) -%}
|{% for one in pair %} ![{{ one.description }}](figures/{{ one.name }}.png) |{% endfor %}
{% endfor %}
The same as a page, in light and dark: `report.html`.

## How it was made

Variational dropout with a learned prior per attention head and feed-forward neuron (target: {{ report.target }}):
{% if report.training.phases.sparsify_steps -%}
what the trained posterior found least relevant was removed for good, and the rest trained on. This command repeats it,
{%- else -%}
what the bound of a posterior in closed form misses least was removed for good; the rest made up for it by least
squares, and trained on. This command repeats it,
{%- endif %}
with local folders by their names alone:

```bash
{{ report.command }}
```

- Base model: {{ report.base_model }}
- Task: {{ report.task }}
- Seeds: {{ named(report.seeds) }}
- Training: {{ "%.0f" | format(report.train_seconds) }} s on {{ report.device }}
- Versions: {{ named(report.versions) }}

## Limits

The removed parts mattered least *for this task's data*. Expect less of the model elsewhere, and measure before use.
"""


def render_model_card(
    report: RunReport, drawings: Sequence[Drawing], *, architecture: str, repo_id: str, is_cut: bool
) -> ModelCard:
    """Write the card of a model.

    Args:
        report: What came out of the run.
        drawings: Its figures, whose files lie in `figures` beside the card.
        architecture: Name of its class, such as `BertForSequenceClassification`.
        repo_id: Where it will live, a repository or a folder.
        is_cut: Whether layers are smaller than its config says.

    Returns:
        The card.
    """
    return ModelCard.from_template(
        _metadata(report, repo_id),
        template_str=_TEMPLATE,
        report=report,
        drawings=drawings,
        how_to_load=how_to_load(
            architecture=architecture,
            auto_class=AUTO_CLASS,
            repo_id=repo_id,
            is_cut=is_cut,
            is_smaller=report.is_smaller,
        ),
        score=percent,
        counts=_counts,
        named=named,
    )


def _metadata(report: RunReport, repo_id: str) -> ModelCardData:
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["hf_vdneuron", "variational-dropout", *(["pruned"] if report.is_smaller else [])],
        # The name of a local folder would be taken for a repository.
        base_model=report.base_model if "/" in report.base_model else None,
        model_name=repo_id,
        eval_results=[_eval_result(report, name, value) for name, value in report.evaluation.metrics.items()],
    )


def _eval_result(report: RunReport, metric: str, value: float) -> EvalResult:
    is_official = report.task in GLUE_TASKS
    return EvalResult(
        task_type="text-classification",
        dataset_type=HUB_DATASET if is_official else report.task,
        dataset_name=f"GLUE {report.task}" if is_official else report.task,
        dataset_config=report.task if is_official else None,
        dataset_split=report.evaluation.split,
        metric_type=metric,
        metric_value=value,
    )


def _counts(per_layer: list[int]) -> str:
    return ", ".join(map(str, per_layer))
