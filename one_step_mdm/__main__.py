"""The command `one-step-mdm`, and `python -m one_step_mdm`: the scripts by name, from any folder."""

import argparse
import ast
import importlib
import sys
import textwrap
from pathlib import Path

from distill.config import CONFIGS, recipes

SCRIPTS = CONFIGS.parent / "scripts"

EPILOG = """commands:
{commands}

recipes, which --config takes by name (or name a file of your own; these lie in {configs}):
{recipes}

several processes, of one machine or many:
  accelerate launch --num_processes 8 -m one_step_mdm train-student --config digits/student
"""


def main() -> None:
    scripts = {path.stem.replace("_", "-"): path for path in sorted(SCRIPTS.glob("*.py"))}
    parser = argparse.ArgumentParser(
        prog="one-step-mdm",
        description="Distil masked diffusion models into one-step generators.",
        epilog=EPILOG.format(
            commands="\n".join(f"  {command:20} {about(path)}" for command, path in scripts.items()),
            recipes=textwrap.fill(", ".join(recipes()), 100, initial_indent="  ", subsequent_indent="  "),
            configs=CONFIGS,
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=scripts, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="COMMAND --help lists them")
    given = parser.parse_args()
    sys.argv = [f"one-step-mdm {given.command}", *given.arguments]
    importlib.import_module(f"one_step_mdm.scripts.{scripts[given.command].stem}").main()


def about(script: Path) -> str:
    """The first line of a script's docstring; to import it would take seconds."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
