"""A tiny base model, and rows to learn."""

from pathlib import Path

import pytest
import torch

from tests.model import tiny


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def base(tmp_path_factory) -> Path:
    return tiny.save(tiny.qwen(), tmp_path_factory.mktemp("base"))
