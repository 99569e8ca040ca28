"""What every model of this library has: weights, a tokenizer, and the rows that it takes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.models.forward import FrozenReference
from tokenward.models.identity import longer_than_steady
from tokenward.tokens.batches import NOTHING, Batch, Needs, TokenBatch, collate
from tokenward.tokens.rows import Layout, TokenRow
from tokenward.tokens.template import Style, Template


@dataclass(frozen=True, kw_only=True)
class TokenModel(ABC):
    """A model that gives one number per response token.

    Attributes:
        model: The module that is called and trained.
        tokenizer: Its fast tokenizer.
        layout: How its rows are laid out; see :mod:`tokenward.tokens.layouts`.
        fingerprint: Of weights, config and tokenizer files.
        name: As the user wrote it.
        start_id: What its decoder begins with, where it has an encoder.
    """

    model: PreTrainedModel | PeftModel | nn.Module
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    fingerprint: str
    name: str
    start_id: int | None = None

    @property
    def pad_id(self) -> int:
        """Id that fills rows; it is masked by position, never by its value, so any id serves."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def whole(self) -> bool:
        """Whether a checkpoint must hold every weight; not so where most of them never change."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return next(self.model.parameters()).dtype

    def template(self, style: Style | Literal["chat", "plain"]) -> Template:
        """How its prompts and replies are written."""
        style = Style(style) if isinstance(style, str) else style
        return style.template(self.tokenizer, encoder=self.start_id is not None)

    @property
    def reads_whole(self) -> bool:
        """Whether it reads a response's last token: its number is read after the token, not before it."""
        return False

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """Rows as a batch that this model takes, on the CPU.

        Raises:
            UserError: a row is so long that the others would get other numbers beside it.
        """
        batch = collate(
            rows, layout=self.layout, pad_id=self.pad_id, start_id=self.start_id, whole=self.reads_whole
        )
        config = self.model.config
        if isinstance(config, PretrainedConfig):
            reason = longer_than_steady(config, self.name, int(batch.inputs.position_ids.max()) + 1)
            if reason is not None:
                raise UserError(reason)
        return batch

    @abstractmethod
    def read(
        self,
        module: nn.Module,
        batch: Batch,
        needs: Needs = NOTHING,
        reference: FrozenReference | None = None,
    ) -> tuple[Tensor, TokenBatch]:
        """One number per token, and the tokens with the statistics that an objective needs.  -> [n]

        Args:
            module: This model's ``model``, or a wrapper around it (DDP, FSDP2); its ``forward`` is called.
            batch: The rows, on the model's device.
            needs: Which statistics; a model without a head for text has none.
            reference: The frozen model, where they compare with it.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder, from which it can be loaded again."""


def layout_of_both(first: TokenModel, second: TokenModel) -> Layout:
    """Rows that two models of one kind take: packed ones only where both do; else those of one response each."""
    return first.layout if first.layout == second.layout else "separate"
