"""A T5: the numbers of plain teacher forcing, the greedy replies of transformers, and learning to copy."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import save_tiny, tiny_t5, tiny_tokenizer
from tests.tokens.rows import encoded
from tests.training.tools import arguments
from tokenward.errors import UserError
from tokenward.models.forward import token_statistics
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel, load_model
from tokenward.objectives import SFT, WeightedLikelihood
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.scoring.reads import token_values
from tokenward.tokens.batches import Needs
from tokenward.tokens.rows import TokenRow
from tokenward.training.trainer import TokenTrainer

EOS = tiny_tokenizer().eos_token_id
START = EOS  # T5 starts its decoder with the pad token, which is the end-of-turn token in these tests
ids = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(5)).tolist()
ROWS = [
    encoded(ids[:9], ids[9:13], ids[13:20]),
    encoded(ids[20:23], [*ids[23:24], EOS], ids[24:29], ids[29:31]),
    encoded(ids[31:45], ids[45:50], ids[50:60]),
]
TOTAL = sum(len(response) for row in ROWS for response in row.responses)
FACTORS = torch.randn(TOTAL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def language_model(dtype=torch.float32, *, head=True) -> LanguageModel:
    model = tiny_t5(dtype=dtype).eval()
    return LanguageModel(
        model=model, tokenizer=tiny_tokenizer(), head=SelectiveHead(model.lm_head) if head else None,
        layout="encoder_decoder", fingerprint="", name="tiny t5", start_id=START,
    )  # fmt: skip


def plain_statistics(model, rows):
    """Log-probabilities and entropies by transformers alone.  -> [n], [n]"""
    pairs = [(row.prompt, response) for row in rows for response in row.responses]
    logits = [
        model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[START, *response[:-1]]])
        ).logits[0]
        for prompt, response in pairs
    ]
    logp = torch.cat(logits).log_softmax(-1)
    tokens = torch.tensor([token for _, response in pairs for token in response])
    return logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def slopes_of(model, values, factors):
    model.zero_grad()
    (values * factors).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("head", [True, False])
def test_statistics_are_those_of_plain_teacher_forcing(head):
    policy = language_model(torch.float64, head=head)
    logp, entropy = plain_statistics(policy.model, ROWS)
    both = torch.cat((FACTORS, FACTORS.flip(0)))
    expected = slopes_of(policy.model, torch.cat((logp, entropy)), both)
    found = token_statistics(policy.model, policy.head, policy.collate(list(ROWS)), Needs(entropy=True))
    # The norms of T5 are in float32 whatever the dtype of its weights.
    torch.testing.assert_close(found["logp"], logp, rtol=0, atol=2e-6)
    torch.testing.assert_close(found["entropy"], entropy, rtol=0, atol=2e-6)
    assert logp.std() > 0.5
    mine = slopes_of(policy.model, torch.cat((found["logp"], found["entropy"])), both)
    largest = max(float(slope.abs().max()) for slope in expected.values())
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 * largest)


def test_loading_and_saving(tmp_path):
    folder = str(save_tiny(tmp_path / "a", tiny_t5()))
    policy = load_model(folder, device="cpu")
    assert (policy.layout, policy.start_id) == ("encoder_decoder", START)
    assert policy.head is not None
    values = token_values(policy, list(ROWS), precision="float32", tokens_per_batch=64)
    found = torch.cat([part for row in values for part in row])
    torch.testing.assert_close(found, plain_statistics(policy.model, ROWS)[0].detach(), rtol=0, atol=1e-4)
    with torch.no_grad():
        policy.model.shared.weight.add_(0.01)
    policy.save(tmp_path / "b")
    again = load_model(str(tmp_path / "b"), device="cpu")
    after = again.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in policy.model.state_dict().items())
    assert again.model.lm_head.weight is again.model.shared.weight
    with pytest.raises(UserError) as error:
        load_model(folder, device="cpu", packing="shared_prompts")
    assert error.value.code == "unsupported-packing"


PROMPTS = [ids[:4], ids[4:20], ids[20:21], ids[30:39], ids[40:60]]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_greedy_replies_are_those_of_transformers_one_prompt_at_a_time(batch):
    policy = language_model()
    settings = SamplingSettings(max_new_tokens=9, temperature=0.0, batch=batch)
    replies = sample_replies(policy, policy.template("plain"), PROMPTS, settings, seed=0)
    plain = tiny_t5().eval()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=9, eos_token_id=EOS, pad_token_id=EOS, decoder_start_token_id=START
    )
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        row = plain.generate(torch.tensor([prompt]), generation_config=config)[0, 1:].tolist()
        assert (reply.ids, reply.ended) == (row, EOS in row)
    assert len({tuple(reply.ids) for reply in replies}) > 1


def test_reply_does_not_begin_with_the_decoder_start():
    """Start, pad and end are one id here: a reply that began with the start would end at once."""
    policy = language_model()
    settings = SamplingSettings(max_new_tokens=6, fixed_length=True)
    template = policy.template("plain")
    replies = sample_replies(policy, template, PROMPTS * 4, settings, seed=0)
    assert {len(reply.ids) for reply in replies} == {6}
    assert not any(token in template.special_ids for reply in replies for token in reply.ids)
    assert template.encoder
    assert template.eos_ids == [EOS]
    assert template.fingerprint != replace(template, encoder=False).fingerprint


def copy_rows(count: int, seed: int) -> list[TokenRow]:
    """Three of six letters, to be copied."""
    rng = random.Random(seed)
    letters = [[rng.randrange(6) for _ in range(3)] for _ in range(count)]
    return [encoded(some, [*some, EOS], ranks=(0,)) for some in letters]


def mean_logp(policy, rows):
    values = token_values(policy, rows, precision="float32", tokens_per_batch=4096)
    return float(torch.cat([row[0] for row in values]).mean())


def test_it_learns_to_copy(tmp_path):
    """This needs encoder states in the decoder: without them, a letter can be guessed with probability 1/6."""
    policy, eval_rows = language_model(), copy_rows(40, seed=1)
    before = mean_logp(policy, eval_rows)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 120, "logging_steps": 1000}
    settings |= {"per_device_train_batch_size": 32, "max_grad_norm": 1.0}
    rows = copy_rows(400, seed=0)
    TokenTrainer(policy, WeightedLikelihood(), arguments(tmp_path, **settings), rows).train()
    policy.model.eval()
    after = mean_logp(policy, eval_rows)
    # log(1/6) for each of three letters and 0 for the end is the best without the prompt.
    blind = 0.75 * -1.79
    assert before < -3
    assert after > blind / 2, (before, after)


def test_adapter_trains_and_is_loaded_again(tmp_path):
    base = load_model(str(save_tiny(tmp_path / "base", tiny_t5())), device="cpu")
    policy = base.with_adapter({"r": 2, "target_modules": ["q", "v"]})
    assert policy.model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    rows = copy_rows(16, seed=0)
    before = mean_logp(policy, rows)
    settings = {"optim": "adamw_torch", "learning_rate": 3e-2, "max_steps": 10}
    TokenTrainer(policy, SFT(), arguments(tmp_path / "t", **settings), rows).train()
    policy.model.eval()
    trained = mean_logp(policy, rows)
    assert trained > before + 0.1
    policy.save(tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"), device="cpu")
    assert mean_logp(again, rows) == pytest.approx(trained, abs=1e-5)
