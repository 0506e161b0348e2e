"""The one error of this package."""


class DataError(Exception):
    """Data or a partition that cannot be used; the message says what is wrong and what to do."""
