"""Links by name: from the margin of a pair, of responses or of tokens, to its loss."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import links

LinkName = Literal["logistic", "hinge", "robust", "kliep", "lsif", "ba", "sba"]


@dataclass(frozen=True, slots=True)
class Link:
    """A loss of the margin ``z`` by which the preferred side leads; see :mod:`tokenward.ops.links`.

    Attributes:
        name: ``logistic`` (DPO), ``hinge``, ``robust`` (unbiased under flipped labels), or of the Bregman family
            ``kliep``, ``lsif``, ``ba``, ``sba``; logistic is in it too.
        label_smoothing: Assumed share ``e`` of flipped labels; of all but ``robust``, ``(1 - e) L(z) + e L(-z)``.
        power: The lambda of ``ba`` and ``sba``.
        scale: The s of ``sba``.
    """

    _: KW_ONLY
    name: LinkName = "logistic"
    label_smoothing: float = 0.0
    power: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}: at 0.5 no label is left."
            )
        if not (self.power >= 0 and self.scale > 0):
            raise UserError(
                f"a Bregman link needs power >= 0 and scale > 0, got {self.power} and {self.scale}. Write power: 0.0, scale: 4.0."
            )

    def __call__(self, margin: Tensor) -> Tensor:
        """The loss.  [...] -> [...]"""
        if self.name == "robust":
            return links.robust(margin, self.label_smoothing)
        plain: dict[str, links.Link] = {
            "logistic": links.logistic,
            "hinge": links.hinge,
            "kliep": links.kliep,
            "lsif": links.lsif,
            "ba": lambda z: links.basu(z, self.power),
            "sba": lambda z: links.scaled_basu(z, self.power, self.scale),
        }
        return links.smoothed(plain[self.name], margin, self.label_smoothing)
