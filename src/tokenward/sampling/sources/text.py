"""Metrics of a completion against reference texts: ROUGE, METEOR and chrF."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenward.errors import UserError
from tokenward.sampling.sources.base import FIXED, RowError, source_package

DEBIAN_FOLDER = Path("/usr/share/wordnet")
LEXICOGRAPHER_FILES = 45


def load_wordnet(debian_folder: Path = DEBIAN_FOLDER) -> Any:
    """A WordNet reader of nltk.

    Args:
        debian_folder: Where Debian's wordnet-base keeps its files.

    Raises:
        UserError: neither has the dictionary.
    """
    wordnet = source_package("nltk.corpus", "meteor").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        if (debian_folder / "data.noun").is_file():
            return _from_debian(debian_folder)
        raise UserError(
            "METEOR needs WordNet's dictionary, which was found neither in nltk's data folders nor in "
            f"{debian_folder}. Run python -c \"import nltk; nltk.download('wordnet')\" where the internet can be reached, "
            "or install Debian's package wordnet-base; or write source: {name: rouge}, which needs no data."
        ) from error
    return wordnet


def _from_debian(folder: Path) -> Any:
    """Debian's files are WordNet's own, except that two which METEOR never reads are left out."""
    nltk_data = source_package("nltk.data", "meteor")
    readers = source_package("nltk.corpus.reader", "meteor")
    lazy = source_package("nltk.corpus.util", "meteor").LazyCorpusLoader

    class DebianWordNet(readers.WordNetCorpusReader):
        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{i:02d}\t{i:02d}\t0\n" for i in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Other languages' words would need nltk's own data beside this."""

    # nltk opens no file outside its data folders.
    if str(folder) not in nltk_data.path:
        nltk_data.path.append(str(folder))
    return DebianWordNet(str(folder), lazy("omw-2.0", readers.CorpusReader, r".*\.tab"))


Several = Literal["max", "mean"]
Score = Callable[[str, Sequence[str]], float]


def against_references(
    name: str, completions: Sequence[str], columns: Mapping[str, Sequence[Any]], score: Score
) -> list[float]:
    """The score of each completion against its references; 0 for an empty one, which overlaps with nothing.

    Raises:
        UserError: there is no column ``references``.
        RowError: a row has no references, or an empty one.
    """
    if "references" not in columns:
        found = ", ".join(column for column in columns if column not in FIXED) or "none"
        raise UserError(
            f"{name} measures against reference texts, and the examples have no column references "
            f"(their columns: {found}). Write examples: {{references: COLUMN}} with the column that holds them, such as "
            "target."
        )
    pairs = enumerate(zip(completions, columns["references"], strict=True))
    return [_scored(row, completion, references, score) for row, (completion, references) in pairs]


def _scored(row: int, completion: str, references: Any, score: Score) -> float:
    if isinstance(references, str) or not isinstance(references, Sequence) or not references:
        raise RowError(row, f"references is {references!r}; expected a list of at least one text.")
    for text in references:
        if not isinstance(text, str) or not text.strip():
            raise RowError(
                row,
                f"a reference is {text!r}, which every reply would fail alike. Leave the example out, or give it a text.",
            )
    try:
        return score(completion, references) if completion.strip() else 0.0
    except _NothingToCount as error:
        raise RowError(row, str(error)) from error


class _NothingToCount(Exception):
    """A reference in which a metric finds nothing, so that every reply would get 0."""


def _merged(values: Sequence[float], several: Several) -> float:
    return max(values) if several == "max" else sum(values) / len(values)


@dataclass(frozen=True)
class Rouge:
    """ROUGE, from 0 to 1, of the package rouge-score (Lin, 2004).

    Its words are runs of ``a-z`` and ``0-9`` in lower case, so it suits text in Latin letters only.

    Attributes:
        type: ``rouge1`` and ``rouge2`` count shared words and word pairs, ``rougeL`` the longest common subsequence of
            words, ``rougeLsum`` that of each line of the reference with all lines of the reply.
        stemmer: Compare Porter stems of words longer than three letters.
        measure: ``fmeasure`` is the harmonic mean of ``precision`` and ``recall``.
        several: Of several references, the best one counts or their mean.
    """

    _: KW_ONLY
    type: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    stemmer: bool = True
    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure"
    several: Several = "max"

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """ROUGE of each completion against the column ``references``."""
        return against_references("rouge", completions, columns, self._score)

    @cached_property
    def _scorer(self) -> Any:
        package = source_package("rouge_score.rouge_scorer", "rouge")
        return package.RougeScorer([self.type], use_stemmer=self.stemmer)

    def _score(self, completion: str, references: Sequence[str]) -> float:
        needed = 2 if self.type == "rouge2" else 1
        for text in references:
            words = source_package("rouge_score.tokenize", "rouge").tokenize(text, None)
            if len(words) < needed:
                raise _NothingToCount(
                    f"{self.type} needs {needed} words of a-z and 0-9 in a reference, found {len(words)}, so every reply would "
                    "get 0. Write chrf in its place for other alphabets, or leave the example out."
                )
        results = [self._scorer.score(text, completion)[self.type] for text in references]
        return _merged([float(getattr(result, self.measure)) for result in results], self.several)


@dataclass(frozen=True)
class Meteor:
    """METEOR, from 0 to 1, of nltk (Lavie and Agarwal, 2007; alpha 0.9, beta 3, gamma 0.5).

    Words match exactly, by their Porter stem, or as synonyms in WordNet, whose dictionary must be installed; nltk looks
    synonyms up by the stem, so that of "large", which stems to "larg", none is found. Words are
    split as by nltk's ``word_tokenize``, but sentences at ``.``, ``!`` and ``?`` before white space, which needs no
    model of sentence ends.

    Attributes:
        several: Of several references, the best one counts or their mean.
    """

    _: KW_ONLY
    several: Several = "max"

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """METEOR of each completion against the column ``references``."""
        return against_references("meteor", completions, columns, self._score)

    @cached_property
    def _wordnet(self) -> Any:
        return load_wordnet()

    def _score(self, completion: str, references: Sequence[str]) -> float:
        package = source_package("nltk.translate.meteor_score", "meteor")
        words = _words(completion)
        values = [
            package.single_meteor_score(_words(text), words, wordnet=self._wordnet) for text in references
        ]
        return _merged([float(value) for value in values], self.several)


def _words(text: str) -> list[str]:
    split = source_package("nltk.tokenize", "meteor").NLTKWordTokenizer().tokenize
    return [word for sentence in re.split(r"(?<=[.!?])\s+", text) for word in split(sentence)]


@dataclass(frozen=True)
class ChrF:
    """Sentence chrF of the package sacrebleu, from 0 to 100 (Popovic, 2015); of several references, the best one.

    It counts shared runs of characters, so it suits every alphabet.

    Attributes:
        characters: Longest run of characters.
        words: Longest run of words; 0 is chrF, 2 is chrF++.
        beta: Weight of recall over precision.
    """

    _: KW_ONLY
    characters: int = 6
    words: int = 0
    beta: int = 2

    def __post_init__(self) -> None:
        if self.characters < 1 or self.words < 0 or self.beta < 1:
            raise UserError(
                f"chrf counts runs of 1 or more characters and 0 or more words with a beta of 1 or more, got characters "
                f"{self.characters}, words {self.words}, beta {self.beta}. The usual ones are 6, 0 and 2; chrF++ has words: 2."
            )

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """Sentence chrF of each completion against the column ``references``."""
        return against_references("chrf", completions, columns, self._score)

    @cached_property
    def _scorer(self) -> Any:
        metric = source_package("sacrebleu.metrics", "chrf").CHRF
        return metric(char_order=self.characters, word_order=self.words, beta=self.beta)

    def _score(self, completion: str, references: Sequence[str]) -> float:
        return float(self._scorer.sentence_score(completion, list(references)).score)
