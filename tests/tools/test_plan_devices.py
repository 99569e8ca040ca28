"""Plans of several devices: each engine worked by hand, what is said if it does not fit, and the page's tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.scaling_page import MODELS, PAGE, page
from tokenward.config import load_recipe
from tokenward.errors import UserError
from tokenward.models.identity import model_sizes
from tokenward.ops.costs import FLOAT, HALF, ModelSizes, NumberTypes, Work, training_memory
from tokenward.ops.sharding import Devices, Engine, sent_bytes, training_bytes, training_seconds
from tokenward.tools.plan import plan_recipe
from tokenward.tools.plan_devices import TrainingWork, Wanted, bytes_of, fitting, wanted

SIZES = ModelSizes(
    weights=1000, trained=1000, products=600, head=200, layers=3, width=4, attention=4, inner=8, vocabulary=50
)
WORK = Work(30, 20, 50)
HALVES = NumberTypes(FLOAT, HALF)


def on(engine: Engine, count: int = 4) -> Devices:
    return Devices(count, engine, 1e9, 1e12, 1e9)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("types", [NumberTypes(), HALVES])
def test_one_device_is_one_process(engine, types):
    one = training_memory(SIZES, WORK, types)
    assert training_bytes(SIZES, WORK, types, on(engine, 1)) == (*one, 0, 0)


def test_each_engine_worked_by_hand():
    def state(engine: Engine, types: NumberTypes, **more) -> list[float]:
        found = training_bytes(SIZES, WORK, types, on(engine), **more)
        return [found.weights, found.gradients, found.optimizer, found.reference, found.whole]

    assert state("ddp", NumberTypes()) == [4000, 4000, 8000, 0, 4000], "buckets of all gradients"
    # Two layers of 200 weights and 400 outside of the layers; gradients of one layer and of what is outside.
    assert state("fsdp2", NumberTypes()) == [1000, 1000, 2000, 0, 4 * 800 + 4 * 600]
    assert state("fsdp2", HALVES) == [1000, 1000, 2000, 0, 2 * 800 + 2 * 600], "the parts stay float32"
    assert state("fsdp2", HALVES, reference=True)[3:] == [1000, 2 * 800 + 2 * 600 + 2 * 800]
    assert state("zero2", NumberTypes()) == [4000, 1000, 2000, 0, 2 * 4 * 1000]
    assert state("zero2", HALVES) == [2 * 1000 + 4 * 250, 2 * 250, 8 * 250, 0, 2 * 2 * 1000]
    assert state("zero3", HALVES) == [2 * 250 + 4 * 250, 2 * 250, 8 * 250, 0, 2 * 1000 + 2 * 2 * 1000]


def test_an_adapter_leaves_nothing_but_itself_to_exchange():
    lora = SIZES._replace(weights=1010, trained=10)
    found = training_bytes(lora, WORK, HALVES, on("fsdp2"))
    assert (found.weights, found.gradients, found.optimizer) == (1010, 10, 20)
    assert found.whole == pytest.approx(2 * 800 + 2 * 600 * 10 / 1010)


def test_time_is_that_of_computing_or_of_sending():
    assert training_seconds(8e12, 1e9, on("ddp")) == 2, "eight operations of a trillion on four devices"
    assert training_seconds(8e12, 5e9, on("ddp")) == 5
    sent = {
        name: sent_bytes(SIZES, HALVES, on(name), passes=6, updates=2) for name in ("ddp", "fsdp2", "zero2")
    }
    share = 3 / 4
    assert sent == {
        "ddp": share * 2 * 2 * 4000,
        "fsdp2": share * 6 * 2 * 3000,
        "zero2": share * 2 * (6 * 1000 + 2 * 1000),
    }


def work(**changes) -> TrainingWork:
    made = TrainingWork(
        key="policy",
        table={},
        sizes=SIZES,
        lora=SIZES._replace(weights=1010, trained=10),
        types=NumberTypes(),
        largest=lambda tokens: WORK.times(tokens / 30),
        mean=WORK,
        rows=8,
        budget=30,
        checkpointing=False,
        reference=False,
    )
    return replace(made, **changes)


def test_what_does_not_fit_is_said_with_what_to_write():
    whole = work().memory(Wanted(4)).total
    assert fitting(work(), Wanted(4, whole)) == ""
    said = fitting(work(), Wanted(4, 0.8 * whole))
    assert said.startswith("does not fit. Write --engine fsdp2")
    state = sum(work().memory(Wanted(4))[:3])
    assert "model.adapter" in fitting(work(), Wanted(4, 0.05 * state))
    assert fitting(work(), Wanted(4, 1.0)).endswith("Use a smaller model")


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("512MB", 512e6), ("1000", 1000)]
)
def test_sizes_of_devices(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ((None, "80GB", None), "missing-setting"),
        ((0, None, None), "out-of-range"),
        ((8, "much", None), "bad-size"),
        ((8, "0GB", None), "bad-size"),
        ((8, None, "fsdp"), "unknown-name"),
        ((8, None, None, -1.0), "out-of-range"),
    ],
)
def test_wrong_devices_are_refused(given, code):
    with pytest.raises(UserError) as error:
        wanted(*given)
    assert error.value.code == code


def test_a_plan_of_devices_follows_the_recipe(tiny_workplace: Path) -> None:
    recipe, asked = tiny_workplace, Wanted(4, 1e9, "fsdp2")
    plan = plan_recipe(recipe, (), measure=False, quiet=True, devices=asked)
    assert [stage.stage for stage in plan.devices] == ["reference", "oracle", "scores", "policy"]
    named = {stage.stage: stage for stage in plan.devices}
    sizes = model_sizes(load_recipe(recipe).recipe.model.name)
    assert named["oracle"].memory.weights == sizes.weights * FLOAT / 4
    assert not any(stage.advice for stage in plan.devices)
    small = plan_recipe(recipe, (), measure=False, quiet=True, devices=Wanted(4, 1000.0))
    assert all("does not fit" in stage.advice for stage in small.devices)
    assert not plan_recipe(recipe, (), measure=False, quiet=True).devices


def test_the_shapes_are_those_of_the_models():
    # The numbers of weights that their authors give.
    assert {shape.name: shape.sizes(lora=False).weights for shape in MODELS} == {
        "8B": 8_030_261_248,
        "70B": 70_553_706_496,
    }


def test_the_page_has_the_tables_as_they_are_computed():
    written = PAGE.read_text()
    assert page(written) == written, "run python -m scripts.scaling_page --write"
