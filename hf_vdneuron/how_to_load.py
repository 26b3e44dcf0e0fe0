# SPDX-License-Identifier: Apache-2.0
"""How a model with smaller layers is loaded, in words: the part of a card that nobody should miss."""

__all__ = ["LOAD_ERROR", "TITLE", "how_to_load"]

#: What the text begins with.
TITLE = "**How to load it.**"

#: What transformers says to weights of other sizes than the config's. People search for it.
LOAD_ERROR = (
    "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above "
    "report!"
)

_CUT = """{title} Some layers are smaller than the config says, so a plain
`{architecture}.from_pretrained` stops with

```text
{error}
```

Do **not** set `ignore_mismatched_sizes=True`: it replaces the trained weights by random ones. Either of these loads
the model as it is:

```python
import hf_vdneuron

model = hf_vdneuron.from_pretrained("{repo_id}")
```

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
```"""

_WHOLE = """{title} {reason}, so this is an ordinary
`{architecture}`:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repo_id}")
```"""


def how_to_load(*, architecture: str, auto_class: str, repo_id: str, is_cut: bool, is_smaller: bool = True) -> str:
    """Write how to load a model, and what a plain load says.

    Args:
        architecture: Name of its class, such as `BertForSequenceClassification`.
        auto_class: Name of an auto class that builds it, such as `AutoModelForSequenceClassification`.
        repo_id: Where it lives, a repository or a folder.
        is_cut: Whether layers are smaller than its config says.
        is_smaller: Whether anything was removed.

    Returns:
        Markdown, without a heading.
    """
    text = _CUT if is_cut else _WHOLE
    return text.format(
        title=TITLE,
        reason="Its config says what is left" if is_smaller else "Nothing was removed in the end",
        architecture=architecture,
        auto_class=auto_class,
        repo_id=repo_id,
        error=LOAD_ERROR,
    )
