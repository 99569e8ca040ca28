"""What a class of one's own must give back: each mistake is refused with its name before the training builds on it."""

import re

import pytest

from tests.pipeline.tools import plugin, refused

LAB = """
import torch
from tokenward.objectives import Losses
from tokenward.ops.ragged import weighted_mean

def means(logp, batch):
    return weighted_mean(logp, batch.weights, batch.response, batch.responses)

class Plain:
    def __call__(self, logp, batch):
        return torch.relu(1 - means(logp, batch)).mean()

class Reduced:
    def __call__(self, logp, batch):
        return Losses(torch.relu(1 - means(logp, batch)).mean(), {})

class PerResponse:
    def __call__(self, logp, batch):
        return Losses(-means(logp, batch), {})

class Metric:
    def __call__(self, logp, batch):
        mean = means(logp, batch)
        return Losses(mean[1::2] - mean[0::2], {"spread": mean})

class Short:
    def __call__(self, logp):
        return logp

class Idle:
    pass

class Listed:
    reads = ()
    def __call__(self, record):
        return [float(place) for place in range(len(record.ids))]

class Worded:
    reads = ()
    def __call__(self, record):
        return ["high"] * len(record.ids)

class Fair:
    def __call__(self, logp, batch):
        mean = means(logp, batch)
        return Losses(mean[1::2] - mean[0::2], {})

class Weights:
    def __call__(self, tokens):
        return [1.0] * len(tokens.scores)
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["policy.objective={name: 'LAB:Plain'}"], "objective LAB:Plain returned a Tensor of shape .* must return Losses"),
        (["policy.objective={name: 'LAB:Reduced'}"], r"objective LAB:Reduced returned a Tensor of shape \[\] as loss"),
        (["policy.objective={name: 'LAB:PerResponse'}"], r"LAB:PerResponse returned .* shape \[8\] as loss for a batch of 4 comp"),
        (["policy.objective={name: 'LAB:Metric'}"], r"LAB:Metric returned .* shape \[8\] as spread for a batch of 4 comp"),
        (["policy.objective={name: 'LAB:Short'}"], r"objective LAB:Short takes \(logp\): .* called as f\(logp, batch\)"),
        (["policy.objective={name: 'LAB:Idle'}"], "objective LAB:Idle is a Idle, which cannot be called"),
        (["policy.selection={name: 'LAB:Fair'}"], r"selector LAB:Fair takes \(logp, batch\): .* called as f\(tokens\)"),
        (["scores.scorer={name: 'LAB:Fair'}"], r"scorer LAB:Fair takes \(logp, batch\): .* called as f\(record\)"),
        (["scores.scorer={name: 'LAB:Worded'}"], "scorer .*Worded.* returned a list that is no list of numbers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_return_or_signature_is_named(tiny_workplace, changes, message):
    lab = plugin(LAB)
    base = ["scores.scorer={name: random}", "policy.training.max_steps=1"]
    text = refused(tiny_workplace, [*base, *(item.replace("LAB", lab) for item in changes)], last="policy")
    assert re.search(message.replace("LAB", lab), text), text


def test_lists_of_numbers_are_taken_and_a_scope_need_not_be_said(tiny_workplace):
    import tokenward

    lab = plugin(LAB)
    names = [
        "scores.scorer={name: 'LAB:Listed'}",
        "policy.selection={name: 'LAB:Weights'}",
        "policy.objective={name: 'LAB:Fair'}",
    ]
    changes = [item.replace("LAB", lab) for item in names]
    run = tokenward.run(tiny_workplace, [*changes, "policy.training.max_steps=1"], last="policy", quiet=True)
    assert run.done("policy").facts["kept"] == {"chosen": 1.0, "rejected": 1.0}
