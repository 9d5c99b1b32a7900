"""How a script ends: a user's mistake, or a disk's, is one line on stderr and exit status 2, not a traceback."""

import logging
import os
import sys
from collections.abc import Callable

from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

from distill.loop.host import ElsewhereError


def run(command: Callable[[], object]) -> None:
    """Call the command; one process of several warns for all, and each that fails says why."""
    rank = os.environ.get("RANK", "0")
    logging.basicConfig(level=logging.WARNING if rank == "0" else logging.ERROR, format="%(levelname)s: %(message)s")
    diffusers_logging.disable_progress_bar()  # a bar for opening three small files is noise
    try:
        command()
    except (ValueError, OSError, SafetensorError, FloatingPointError, ElsewhereError) as error:
        print(f"error: {error}" if rank == "0" else f"error on process {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
