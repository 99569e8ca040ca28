"""Base class of all models: weights, a tokenizer, and a layout of rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tokenward.models.forward import FrozenReference
from tokenward.models.identity import check_row_length
from tokenward.tokens.batches import NOTHING, Batch, Needs, TokenBatch, collate
from tokenward.tokens.rows import Layout, TokenRow
from tokenward.tokens.template import Style, Template


@dataclass(frozen=True, kw_only=True)
class TokenModel(ABC):
    """A model that returns one number per response token.

    Attributes:
        model: The module to call and to train.
        tokenizer: Its fast tokenizer.
        layout: Layout of its rows, see :mod:`tokenward.tokens.layouts`.
        fingerprint: Hash of weights, config and tokenizer files.
        name: The name given by the user.
        start_id: Token that starts the decoder, if there is an encoder.
        reads_whole: Whether the number of a token is read after the token, so that the last token must be in the row.
    """

    model: PreTrainedModel | PeftModel | nn.Module
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    fingerprint: str
    name: str
    start_id: int | None = None
    reads_whole: ClassVar[bool] = False

    @property
    def pad_id(self) -> int:
        """Id that fills rows. Padding is masked by position, never by its id, so any id works."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def whole(self) -> bool:
        """Whether a checkpoint must contain every weight; False if most weights are frozen."""
        return True

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.model.parameters()).dtype

    def template(self, style: Style | Literal["chat", "plain"]) -> Template:
        """How prompts and replies are written."""
        style = Style(style) if isinstance(style, str) else style
        return style.template(self.tokenizer, encoder=self.start_id is not None)

    def collate(self, rows: Sequence[TokenRow]) -> Batch:
        """Collate rows into a batch for this model, on the CPU.

        Raises:
            UserError: A row is so long that it would change the results of the other rows.
        """
        batch = collate(
            rows, layout=self.layout, pad_id=self.pad_id, start_id=self.start_id, whole=self.reads_whole
        )
        config = self.model.config
        if isinstance(config, PretrainedConfig):
            check_row_length(config, self.name, int(batch.inputs.position_ids.max()) + 1)
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

        ``module`` is ``model`` or a wrapper around it (DDP, FSDP2); its ``forward`` is called. The batch is on its device.
        Statistics that compare with a frozen model need ``reference``. A model without a language model head has none.
        """

    @abstractmethod
    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write an ordinary Hugging Face folder, from which the model can be loaded again.

        ``weights`` are the model's whole weights, if its processes hold parts of them.
        """


def layout_of_both(first: TokenModel, second: TokenModel) -> Layout:
    """The common layout of two models of one kind; separate rows if theirs differ."""
    return first.layout if first.layout == second.layout else "separate"


def shares_weights(one: TokenModel, other: TokenModel) -> bool:
    """Whether two models have weights in common: they are one object, or adapters in one base model."""
    own = {id(weight) for weight in one.model.parameters()}
    return any(id(weight) in own for weight in other.model.parameters())
