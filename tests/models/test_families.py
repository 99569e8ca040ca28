"""For every family of transformers, the probe decides correctly and the numbers are those of plain calls."""

import pytest
import torch

from tests.models.families import CHANGES, FAMILIES, REFUSED, SHARED, measured, tiny
from tests.objectives.tools import naming

# Some modules of transformers warn that they run slow reference code without their kernels.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

# Families whose influences a tolerance once hid in bfloat16 or with small weights, and mixtures of experts, whose sums
# depend on the batch.
DELICATE = [
    "gemma2", "cohere", "granite", "falcon_h1", "nanochat", "recurrent_gemma", "phi", "gptj", "codegen",
    "falcon", "minimax", "mamba2", "lfm2", "jamba", "bamba", "olmoe", "flex_olmo", "aria_text",
    "minimax_m3_vl_text", "deepseek_v3", "qwen3_next", "roberta", "opt", "bloom", "llama",
]  # fmt: skip


def check(family, found):
    if family in REFUSED:
        assert found.layout == "refused"
        assert found.head == "it is not a causal language model"
        return
    assert found.layout == ("shared" if family in SHARED else "separate")
    assert found.head == ", ".join(["linear", *([CHANGES[family]] if family in CHANGES else [])])
    # In the same rows, the head is exact to the bit.
    assert found.head_by == 0


@pytest.mark.slow
def test_every_family_has_the_numbers_of_plain_calls():
    for family in FAMILIES:
        with naming(family):
            found = measured(tiny(family))
            check(family, found)
            # Rounding of float32 sums in another order; experts and recurrences lose two digits more than others.
            assert found.by < 1e-4
            assert found.slope < 2e-4


def test_decision_does_not_depend_on_the_dtype():
    for family in DELICATE:
        with naming(family):
            check(family, measured(tiny(family, dtype=torch.bfloat16)))


def test_decision_does_not_depend_on_the_size_of_the_weights():
    for family in ("lfm2", "falcon_h1", "minimax", "mamba2", "gptj", "codegen", "falcon", "llama"):
        for dtype in (torch.float32, torch.bfloat16):
            with naming((family, dtype)):
                check(family, measured(tiny(family, dtype=dtype, lively=False)))
