"""Examples, the gap as a preference source, calibration, the final choice, and random prompts."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel
from tokenward.ops.classification import predictions
from tokenward.sampling.classification import (
    ClassificationGap,
    LabelledText,
    PromptTemplate,
    TaskModel,
    calibration_offsets,
    choose,
    gap_scores,
    random_prompts,
    read_labelled,
)

REAL = Path(__file__).parents[3] / "shared" / "data" / "fewshot_16"


TABLE = {
    (1,): {"a": [0.9, 0.1], "b": [0.6, 0.4], "c": [0.5, 0.5]},
    (2,): {"a": [0.2, 0.8], "b": [0.3, 0.7], "c": [0.4, 0.6]},
    (3,): {"a": [0.7, 0.3], "b": [0.2, 0.8], "c": [0.55, 0.45]},
}


class ByHand(TaskModel):
    """Class probabilities written down: by prompt and text, or else equal ones."""

    calls: list

    def class_logprobs(self, prompts, texts):
        self.calls.append(([tuple(ids) for ids in prompts], list(texts)))
        equal = [0.5, 0.5]
        rows = [[TABLE.get(tuple(ids), {}).get(text, equal) for text in texts] for ids in prompts]
        return torch.tensor(rows).log()


def by_hand():
    model = tiny_llama()
    language = LanguageModel(
        model=model, tokenizer=tiny_tokenizer(), head=SelectiveHead(model.get_output_embeddings()),
        layout="shared", fingerprint="", name="tiny",
    )  # fmt: skip
    task = ByHand(model=language, template=PromptTemplate("{sentence} {prompt}"), verbalizers=[" a", "good"])
    object.__setattr__(task, "calls", [])
    return task


def labelled(*pairs):
    return [LabelledText(text, label, f"file:{row}") for row, (text, label) in enumerate(pairs, 2)]


EXAMPLES = labelled(("a", 0), ("b", 1), ("c", 1))


def source(**settings):
    return ClassificationGap(task=by_hand(), **{"examples": EXAMPLES, "share": 1.0, **settings})


def score(gap, *prompts):
    return gap([""] * len(prompts), [""] * len(prompts), [list(ids) for ids in prompts])


# Prompt 1: gaps 0.8, -0.2 and an exact tie. Prompt 2: -0.6, 0.4, 0.2. Prompt 3: 0.4, 0.6, -0.1.
SCORES = {1: (160 - 36 + 0) / 3, 2: (-108 + 80 + 40) / 3, 3: (80 + 120 - 18) / 3}


def test_scores_by_hand_with_an_exact_tie():
    expected = [SCORES[1], SCORES[2], SCORES[3], 0.0]
    assert score(source(), (1,), (2,), (3,), (9,)) == pytest.approx(expected, abs=1e-4)
    assert gap_scores(by_hand(), [[1], [9]], EXAMPLES, correct=10, wrong=1).tolist() == pytest.approx(
        [(8 - 0.2) / 3, 0.0], abs=1e-5
    )


def test_a_draw_is_the_same_for_all_prompts_and_again_for_the_same_number():
    examples = labelled(*((str(number), number % 2) for number in range(32)))
    gap = ClassificationGap(task=by_hand(), examples=examples)

    def texts(draw, **settings):
        return [example.text for example in replace(gap, draw=draw, **settings).drawn()]

    drawn = [texts(draw) for draw in range(300)]
    assert drawn == [texts(draw) for draw in range(300)]
    assert {len(found) for found in drawn} == {26}  # 80 % of 32, as in the published code
    assert len(set(map(tuple, drawn[:6]))) == 6
    assert texts(3, seed=1) != drawn[3]
    # Over many draws each example comes in about as often as another.
    counts = Counter(text for found in drawn for text in found)
    assert len(counts) == 32
    assert 210 < min(counts.values()) <= max(counts.values()) < 280
    score(replace(gap, draw=5), (1,), (2,))
    assert gap.task.calls == [([(1,), (2,)], drawn[5])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share is 0.0, it must be above 0"),
        ({"share": 1.1}, "share is 1.1"),
        ({"correct": 0.0}, "both must be above 0"),
        ({"wrong": -180.0}, "wrong -180.0; both must be above 0"),
        ({"examples": []}, "no labelled examples"),
        ({"examples": labelled(("a", 0), ("b", 2))}, r"file:3: label 2 has no verbalizer; .*' a', 'good'"),
    ],
)
def test_a_gap_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        source(**settings)


def test_calibration_by_hand():
    """Two prompts; the first leans to class 1 by log-odds of 1 and 3, so its threshold is 2."""
    logp = torch.tensor([[[0.0, 1.0], [0.0, 3.0]], [[0.0, -1.0], [0.0, 1.0]]]).log_softmax(-1)
    offsets = calibration_offsets(logp)
    torch.testing.assert_close(
        offsets, torch.tensor([[-1.0, 1.0], [0.0, 0.0]], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert predictions(logp, offsets[:, None]).tolist() == [[0, 1], [0, 1]]


def test_the_best_are_chosen_by_the_development_split_and_tested_by_hand():
    task = by_hand()
    prompts = [[2], [9], [1], [3], [2], [1]]
    test = labelled(("b", 1), ("a", 1), ("c", 1), ("a", 0))
    chosen = choose(task, prompts, EXAMPLES, test, best=3)
    # 60.7, 41.3, 4.0, 0.0
    assert [candidate.ids for candidate in chosen.candidates] == [[3], [1], [2], [9]]
    scores = [SCORES[3], SCORES[1], SCORES[2], 0.0]
    assert [candidate.score for candidate in chosen.candidates] == pytest.approx(scores, abs=1e-4)
    # A tie is the first label: prompt 1 says 0 of the text c, whose label is 1.
    accuracies = [2 / 3, 1 / 3, 2 / 3, 1 / 3]
    assert [candidate.accuracy for candidate in chosen.candidates] == pytest.approx(accuracies)
    assert chosen.candidates[0].text == tiny_tokenizer().decode([3])
    assert chosen.correct.tolist() == [
        [True, False, False, True],
        [False, False, False, True],
        [True, True, True, False],
    ]
    assert chosen.accuracy == [0.5, 0.25, 0.75]
    # Log-odds of a, b, c and the threshold near their mean, by prompt: -0.85 1.39 -0.20 at about 0.1; -2.20 -0.41 0
    # at about -0.8; 1.39 0.85 0.41 at about 0.88.
    assert chosen.calibrated.tolist() == [
        [True, False, False, True],
        [True, False, True, True],
        [False, True, False, False],
    ]
    assert chosen.calibrated_accuracy == [0.5, 0.75, 0.25]
    # The test texts are asked for once, of the best three alone.
    assert task.calls[-1] == ([(3,), (1,), (2,)], ["b", "a", "c", "a"])
    assert len(task.calls) == 2


def test_labels_of_the_development_split_do_not_calibrate():
    flipped = [example._replace(label=1 - example.label) for example in EXAMPLES]
    one = choose(by_hand(), [[3]], EXAMPLES, EXAMPLES)
    other = choose(by_hand(), [[3]], flipped, EXAMPLES)
    assert torch.equal(one.offsets, other.offsets)
    assert one.calibrated.shape == (1, 3)


def test_the_earliest_of_equal_candidates_comes_first():
    chosen = choose(by_hand(), [[30], [9], [20]], EXAMPLES, EXAMPLES, best=1)
    assert [candidate.ids for candidate in chosen.candidates] == [[30], [9], [20]]


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(UserError, match="nothing to choose: 0 candidates"):
        choose(by_hand(), [], EXAMPLES, EXAMPLES)
    with pytest.raises(UserError, match="best 0"):
        choose(by_hand(), [[1]], EXAMPLES, EXAMPLES, best=0)
    with pytest.raises(UserError, match="file:2: label 7 has no verbalizer"):
        choose(by_hand(), [[1]], EXAMPLES, labelled(("a", 7)))


def test_random_prompts_are_seeded_and_leave_ids_out():
    prompts = random_prompts(6, 5, 40, 3, excluded=[0, 4, 99])
    assert prompts == random_prompts(6, 5, 40, 3, excluded={4, 0})
    assert prompts != random_prompts(6, 5, 40, 4, excluded={4, 0})
    assert [len(ids) for ids in prompts] == [5] * 40
    assert {token for ids in prompts for token in ids} == {1, 2, 3, 5}
    with pytest.raises(UserError, match="all 3 ids of the vocabulary are excluded"):
        random_prompts(3, 5, 1, 0, excluded=[0, 1, 2])
    with pytest.raises(UserError, match="length 0 and count 1"):
        random_prompts(3, 0, 1, 0)


def test_labelled_texts_of_every_file_kind(tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"so\t1\n " \t0\n')
    (tmp_path / "a.csv").write_text('label,sentence\n1,"""so"\n0," "" "\n')
    (tmp_path / "a.jsonl").write_text(
        '{"sentence": "\\"so", "label": 1}\n{"sentence": " \\" ", "label": 0}\n'
    )
    for name, rows in (("a.tsv", (2, 3)), ("a.csv", (2, 3)), ("a.jsonl", (1, 2))):
        path = tmp_path / name
        expected = [LabelledText('"so', 1, f"{path}:{rows[0]}"), LabelledText(' " ', 0, f"{path}:{rows[1]}")]
        assert read_labelled(path, "sentence", "label") == expected
        assert read_labelled(path, ("text", "sentence"), "label", classes=2) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\n", r"a\.tsv: holds no rows"),
        ("sentense\tlabel\na\t1\n", r"a\.tsv:2: has no column text or sentence\. .*It has: sentense, label"),
        ("text\tlabel\tsentence\na\t1\tb\n", r":2: has the columns text and sentence\. Name the one"),
        ("text\tlabels\na\t1\n", r":2: has no column label\. Did you mean labels\?"),
        ("text\tlabel\na\tpositive\n", r":2: label: found text, expected a finite number"),
        ("text\tlabel\na\t0.5\n", r":2: label: found the number 0\.5, expected a whole number"),
        ("text\tlabel\na\t1\nb\t-1\n", r":3: label is -1\. Labels must be 0 to 1, one for each verbalizer"),
        ("text\tlabel\na\t2\n", r":2: label is 2\. Labels must be 0 to 1"),
        ("text\tlabel\n  \t1\n", r":2: text is empty"),
    ],
)
def test_a_row_without_text_or_label_is_named(tmp_path, content, message):
    path = tmp_path / "a.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_labelled(path, ("text", "sentence"), "label", classes=2)


def test_a_null_text_and_a_missing_file_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null, "label": 0}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: text: found null"):
        read_labelled(path, "text", "label")
    path.write_text('{"text": "a", "label": -1}\n')
    with pytest.raises(UserError, match=r"Labels must be 0 or more"):
        read_labelled(path, "text", "label")
    with pytest.raises(UserError, match="no such file"):
        read_labelled(tmp_path / "none.tsv", "text", "label")


@pytest.mark.skipif(not REAL.is_dir(), reason="the few-shot files are not beside this checkout")
@pytest.mark.parametrize(("name", "counts"), [("sst-2", (32, 32, 1821)), ("agnews", (64, 64, 7600))])
def test_the_published_few_shot_files(name, counts):
    classes = {"sst-2": 2, "agnews": 4}[name]
    splits = [
        read_labelled(REAL / name / "16-13" / f"{split}.tsv", ("text", "sentence"), "label", classes=classes)
        for split in ("train", "dev", "test")
    ]
    assert tuple(map(len, splits)) == counts
    for split in splits[:2]:
        assert [sum(item.label == label for item in split) for label in range(classes)] == [16] * classes
    # The files hold quote characters that are no quoting: each line is one text.
    assert random.Random(0).choice(splits[2]).text.count("\n") == 0
    lines = (REAL / name / "16-13" / "test.tsv").read_text().splitlines()[1:]
    assert [item.text for item in splits[2]] == [line.rsplit("\t", 1)[0] for line in lines]
