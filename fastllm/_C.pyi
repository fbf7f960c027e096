"""The compiled extension (csrc/module.cpp); each function's docstring lists its arguments."""

from typing import Any

def __getattr__(name: str) -> Any: ...
