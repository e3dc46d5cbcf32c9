"""The one exception that means "the user can fix this": the command line prints its text and exits with 2.

Everything else that escapes is a bug of ours and keeps its traceback. A message names the file, line, key or rank
it is about, and ends with what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input, with a message written for the person who has to act on it."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the choice closest to a misspelt `name`, or an empty string if none is close."""
    close = get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
