"""Exceptions that are part of the interface."""


class UnsupportedError(RuntimeError):
    """No backend, or not the one asked for, can serve a call; the message lists every reason."""
