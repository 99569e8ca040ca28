"""What engines refuse, and which checkpoints a training can go on from; tests/training/test_engines.py runs them."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from tests.objectives.tools import naming
from tests.tiny import tiny_llama
from tests.training.tools import arguments
from tokenward.errors import UserError
from tokenward.training.engines import check_cut, check_engine, complete_deepspeed
from tokenward.training.resume import by_name, by_number, check_resumable, kind_of, optimized_names

KINDS = {
    "plain": ["optimizer.pt"],
    "fsdp": ["optimizer.bin", "pytorch_model_fsdp.bin"],
    "fsdp parts": ["optimizer_0/", "pytorch_model_fsdp_0/"],
    "deepspeed": ["global_step3/", "latest"],
}
TOGETHER = {"plain", "fsdp"}
"""Kinds that are translated into each other."""


def checkpoint(folder, kind, processes):
    folder.mkdir()
    states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    for name in (*KINDS[kind], *states):
        path = folder / name
        path.mkdir() if name.endswith("/") else path.touch()
    return folder


@pytest.mark.parametrize(("kind", "wanted"), [*product(KINDS, KINDS)])
def test_what_an_engine_cannot_read_is_refused(kind, wanted, tmp_path):
    begun = checkpoint(tmp_path / "checkpoint-3", kind, 2)
    assert kind_of(begun) == kind
    if kind == wanted or {kind, wanted} <= TOGETHER:
        check_resumable(begun, wanted, 2, universal=False)
    else:
        with pytest.raises(UserError, match="as the model, without resume") as caught:
            check_resumable(begun, wanted, 2, universal=False)
        assert caught.value.code == "unusable-checkpoint"


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_processes_is_refused_for_deepspeed_alone(kind, tmp_path):
    begun = checkpoint(tmp_path / "checkpoint-3", kind, 2)
    if kind != "deepspeed":
        check_resumable(begun, kind, 1, universal=False)
        return
    check_resumable(begun, kind, 1, universal=True)
    with pytest.raises(
        UserError, match="written by 2 processes of DeepSpeed, and this training has 1"
    ) as caught:
        check_resumable(begun, kind, 1, universal=False)
    assert caught.value.code == "unusable-checkpoint"


def test_an_optimizers_state_is_the_same_by_name_and_by_number():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    biases = [model[0].bias, model[1].bias]
    weights = [model[1].weight, model[0].weight]  # not in the order of the model
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = optimized_names(model, optimizer)
    assert names == ["1.weight", "0.weight", "0.bias", "1.bias"]
    state = optimizer.state_dict()
    named = by_name(state, names)
    assert torch.equal(named["state"]["1.weight"]["exp_avg"], optimizer.state[model[1].weight]["exp_avg"])
    assert [group["params"] for group in named["param_groups"]] == [names[:2], names[2:]]
    assert by_number(named, names) == state


def test_an_engine_that_would_not_do_what_the_arguments_say_is_refused(tmp_path):
    settings = arguments(tmp_path)
    settings.fsdp = True
    with pytest.raises(UserError, match="this training has one") as caught:
        check_cut(tiny_llama(), settings)
    kinds = [
        ("DDP on a CPU", {"distributed_type": DistributedType.MULTI_CPU}, "own whole copy"),
        ("FSDP 1", {"distributed_type": DistributedType.FSDP, "is_fsdp2": False}, "first version"),
        (
            "heads in parts",
            {"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1, sp_size=1)},
            r"\[2, 1, 1\]",
        ),
    ]
    fine = {"distributed_type": DistributedType.FSDP, "is_fsdp2": True, "parallelism_config": None}
    check_engine(SimpleNamespace(**fine), settings)
    for name, other, words in kinds:
        with naming(name), pytest.raises(UserError, match=words) as caught:
            check_engine(SimpleNamespace(**{**fine, **other}), settings)
        assert caught.value.code == "unsupported-parallelism"


def test_a_config_of_deepspeed_without_clipping_clips_as_the_arguments_say(tmp_path):
    for written, clipped in (
        ({}, 0.5),
        ({"gradient_clipping": "auto"}, 0.5),
        ({"gradient_clipping": 2.0}, 2.0),
    ):
        config = {"zero_optimization": {"stage": 3}, **written}
        plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
        accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
        complete_deepspeed(accelerator, arguments(tmp_path, max_grad_norm=0.5))
        assert config["gradient_clipping"] == clipped
