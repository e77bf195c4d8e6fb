"""What can be wrong with the data."""


class DataError(RuntimeError):
    """The data cannot be had, or not as asked; the message says what to do."""
