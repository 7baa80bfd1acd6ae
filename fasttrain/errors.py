"""The exceptions that reach a person as a line instead of a traceback."""

from fasttrain.printable import printable


class UsageError(Exception):
    """A mistake that its maker can mend: the message is one line that names the offending value and the remedy.

    ``everywhere`` tells that all ranks raise it together, so that one of them speaks for all.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(printable(message))
        self.everywhere = everywhere


class NotFinite(UsageError):
    """Features, scores or weights of which no metric can be made; the message says which, and why where that is known.

    Raised on all ranks together. A command ends with it; while training, the metric is NaN and this its line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, everywhere=True)
