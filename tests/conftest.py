"""Fixtures that several test modules share."""

from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")
