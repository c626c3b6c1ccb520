"""Figures."""
def draw(found, paths, out): pass
