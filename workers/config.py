"""Settings from files and environment, and the only place that reads the environment.

Later wins: the shipped `temporal/countersign.toml`, then `$COUNTERSIGN_CONFIG` or `./countersign.toml`, then
variables `COUNTERSIGN_…` with `__` between levels. Lists are replaced whole by a file; a variable reaches an
entry by its name (`COUNTERSIGN_TIERS__EDGE__TOKEN`). A key nobody knows is refused, never skipped.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import types
from collections.abc import Iterator, Mapping
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import ErrorDetails, to_json

from models.errors import InvalidInput
from models.settings import Settings

PREFIX = "COUNTERSIGN_"
CONFIG = "COUNTERSIGN_CONFIG"
"""Path of the file that overrides the shipped defaults."""
SNAPSHOT = "COUNTERSIGN_SETTINGS"
"""Path of complete settings that the launcher wrote for its children; nothing else is read then."""
FILE = "countersign.toml"
SECRET = ("token", "api_key")

Tree = dict[str, Any]


def load(environ: Mapping[str, str] | None = None, folder: Path | None = None) -> Settings:
    """Read the settings this process should use.

    Raises:
        InvalidInput: a file or variable does not fit; names field, value and remedy.
    """
    environ = os.environ if environ is None else environ
    if given := environ.get(SNAPSHOT):
        return restore(Path(given))
    tree = shipped()
    chosen = chosen_file(environ, folder)
    if chosen is not None:
        tree = _merged(tree, _toml(chosen))
    return _checked(_with_variables(tree, environ))


def shipped() -> Tree:
    """The defaults that come with the code."""
    return tomllib.loads(resources.files("temporal").joinpath(FILE).read_text("utf-8"))


def chosen_file(environ: Mapping[str, str] | None = None, folder: Path | None = None) -> Path | None:
    """The file that overrides the shipped defaults, if there is one.

    Raises:
        InvalidInput: `COUNTERSIGN_CONFIG` names a file that is not there.
    """
    environ = os.environ if environ is None else environ
    if named := environ.get(CONFIG):
        if not Path(named).is_file():
            raise InvalidInput.field(CONFIG, named, "name a readable TOML file, or unset the variable")
        return Path(named)
    usual = (folder or Path.cwd()) / FILE
    return usual if usual.is_file() else None


def snapshot(settings: Settings, path: Path) -> None:
    """Write complete settings, secrets included, for `SNAPSHOT`; only the owner may read the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(to_json(_unveiled(settings.model_dump())))


def restore(path: Path) -> Settings:
    """Read what `snapshot` wrote.

    Raises:
        InvalidInput: the file is gone or is something else.
    """
    try:
        return _checked(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput.field(
            SNAPSHOT, str(path), f"start it through `countersign up` ({error})"
        ) from None


def _toml(path: Path) -> Tree:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput.field(CONFIG, str(path), f"correct the TOML: {error}") from None


def _merged(base: Tree, over: Tree) -> Tree:
    both = {key: value for key, value in over.items() if key in base}
    nested = {
        key: _merged(base[key], value)
        for key, value in both.items()
        if isinstance(base[key], dict) and isinstance(value, dict)
    }
    return {**base, **over, **nested}


def _with_variables(tree: Tree, environ: Mapping[str, str]) -> Tree:
    tree = deepcopy(tree)
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in (CONFIG, SNAPSHOT):
            _put(tree, name, name.removeprefix(PREFIX).lower().split("__"), environ[name])
    return tree


def _put(tree: Tree, variable: str, path: list[str], text: str) -> None:
    here: Any = tree
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            here = _entry(here, variable, part)
            if last:
                raise InvalidInput.field(variable, text, f"add the field, for instance {variable}__URL")
        elif not isinstance(here, dict):
            raise InvalidInput.field(variable, text, f"{path[depth - 1]} has no parts; drop __{part.upper()}")
        elif last:
            here[part] = _value(variable, text)
        else:
            here = here.setdefault(part, {})


def _entry(entries: list[Any], variable: str, wanted: str) -> Any:
    """Entry of a list by its name; variables cannot spell dashes and dots."""
    named = {str(entry["name"]): entry for entry in entries if isinstance(entry, dict) and "name" in entry}
    for name, entry in named.items():
        if name.replace("-", "_").replace(".", "_") == wanted:
            return entry
    if entries and not named:
        raise InvalidInput.field(
            variable, wanted, 'its entries have no names; write the list, as ["one", "two"]'
        )
    raise InvalidInput.field(variable, wanted, f"name one of the entries: {', '.join(named) or 'none'}")


def _value(variable: str, text: str) -> Any:
    if text == "null":
        return None
    if not text.startswith(("[", "{")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput.field(variable, text, f"write lists and tables as JSON ({error})") from None


def _checked(tree: Tree) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _refusal(tree, error.errors()[0]) from None


def _refusal(tree: Tree, error: ErrorDetails) -> InvalidInput:
    where = [str(part) for part in error["loc"]]
    secret = where[-1] in SECRET
    value = "(hidden)" if secret else error["input"]
    name = ".".join(_names(tree, where))
    variable = PREFIX + "__".join(_names(tree, where)).upper()
    place = f"it stands in {FILE}, or in the environment as {variable}"
    return InvalidInput.field(name, value, f"{_remedy(error, where)} ({place})")


def _names(tree: Any, where: list[str]) -> Iterator[str]:
    """The path as people write it: entries of lists by their names."""
    for part in where:
        if isinstance(tree, list):
            tree = cast("list[Any]", tree)[int(part)]
            yield str(tree.get("name", part)) if isinstance(tree, dict) else part
        else:
            tree = cast(Tree, tree).get(part) if isinstance(tree, dict) else None
            yield part


def _remedy(error: ErrorDetails, where: list[str]) -> str:
    if error["type"] == "missing":
        return f"add {where[-1]}"
    if error["type"] in ("tuple_type", "list_type"):
        return 'write a list, as ["one", "two"]'
    if error["type"] != "extra_forbidden":
        return error["msg"][0].lower() + error["msg"][1:]
    known = sorted(_fields(where[:-1]))
    near = difflib.get_close_matches(where[-1], known, n=1)
    return f"did you mean {near[0]}?" if near else f"remove it; known here: {', '.join(known)}"


def _fields(where: list[str]) -> set[str]:
    """Field names of the settings model that stands at a path."""
    model: type[BaseModel] = Settings
    for part in where:
        if part in model.model_fields:
            model = next(_models(model.model_fields[part].annotation), model)
    return set(model.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    plain = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if plain and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _unveiled(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return {key: _unveiled(item) for key, item in cast(Tree, value).items()}
    if isinstance(value, list | tuple):
        return [_unveiled(item) for item in cast("list[Any]", value)]
    return value
