"""The README's lines run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from glue_samples import tiny_classifier, tiny_tokenizer


README = Path(__file__).parents[1] / "README.md"

# What a reader has at hand: a model, rows, a place to write to.
PREAMBLE = """
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
import hf_vdneuron
from hf_vdneuron import VDTrainer, VDTrainingArguments

name, out, steps = "model", "out", 6
tokenizer, texts = AutoTokenizer.from_pretrained(name), ["a good film", "a bad film"]
data = [{"input_ids": torch.tensor([2, 5 + row % 10, 3]), "labels": row % 2} for row in range(16)]
batches = [{name: torch.as_tensor(value)[None] for name, value in row.items()} for row in data]
"""


def test_its_lines_of_python(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    tiny_classifier(2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    # The reader's machine may have an accelerator; the test's arguments keep to the CPU.
    code = PREAMBLE + "\n".join(blocks).replace("max_steps=steps", "max_steps=steps, use_cpu=True")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "page", [README, README.parent / "scripts" / "results" / "README.md"], ids=["README", "results"]
)
def test_every_file_it_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"(?:bash|python) (scripts/\w+\.\w+)", text):
        assert (README.parent / path).exists(), path
