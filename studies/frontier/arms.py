"""The methods of the study, each as the part of a recipe that makes it up."""

from typing import Any, NamedTuple

import yaml

from tokenward.methods import all_methods

ORACLE: dict[str, Any] = {"learning_rate": 1.5e-4, "num_train_epochs": 1}
"""How an oracle trains, and every other model that scores."""

REWARD: dict[str, Any] = {
    "head": {"hidden": 128, "gain": 0.1, "bound": "none", "bias": 0.0},
    "training": {"learning_rate": 1.0e-3, "num_train_epochs": 3, "lr_scheduler_type": "linear"},
}
"""TLM's token reward. Its head is small and without bounds, unless its rewards are weights, which must be positive."""

SLOW, MIDDLE, FAST, FASTER = 5.0e-6, 1.5e-5, 5.0e-5, 1.5e-4
"""Learning rates of the policies, each for one epoch at a constant rate."""


class Arm(NamedTuple):
    """A method.

    Attributes:
        name: On the command line.
        title: In tables and pictures.
        body: Tables of a recipe; the policy's training is the study's.
        group: Which table and picture it stands in.
        rates: Learning rates. On a part of the tokens, the same rate goes further. Of an online arm, factors of its KL penalty.
        pairs: Which pairs of the four replies train it: the best and the worst, or all.
        judge: If set, the policy trains on replies that the start gives to the training prompts, ranked by an ``oracle`` of all
            pairs or by TLM's token ``reward``.
        part: Percent of the training prompts, with their replies, that there are.
        scored_by: If set, an oracle from elsewhere scores the tokens: a ``smaller`` one, or one of the ``other`` reward.
        falls: Whether the learning rate falls to 0. Then a training is read at its end, and each rate leads to another distance.
        epochs: Of the policy on pairs, and times those of TLM's reward: on less data more, for as many updates.
    """

    name: str
    title: str
    body: dict[str, Any]
    group: str = "methods"
    rates: tuple[float, ...] = (MIDDLE, FAST)
    pairs: str = "best_worst"
    judge: str = ""
    scored_by: str = ""
    part: int = 100
    falls: bool = False
    epochs: int = 1

    @property
    def online(self) -> bool:
        """Whether the policy trains on its own replies."""
        return self.body["policy"]["objective"]["name"] == "reinforce"


def selection(fraction: float, kind: str = "top_fraction") -> dict[str, Any]:
    """The selector of SePO; ``random`` and ``inverse`` are controls."""
    sides = {
        "top_fraction": ("top", "bottom"),
        "random": ("random", "random"),
        "inverse": ("bottom", "top"),
    }[kind]
    chosen, rejected = ({"fraction": fraction, "direction": direction} for direction in sides)
    return {"name": "top_fraction", "chosen": chosen, "rejected": rejected, "eos": "none"}


def _others(fraction: float) -> dict[str, Any]:
    """The tokens that :func:`selection` leaves, on both sides."""
    rest = {"fraction": 1 - fraction, "count": "ceil"}
    return {
        "name": "transform",
        "chosen": [{"top": {"which": "smallest", **rest}}],
        "rejected": [{"top": {"which": "largest", **rest}}],
    }


DPO: dict[str, Any] = {"name": "dpo", "beta": 0.1}
SEPO: dict[str, Any] = {"name": "sepo", "gamma": 2.0}
LOG_RATIO: dict[str, Any] = {"oracle": {"objective": DPO}, "scores": {"scorer": {"name": "log_ratio"}}}
BY_REWARD: dict[str, Any] = {"scores": {"scorer": {"name": "reward"}}}
NO_SCORES: dict[str, Any] = {"scores": {"scorer": {"name": "surprisal"}}}


def _policy(
    chosen: dict[str, Any], objective: dict[str, Any], scores: dict[str, Any] = LOG_RATIO
) -> dict[str, Any]:
    return {**scores, "policy": {"selection": chosen, "objective": objective}}


def _anchored(fraction: float, factor: float, direction: str, where: str) -> dict[str, Any]:
    """DPO on the key tokens, with the KL divergence to the start at the other tokens, or at all of them."""
    anchor: dict[str, Any] = {"name": "token_kl", "factor": factor, "direction": direction}
    if where == "others":
        anchor["selection"] = _others(fraction)
    terms = [{**DPO, "selection": selection(fraction)}, anchor]
    return _policy({"name": "all"}, {"name": "sum", "terms": terms})


def _of_method(name: str) -> dict[str, Any]:
    """The recipe of ``tokenward init --method NAME``, with the study's training."""
    text = all_methods()[name].body.replace("LOW", "-0.5").replace("HIGH", "1.5")
    body = yaml.safe_load(text)
    for table in body.get("auxiliary_models", {}).values():
        if "training" in table:
            table["training"] = {}  # the study fills it in
    return body


FROM_METHODS = {
    "dpo": "DPO", "simpo": "SimPO", "ipo": "IPO", "kto": "KTO", "orpo": "ORPO", "tdpo1": "TDPO1", "tdpo2": "TDPO2", "tgdpo": "TGDPO",
    "tis_dpo": "TIS-DPO", "tis_dpo_sft": "TIS-DPO (SFT)", "confpo": "ConfPO", "sparsepo": "SparsePO", "mapo": "MaPO",
    "tbpo_a": "TBPO-A", "tbpo_q": "TBPO-Q", "d2po": "D2PO", "rho1": "Rho-1", "toss": "ToSS", "toss_pro": "ToSS-Pro", "tlm": "TLM: likelihood weighted by its reward",
}  # fmt: skip
"""Methods of ``tokenward methods`` that this data allows. ``ld_dpo`` is DPO where all replies are equally long; ``treg`` and
``tis_dpo_prompt`` need a model that follows instructions, ``xtf`` words of a task, ``cft`` a verifier; ``tlm_rl`` and ``rto`` are the arms ``rl_reward`` and ``rl_oracle``."""

ONLINE, PENALTIES = 1.0e-4, (2.5, 1.7, 1.2, 0.85)
"""Of an online training: its learning rate, which falls to 0, and the factors of its KL penalty: each leads to another distance."""
SOME, QUICK, FALLING = (SLOW, MIDDLE), (FAST, FASTER), (2.5e-5, 5.0e-5, 1.0e-4, 2.0e-4)
_KL = {"name": "token_kl", "direction": "reverse"}


def _with_kl(factor: float, beta: float = 0.1) -> dict[str, Any]:
    """DPO with the KL divergence to the start at every token."""
    terms = [{**DPO, "beta": beta}, {**_KL, "factor": factor}]
    return _policy({"name": "all"}, {"name": "sum", "terms": terms}, NO_SCORES)


BY_ORACLE: dict[str, Any] = {
    "auxiliary_models": {"known": {"model": "ORACLE"}},
    "scores": {"scorer": {"name": "log_ratio", "numerator": "known", "denominator": "reference"}},
}
"""Scores of the oracle that ranked distilled replies; ``ORACLE`` is its folder."""


LAYERS = 2
"""Layers of a smaller oracle."""

SMALLER: dict[str, Any] = {
    "oracle": {"model": "SMALLER", "objective": DPO},
    "scores": {"scorer": {"name": "log_ratio"}},
}
"""Scores of an oracle with fewer layers; ``SMALLER`` is the folder of the model that it starts from."""


def _of_part(fraction: float) -> dict[str, Any]:
    return {**LOG_RATIO, "oracle": {"objective": DPO, "fraction": fraction}}


def _dpo(beta: float) -> dict[str, Any]:
    return _policy({"name": "all"}, {**DPO, "beta": beta}, NO_SCORES)


def _reinforce(scores: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """REINFORCE with token rewards on the policy's own replies, and a penalty of ``kl`` a nat, which the study sets."""
    objective = {"name": "reinforce", "entropy": 0.0, "baseline": "leave_one_out", **settings}
    return _policy({"name": "all"}, objective, scores)


_LIKELIHOOD = _policy({"name": "all"}, {"name": "weighted_likelihood"}, NO_SCORES)

_LISTED = [
    *(Arm(name, title, _of_method(name)) for name, title in FROM_METHODS.items()),
    Arm("dpo_all", "DPO on all pairs", _dpo(0.1), rates=SOME, pairs="all"),
    Arm("dpo_b03", "DPO, beta 0.3", _dpo(0.3), rates=QUICK),
    Arm("dpo_b1", "DPO, beta 1", _dpo(1.0), rates=QUICK),
    Arm("dpo_falls", "DPO, falling rate", _dpo(0.1), rates=FALLING, falls=True),
    Arm("dpo_b03_falls", "DPO, beta 0.3, falling rate", _dpo(0.3), rates=FALLING, falls=True),
    Arm("dpo_falls3", "DPO, falling rate, 3 epochs", _dpo(0.1), rates=FALLING, falls=True, epochs=3),
    Arm("sft", "likelihood of the best", _LIKELIHOOD, rates=QUICK),
    Arm(
        "weighted",
        "likelihood weighted by the oracle",
        _policy({"name": "soft", "transform": "exp", "temperature": 0.5}, {"name": "weighted_likelihood"}),
    ),
    Arm(
        "tlm_sequence",
        "likelihood weighted by TLM's reward, spread over the reply",
        _policy(
            {"name": "soft", "spread": "sequence"},
            {"name": "weighted_likelihood", "normaliser": "length"},
            BY_REWARD,
        ),
    ),
    *(
        Arm(f"sepo{percent}", f"SePO {percent} %", _policy(selection(percent / 100), SEPO), "selection", SOME)
        for percent in (10, 30, 50, 70)
    ),
    *(
        Arm(
            f"sepo30_of_{percent}",
            f"SePO 30 %, oracle of {percent} % of the pairs",
            _policy(selection(0.3), SEPO, _of_part(percent / 100)),
            "oracle",
            SOME,
        )
        for percent in (5, 25)
    ),
    *(
        Arm(
            f"sepo30_{name}",
            f"SePO 30 %, {title}",
            _policy(selection(0.3), SEPO, scores),
            "oracle",
            SOME,
            scored_by=name,
        )
        for name, title, scores in (
            ("smaller", f"oracle of {LAYERS} layers", SMALLER),
            ("other", "oracle of the other reward", BY_ORACLE),
        )
    ),
    Arm("sepo30_random", "SePO, random 30 %", _policy(selection(0.3, "random"), SEPO), "selection"),
    Arm("sepo30_inverse", "SePO, inverse 30 %", _policy(selection(0.3, "inverse"), SEPO), "selection", SOME),
    Arm("dpo30", "DPO on selected 30 %", _policy(selection(0.3), DPO), "selection", SOME),
    Arm(
        "dpo30_b1", "DPO on selected 30 %, beta 1", _policy(selection(0.3), {**DPO, "beta": 1.0}), "selection"
    ),
    Arm("dpo30_random", "DPO on random 30 %", _policy(selection(0.3, "random"), DPO), "selection", QUICK),
    Arm(
        "tlm_sepo",
        "SePO 30 % by TLM's reward",
        _policy(selection(0.3), SEPO, BY_REWARD),
        "selection",
        SOME,
    ),
    Arm("dpo_kl", "DPO + KL", _with_kl(0.03), "anchor", QUICK),
    Arm("dpo_kl1", "DPO + KL 0.1", _with_kl(0.1), "anchor", QUICK),
    Arm(
        "dpo30_anchor",
        "DPO on selected 30 %, KL elsewhere",
        _anchored(0.3, 0.03, "reverse", "others"),
        "anchor",
        QUICK,
    ),
    Arm(
        "dpo30_anchor1",
        "DPO on selected 30 %, KL 0.1 elsewhere",
        _anchored(0.3, 0.1, "reverse", "others"),
        "anchor",
        QUICK,
    ),
    Arm(
        "distil_reward_b1",
        "distilled by TLM's reward, DPO, beta 1",
        _dpo(1.0),
        "distilled",
        judge="reward",
    ),
    Arm(
        "distil_reward_b03",
        "distilled by TLM's reward, DPO, beta 0.3",
        _dpo(0.3),
        "distilled",
        judge="reward",
    ),
    Arm("distil_dpo", "distilled, DPO", _dpo(0.1), "distilled", SOME, judge="oracle"),
    Arm("distil_dpo_b1", "distilled, DPO, beta 1", _dpo(1.0), "distilled", SOME, judge="oracle"),
    Arm("distil_sft", "distilled, likelihood of the best", _LIKELIHOOD, "distilled", SOME, judge="oracle"),
    Arm(
        "distil_sepo30",
        "distilled, SePO 30 %",
        _policy(selection(0.3), SEPO, BY_ORACLE),
        "distilled",
        SOME,
        judge="oracle",
    ),
    Arm(
        "distil_dpo30",
        "distilled, DPO on selected 30 %",
        _policy(selection(0.3), DPO, BY_ORACLE),
        "distilled",
        SOME,
        judge="oracle",
    ),
    Arm(
        "rl_reward",
        "REINFORCE by TLM's token reward",
        _reinforce(BY_REWARD, return_to_go=True),
        "online",
        PENALTIES,
    ),
    *(
        Arm(
            f"{name}_of_{percent}",
            f"{title}, {percent} % of the data",
            body,
            "data",
            rates,
            part=percent,
            epochs=100 // percent,
        )
        for percent in (5, 25)
        for name, title, body, rates in (
            ("dpo", "DPO", _of_method("dpo"), (MIDDLE, FAST)),
            (
                "rl_reward",
                "REINFORCE by TLM's token reward",
                _reinforce(BY_REWARD, return_to_go=True),
                (1.2,),
            ),
        )
    ),
    Arm(
        "rl_sequence",
        "REINFORCE by TLM's reward, summed over the reply",
        _reinforce(BY_REWARD, spread="sequence"),
        "online",
        PENALTIES,
    ),
    Arm(
        "rl_now",
        "REINFORCE by TLM's token reward, without later ones",
        _reinforce(BY_REWARD),
        "online",
        (0.5, 0.25, 0.125),
    ),
    Arm(
        "rl_oracle",
        "REINFORCE by the oracle's token reward (RTO)",
        _reinforce(LOG_RATIO, return_to_go=True),
        "online",
        (7.0, 3.0, 1.2),  # its rewards are larger
    ),
    Arm("dpo30_kl", "DPO on selected 30 % + KL", _anchored(0.3, 0.03, "reverse", "all"), "anchor"),
]

ARMS = {arm.name: arm for arm in _LISTED}
