"""Claim: a damaged file of any kind ends in status 0 or 2 and one line, never in a traceback."""

import fuzz

from toy import toy2d


def test_one_damaged_file_of_each_kind(tmp_path, monkeypatch):
    """tests/fuzz.py damages more of them."""
    monkeypatch.chdir(tmp_path)  # is restored afterwards
    fit = lambda cfg, progress: toy2d.make_network(cfg).state_dict()
    monkeypatch.setattr(toy2d, "fit_start", fit)
    monkeypatch.setattr(toy2d, "draw_picture", lambda *_: b"a picture")
    assert fuzz.fuzz(tmp_path, 1) == []
