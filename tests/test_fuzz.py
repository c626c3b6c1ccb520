"""Claim: a damaged file of any kind ends in status 0 or 2 and one line, never in a traceback."""

import fuzz


def test_one_damaged_file_of_each_kind(tmp_path, monkeypatch):
    """tests/fuzz.py damages more of them."""
    monkeypatch.chdir(tmp_path)  # is restored afterwards
    assert fuzz.fuzz(tmp_path, 1) == []
