"""Token reward models on tiny backbones, and rewards computed plainly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tokenward.models.reward import RewardModel, RewardSettings, TokenRewardModule
from tokenward.tokens.rows import Layout, TokenRow

# The published start gives nearly equal rewards; with these settings they differ.
LIVELY = {"hidden": 8, "gain": 0.5, "bias": 0.1}


def _t5_body(**settings):
    model = tiny_t5(**settings)
    # T5Model is T5ForConditionalGeneration without the head.
    from transformers import T5Model

    body = T5Model(model.config).to(model.dtype)
    body.load_state_dict(model.state_dict(), strict=False)
    return body


BODIES: dict[str, Callable[..., torch.nn.Module]] = {
    "gpt2": lambda **settings: tiny_gpt2(**settings).transformer,
    "llama": lambda **settings: tiny_llama(**settings).model,
    "t5": _t5_body,
}


def reward_model(name: str, layout: Layout, *, dtype: torch.dtype = torch.float32, **settings) -> RewardModel:
    """A reward model on a tiny backbone, as from ``new_reward_model`` but without folder and probe."""
    body = BODIES[name](dtype=dtype)
    torch.manual_seed(3)
    module = TokenRewardModule(body, RewardSettings(**{**LIVELY, **settings})).to(dtype).eval()
    start = body.config.decoder_start_token_id if body.config.is_encoder_decoder else None
    return RewardModel(
        model=module, tokenizer=tiny_tokenizer(), layout=layout, fingerprint="", name="tiny", start_id=start
    )


def plain_rewards(model: RewardModel, rows: Sequence[TokenRow]) -> Tensor:
    """Reward of every response token from the hidden state after it, one response at a time.  -> [n]"""
    module = model.model
    parts = []
    for row in rows:
        for response in row.responses:
            if model.start_id is None:
                states = module.backbone(input_ids=torch.tensor([row.prompt + response])).last_hidden_state[0]
            else:
                states = module.backbone(
                    input_ids=torch.tensor([row.prompt]),
                    decoder_input_ids=torch.tensor([[model.start_id, *response]]),
                ).last_hidden_state[0]
            parts.append(module.settings.bounded(module.head(states[-len(response) :])[:, 0]))
    return torch.cat(parts)
