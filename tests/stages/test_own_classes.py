"""Custom classes: what they return is checked, with their name in the message, and editing their file reruns a stage."""

import sys
from pathlib import Path

import tokenward
from tests.stages.runs import plugin, refusal
from tokenward import plugins

LAB = """
import torch
from tokenward.objectives import Losses, Needs
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

class Silent:
    needs = Needs(own_denominator=True)
    def __call__(self, logp, batch):
        return Losses(logp.new_zeros(batch.comparisons), {})

class Sudden:
    def __call__(self, logp, batch):
        return Losses(logp.new_zeros(batch.comparisons), {}, logp.new_ones(batch.comparisons))

class BelowZero:
    needs = Needs(own_denominator=True)
    def __call__(self, logp, batch):
        return Losses(logp.new_zeros(batch.comparisons), {}, -logp.new_ones(batch.comparisons))

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

class Negative:
    def __call__(self, tokens):
        return [-1.0] * len(tokens.scores)

class Brief:
    reads = ()
    def __call__(self, record):
        return [1.0]

class Unlisted:
    reads = ("reference_logp",)
    def __call__(self, record):
        return record.value("oracle_logp") - record.value("reference_logp")

class UnlistedInStep:
    reads = ("policy_logp",)
    def __call__(self, record):
        return record.value("policy_entropy")

class Unknown:
    reads = ()
    def __call__(self, record):
        return record.value("logp_of_oracle")

class BriefInStep:
    reads = ("policy_logp",)
    def __call__(self, record):
        return record.value("policy_logp")[:1]
"""


WRONG = [
    ("policy.objective={name: 'LAB:Plain'}", ["LAB:Plain", "Losses"]),
    ("policy.objective={name: 'LAB:Reduced'}", ["LAB:Reduced", "[]", "loss"]),
    ("policy.objective={name: 'LAB:PerResponse'}", ["LAB:PerResponse", "[8]", "4"]),
    ("policy.objective={name: 'LAB:Metric'}", ["LAB:Metric", "[8]", "spread"]),
    ("policy.objective={name: 'LAB:Silent'}", ["LAB:Silent", "own_denominator"]),
    ("policy.objective={name: 'LAB:Sudden'}", ["LAB:Sudden", "denominator"]),
    ("policy.objective={name: 'LAB:BelowZero'}", ["LAB:BelowZero", "denominator"]),
    ("policy.objective={name: 'LAB:Short'}", ["LAB:Short", "f(logp, batch)"]),
    ("policy.objective={name: 'LAB:Idle'}", ["LAB:Idle"]),
    ("policy.selection={name: 'LAB:Fair'}", ["LAB:Fair", "f(tokens)"]),
    ("scores.scorer={name: 'LAB:Fair'}", ["LAB:Fair", "f(record)"]),
    ("scores.scorer={name: 'LAB:Worded'}", ["LAB:Worded"]),
    ("scores.scorer={name: 'LAB:Brief'}", ["LAB:Brief", "(1,)"]),
    ("scores.scorer={name: 'LAB:BriefInStep'};policy.objective={name: sft}", ["LAB:BriefInStep", "(1,)"]),
    ("policy.selection={name: 'LAB:Negative'}", ["LAB:Negative", ">= 0"]),
    ("policy.objective={name: sum, terms: [{name: dpo}, {name: sft, selection: {name: 'LAB:Negative'}}]}", ["LAB:Negative", ">= 0"]),
    ("scores.scorer={name: 'LAB:Unlisted'}", ["LAB:Unlisted", '("reference_logp", "oracle_logp")']),
    ("scores.scorer={name: 'LAB:UnlistedInStep'};policy.objective={name: sft}", ['("policy_logp", "policy_entropy")']),
    ("scores.scorer={name: 'LAB:Unknown'}", ["logp_of_oracle"]),
]  # fmt: skip


def test_wrong_return_value_or_signature_is_named(tiny_workplace):
    lab = plugin(LAB)
    base = ["scores.scorer={name: random}", "policy.training.max_steps=1", "fixed_prompts=0"]
    for changes, words in WRONG:
        given = [*base, *changes.replace("LAB", lab).split(";")]
        message = str(refusal(tiny_workplace, given, last="policy"))
        assert all(word.replace("LAB", lab) in message for word in words), message


def test_lists_of_numbers_are_accepted_without_a_scope(tiny_workplace):
    lab = plugin(LAB)
    names = [
        "scores.scorer={name: 'LAB:Listed'}",
        "policy.selection={name: 'LAB:Weights'}",
        "policy.objective={name: 'LAB:Fair'}",
    ]
    changes = [item.replace("LAB", lab) for item in names]
    run = tokenward.run(tiny_workplace, [*changes, "policy.training.max_steps=1"], last="policy", quiet=True)
    assert run.done("policy").facts["kept"] == {"chosen": 1.0, "rejected": 1.0}


def test_editing_a_custom_class_reruns_what_depends_on_it(tiny_workplace, monkeypatch):
    lab = plugin(LAB)
    changes = [f"scores.scorer={{name: '{lab}:Listed'}}", "policy.training.max_steps=1"]
    path = Path(f"{lab}.py")
    first = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    before = {name: first.done(name) for name in ("scores", "policy")}
    path.write_text(path.read_text().replace("float(place)", "float(-place)"))
    sys.modules.pop(lab)  # as in a new process
    monkeypatch.setattr(plugins, "_CODE", {})
    again = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    after = {name: again.done(name) for name in before}
    assert after["scores"] == before["scores"], (
        "it holds raw values, which do not depend on the scorer's code"
    )
    assert before["policy"].changes_to(after["policy"]) == [f"input code of {lab}:Listed: changed"]


def test_only_custom_code_is_fingerprinted(tiny_workplace):
    settings = {
        "a": "cuda:1", "b": ["tokenward.evaluation.replies:vader", "sys:path"], "c": {"text": "Label: {text}", "n": 3}
    }  # fmt: skip
    assert plugins.code_fingerprints(settings) == {}
    lab = plugin(LAB)
    sys.path.insert(0, str(Path.cwd()))
    try:
        nested = {
            "objective": {"name": "plackett_luce", "aggregate": f"{lab}:means"},
            "metrics": [f"{lab}:Fair"],
        }
        assert {*plugins.code_fingerprints(nested)} == {f"code of {lab}:means", f"code of {lab}:Fair"}
    finally:
        sys.path.remove(str(Path.cwd()))
