"""The one kind of error that is the reader's to mend."""

from __future__ import annotations


class InputError(Exception):
    """What was given is wrong: a file, a row, a setting, an artifact.

    The message is one line that names the culprit, says what was expected and what to do next. It
    is shown without a traceback and never retried: the same input fails the same way again.
    """
