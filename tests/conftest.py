"""Every test starts from the same random state, runs on one thread and cannot reach the Hub."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported

import random

import numpy as np
import pytest
import torch
from hypothesis import settings


SEED = 0

# The same examples in every run, and no time limit per example: a busy machine is not a bug.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start each test from the same random state, whichever tests ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the global state is what transformers and datasets draw from
    torch.manual_seed(SEED)
