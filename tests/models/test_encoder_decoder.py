"""A T5: the same numbers as plain teacher forcing, its own greedy replies, and training that learns a copy task."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import save_tiny, tiny_t5, tiny_tokenizer
from tests.tokens.rows import encoded
from tests.training.tools import arguments
from tokenward.errors import UserError
from tokenward.models.forward import token_kl, token_statistics
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel, load_model
from tokenward.objectives import SFT, Reinforce, WeightedLikelihood
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.scoring.reads import token_values
from tokenward.tokens.batches import Needs
from tokenward.tokens.rows import TokenRow
from tokenward.training.trainer import TokenTrainer

EOS = tiny_tokenizer().eos_token_id
START = EOS  # T5 starts its decoder with the pad, and the tests' pad is the end-of-turn token
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


def plain_logits(model, prompt, response):
    """Logits that predict each token of one response, by transformers alone.  -> [len v]"""
    decoder = torch.tensor([[START, *response[:-1]]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]


def plain_statistics(model, rows):
    pairs = [(row.prompt, response) for row in rows for response in row.responses]
    logp = torch.cat([plain_logits(model, *pair) for pair in pairs]).log_softmax(-1)
    tokens = torch.tensor([token for _, response in pairs for token in response])
    return logp.gather(-1, tokens[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def slopes_of(model, values, factors):
    model.zero_grad()
    (values * factors).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("head", [True, False])
def test_log_probabilities_and_entropy_are_those_of_plain_teacher_forcing(head):
    policy = language_model(torch.float64, head=head)
    logp, entropy = plain_statistics(policy.model, ROWS)
    both = torch.cat((FACTORS, FACTORS.flip(0)))
    expected = slopes_of(policy.model, torch.cat((logp, entropy)), both)
    batch = policy.collate(list(ROWS))
    found = token_statistics(policy.model, policy.head, batch, Needs(entropy=True))
    # The norms of T5 are in float32 whatever its weights are.
    torch.testing.assert_close(found["logp"], logp, rtol=0, atol=2e-6)
    torch.testing.assert_close(found["entropy"], entropy, rtol=0, atol=2e-6)
    assert logp.std() > 0.5
    mine = slopes_of(policy.model, torch.cat((found["logp"], found["entropy"])), both)
    largest = max(float(slope.abs().max()) for slope in expected.values())
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5 * largest)


def test_the_first_token_is_predicted_by_the_decoders_start_alone():
    policy = language_model()
    first = plain_logits(policy.model, [5, 6, 7], [9]).log_softmax(-1)[0, 9]
    row = encoded([5, 6, 7], [9, 10, 11], [9])
    found = token_values(policy, [row], precision="float32", tokens_per_batch=4096)[0]
    assert float(found[0][0]) == pytest.approx(float(first.detach()), abs=1e-5)
    assert float(found[1][0]) == pytest.approx(float(first.detach()), abs=1e-5)


def test_loading_finds_the_layout_and_the_start(tmp_path):
    folder = str(save_tiny(tmp_path, tiny_t5()))
    policy = load_model(folder, device="cpu")
    assert (policy.layout, policy.start_id) == ("encoder_decoder", START)
    assert policy.head is not None
    values = token_values(policy, list(ROWS), precision="float32", tokens_per_batch=64)
    expected, _ = plain_statistics(policy.model, ROWS)
    torch.testing.assert_close(
        torch.cat([part for row in values for part in row]), expected.detach(), rtol=0, atol=1e-4
    )
    with pytest.raises(UserError, match=r"packing is shared_prompts, but .* has an encoder"):
        load_model(folder, device="cpu", packing="shared_prompts")


def test_what_is_saved_is_loaded_again(tmp_path):
    policy = load_model(str(save_tiny(tmp_path / "a", tiny_t5())), device="cpu")
    with torch.no_grad():
        policy.model.shared.weight.add_(0.01)
    policy.save(tmp_path / "b")
    again = load_model(str(tmp_path / "b"), device="cpu")
    before, after = policy.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.model.lm_head.weight is again.model.shared.weight


def test_divergence_from_itself_is_zero_and_from_another_that_of_all_logits():
    policy, other = language_model(torch.float64), tiny_t5(dtype=torch.float64, seed=1).eval()
    batch = policy.collate(list(ROWS))
    pairs = [(row.prompt, response) for row in ROWS for response in row.responses]
    with torch.no_grad():
        mine, theirs = (
            torch.cat([plain_logits(model, *pair) for pair in pairs]).log_softmax(-1)
            for model in (policy.model, other)
        )
    head = SelectiveHead(other.lm_head)
    found = token_kl(policy.model, policy.head, other, head, batch)
    torch.testing.assert_close(found, (mine.exp() * (mine - theirs)).sum(-1), rtol=0, atol=1e-5)
    assert float(token_kl(policy.model, policy.head, policy.model, policy.head, batch).abs().max()) == 0


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
        assert reply.ids == row
        assert reply.ended == (EOS in row)
    assert len({tuple(reply.ids) for reply in replies}) > 1


def test_a_reply_does_not_begin_with_the_decoders_start():
    """Start, pad and end are one id here: a reply that began with the start would be over at once."""
    policy = language_model()
    settings = SamplingSettings(max_new_tokens=6, fixed_length=True)
    replies = sample_replies(policy, policy.template("plain"), PROMPTS * 4, settings, seed=0)
    assert {len(reply.ids) for reply in replies} == {6}
    assert not any(token in policy.template("plain").special_ids for r in replies for token in r.ids)


def test_the_template_keeps_the_encoders_end_and_writes_no_joint_text():
    policy = language_model()
    template = policy.template("plain")
    assert template.encoder
    assert template.eos_ids == [EOS]
    assert template.fingerprint != replace(template, encoder=False).fingerprint


def copy_rows(count: int, seed: int) -> list[TokenRow]:
    """Three of six letters, to be written again."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        letters = [rng.randrange(6) for _ in range(3)]
        rows.append(encoded(letters, [*letters, EOS], ranks=(0,)))
    return rows


def mean_logp(policy, rows):
    values = token_values(policy, rows, precision="float32", tokens_per_batch=4096)
    return float(torch.cat([row[0] for row in values]).mean())


def test_it_learns_to_copy(tmp_path):
    """Only an encoder whose states reach the decoder can: the letters cannot be guessed better than 1 in 6."""
    policy = language_model()
    eval_rows = copy_rows(40, seed=1)
    before = mean_logp(policy, eval_rows)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 120, "logging_steps": 1000}
    settings |= {"per_device_train_batch_size": 32, "max_grad_norm": 1.0}
    TokenTrainer(
        policy, WeightedLikelihood(), arguments(tmp_path, **settings), copy_rows(400, seed=0)
    ).train()
    policy.model.eval()
    after = mean_logp(policy, eval_rows)
    # log(1/6) for each of three letters, and the end for nothing, is what not looking at the prompt gives.
    blind = 0.75 * -1.79
    assert before < -3
    assert after > blind / 2, (before, after)


def test_token_weights_choose_what_it_learns(tmp_path):
    """Letters of weight 0 may stay as unlikely as they were."""

    def logps(policy, rows):
        values = token_values(policy, rows, precision="float32", tokens_per_batch=4096)
        return torch.stack([row[0] for row in values]).mean(0)

    rows = copy_rows(60, seed=0)
    first = [replace(row, weights=[torch.tensor([1.0, 0.0, 0.0, 0.0])]) for row in rows]
    policy = language_model()
    before = logps(policy, rows)
    assert logps(policy, first).tolist() == [pytest.approx(float(before[0])), 0, 0, 0], "not even read"
    settings = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": 20}
    TokenTrainer(policy, WeightedLikelihood(), arguments(tmp_path, **settings), first).train()
    policy.model.eval()
    gain = logps(policy, rows) - before
    assert float(gain[0]) > 1
    assert float(gain[3]) < float(gain[0]) / 2


def test_reinforce_trains_on_its_own_samples(tmp_path):
    """A reward for one token: after a few updates the policy writes it far more often."""
    policy = language_model()
    template, settings = policy.template("plain"), SamplingSettings(max_new_tokens=2, fixed_length=True)
    wanted = 7

    def sampled(rows, step):
        replies = sample_replies(policy, template, [row.prompt for row in rows] * 16, settings, seed=step)
        item = encoded(rows[0].prompt, *[reply.ids for reply in replies])
        rewards = [torch.tensor([float(token == wanted) for token in reply.ids]) for reply in replies]
        return [replace(item, scores=rewards)]

    row = encoded([1, 2, 3])
    table = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 40}
    trainer = TokenTrainer(
        policy, Reinforce(entropy=0.01, baseline="mean"),
        arguments(tmp_path, **table), [row], prepare=sampled,
    )  # fmt: skip
    before = plain_logits(policy.model, [1, 2, 3], [0]).softmax(-1)[0, wanted].detach()
    trainer.train()
    policy.model.eval()
    after = plain_logits(policy.model, [1, 2, 3], [0]).softmax(-1)[0, wanted].detach()
    assert float(before) < 0.05
    assert float(after) > 0.5


def test_an_adapter_on_it_trains_and_is_loaded_again(tmp_path):
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
