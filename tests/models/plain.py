"""Log-probabilities computed plainly, one response at a time from all logits, and by the library."""

import torch
from torch import Tensor, nn

from tokenward.models.forward import token_statistics
from tokenward.models.head import SelectiveHead
from tokenward.tokens.batches import Batch
from tokenward.tokens.rows import TokenRow


def plain_logits(model: nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """Logits that predict each token of one response.  -> [len v]"""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1]


def plain_logprobs(model: nn.Module, rows: list[TokenRow]) -> Tensor:
    """Log-probability of every response token of some comparisons, laid end to end.  -> [n]"""
    parts = [
        plain_logits(model, row.prompt, response).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
        for row in rows
        for response in row.responses
    ]
    return torch.cat(parts)[:, 0]


def token_logprobs(model: nn.Module, head: SelectiveHead | None, batch: Batch) -> Tensor:
    """Log-probabilities of a batch, by the library.  -> [n] float32"""
    return token_statistics(model, head, batch)["logp"]
