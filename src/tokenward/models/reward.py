"""The token reward model: a transformer with one scalar per token.

TLM (arXiv 2306.00398), section 3.1: ``r_phi(s_t, a_t)`` is read at the hidden state after the token ``a_t``, so it depends on
the prompt and the tokens up to and including ``a_t``, never on later ones. Training and inference use the same input layout;
the published code does not (tlm.md B2).
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenward.artifacts import read_json, user_path, write_json
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.forward import FrozenReference, run_model
from tokenward.models.head_mlp import PUBLISHED_BIAS, init_linear, mlp, save_weights
from tokenward.models.identity import model_fingerprint
from tokenward.models.loading import AUTO, check_finite, load_backbone, load_tokenizer
from tokenward.models.probe import Packing, reward_layout
from tokenward.models.sharding import weights_within
from tokenward.ops.transforms import bound_sigmoid, bound_softplus
from tokenward.plugins import validated
from tokenward.tokens.batches import NOTHING, Batch, Needs, TokenBatch
from tokenward.tokens.segments import Unit

SETTINGS_FILE = "token_reward.json"
HEAD_FILE = "token_reward_head.safetensors"


@dataclass(frozen=True, slots=True)
@validated
class RewardSettings:
    """Settings of the head of a token reward model.

    Attributes:
        hidden: Width of the head's hidden layer; None for a single linear layer.
        gain: Gain of the Xavier-uniform initialization.
        bias: Initial value of the biases; None as in :func:`tokenward.models.head_mlp.mlp`.
        bound: ``softplus`` (as published; its range is ``low`` to ``low + softplus(high - low)``, 0 to 1.3133 by default),
            ``sigmoid`` (``low`` to ``high``) or ``none``.
        low: Lower end of the range.
        high: Upper end of the range.
        exact_range: Rescale softplus to the range ``low`` to ``high``.
        unit: What gets one reward: a ``token``, a ``word``, a ``sentence``, or the ``spans`` of the data.
        freeze: Train only the head.
    """

    _: KW_ONLY
    hidden: int | None = 2048
    gain: float = 1e-4
    bias: float | None = None
    bound: Literal["softplus", "sigmoid", "none"] = "softplus"
    low: float = 1e-8
    high: float = 1.0
    exact_range: bool = False
    unit: Unit = "token"
    freeze: bool = False

    def __post_init__(self) -> None:
        if not self.high > self.low:
            raise UserError(
                f"a reward needs high > low, got low {self.low} and high {self.high}. Use for example low: 0.0, high: 1.0.",
                code="out-of-range",
                key="reward.head.high",
            )
        if not self.gain > 0 or (self.hidden is not None and self.hidden < 1):
            raise UserError(
                f"the head of the reward needs gain > 0 and hidden >= 1, got {self.gain} and {self.hidden}. Use hidden: 2048, or "
                "hidden: null for a single linear layer.",
                code="out-of-range",
                key="reward.head.hidden",
            )

    @property
    def range(self) -> tuple[float, float]:
        """The actual range of the rewards."""
        if self.bound == "none":
            return -float("inf"), float("inf")
        if self.bound == "sigmoid" or self.exact_range:
            return self.low, self.high
        span = torch.tensor(self.high - self.low, dtype=torch.float64)
        return self.low, self.low + float(nn.functional.softplus(span))

    def bounded(self, raw: Tensor) -> Tensor:
        """Rewards from the output of the head."""
        if self.bound == "softplus":
            return bound_softplus(raw, self.low, self.high, exact=self.exact_range)
        return bound_sigmoid(raw, self.low, self.high) if self.bound == "sigmoid" else raw


class TokenRewardModule(nn.Module):
    """A backbone with a scalar head at every position."""

    def __init__(self, backbone: PreTrainedModel, settings: RewardSettings) -> None:
        super().__init__()
        self.backbone, self.settings, self.config = backbone, settings, backbone.config
        self._keys_to_ignore_on_save = None  # transformers reads it for checkpoints of trained weights only
        width = backbone.config.get_text_config().hidden_size
        if settings.hidden is None:
            self.head: nn.Module = nn.Linear(width, 1)
            bias = PUBLISHED_BIAS if settings.bias is None else settings.bias
            init_linear(self.head, gain=settings.gain, bias=bias)  # type: ignore[arg-type]
        else:
            self.head = mlp(width, settings.hidden, 1, gain=settings.gain, bias=settings.bias)
        backbone.requires_grad_(not settings.freeze)

    def forward(self, **inputs: Any) -> Tensor:
        """Bounded reward at each position of the rows, or of the decoder rows.  -> [rows t]"""
        hidden = self.backbone(**inputs).last_hidden_state
        raw = self.head(hidden.to(next(self.head.parameters()).dtype)).squeeze(-1)
        # Near 0, the softplus bound needs more precision than half precision has.
        return self.settings.bounded(raw if raw.dtype == torch.float64 else raw.float())


@dataclass(frozen=True, kw_only=True)
class RewardModel(TokenModel):
    """A token reward model, ready to train or to score."""

    model: TokenRewardModule
    reads_whole: ClassVar[bool] = True

    @property
    def settings(self) -> RewardSettings:
        """Settings of its head."""
        return self.model.settings

    def read(
        self,
        module: nn.Module,
        batch: Batch,
        needs: Needs = NOTHING,
        reference: FrozenReference | None = None,
    ) -> tuple[Tensor, TokenBatch]:
        """Reward of each response token, read after the token.  -> [n] float32"""
        rewards = run_model(module, batch.inputs).reshape(-1)[batch.inputs.placed_at]
        return rewards, batch.tokens

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write an ordinary folder: the backbone, as ``AutoModel`` loads it, the head, its settings and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        body, head = (
            None if weights is None else weights_within(self.model, part, weights)
            for part in (self.model.backbone, self.model.head)
        )
        self.model.backbone.save_pretrained(folder, state_dict=body)
        self.tokenizer.save_pretrained(folder)
        save_weights(self.model.head, folder / HEAD_FILE, head)
        write_json(folder / SETTINGS_FILE, asdict(self.settings), ascii=True)


def new_reward_model(
    name: str,
    settings: RewardSettings,
    *,
    seed: int,
    device: str = "auto",
    attention: str = AUTO,
    packing: Packing = "auto",
    trust_remote_code: bool = False,
) -> RewardModel:
    """A reward model on a pretrained backbone with a new head, in float32 for training.

    The language model head of ``name`` is dropped, and the new head is initialized with ``seed``. See
    :func:`tokenward.models.loading.load_model` for the other arguments.

    Raises:
        UserError: There is no such model, or it is an adapter.
    """
    backbone = load_backbone(
        name, dtype="float32", device=device, attention=attention, trust_remote_code=trust_remote_code
    )
    return _reward_model(reward_head(backbone, settings, seed=seed), name, packing, trust_remote_code)


def reward_head(backbone: PreTrainedModel, settings: RewardSettings, *, seed: int) -> TokenRewardModule:
    """A backbone with a new head in float32 on the CPU, which depends on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TokenRewardModule(backbone, settings)


def load_reward_model(
    folder: str | Path,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = AUTO,
    packing: Packing = "auto",
) -> RewardModel:
    """Load a reward model from a folder that :meth:`RewardModel.save` wrote.

    Raises:
        UserError: The folder does not contain a token reward model.
    """
    path, settings = user_path(folder), settings_of_reward(folder)
    backbone = load_backbone(str(path), dtype=dtype, device=device, attention=attention)
    try:
        module = TokenRewardModule(backbone, settings)
        module.head.load_state_dict(load_file(path / HEAD_FILE))
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    check_finite(module.head, str(folder))
    return _reward_model(module, str(folder), packing, False)


def settings_of_reward(folder: str | Path, *, key: str = "") -> RewardSettings:
    """Settings of the head of a token reward model; ``key`` is the recipe's key that names it, for errors.

    Raises:
        UserError: The folder does not contain a token reward model.
    """
    path = user_path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not a token reward model: it has no {SETTINGS_FILE}. Use a folder written by the reward stage, such as "
            "runs/NAME/reward/model.",
            code="not-a-reward-model",
            key=key,
        )
    try:
        return RewardSettings(**read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: str | Path, error: Exception) -> UserError:
    return UserError(
        f"cannot load the head of the token reward model in {folder} from {SETTINGS_FILE} and {HEAD_FILE}: {error}. Copy the "
        "whole folder again, or run the stage that wrote it again.",
        code="damaged-file",
    )


def is_reward_folder(folder: Path) -> bool:
    """Whether a folder contains a token reward model."""
    return (folder / SETTINGS_FILE).is_file()


def _reward_model(
    module: TokenRewardModule, name: str, packing: Packing, trust_remote_code: bool
) -> RewardModel:
    parameter = next(module.backbone.parameters())
    # The head stays in float32, because rewards differ by small amounts.
    module.head.to(parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    module.eval()
    config = module.backbone.config
    return RewardModel(
        model=module,
        tokenizer=load_tokenizer(name, trust_remote_code=trust_remote_code),
        layout=reward_layout(module.backbone, packing=packing, name=name),
        fingerprint=model_fingerprint(name, trust_remote_code=trust_remote_code),
        name=name,
        start_id=config.decoder_start_token_id if config.is_encoder_decoder else None,
    )
