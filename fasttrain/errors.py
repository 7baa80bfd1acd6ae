"""The one exception that reaches a person as a line instead of a traceback."""

from fasttrain.printable import printable


class UsageError(Exception):
    """A mistake that its maker can mend: the message is one line that names the offending value and the remedy.

    ``everywhere`` tells that all ranks raise it together, so that one of them speaks for all.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(printable(message))
        self.everywhere = everywhere
