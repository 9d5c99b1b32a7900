from teachers import *  # noqa: F403  (what editors and type checkers follow in a checkout)
