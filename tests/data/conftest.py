"""Fixtures of the data tests."""

import json

import pytest


@pytest.fixture
def source(tmp_path):
    """Writes rows to a JSONL file and returns its path."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
