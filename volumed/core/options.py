"""Text that people wrote, read into a driver's options; errors name the key and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

from pydantic import ValidationError

from volumed.driver import Options
from volumed.errors import InvalidRequest


def option_keys(model: type[Options]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the word nearest to the one given, or all there are."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known are: {', '.join(choices)}" if choices else "there are none"


def read_options(
    model: type[Options],
    values: Mapping[str, object],
    *,
    subject: str,
    locate: Callable[[str], str] | None = None,
) -> Options:
    """An instance of `model`. `locate` tells where a key is written. Raises InvalidRequest for the first value that
    does not fit; a key that does not exist comes before one that is missing, which it most likely is, misspelt."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)
        first = next((each for each in wrong if each["type"] == "extra_forbidden"), wrong[0])
        key = ".".join(str(part) for part in first["loc"])
        if locate is not None:
            subject = f"{locate(key)}: {subject}"
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(
                f"there is no option {key!r}", subject=subject, hint=nearest(key, option_keys(model))
            ) from None
        raise InvalidRequest(f"option {key!r}: {first['msg']}", subject=subject) from None
