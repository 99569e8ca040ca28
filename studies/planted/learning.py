"""Train a token reward model on the ranks of a world, and measure it on eval groups."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, PrinterCallback

from studies.planted.worlds import LONGEST, PROMPT, TYPES, WORLDS, Floats, Ints, K, groups
from tokenward.models.reward import RewardModel, RewardSettings, TokenRewardModule
from tokenward.objectives.listwise import PlackettLuce
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow
from tokenward.training.arguments import training_arguments
from tokenward.training.trainer import TokenTrainer


class Method(NamedTuple):
    """An aggregate with its settings. Without attention, a token's reward depends only on the token."""

    objective: PlackettLuce
    learning_rate: float = 1e-2
    bound: str = "softplus"
    attention: bool = True


def soft(aggregate: str, temperature: float, *, neutral: bool = False) -> Method:
    """A softmax or softmin at some temperature."""
    return Method(PlackettLuce(aggregate=aggregate, temperature=temperature, length_neutral=neutral))


SHARP = 0.1
METHODS = {
    "average": Method(PlackettLuce()),
    "sum": Method(PlackettLuce(aggregate="sum")),
    "sum, no bound": Method(PlackettLuce(aggregate="sum"), bound="none"),
    "softmax 2 (published)": soft("softmax", 2.0),
    "softmax 0.1": soft("softmax", SHARP),
    "softmax 0.1, neutral": soft("softmax", SHARP, neutral=True),
    "softmin 2 (published)": soft("softmin", 2.0),
    "softmin 0.1": soft("softmin", SHARP),
    "softmin 0.1, neutral": soft("softmin", SHARP, neutral=True),
}
OWN = {"mean": "average", "sum": "sum", "present": "softmax", "keyword": "softmax", "worst": "softmin"}
"""The aggregate that matches each case; fixed before anything was measured."""
ALONE = {"mean": "average", "keyword": "softmax 0.1", "worst": "softmin 0.1"}
"""The methods in the picture, which are also run without attention."""


class Sizes(NamedTuple):
    """Amount of data and training."""

    groups: int = 600
    eval: int = 300
    steps: int = 200
    batch: int = 16
    width: int = 32
    k: int = K


class Cell(NamedTuple):
    """Results of one training on the eval groups.

    Attributes:
        accuracy: ``[groups]``, share of a group's pairs in the right order.
        longer: ``[groups]``, share of a group's pairs of different lengths in which the longer one has the higher
            ``e``; equal values count half.
        learned: ``[n]``, reward of each token.
        planted: ``[n]``, planted score of each token.
        types: ``[n]``, type of each token.
        lengths: ``[r]``, tokens of each sequence.
    """

    accuracy: Floats
    longer: Floats
    learned: Floats
    planted: Floats
    types: Ints
    lengths: Ints


def reward_model(seed: int, *, width: int, bound: str = "softplus") -> RewardModel:
    """A reward model of two layers with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TYPES + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=PROMPT + 1,
        bos_token_id=None,
        eos_token_id=None,
    )
    settings = RewardSettings(hidden=2 * width, bound=bound)  # type: ignore[arg-type]
    words = {f"w{index}": index for index in range(TYPES)} | {"prompt": PROMPT, "pad": PROMPT + 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="pad")), pad_token="pad"
    )
    return RewardModel(
        model=TokenRewardModule(LlamaModel(config), settings),
        tokenizer=tokenizer,
        layout="shared",
        fingerprint="",
        name="planted",
    )


def without_attention(backbone: LlamaModel) -> None:
    """Disable attention between tokens, also during training."""
    for layer in backbone.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        layer.self_attn.requires_grad_(False)


def train(model: RewardModel, method: Method, rows: Sequence[TokenRow], sizes: Sizes, seed: int) -> None:
    """Train the token reward on the ranks of groups."""
    table: dict[str, Any] = {
        "learning_rate": method.learning_rate,
        "max_steps": sizes.steps,
        "per_device_train_batch_size": sizes.batch,
        "max_grad_norm": 5.0,
        "logging_steps": sizes.steps,
        "tokens_per_forward": 8192,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(table, folder=Path(folder), seed=seed, where="study", device="cpu")
        trainer = TokenTrainer(model, method.objective, arguments, rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(model: RewardModel, objective: PlackettLuce, rows: Sequence[TokenRow]) -> Cell:
    """Measure rank accuracy on groups, and each token's learned reward and planted score."""
    values = token_values(model, rows, precision="float32", tokens_per_batch=8192)
    learned = torch.cat([part for row in values for part in row])
    batch = model.collate(rows).tokens
    assert batch.scores is not None
    length = torch.bincount(batch.response)
    accuracy, longer, shorter = (
        objective(learned, replace(batch, rank=rank)).metrics["rank/accuracy"].double().numpy()
        for rank in (batch.rank, LONGEST - length, length)
    )
    return Cell(
        accuracy=accuracy,
        longer=(longer + 1 - shorter) / 2,
        learned=learned.double().numpy(),
        planted=batch.scores.double().numpy(),
        types=batch.ids.numpy(),
        lengths=length.numpy(),
    )


def run(case: str, method: Method, seed: int, sizes: Sizes) -> Cell:
    """Run one case with one method and seed. The seed determines data and initial weights."""
    rng = np.random.default_rng([seed, list(WORLDS).index(case)])
    world = WORLDS[case](rng)
    eval_rows = groups(world, rng, sizes.eval)
    rows = groups(world, rng, sizes.groups, sizes.k)
    model = reward_model(seed, width=sizes.width, bound=method.bound)
    if not method.attention:
        without_attention(model.model.backbone)  # type: ignore[arg-type]
    if sizes.steps:
        train(model, method, rows, sizes, seed)
    return measure(model, method.objective, eval_rows)


Cells = dict[tuple[str, str], list[Cell]]
