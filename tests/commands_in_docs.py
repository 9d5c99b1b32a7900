"""The commands that the docs print, read out of their code blocks and lines of code."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(
    r"(?:^|.*\s)(?:\S*scripts/(\w+)\.py|one-step-mdm (\w[\w-]*)|-m one_step_mdm (\w[\w-]*))(?=\s|$)(.*)", re.DOTALL
)
# What stands for something else, where an option says what: `--steps N`.
PLACEHOLDERS = {"SEED": "0"}


@dataclass(frozen=True)
class Command:
    """A script with its arguments, and what stands before it; where `is_part`, the docs show no more of it."""

    script: str
    arguments: tuple[str, ...]
    launcher: tuple[str, ...]
    is_part: bool


def blocks(text):
    """The code blocks of a page, but for those of other languages than the shell's."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in ("", "sh", "bash")]


def spans(text):
    """The code in the lines of a page, outside its blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def lines(block):
    """What a shell would read as lines; an indented one goes on with the one before."""
    return re.sub(r"\s*\\?\n[ \t]+(?=\S)", " ", re.sub(r"[ \t]+#.*$", "", block, flags=re.MULTILINE)).splitlines()


def parse(line, is_part=False):
    """The command of a line; None where it runs none of ours."""
    line = re.sub(r"(?<!\S)\[([^\[\]]*)\](?!\S)", r"\1", line)  # [what may be left out]
    if (quoted := re.search(r'-c "([^"]*)"', line)) is not None:
        line = quoted[1]
    found = SCRIPT.match(line)
    if found is None or line.startswith("#"):
        return None
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(re.sub(r"\\?\$\w+", "0", found[4]))]
    words = [re.sub(r"=(\w+)$", lambda value: "=" + PLACEHOLDERS.get(value[1], value[1]), word) for word in words]
    is_part = is_part or "..." in words
    launcher = shlex.split(re.sub(r"\\?\$\w+", "0", line[: found.start(4)]))
    script = (found[1] or found[2] or found[3]).replace("-", "_")
    kept = [word for word in words if word not in ("...", "key=value")]
    return Command(f"{script}.py", tuple(kept), tuple(launcher), is_part)


def commands_in(block):
    return [command for line in lines(block) if (command := parse(line)) is not None]


def section(page, title):
    """What stands below a heading, up to the next of its level."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return found
