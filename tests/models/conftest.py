"""Fixtures for models in float64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture
def exact_llama(monkeypatch):
    """Llama's RMSNorm in the dtype of its input instead of float32."""

    def forward(self, hidden):
        variance = hidden.square().mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
