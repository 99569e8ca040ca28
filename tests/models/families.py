"""Small random models of every family of transformers with a tiny config, and the table of what the probe decides.

``python -m tests.models.families`` writes the table of docs/models.md.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models.plain import token_logprobs
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models.head import SelectiveHead
from tokenward.models.probe import choose_head, choose_layout
from tokenward.tokens.batches import collate
from tokenward.tokens.rows import Layout

VOCABULARY = 266
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "embedding_size": 32, "d_model": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 8,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "is_decoder": True,
    "sliding_window": 8, "attention_window_size": 8, "use_cache": False,
    # Auxiliary models.
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_mem_heads": 2,
    # Latent and sparse attention.
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64, "keep_window_size": 8,
    # Recurrence.
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 8, "mamba_d_ssm": 64, "mamba_dt_rank": 4, "state_size": 8,
    "conv_kernel": 4, "expand": 2, "time_step_rank": 4, "num_heads": 8, "n_groups": 1, "chunk_size": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "lru_width": 32,
    # Decoders that have an encoder elsewhere.
    "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
}  # fmt: skip
SETTINGS = {
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
}
"""Settings whose defaults would have no effect at this size."""

SHARED = [
    "apertus", "arcee", "aria_text", "axk1", "bert", "bert-generation", "biogpt", "bitnet", "cohere", "ctrl",
    "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "electra", "ernie", "ernie4_5", "ernie4_5_moe",
    "flex_olmo", "gemma", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox",
    "granite", "granitemoe", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "hy_v3", "hyperclovax", "jais2", "laguna", "llama", "mellum", "minicpm3", "minimax_m2", "ministral3",
    "mixtral", "nanochat", "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "whisper", "youtu",
]  # fmt: skip
SEPARATE = [
    "afmoe", "axk2", "bailing_hybrid", "bamba", "bart", "beam", "big_bird", "bigbird_pegasus", "blenderbot",
    "blenderbot-small", "bloom", "camembert", "codegen", "cohere2", "cohere2_moe", "cwm", "data2vec-text",
    "deepseek_v32", "deepseek_v4", "doge", "dots3_note_text", "exaone4", "exaone_moe", "falcon", "falcon_h1",
    "falcon_mamba", "flint", "gemma2", "gemma3", "gemma4_unified", "glm_moe_dsa", "gpt_neo",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "granitemoehybrid", "hy_v4",
    "inkling2_text", "inkling_text", "jamba", "jetmoe", "kolibri1", "lfm2", "lfm2_moe", "lfm3", "llama4",
    "mamba", "mamba2", "marian", "mbart", "megatron-bert", "mimo_v2_flash", "minimax", "minimax_m3_vl_text",
    "ministral", "mistral", "modernbert-decoder", "mpt", "mvp", "nemotron", "nemotron_h", "olmo3",
    "olmo_hybrid", "openai-gpt", "pegasus", "plbart", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "qwen4_exp", "recurrent_gemma", "rembert", "roberta", "roberta-prelayernorm", "roformer", "rwkv",
    "stablelm", "trocr", "vaultgemma", "xglm", "xlm-roberta", "xlm-roberta-xl", "xlstm", "zaya",
]  # fmt: skip
REFUSED = ["cpmant", "prophetnet", "xlm"]
FAMILIES = sorted([*SHARED, *SEPARATE, *REFUSED])
"""By the correct layout at this size, with a window of 8 if there is one."""
FLOAT32_ONLY = ("inkling2_text", "xlstm")
"""Families that transformers cannot run in bfloat16 here."""
CHANGES = {
    "beam": "cap 30", "cohere": "times 0.25", "cohere2": "times 0.0625", "cohere2_moe": "times 0.0625",
    "falcon_h1": "times 0.4", "gemma2": "cap 2", "granite": "over 4", "inkling2_text": "cap 30", "nanochat": "cap 15",
    "recurrent_gemma": "cap 30", "vaultgemma": "cap 30", "xlstm": "cap 30",
}  # fmt: skip
"""How a family changes the output of its head."""

_ids = torch.randint(5, VOCABULARY, (70,), generator=torch.Generator().manual_seed(5)).tolist()
ROWS = [
    encoded(_ids[:11], _ids[11:19], _ids[19:22], _ids[22:28]),
    encoded(_ids[30:34], _ids[34:36], _ids[36:45]),
]


class Measured(NamedTuple):
    """Decisions for a model, and differences to plain calls of transformers with one response each."""

    layout: str  # or ``refused``
    head: str  # ``linear`` with the change of its logits, ``all logits``, or why the model is refused
    head_by: float = (
        0.0  # largest difference of a log-probability between the head and all logits in the same rows
    )
    by: float = 0.0  # the same to plain calls
    slope: float = 0.0  # largest difference of a gradient to plain calls, relative to the largest gradient


def tiny(family: str, *, dtype: torch.dtype = torch.float32, lively: bool = True) -> PreTrainedModel:
    """A small model of a family, with weights as large as in a trained model unless ``lively`` is False."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(family)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters() if lively else ():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 if parameter.dim() > 1 else parameter.data + noise * 0.1
    return model.to(dtype)


def _config(family: str):
    kind = type(CONFIG_MAPPING[family]().get_text_config())
    known = set(kind().to_dict()) | set(kind.attribute_map)
    # A name and its alias would set the same value twice.
    aliases = {alias for alias, name in kind.attribute_map.items() if name in SIZES and alias in SIZES}
    settings = {name: value for name, value in SIZES.items() if name in known - aliases}
    if getattr(kind(), "sliding_window", None) is None:
        settings.pop("sliding_window", None)
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = SIZES["num_attention_heads"]
    return kind(**settings | SETTINGS.get(family, {}))


def measured(model: PreTrainedModel) -> Measured:
    """Probe a model and measure the results of its fast paths."""
    expected, slopes = _with_gradient(model, _plain(model))
    try:
        layout = choose_layout(model, packing="auto", name="it")
    except UserError as error:
        return Measured("refused", str(error).split(":")[0])
    whole, _ = _with_gradient(model, _read(model, None, layout))
    head = choose_head(model, name="it")
    found, found_slopes = _with_gradient(model, _read(model, head, layout))
    return Measured(
        layout,
        _title(head),
        float((found - whole).abs().max()),
        float((found - expected).abs().max()),
        _apart(found_slopes, slopes),
    )


def _title(head: SelectiveHead | None) -> str:
    if head is None:
        return "all logits"
    steps = ", ".join(f"{step.kind} {step.number:g}" for step in head.change.steps)
    return ("linear" if head.linear is not None else "its own") + (f", {steps}" if steps else "")


def _read(model: PreTrainedModel, head: SelectiveHead | None, layout: Layout) -> Tensor:
    batch = collate(list(ROWS), layout=layout, pad_id=0, whole=False)
    return token_logprobs(model, head, batch)


def _plain(model: PreTrainedModel) -> Tensor:
    parts = []
    for row in ROWS:
        for response in row.responses:
            ids = torch.tensor([row.prompt + response])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1].float()
            parts.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(parts)


def _with_gradient(model: PreTrainedModel, logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    (logp * torch.arange(len(logp)).cos()).sum().backward()
    return logp.detach(), {
        name: item.grad.float() for name, item in model.named_parameters() if item.grad is not None
    }


def _apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    largest = max(float(item.abs().max()) for item in expected.values())
    none = torch.zeros(())
    return (
        max(float((found.get(n, none) - expected.get(n, none)).abs().max()) for n in {**found, **expected})
        / largest
    )


def table(families: list[str]) -> Iterator[str]:
    """Lines of the table in docs/models.md."""
    yield "| family | rows | head | of all logits | float32 | gradient | bfloat16 | gradient |"
    yield "|---|---|---|---|---|---|---|---|"
    for family in families:
        wide = measured(tiny(family))
        types = [wide] if family in FLOAT32_ONLY else [wide, measured(tiny(family, dtype=torch.bfloat16))]
        assert {item[:2] for item in types} == {wide[:2]}, family
        figures = [_figure(max(item.head_by for item in types))]
        figures += [_figure(value) for item in types for value in (item.by, item.slope)]
        figures = [""] * 5 if wide.layout == "refused" else figures + ["", ""] * (2 - len(types))
        yield f"| {family} | {wide.layout} | {wide.head} | " + " | ".join(figures) + " |"


def _figure(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def main() -> None:
    """Replace the table in docs/models.md."""
    lines = "\n".join(table(FAMILIES))
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n\n{lines}\n\n{END}{rest.partition(END)[2]}")


PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- families -->", "<!-- end of families -->"

if __name__ == "__main__":
    main()
