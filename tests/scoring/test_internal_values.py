"""Values read inside a model, against the whole logits, attentions and states that transformers returns."""

import pytest
import torch

from tests.tiny import save_tiny, tiny_gpt2, tiny_llama
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.ops.representation import activation_mask
from tokenward.scoring.basic import Activation, Attention, Similarity
from tokenward.scoring.model_scorers import internal_values
from tokenward.scoring.reads import value_of

ROWS = [encoded([1, 2, 3], [4, 5, 9], [6, 7]), encoded([9], [10], [12, 13, 14, 15])]
TEXTS = [(row.prompt, ids) for row in ROWS for ids in row.responses]
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("internal") / request.param, MODELS[request.param]()))


def values(folder, value, *, attention="sdpa", tokens=64) -> list[torch.Tensor]:
    model = load_model(folder, device="cpu", attention=attention)
    rows = internal_values(model, ROWS, value, precision="float32", tokens_per_batch=tokens)
    return [response for row in rows for response in row]


def outputs(folder, attention="sdpa", **settings):
    """One text after another through the plain model: (prompt length, response, output)."""
    model = load_model(folder, device="cpu", attention=attention).model
    for prompt, ids in TEXTS:
        with torch.no_grad():
            yield len(prompt), ids, model(input_ids=torch.tensor([prompt + ids]), **settings)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_entropy_and_rank_are_those_of_all_logits(folder, tokens):
    entropy, rank = (
        values(folder, value_of(f"reference_{kind}"), tokens=tokens) for kind in ("entropy", "rank")
    )
    for place, (before, ids, output) in enumerate(outputs(folder)):
        logp = output.logits[0, before - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(entropy[place], -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)
        chosen = logp.gather(-1, torch.tensor(ids)[:, None])
        assert rank[place].tolist() == (logp > chosen).sum(-1).tolist()


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("tokens", [1, 1000])
def test_attention_is_the_mean_over_heads_and_later_positions(folder, layer, tokens):
    """And not ``1 / t`` everywhere, as in XTF's released code."""
    received = values(folder, Attention(layer=layer).reads[0], attention="eager", tokens=tokens)
    for place, (before, _, output) in enumerate(outputs(folder, "eager", output_attentions=True)):
        weights = output.attentions[layer][0].mean(0)
        expected = torch.stack([weights[at:, at].mean() for at in range(before, len(weights))])
        torch.testing.assert_close(received[place], expected, atol=1e-6, rtol=0)
        assert len(expected) < 3 or float(expected.std()) > 1e-3


@pytest.mark.parametrize(
    ("layer", "attention", "code"), [(2, "eager", "out-of-range"), (0, "sdpa", "unsupported-model")]
)
def test_a_missing_layer_and_attention_without_weights_are_refused(folder, layer, attention, code):
    with pytest.raises(UserError) as caught:
        values(folder, Attention(layer=layer).reads[0], attention=attention)
    assert caught.value.code == code


def test_similarity_is_the_cosine_with_the_mean_of_the_words_vectors(folder):
    similarity = values(folder, Similarity(("good", "the a")).reads[0])
    model = load_model(folder, device="cpu")
    table = model.model.get_input_embeddings().weight.detach()
    words = [table[model.tokenizer(word)["input_ids"]].mean(0) for word in ("good", "the a")]
    middle = (words[0] + words[1]) / 2
    for response, (_, ids) in zip(similarity, TEXTS, strict=True):
        expected = torch.cosine_similarity(table[ids], middle[None], dim=-1)
        torch.testing.assert_close(response, expected, atol=1e-6, rtol=0)
    alone = values(folder, Similarity(("good",), space="alone").reads[0])
    with torch.no_grad():
        states = [
            model.model(input_ids=torch.tensor([[token]]), output_hidden_states=True).hidden_states[-1][0, 0]
            for token in (model.tokenizer("good")["input_ids"][0], TEXTS[0][1][2])
        ]
    assert float(alone[0][2]) == pytest.approx(float(torch.cosine_similarity(*states, dim=0)), abs=1e-5)


def test_activation_is_made_of_mlps_attention_layers_and_logits(folder):
    activation = values(folder, Activation().reads[0])
    for one, other in zip(activation, values(folder, Activation().reads[0], tokens=1), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    model = load_model(folder, device="cpu").model
    inner = model.model if hasattr(model, "model") else model.transformer
    layers = inner.layers if hasattr(inner, "layers") else inner.h
    prompt, ids = TEXTS[-1]
    kept = {}
    for number, layer in enumerate(layers):
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
        for kind, module in (("mlp", layer.mlp), ("attention", attention), ("layer", layer)):
            module.register_forward_hook(lambda m, i, o, key=(kind, number): kept.update({key: o}))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits
    where = slice(len(prompt) - 1, -1)
    kinds = []
    for kind in ("mlp", "attention", "layer"):
        parts = [kept[kind, number] for number in range(len(layers))]
        tensors = [part if isinstance(part, torch.Tensor) else part[0] for part in parts]
        kinds.append(torch.stack([part[0, where].mean(-1) for part in tensors]))
    kinds.append(logits[0, where].mean(-1)[None])
    expected = activation_mask(kinds, torch.zeros(len(ids), dtype=torch.long), 1)
    torch.testing.assert_close(activation[-1], expected, atol=1e-4, rtol=0)
