# SPDX-License-Identifier: Apache-2.0
"""The page a pruned model is met by: how to load it, what was removed, what that cost."""

from huggingface_hub import ModelCard, ModelCardData

from hf_vdneuron.report import RunReport


__all__ = ["render_model_card"]

_TEMPLATE = """---
{{ card_data }}
---

# {{ base_model }}, sparsified on {{ report.task }}

**How to load it.** Some layers are smaller than the config of `{{ architecture }}` says, so a plain
`from_pretrained` stops with a `RuntimeError` about mismatched sizes. Either of these works:

```python
import hf_vdneuron

model = hf_vdneuron.from_pretrained("{{ repo_id }}")
```

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("{{ repo_id }}", trust_remote_code=True)
```

Do **not** pass `ignore_mismatched_sizes=True`: it replaces the trained weights by random ones.

## What was removed

| | dense | this model |
|---|---|---|
| score on {{ report.task }} | {{ score(report.dense.score) }} | {{ score(report.pruned.score) }} |
| score right after the cut, before recovery | | {{ score(report.score_after_cut) }} |
| parameters | {{ "{:,}".format(report.dense.parameters) }} | {{ "{:,}".format(report.pruned.parameters) }} |
| heads per layer | {{ counts(report.dense.heads_per_layer) }} | {{ counts(report.pruned.heads_per_layer) }} |
| neurons per layer | {{ counts(report.dense.neurons_per_layer) }} | {{ counts(report.pruned.neurons_per_layer) }} |

Speed-up of the body in multiply-accumulates: **{{ "%.2f" | format(report.speedup.predicted) }}x**. Measured on
{{ report.environment.device }}, batch {{ report.speedup.batch_size }}, {{ report.speedup.length }} tokens:
**{{ "%.2f" | format(report.speedup.measured) }}x** for the whole model.

## How it was made

Variational dropout with a learned prior per attention head and feed-forward neuron (target: {{ report.target }}, seed
{{ report.seed }}): what the trained posterior found irrelevant was removed for good, and the rest trained on.
Scores are the mean of the task's GLUE metrics on its validation set.

Versions: {% for name, value in report.environment.items() %}{{ name }} {{ value }}{{ ", " if not loop.last }}\
{% endfor %}.

## Limits

The removed parts were irrelevant *for this task's data*. Expect less of the model elsewhere, and measure before use.
"""


def render_model_card(report: RunReport, *, base_model: str, architecture: str, repo_id: str) -> ModelCard:
    """Write the card of a pruned model.

    Args:
        report: What came out of the run.
        base_model: Name of the model it started from.
        architecture: Name of its class, such as `BertForSequenceClassification`.
        repo_id: Where it will live, a repository or a folder.

    Returns:
        The card.
    """
    data = ModelCardData(
        library_name="transformers", tags=["hf_vdneuron", "pruned", "variational-dropout"], pipeline_tag=None
    )
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        report=report,
        base_model=base_model,
        architecture=architecture,
        repo_id=repo_id,
        score=_percent,
        counts=_counts,
    )


def _percent(score: float | None) -> str:
    return "not measured" if score is None else f"{100 * score:.2f}"


def _counts(per_layer: list[int]) -> str:
    return ", ".join(map(str, per_layer))
