"""Configuration: dataclasses are the truth; YAML files and `key=value` overrides fill them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")

CONFIGS = Path(__file__).parents[1] / "configs"  # in a checkout, and where it is installed

logger = logging.getLogger(__name__)


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and one line of help."""
    return dataclasses.field(default=default, metadata={"help": help})


def section(config_class: typing.Callable[[], Any], help: str) -> Any:
    """A dataclass field that holds another configuration."""
    return dataclasses.field(default_factory=config_class, metadata={"help": help})


def choice(kinds: Mapping[str, Any], default: str, help: str) -> Any:
    """A field with the configuration of one of several kinds, `kinds[name].config_class`; its `name` says which."""
    return dataclasses.field(
        default_factory=lambda: kinds[default].config_class(), metadata={"help": help, "kinds": kinds}
    )


def parse_arguments(config_class: type[Config], description: str, argv: list[str] | None = None) -> Config:
    """The configuration that a command line asks for; `--dry-run` prints it and exits, bad input exits with a line."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="settings (in the YAML file, or as key=value):\n" + describe(config_class()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a YAML file with settings, or a recipe by name: digits/student")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and exit")
    parser.add_argument("--max-steps", type=int, help="end after so many steps; schedules stay those of num_steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before the file's")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.max_steps is not None:
        arguments.overrides.append(f"training.max_steps={arguments.max_steps}")
    try:
        config = load_config(config_class, arguments.config, arguments.overrides)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    if arguments.dry_run:
        print(to_yaml(config), end="")
        parser.exit()
    return config


def load_config(
    config_class: type[Config], path: Path | str | None = None, overrides: typing.Sequence[str] = ()
) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides; raises ValueError that names the setting at fault.

    A class may say in `FORMERLY` what its settings were called before; who uses the old name is told the new one.
    """
    sources = [(str(path), _read_yaml(path)), ("the command line", _read_overrides(overrides))]
    for source, given in sources:
        _check_choices(given, config_class(), source)
        _rename(given, getattr(config_class, "FORMERLY", {}), source)
    defaults = _choose(config_class(), sources)
    merged = OmegaConf.structured(defaults)
    for source, given in sources:
        _check_keys(given, defaults, source)
        _restore_words(given, defaults)
        try:
            merged = OmegaConf.merge(merged, given)
        except OmegaConfBaseException as error:
            raise ValueError(f"{source}: {error.full_key}: {str(error).splitlines()[0]}") from None
        except TypeError as error:  # a mapping for a list
            raise ValueError(f"{source}: {given}: {error}") from None
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    assert isinstance(config, config_class)
    return config


def find_config(name: Path | str) -> Path:
    """The YAML file of this name, else the recipe's; FileNotFoundError where there is neither."""
    if Path(name).is_file():
        return Path(name)
    if str(name) in recipes():
        return CONFIGS / f"{name}.yaml"
    raise FileNotFoundError(f"there is no configuration file {name}; recipes are {', '.join(recipes())}")


def recipes() -> list[str]:
    """The names of the configurations in configs/, `digits/student` and so on; accelerate's own are none."""
    found = (path.relative_to(CONFIGS).with_suffix("") for path in sorted(CONFIGS.glob("*/*.yaml")))
    return [path.as_posix() for path in found if path.parts[0] != "accelerate"]


def _read_yaml(path: Path | str | None) -> dict[Any, Any]:
    if path is None:
        return {}
    path = find_config(path)
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OSError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not a YAML file of settings: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold settings as `key: value`")
    return given


def _read_overrides(overrides: typing.Sequence[str]) -> dict[Any, Any]:
    for override in overrides:
        if not re.match(r"\w[\w.]*=", override):
            raise ValueError(f"{override!r} is not of the form key=value")
    quoted = [override + "''" if override.endswith("=") else override for override in overrides]  # key= is empty text
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist(quoted))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{' '.join(overrides)} are not settings of the form key=value: {error}") from None
    assert isinstance(given, dict)
    return given


def _check_choices(given: Mapping[str, Any], defaults: Any, source: str) -> None:
    """A ValueError where one of several kinds is not chosen by a mapping with its `name`."""
    for field in dataclasses.fields(defaults):
        if "kinds" in field.metadata and field.name in given:
            chosen = given[field.name]
            if not isinstance(chosen, Mapping) or not isinstance(chosen.get("name", ""), str):
                known = ", ".join(field.metadata["kinds"])
                raise ValueError(f"{source}: {field.name}={chosen!r}; say {field.name}.name=..., one of {known}")


def _rename(given: dict[Any, Any], formerly: Mapping[str, str], source: str) -> None:
    for old, new in formerly.items():
        *sections, key = old.split(".")
        place: Any = given
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or key not in place:
            continue
        logger.warning("%s: %s is called %s now", source, old, new)
        value, target = place.pop(key), given
        *sections, key = new.split(".")
        for section in sections:
            target = target.setdefault(section, {})
        target.setdefault(key, value)


def _choose(defaults: Any, sources: typing.Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """The defaults, with those of the kinds that the sources choose by name; the last one decides."""
    for field in dataclasses.fields(defaults):
        for source, given in sources:
            chosen = given.get(field.name)
            if "kinds" not in field.metadata or not isinstance(chosen, Mapping) or "name" not in chosen:
                continue
            kinds, name = field.metadata["kinds"], chosen["name"]
            if name not in kinds:
                raise ValueError(
                    f"{source}: {field.name}.name={name!r} is not known; choose from {', '.join(map(str, kinds))}"
                )
            setattr(defaults, field.name, kinds[name].config_class())
    return defaults


def _check_keys(given: Mapping[str, Any], defaults: Any, source: str, prefix: str = "") -> None:
    known = [field.name for field in dataclasses.fields(defaults)]
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"{source}: unknown setting {prefix}{key}{hint}")
        if dataclasses.is_dataclass(getattr(defaults, key)) and isinstance(value, Mapping):
            _check_keys(value, getattr(defaults, key), source, f"{prefix}{key}.")


def _restore_words(given: dict[str, Any], defaults: Any) -> None:
    """YAML reads the word `no` as False; where text is wanted it is the word."""
    for key, value in given.items():
        default = getattr(defaults, key)
        if dataclasses.is_dataclass(default) and isinstance(value, dict):
            _restore_words(value, default)
        elif isinstance(default, str) and isinstance(value, bool):
            given[key] = "yes" if value else "no"


def to_yaml(config: Any) -> str:
    """The configuration as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe(config: Any, prefix: str = "") -> str:
    """A line for each setting of a configuration: name, value, help."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines.append(describe(value, f"{prefix}{field.name}."))
            for name, kind in field.metadata.get("kinds", {}).items():
                if not isinstance(value, kind.config_class):
                    lines += [
                        f"  with {field.name}.name={name}:",
                        describe(kind.config_class(), f"{prefix}{field.name}."),
                    ]
        else:
            lines.append(f"  {prefix + field.name:<38} {value!s:<24} {field.metadata.get('help', '')}")
    return "\n".join(lines)
