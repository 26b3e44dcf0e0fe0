"""Small runs of the trainer: a tiny model, a few rows, a dozen steps."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_vdneuron.trainer import VDTrainer
from hf_vdneuron.training_args import VDTrainingArguments


Rows = list[dict[str, Tensor]]

# What transformers calls it to recompute activations; before 5.23 it was "gradient checkpointing" everywhere.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)

NUM_ROWS, LENGTH, VOCABULARY = 48, 6, 20

# Four steps of sparsification with these end some units and keep others.
PRUNING = {"log_var_distance": 12.0, "group_scale_distance": 5.0, "kl_weight": 4.0}

# Fractions of a run with one phase each.
FINETUNE_ONLY = {"finetune_fraction": 1.0, "sparsify_fraction": 0.0, "recover_fraction": 0.0}
RECOVER_ONLY = {"finetune_fraction": 0.0, "sparsify_fraction": 0.0, "recover_fraction": 1.0}


def tiny_bert(
    model_class: type[PreTrainedModel] = BertForSequenceClassification, *, dropout: float = 0.0, **options: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        **options,
    )
    return model_class(config)


def rows(*, language_model: bool = False) -> Rows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (NUM_ROWS, LENGTH), generator=generator)
    labels = ids if language_model else (ids[:, 0] > VOCABULARY // 2).long()
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def arguments(output_dir: Path, **options: Any) -> VDTrainingArguments:
    defaults = {
        "max_steps": 12,
        "finetune_fraction": 1 / 3,
        "sparsify_fraction": 1 / 3,
        "recover_fraction": 1 / 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return VDTrainingArguments(output_dir=str(output_dir), **(defaults | options))


def make_trainer(
    output_dir: Path,
    model: PreTrainedModel | None = None,
    *,
    data: Rows | None = None,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> VDTrainer:
    return VDTrainer(
        model=tiny_bert() if model is None else model,
        args=arguments(output_dir, **options),
        train_dataset=rows() if data is None else data,
        **(trainer_options or {}),
    )


class StopAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = state.global_step == self.step
