"""Every family of transformers: what the probe decides for it is right, and its numbers are those of plain calls."""

import pytest
import torch

from tests.models.families import CHANGES, FAMILIES, REFUSED, SHARED, measured, tiny
from tests.objectives.tools import naming

# Some of transformers' modules are slow reference code without their kernels, and say so.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

# What a tolerance once hid in bfloat16, at a start with small weights, or both; and auxiliary models, whose sums depend on the batch.
DELICATE = [
    "gemma2", "cohere", "granite", "falcon_h1", "nanochat", "recurrent_gemma", "phi", "gptj", "codegen",
    "falcon", "minimax", "mamba2", "lfm2", "jamba", "bamba", "olmoe", "flex_olmo", "aria_text",
    "minimax_m3_vl_text", "deepseek_v3", "qwen3_next", "roberta", "opt", "bloom", "llama",
]  # fmt: skip


def check(family, found):
    if family in REFUSED:
        assert found.layout == "refused"
        assert "is no causal language model" in found.head
        return
    assert found.layout == ("shared" if family in SHARED else "separate")
    assert found.head == ", ".join(["linear", *([CHANGES[family]] if family in CHANGES else [])])
    # The head in the same rows: to the bit.
    assert found.head_by == 0


def test_each_family_has_the_numbers_of_plain_calls():
    for family in FAMILIES:
        with naming(family):
            found = measured(tiny(family))
            check(family, found)
            # Float32 in another order of summation; auxiliary models and recurrences lose two digits more than the rest.
            assert found.by < 1e-4
            assert found.slope < 2e-4


def test_the_decision_does_not_depend_on_the_precision():
    for family in DELICATE:
        with naming(family):
            check(family, measured(tiny(family, dtype=torch.bfloat16)))


def test_the_decision_does_not_depend_on_the_size_of_the_weights():
    for family in ("lfm2", "falcon_h1", "minimax", "mamba2", "gptj", "codegen", "falcon", "llama"):
        for dtype in (torch.float32, torch.bfloat16):
            with naming((family, dtype)):
                check(family, measured(tiny(family, dtype=dtype, lively=False)))
