"""Law 3 for every cut at once: packed rows, tiled head, nothing after the last needed token.

The step's loss and every gradient against plain transformers calls with all logits, for models of several
kinds, with an adapter, inside DDP, with gradient checkpointing and with torch.compile.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.models.plain import plain_logprobs
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.training.tools import language_model, random_rows
from tokenward.models.attention import install_tree_attention
from tokenward.models.head import install_head
from tokenward.objectives import SePO
from tokenward.tokens.batches import collate
from tokenward.training.checks import disable_dropout


def tiny_qwen2(*, dtype=torch.float32):
    """Two layers of 32 with biases on queries, keys and values, and a head of its own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    for parameter in model.parameters():  # biases begin at 0, and would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    install_tree_attention(model)
    return model


MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2}
# Norms of Llama and Qwen compute in float32 whatever the weights' type; see tests/models/test_forward.py.
SLOPES = {"llama": 1e-5, "qwen2": 1e-5, "gpt2": 1e-10}


def selected_rows():
    """Pairs, some of which begin alike, with about a third of the tokens selected."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, row in enumerate(random_rows(6, longest=15)):
        first, second = row.responses
        if number % 2:
            row = replace(row, responses=[first[:3] + first, first[:3] + second])
        weights = []
        for ids in row.responses:
            kept = torch.rand(len(ids), generator=generator) < 0.3
            kept[0] |= not kept.any()
            weights.append(kept.float())
        rows.append(replace(row, weights=weights))
    return rows


def plain_loss(model, rows):
    batch = collate(rows, layout="separate", pad_id=0)
    logp = plain_logprobs(model, list(rows))
    return SePO()(logp, batch.tokens).loss.mean()


def cut_loss(model, module, rows):
    values, batch = model.read(module, model.collate(rows))
    return SePO()(values, batch).loss.mean()


def slopes(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def check(name, model, module=None):
    rows = selected_rows()
    assert (
        model.collate(rows).inputs.input_ids.numel()
        < 0.7 * collate(rows, layout="separate", pad_id=0).inputs.input_ids.numel()
    )
    expected = plain_loss(model.model, rows)
    expected_slopes = slopes(model.model, expected)
    found = cut_loss(model, model.model if module is None else module, rows)
    assert expected_slopes
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found_slopes = slopes(model.model, found)
    assert found_slopes.keys() == expected_slopes.keys()
    for key, slope in expected_slopes.items():
        within = SLOPES[name] * float(slope.abs().max()) + 1e-12
        torch.testing.assert_close(found_slopes[key], slope, rtol=0, atol=within)


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def model_of(name):
    return language_model(MODELS[name](dtype=torch.float64))


def adapted(model, targets, **settings):
    """The model with an adapter that changes its output from the start."""
    torch.manual_seed(2)
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    inside = get_peft_model(model.model, lora)
    return replace(model, model=inside, head=install_head(inside))


def test_the_plain_model(name):
    check(name, model_of(name))


def test_with_an_adapter(name):
    check(name, adapted(model_of(name), "all-linear", fan_in_fan_out=name == "gpt2"))


def test_with_an_adapter_on_the_head_too():
    """Such a head is no matrix product any more, and goes through the chunked path."""
    model = adapted(model_of("qwen2"), ["q_proj", "lm_head"])
    assert model.head.linear is None
    check("qwen2", model)


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_inside_ddp(name, alone):
    model = model_of(name)
    check(name, model, DistributedDataParallel(model.model))


def test_with_gradient_checkpointing(name):
    model = model_of(name)
    disable_dropout(model.model)
    model.model.activation_checkpointing_enable()
    model.model.train()
    check(name, model)


# The tracer looks at every tensor it meets.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled():
    """Graphs as torch.compile cuts them; aot_eager runs them without a C++ compiler. One layer has every kind of cut."""
    model = language_model(tiny_llama(dtype=torch.float64, num_hidden_layers=1))
    torch.compiler.reset()
    check("llama", model, torch.compile(model.model, backend="aot_eager", dynamic=True))
