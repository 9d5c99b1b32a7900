"""Released checkpoints: read without running what is in them, every tensor accounted for."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn

from teachers.folder import file_digest

WRAPPERS = ("model_state_dict", "state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint file by name, where it lies and what it is (SHA-256)."""

    path: Path
    sha256: str
    tensors: dict[str, torch.Tensor]

    def shape(self, key: str) -> torch.Size:
        """The shape of a tensor that tells a size of the network; ValueError if it is not there."""
        if key not in self.tensors:
            raise self._other_kind(key)
        return self.tensors[key].shape

    def count(self, pattern: str) -> int:
        """How many numbers the pattern's group takes over all names, e.g. the layers of `layers.(\\d+).`."""
        matches = (re.match(pattern, key) for key in self.tensors)
        numbers = {match[1] for match in matches if match}
        if not numbers:
            raise self._other_kind(pattern)
        return len(numbers)

    def _other_kind(self, absent: str) -> ValueError:
        names = sorted(self.tensors)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return ValueError(
            f"{self.path} has no tensor {absent}, so it is not a checkpoint of this kind; it has "
            f"{', '.join(names[:5])}{more}"
        )


def find_file(name: str) -> Path:
    """A local file, or `owner/repository:file` on the hub, downloaded once; FileNotFoundError if there is neither."""
    if Path(name).is_file():
        return Path(name)
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+):(.+)", name):
        try:
            return Path(hf_hub_download(match[1], match[2]))
        except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(f"{match[2]} could not be had from the hub's {match[1]}: {error}") from error
    raise FileNotFoundError(f"there is no file {name}; expected a local file, or OWNER/REPOSITORY:FILE on the hub")


def read_checkpoint(name: str) -> Checkpoint:
    """The tensors of a safetensors or pickle file, freed of wrappers and of the prefixes of DDP and torch.compile.

    A pickle is only ever read with `weights_only=True`, which runs no code. ValueError for what is not a plain
    dictionary of tensors.
    """
    path = find_file(name)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors, or it is no checkpoint at all. Nothing in it was run. "
            f"({first_line(error)})"
        ) from error
    except Exception as error:  # damaged bytes are a program for torch's unpickler, which may fail at anything
        raise ValueError(f"{path} cannot be read; is it whole? ({first_line(error)})") from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold a dictionary of tensors")
    tensors = {_strip(key): value for key, value in content.items()}
    if len(tensors) < len(content):
        raise ValueError(f"{path} holds tensors whose names differ by nothing but the prefixes {', '.join(PREFIXES)}")
    return Checkpoint(path, file_digest(path), tensors)


def _strip(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


@dataclass(frozen=True)
class Rule:
    """Where a network's tensors come from: names that match `target` are `select(tensor called source)`.

    `target` is a regular expression; `source` may refer to its groups.
    """

    target: str
    source: str
    select: Callable[[torch.Tensor], torch.Tensor] | None = None


def load_by_rules(network: nn.Module, checkpoint: Checkpoint, rules: Sequence[Rule], ignored: str = r"(?!)") -> None:
    """Fill the network; the first rule that matches a name is the one.

    Every tensor of the checkpoint has to be used or match the pattern `ignored`. One ValueError lists all that is
    missing, unexpected, misshapen or not finite.
    """
    state, used, problems = {}, set(), []
    for name, wanted in network.state_dict().items():
        rule, source = _find_rule(name, rules)
        used.add(source)
        if source not in checkpoint.tensors:
            problems.append(f"missing: {source}")
            continue
        tensor = checkpoint.tensors[source]
        try:
            selected = tensor if rule.select is None else rule.select(tensor)
        except (RuntimeError, IndexError):
            selected = None  # it cannot be cut into the parts that the other tensors' sizes ask for
        if selected is None or selected.shape != wanted.shape:
            problems.append(f"misshapen: {source} is {tuple(tensor.shape)}; {name} needs {tuple(wanted.shape)}")
        elif not selected.is_floating_point() or not selected.isfinite().all():
            problems.append(f"not finite numbers: {source} ({tensor.dtype})")
        else:
            state[name] = selected.float().contiguous()
    unexpected = [key for key in checkpoint.tensors if key not in used and not re.match(ignored, key)]
    problems += [f"unexpected: {key}" for key in sorted(unexpected)]
    if problems:
        listing = "\n  ".join(dict.fromkeys(problems))
        raise ValueError(f"{checkpoint.path} does not fit {type(network).__name__}:\n  {listing}")
    network.load_state_dict(state, assign=True)


def _find_rule(name: str, rules: Sequence[Rule]) -> tuple[Rule, str]:
    for rule in rules:
        if match := re.fullmatch(rule.target, name):
            return rule, match.expand(rule.source)
    raise AssertionError(f"no rule says where {name} comes from")


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
