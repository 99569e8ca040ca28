"""The notebook of the documentation runs from top to bottom, here with the tiny model."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "first_pairs.ipynb"


def output_of(cell: dict) -> str:
    """What a cell shows, as text and as HTML."""
    parts = [output.get("data", {"text/plain": output.get("text", "")}) for output in cell["outputs"]]
    return "".join("".join(part.values()) for part in parts)


@pytest.mark.filterwarnings("default")  # the kernel's own warnings are not ours to turn into errors
def test_the_notebook_runs_and_shows_tokens_and_the_report(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("FIRST_PAIRS_MODEL", str(tiny_folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=None).execute()
    shown = {cell["id"]: output_of(cell) for cell in notebook.cells if cell["cell_type"] == "code"}
    assert "<span style=" in shown["tokens"]
    assert "chosen" in shown["tokens"]
    assert "credit/auroc/log_ratio" in shown["figures"]
    assert "<iframe" in shown["report"]


def test_the_notebook_is_stored_without_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
