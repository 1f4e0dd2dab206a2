"""JSON from anywhere: parsed, and compared with the form in which it was written, before anything in it is used.

A form is a type (`float` takes whole numbers too, `int` takes no bool), `None`, `[form]` for a list of any length,
`{key: form}` for an object that has these keys (and maybe others), or a tuple of forms of which one must fit.
"""

import json
from typing import Any


def parse(data: bytes | str, form: Any) -> Any:
    """The value in `data`.

    Raises:
        ValueError: not JSON, NaN or infinite numbers, a key twice in one object, or not of the form; in one line.
    """
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if said := misfit(value, form):
        raise ValueError(said)
    return value


def misfit(value: Any, form: Any, where: str = "it") -> str | None:
    """What keeps `value` from being of the form, None when nothing does."""
    if isinstance(form, tuple):
        found = [misfit(value, one, where) for one in form]
        return None if None in found else found[-1]
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{where} is no object"
        lacking = next((key for key in form if key not in value), None)
        if lacking is not None:
            return f"{where} lacks {lacking!r}"
        inside = ((value[key], one, f"{key!r} of {where}") for key, one in form.items())
    elif isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        inside = ((one, form[0], f"entry {index} of {where}") for index, one in enumerate(value))
    else:
        return None if _is(value, form) else f"{where} is {_short(value)}"
    return next((said for one in inside if (said := misfit(*one))), None)


def _is(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}…"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_short(next(n for n in names if names.count(n) > 1))} stands twice in one object")
    return made


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")
