"""Objects whose pickles call a function."""

from collections.abc import Callable


class Reduced:
    """Calls a function when it is unpickled: Reduced(os.mkdir, "folder") makes a folder."""

    def __init__(self, function: Callable[..., object], *arguments: object):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced
