"""What jsonargparse says of a user's mistake, in a line or two that name the flag, what was expected and what came."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence

import lightning.pytorch as L
from lightning.pytorch import callbacks as lightning_callbacks

import framework.callbacks
import framework.checkpoints
import framework.datamodules
import framework.modules
from framework.errors import did_you_mean
from framework.trainer import Trainer

BASES = {"model": L.LightningModule, "data": L.LightningDataModule, "trainer.callbacks": L.Callback}
EXAMPLES = {"model": "DANN", "data": "DomainPairDataModule", "trainer.callbacks": "EarlyStopping"}
ABSTRACT = ("ImageClassifier", "DomainAdaptation", "RegularizedTransfer", "PretrainingModule", "ImageDataModule")
GENERAL_FLAGS = ("config", "seed_everything", "run", "ckpt_path", "weights_only", "print_config", "model", "data")
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping such as '{name: value}'",
    "list": "a list such as '[1, 2]'",
    "tuple": "a list such as '[1, 2]'",
}


def class_names(key: str) -> list[str]:
    """The classes that ``--model``, ``--data`` or ``--trainer.callbacks`` take by their bare names, sorted."""
    homes = {
        "model": (framework.modules,),
        "data": (framework.datamodules,),
        "trainer.callbacks": (framework.callbacks, framework.checkpoints, lightning_callbacks),
    }[key]
    return sorted(
        name
        for home in homes
        for name, value in vars(home).items()
        if isinstance(value, type) and issubclass(value, BASES[key]) and name not in ABSTRACT
    )


def missing_class(key: str, option: str | None = None) -> str:
    """The message where a class should be named and is not."""
    before, config = (f" before `--{key}.{option}`", "an earlier `--config`") if option else ("", "a `--config`")
    return (
        f"Expected `--{key}` to name a class{before}, such as `--{key} {EXAMPLES[key]}`, or {config} that does, "
        f"but got none. Known: {', '.join(class_names(key))}."
    )


def readable(message: str, arguments: Sequence[str]) -> str:
    """The mistake that a message of jsonargparse tells of, or the message's own lines where it is of an unknown form.

    Args:
        message: what the parser says.
        arguments: the command line.
    """
    keys = [_without_command(key) for key in re.findall(r'Parser key "([^"]+)"', message)]
    for rule in (_missing_value, _config, _unknown_flag, _unknown_option, _missing_option, _class, _value):
        if (text := rule(message, keys, arguments)) is not None:
            return text
    return _lines(message, keys)


def constructor_message(message: str) -> str:
    """What a constructor said, in one line, without jsonargparse's account of the other types that it has tried."""
    match = re.search(r"Errors:\s*- (.*?)\n\s*(?:- Expected a <class 'NoneType'>|Given value type:)", message, re.S)
    return " ".join((match.group(1) if match else message).split())


def _without_command(key: str) -> str:
    return re.sub(r"^(fit|validate|test|predict)\.", "", key).replace(".init_args", "")


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(f'`{prefix}{n}`' for n in near)}?" if near else ""


def _class_of(message: str) -> type | None:
    match = re.search(r"class_path '([\w.]+)'", message)
    if match is None:
        return None
    home, _, name = match.group(1).rpartition(".")
    try:
        value = getattr(__import__(home, fromlist=[name]), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return value if isinstance(value, type) else None


def _options(cls: type) -> set[str]:
    """The options of a class, those that ``**options`` passes on to its bases included."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base in BASES.values():
            break
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
    return names - {"self", "options", "kwargs", "args", "num_classes"}


def _flags() -> set[str]:
    trainer = _options(Trainer) | set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    flags = {*GENERAL_FLAGS, *(f"trainer.{name}" for name in trainer)}
    for key in ("model", "data"):
        home = getattr(framework, "modules" if key == "model" else "datamodules")
        flags |= {f"{key}.{option}" for name in class_names(key) for option in _options(getattr(home, name))}
    return flags


# ---------------------------------------------------------------------- one kind of mistake each
def _missing_value(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    match = re.match(r"argument (\S+): expected (one|at least one) argument", message)
    if match is None:
        return None
    flag = match.group(1).split("/")[-1]
    pairs = zip(arguments, [*arguments[1:], "--"], strict=True)  # the message names `--data` for `--data.source` too
    full = next((a for a, following in pairs if a.startswith(flag) and following.startswith("--")), flag)
    return f"Expected a value after `{full}`, but got none."


def _config(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    files = [b for a, b in zip(arguments, [*arguments[1:], ""], strict=True) if a in ("-c", "--config")]
    files += [a.split("=", 1)[1] for a in arguments if a.startswith(("-c=", "--config="))]
    which = " or ".join(f"'{file}'" for file in files)
    if keys[:1] == ["config"]:
        reason = message.split(":", 1)[1].strip()
        if match := re.search(r"does not exist: '(.*?)'", reason):
            return f"Expected `--config` to be a YAML file, but '{match.group(1)}' does not exist."
        return f"Expected `--config` to be a YAML file that can be read, but got {which}: {_first(reason)}"
    if message.startswith("Problems parsing config"):
        where = re.findall(r"line \d+, column \d+", message)
        what = re.findall(r"^\s*((?:did not find|found|could not find|mapping values|expected).*)", message, re.M)
        found = f"{what[-1].strip()}" if what else _first(message.split(":", 1)[1])
        return f"Expected `--config` to be YAML, but {which}: {found}{', ' + where[-1] if where else ''}."
    if message.startswith("Unexpected config"):
        shown = _first(message.split(":", 1)[1])
        return f"Expected `--config` to hold options by name, such as `model: DANN`, but {which} holds {shown!r}."
    return None


def _unknown_flag(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        flag = match.group(1).split("=", 1)[0]
        if not flag.startswith("--"):
            return f"Expected options, `--name value`, but got {flag!r}."
        near = _near(flag[2:], _flags(), "--") or " `framework fit --help` lists all."
        return f"Expected a known option, but got `{flag}`.{near}"
    if match := re.search(r"does not accept (?:option|nested key) '([^']+)'", message):
        key = _without_command(match.group(1)).removesuffix(".class_path")
        return (
            f"Expected the `--config` to hold known options, but got '{key}'."
            f"{_near(key, _flags()) or ' `--print_config` shows all.'}"
        )
    return None


def _unknown_option(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    match = re.search(r"Option '([^']+)' is not accepted", message)
    if match is None or not keys:
        return None
    key, option, cls = keys[0], match.group(1), _class_of(message)
    if cls is None or cls in BASES.values():
        return missing_class(key, option) if key in BASES else None
    near = _near(option.split(".")[0], _options(cls), f"--{key}.")
    return (
        f"Expected `--{key}.{option}` to be an option of {cls.__name__}, but it has none of that name.{near} "
        f"`--{key}.help {cls.__name__}` lists all."
    )


def _missing_option(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    match = re.search(r"arguments are required: ([\w., ]+)", message)
    before_4_50 = re.findall(r"(?:Option|Key) ['\"]([\w.]+)['\"] is required", message)
    if match is None and not before_4_50:
        return None
    missing = [_without_command(name) for name in (match.group(1).split(", ") if match else before_4_50)]
    if not keys:
        missing.sort(key=["model", "data"].index) if set(missing) <= {"model", "data"} else None
        return "\n    ".join(
            missing_class(name) if name in BASES else f"Expected `--{name}`, but got none." for name in missing
        )
    flags = " and ".join(f"`--{'.'.join([*keys, name])}`" for name in missing)
    cls = _class_of(message)
    return f"Expected {flags}, which {cls.__name__ if cls else keys[0]} needs, but got none."


def _class(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    patterns = (
        r"dot import path string: (\S+)",
        r"Problem with given class_path '([\w.]+)':\s+(?:module .* has no attribute|No module named)",
        r"^\s*(?:- )?Expected a path but (\S+) either",
        r"Import path does not correspond to a subclass[\s\S]*class_path'?[:=] ?'([\w.]+)'",
    )
    match = next((m for pattern in patterns if (m := re.search(pattern, message, re.M))), None)
    key = keys[0] if keys else _help_key(message)
    if match is None or key not in BASES:
        return None
    name, kind = match.group(1), BASES[key].__name__
    return f"Expected `--{key}` to be the name of a {kind}, but got {name!r}. {did_you_mean(name, class_names(key))}"


def _help_key(message: str) -> str | None:
    match = re.match(r"--([\w.]+)\.help: ", message)
    return match.group(1) if match else None


def _value(message: str, keys: list[str], arguments: Sequence[str]) -> str | None:
    """A value of the wrong type; of nested messages the innermost counts, which ends first."""
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if value is None or not keys or keys[0] == "config":
        return None
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message[: value.end()], re.M)
    words = list(dict.fromkeys(word for text in expected if (word := _type(text))))
    if not words:
        return None
    return f"Expected `--{'.'.join(keys)}` to be {' or '.join(words)}, but got {value.group(1)!r}."


def _type(text: str) -> str:
    if match := re.match(r"<class '(\w+)'>", text):
        return "" if match.group(1) == "NoneType" else TYPES.get(match.group(1), match.group(1))
    if match := re.match(r"typing\.Literal\[(.*)\]", text):
        return "one of " + match.group(1)
    if match := re.match(r"tuple with (\d+) elements", text):
        return f"a list of {match.group(1)} values"
    return "" if text.startswith(("path but", "dot import")) else text


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _lines(message: str, keys: list[str]) -> str:
    noise = ("Expected a <class 'NoneType'>", "Given value", "Subtypes:", "Does not validate", "Errors:", "Parser key")
    lines = [re.sub(r"^[\s-]+", "", line) for line in message.splitlines()]
    kept = list(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    flag = [f"In `--{'.'.join(keys)}`:"] if keys else []
    return "\n    ".join([*flag, *(kept or [_first(message)])])
