"""What a class of one's own must give back: each mistake is refused with its name before the training builds on it."""

import re
import sys
from pathlib import Path

import tokenward
from tests.stages.runs import plugin, refused
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

def brief(record):
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
    (["policy.objective={name: 'LAB:Plain'}"], "objective LAB:Plain returned a Tensor of shape .* must return Losses"),
    (["policy.objective={name: 'LAB:Reduced'}"], r"objective LAB:Reduced returned a Tensor of shape \[\] as loss"),
    (["policy.objective={name: 'LAB:PerResponse'}"], r"LAB:PerResponse returned .* shape \[8\] as loss for a batch of 4 comp"),
    (["policy.objective={name: 'LAB:Metric'}"], r"LAB:Metric returned .* shape \[8\] as spread for a batch of 4 comp"),
    (["policy.objective={name: 'LAB:Silent'}"], "LAB:Silent declares own_denominator but returned none: .* before it begins"),
    (["policy.objective={name: 'LAB:Sudden'}"], "LAB:Sudden returned a denominator: what divides"),
    (["policy.objective={name: 'LAB:BelowZero'}"], r"LAB:BelowZero returned .* shape \[4\] as denominator .* >= 0 per"),
    (["policy.objective={name: 'LAB:Short'}"], r"objective LAB:Short takes \(logp\): .* called as f\(logp, batch\)"),
    (["policy.objective={name: 'LAB:Idle'}"], "objective LAB:Idle is an Idle, which cannot be called"),
    (["policy.selection={name: 'LAB:Fair'}"], r"selector LAB:Fair takes \(logp, batch\): .* called as f\(tokens\)"),
    (["scores.scorer={name: 'LAB:Fair'}"], r"scorer LAB:Fair takes \(logp, batch\): .* called as f\(record\)"),
    (["scores.scorer={name: 'LAB:Worded'}"], "scorer LAB:Worded returned a list that cannot be read as numbers"),
    (["scores.scorer={name: 'LAB:Brief'}"], r"the scorer LAB:Brief returned shape \(1,\) for a response"),
    (["scores.scorer={name: 'LAB:brief'}", "oracle.training.max_steps=1"], r"the scorer LAB:brief returned shape \(1,\) for a response"),
    (["scores.scorer={name: 'LAB:BriefInStep'}", "policy.objective={name: sft}"], r"the scorer LAB:BriefInStep returned shape \(1,\)"),
    (["policy.selection={name: 'LAB:Negative'}"], "the selector LAB:Negative must give one finite weight >= 0 per token"),
    (
        ["scores.scorer={name: random}", "policy.objective={name: sum, terms: [{name: dpo}, {name: sft, selection: {name: 'LAB:Negative'}}]}"],
        "the selector LAB:Negative must give one finite weight >= 0 per token",
    ),
    (
        ["scores.scorer={name: 'LAB:Unlisted'}"],
        r"LAB:Unlisted uses oracle_logp, which it does not declare in reads \(reference_logp\), so it was not computed. "
        r'Write reads = \("reference_logp", "oracle_logp"\)',
    ),
    (
        ["scores.scorer={name: 'LAB:UnlistedInStep'}", "policy.objective={name: sft}"],
        r'uses policy_entropy, which it does not declare .* Write reads = \("policy_logp", "policy_entropy"\)',
    ),
    (["scores.scorer={name: 'LAB:Unknown'}"], "reads 'logp_of_oracle', which is not a known value. Write reward, or MODEL_KIND"),
]  # fmt: skip


def test_a_wrong_return_or_signature_is_named(tiny_workplace):
    lab = plugin(LAB)
    base = ["scores.scorer={name: random}", "policy.training.max_steps=1", "fixed_prompts=0"]
    for changes, message in WRONG:
        text = refused(
            tiny_workplace, [*base, *(item.replace("LAB", lab) for item in changes)], last="policy"
        )
        assert re.search(message.replace("LAB", lab), text), text


def test_lists_of_numbers_are_taken_and_a_scope_need_not_be_said(tiny_workplace):
    lab = plugin(LAB)
    names = [
        "scores.scorer={name: 'LAB:Listed'}",
        "policy.selection={name: 'LAB:Weights'}",
        "policy.objective={name: 'LAB:Fair'}",
    ]
    changes = [item.replace("LAB", lab) for item in names]
    run = tokenward.run(tiny_workplace, [*changes, "policy.training.max_steps=1"], last="policy", quiet=True)
    assert run.done("policy").facts["kept"] == {"chosen": 1.0, "rejected": 1.0}


def test_an_edited_file_of_ones_own_runs_what_depends_on_it_again(tiny_workplace, monkeypatch):
    lab = plugin(f"{LAB}\ndef longest(completions):\n    return [len(text) for text in completions]\n")
    changes = [
        f"scores.scorer={{name: '{lab}:Listed'}}",
        f"evaluation.metrics=['{lab}:longest']",
        "policy.training.max_steps=1", "evaluation.prompts=1", "evaluation.bootstrap=2",
    ]  # fmt: skip
    path = Path(f"{lab}.py")
    first = tokenward.run(tiny_workplace, changes, quiet=True)
    before = {name: first.done(name) for name in ("scores", "policy", "evaluation")}
    path.write_text(path.read_text().replace("float(place)", "float(-place)"))
    sys.modules.pop(lab)  # as in a new process
    monkeypatch.setattr(plugins, "_CODE", {})
    again = tokenward.run(tiny_workplace, changes, quiet=True)
    after = {name: again.done(name) for name in before}
    assert after["scores"] == before["scores"], "it holds raw values, which the scorer has no part in"
    assert before["policy"].changes_to(after["policy"]) == [f"input code of {lab}:Listed: changed"]
    assert f"input code of {lab}:longest: changed" in before["evaluation"].changes_to(after["evaluation"])


def test_only_files_of_ones_own_are_fingerprinted(tiny_workplace):
    settings = {
        "a": "cuda:1", "b": ["tokenward.evaluation.replies:vader", "sys:path"], "c": {"text": "Label: {text}", "n": 3}
    }  # fmt: skip
    assert plugins.code_fingerprints(settings) == {}
    lab = plugin(LAB)
    sys.path.insert(0, str(Path.cwd()))
    try:
        nested = {"objective": {"name": "plackett_luce", "aggregate": f"{lab}:means"}}
        assert [*plugins.code_fingerprints(nested)] == [f"code of {lab}:means"]
    finally:
        sys.path.remove(str(Path.cwd()))
