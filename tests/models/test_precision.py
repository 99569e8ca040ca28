"""Where bfloat16 is slower than float32."""

import pytest
import torch

from tokenward.models.loading import imitates_bfloat16


@pytest.mark.parametrize(
    ("device", "processor", "imitated"),
    [
        ("cpu", {"avx2": True, "avx512_bf16": False}, True),
        ("cpu", {"avx512_f": True, "avx512_bf16": True}, False),
        ("cpu", {"neon": True, "bf16": True}, False),
        ("cpu", {"neon": True}, True),
        ("cuda", {"avx2": True}, False),
    ],
)
def test_a_processor_imitates_what_it_has_no_instructions_for(device, processor, imitated):
    assert imitates_bfloat16(torch.device(device), processor) is imitated


def test_torch_names_the_instructions_of_this_processor():
    assert "architecture" in torch.cpu.get_capabilities()
    assert imitates_bfloat16(torch.device("cpu")) in (True, False)
