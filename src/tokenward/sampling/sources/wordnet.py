"""WordNet's dictionary, for METEOR's synonyms: nltk's own data, or that of Debian's wordnet-base."""

import io
from pathlib import Path
from typing import Any

from tokenward.errors import UserError
from tokenward.sampling.sources.base import source_package

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
