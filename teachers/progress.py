"""Progress bars that are lively on a terminal and quiet in a log file."""

import sys

from tqdm import tqdm


def progress_bar(*arguments, **settings) -> tqdm:
    """tqdm on stderr; where that is no terminal, a line every ten seconds at most."""
    if not sys.stderr.isatty():
        settings = {"mininterval": 10, "ascii": True, "ncols": 100} | settings
    return tqdm(*arguments, **settings)
