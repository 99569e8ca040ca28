"""What tests of models in float64 share."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture
def exact_llama(monkeypatch):
    """Llama's RMSNorm in the type of its input."""

    def forward(self, hidden):
        variance = hidden.square().mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
