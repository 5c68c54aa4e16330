"""Base of everything that a user writes down or a file keeps: immutable, checked, with errors in one sentence."""

from __future__ import annotations

from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from flame_moe.errors import RecipeError, nearest


class Description(BaseModel):
    """Base of every description: immutable, no unknown keys, errors in one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parse(cls, data: Any, *, where: str) -> Self:
        """Validate plain data.

        Raises:
            RecipeError: naming the key, what is wrong with it and the nearest known key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise _sentence(cls, error, where) from None

    def plain(self) -> dict[str, Any]:
        """The description as JSON-ready data; `parse` reads it back."""
        return self.model_dump(mode="json")


def _sentence(cls: type[BaseModel], error: ValidationError, where: str) -> RecipeError:
    """Turn pydantic's first complaint into one sentence with place and mend; a misspelt key goes first."""
    complaints = error.errors(include_url=False)
    first = next((c for c in complaints if c["type"] == "extra_forbidden"), complaints[0])
    path = [str(part) for part in first["loc"]]
    place = f"{where}: {'.'.join(path)}" if path else where
    if first["type"] == "extra_forbidden":
        known = _fields_at(cls, path[:-1])
        return RecipeError(f"unknown key '{path[-1]}'", where=place, mend=nearest(path[-1], known))
    if first["type"] == "missing":
        return RecipeError(f"the key '{path[-1]}' is missing", where=place, mend=f"Add '{path[-1]}'.")
    if first["type"] == "literal_error":
        expected = str(first.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ")
        known = [word.strip() for word in expected.split(",") if word.strip()]
        return RecipeError(f"unknown value {first['input']!r}", where=place, mend=nearest(str(first["input"]), known))
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(first["input"], dict) else f", not {first['input']!r}"
    return RecipeError(message[:1].lower() + message[1:] + shown, where=place)


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the description found by walking `path` from `cls`."""
    current: Any = cls
    for part in path:
        # A part that is no field is a place in a list or a key of a table: the description stays the same.
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            leaves = _flatten(current.model_fields[part].annotation)
            models = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
            current = models[0] if models else None
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _flatten(annotation: Any) -> list[Any]:
    args = get_args(annotation)
    return [annotation] if not args else [leaf for arg in args for leaf in _flatten(arg)]
