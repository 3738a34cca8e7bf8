"""The one kind of error that is the reader's to mend."""

from __future__ import annotations

EXIT_INPUT_ERROR = 2
"""Exit status of a program that was given something wrong, as of one that was called wrongly."""


class InputError(Exception):
    """What was given is wrong: a file, a row, a setting, an artifact.

    The message is one line that names the culprit, says what was expected and what to do next. It
    is shown without a traceback and never retried: the same input fails the same way again.
    """
