"""From a command line to a checked config: the one place that knows Hydra.

A command is a dataclass (its options), a YAML of the same name in ``conf/`` (its defaults) and a function.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from exvideo_train.errors import UserError
from exvideo_train.terminal import EscapedStream, escaped

ConfigT = TypeVar("ConfigT")

USER_ERROR_STATUS = 2
SECONDS_TO_TELL = 3.0
HYDRA_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")


def config_folder() -> Path:
    """``conf/`` of an installed package or of the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run_command(
    config_class: type[ConfigT],
    main: Callable[[ConfigT], None],
    name: str,
    usage: str,
    short: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Compose ``conf/<name>.yaml`` with the command line, check it, and call ``main``.

    Args:
        config_class: the command's dataclass.
        main: called with an instance of it.
        name: the command's YAML in ``conf/``.
        usage: how the command is called, with an example; printed by ``--help``.
        short: names that stand for longer ones on the command line.

    A :class:`UserError` ends the process with status 2 and its message alone.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Before torch reads it. Clips of several sizes, and VAE beside DiT, else leave holes that nothing fits in.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    options: ConfigT | None = None
    try:
        flags, overrides = _split_arguments(_without_launcher_arguments(sys.argv[1:]))
        overrides = [_long(override, short) for override in overrides]
        config = compose_config(name, quote_overrides(overrides, config_class), config_class)
        if "--help" in flags:
            print(help_text(config_class, config, usage))
        elif "--cfg" in flags:
            print(OmegaConf.to_yaml(config), end="")
        else:
            options = to_dataclass(config, config_class)
            # Names and headers of foreign files are printed all over: none of them reaches the terminal as it is.
            with redirect_stdout(EscapedStream(sys.stdout)):
                main(options)
    except UserError as error:
        if options is None and os.environ.get("LOCAL_RANK", "0") != "0":
            # All ranks of a machine are given the same options, and the first tells the mistake. Launchers end all
            # ranks as soon as one ends.
            time.sleep(SECONDS_TO_TELL)
            raise SystemExit(USER_ERROR_STATUS) from None
        print(f"error: {escaped(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR_STATUS) from None


def _without_launcher_arguments(arguments: list[str]) -> list[str]:
    """Drop the ``--local_rank=N`` that the DeepSpeed launcher adds; N goes to the environment instead."""
    kept = []
    expect_value = False
    for argument in arguments:
        if expect_value:
            os.environ.setdefault("LOCAL_RANK", argument)
            expect_value = False
        elif argument in ("--local_rank", "--local-rank"):
            expect_value = True
        elif argument.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", argument.split("=", 1)[1])
        else:
            kept.append(argument)
    return kept


def _split_arguments(arguments: list[str]) -> tuple[set[str], list[str]]:
    """The flags ``--help`` and ``--cfg`` (print the composed config), and overrides.

    Raises:
        UserError: an unknown flag, or a word that is neither a flag nor ``name=value``.
    """
    flags: set[str] = set()
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, is_assigned, value = word.partition("=")
        if flag == "--config-dir":
            folder = value if is_assigned else next(words, "")
            if not Path(folder).is_dir():
                raise UserError(f"--config-dir {folder}: no such folder; name one that holds exp/, model/ or the like")
            overrides.append(f"hydra.searchpath=['file://{Path(folder).resolve()}']")
        elif flag in ("--help", "-h"):
            flags.add("--help")
        elif flag in ("--cfg", "-c"):
            part = value if is_assigned else next(words, "")
            if part != "job":
                raise UserError(f"--cfg {part}: write --cfg job")
            flags.add("--cfg")
        elif word.startswith("-"):
            remedy = f"write {word.lstrip('-')}" if is_assigned else "options are written name=value"
            raise UserError(f"unknown option {word!r}; {remedy}; --help lists all options")
        elif is_assigned or word.startswith("~"):
            overrides.append(word)
        else:
            raise UserError(f"{word!r}: options are written name=value; --help lists all options")
    return flags, overrides


def _long(override: str, short: Mapping[str, str]) -> str:
    key, is_assigned, text = override.partition("=")
    return f"{short.get(key, key)}{is_assigned}{text}"


def quote_overrides(overrides: list[str], config_class: type) -> list[str]:
    """Take the value of every text option as it stands: Hydra gives commas, quotes, colons and ``=`` a meaning.

    A value in quotes of its own (``prompt='"a, b"'``, Hydra's way) is left alone; ``~/`` becomes the home folder,
    which shells leave to the program after a ``=``.
    """
    kinds = {path: kind for path, kind, _ in walk_options(config_class)}
    quoted = []
    for override in overrides:
        key, is_assigned, text = override.partition("=")
        kind = kinds.get(key)
        table = kinds.get(key.lstrip("+").rpartition(".")[0])
        if get_origin(table) is dict:
            kind = get_args(table)[1]
        # A list of texts is written in brackets, unless it is of one.
        is_one_of_list = kind == list[str] and not text.startswith("[")
        is_text = kind in (str, str | None) or is_one_of_list
        is_null = kind is not str and text == "null"
        if not is_assigned or not is_text or is_null or HYDRA_QUOTED.fullmatch(text):
            quoted.append(override)
        else:
            text = os.path.expanduser(text) if text.startswith("~/") else text
            # In OmegaConf ${ begins an interpolation.
            value = QuotedString(text.replace("${", "\\${"), Quote.single).with_quotes()
            quoted.append(f"{key}=[{value}]" if is_one_of_list else f"{key}={value}")
    return quoted


def compose_config(name: str, overrides: list[str], config_class: type) -> DictConfig:
    """Compose ``conf/<name>.yaml`` with overrides.

    Raises:
        UserError: an unknown option, choice or value, with the nearest names.
    """
    # The first entry of conf/<name>.yaml.
    ConfigStore.instance().store(name=f"{name}_schema", node=config_class)
    _check_names(overrides, config_class)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose(name, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, overrides)) from error


def _check_names(overrides: list[str], config_class: type) -> None:
    kinds = {path: kind for path, kind, _ in walk_options(config_class)}
    known = list(kinds)
    tables = tuple(f"{path}." for path, kind in kinds.items() if get_origin(kind) is dict)
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    for override in overrides:
        key = override.lstrip("+").split("=", 1)[0]
        if key.startswith(("hydra.", "hydra/", *tables)):
            continue
        if override.startswith("~"):
            raise UserError(f"{override!r}: options cannot be taken away; give another value, name=value")
        if key == "exp" and not override.startswith("+"):
            raise UserError(f"{override!r}: an experiment is added; write +{override}")
        if key not in groups and key not in known and not any(name.startswith(key + ".") for name in known):
            near = difflib.get_close_matches(key, [*known, *groups], n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all options"
            raise UserError(f"unknown option {key} in {override!r}; {hint}")


def _explain(error: Exception, overrides: list[str]) -> str:
    text = str(error.__cause__ or error).split("\n")[0]
    for override in overrides:
        key, _, choice = override.lstrip("+").partition("=")
        choices = sorted(path.stem for path in (config_folder() / key).glob("*.yaml"))
        if choices and choice not in choices:
            return f"{override}: no such choice; conf/{key}/ has: {', '.join(choices)}"
    given = " ".join(override for override in overrides if override.split("=", 1)[0].lstrip("+") in str(error))
    return f"{given + ': ' if given else ''}{text}; --help lists all options"


def to_dataclass(config: DictConfig, config_class: type[ConfigT]) -> ConfigT:
    """The typed object of a composed config.

    Raises:
        UserError: required options are not given, or a value does not fit its type.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        docs = {path: doc for path, _, doc in walk_options(config_class)}
        lines = [f"  {path}=...  {docs.get(path, '')}" for path in missing]
        raise UserError("these options are required:\n" + "\n".join(lines))
    try:
        if endless := list(_not_finite(OmegaConf.to_container(config, resolve=True))):
            raise UserError(f"{', '.join(endless)}: must be a finite number; --help says which")
        value = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(str(error)) from error
    assert isinstance(value, config_class)
    return value


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Options that are NaN or infinity, which OmegaConf takes for numbers and no option means."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _not_finite(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}={value}"


def field_docs(config_class: type) -> dict[str, str]:
    """The string below each field of a dataclass and its bases, as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def walk_options(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted name, type, documentation) of every option, nested dataclasses opened."""
    docs = field_docs(config_class)
    hints = get_type_hints(config_class)
    for option in dataclasses.fields(config_class):  # type: ignore[arg-type]
        kind = hints[option.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from walk_options(kind, f"{prefix}{option.name}.")
        else:
            yield f"{prefix}{option.name}", kind, docs.get(option.name, "")


def help_text(config_class: type, config: DictConfig, usage: str) -> str:
    """Usage, config groups, and every option with type, composed value and documentation."""
    lines = [usage.strip(), "", "Choices (name=choice; experiments are added: +exp=choice):"]
    root = config_folder()
    for group in sorted(path for path in root.iterdir() if path.is_dir()):
        if group.name == "exp" or group.name in config:
            choices = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
            lines.append(f"  {group.name}: {choices}")
    lines += [
        "  --config-dir DIR adds choices of your own, DIR/exp/mine.yaml for +exp=mine; --cfg job prints the config.",
        "",
        "Options (name=value), with the values composed from this command line:",
    ]
    top_first = sorted(walk_options(config_class), key=lambda option: "." in option[0])
    for path, kind, doc in top_first:
        node = OmegaConf.select(config, path, throw_on_missing=False, default="???")
        value = node.name if isinstance(node, Enum) else ("required" if node == "???" else node)
        lines.append(f"  {path} = {value}  ({_type_name(kind)})")
        lines += textwrap.wrap(doc, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(member.name for member in kind)
    if any(isinstance(one, type) and issubclass(one, Enum) for one in get_args(kind)):
        return " | ".join(_type_name(one) if one is not type(None) else "null" for one in get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not getattr(kind, "__args__", None) else str(kind)
