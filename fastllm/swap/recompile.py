"""A method compiled again from its own source file, changed on the way.

The whole file is compiled, so that closures, private names and what the compiler infers from
imports come out as they did; nothing of it is executed. Only source that gives the very code
object of the function at hand is trusted: an edited file, a rewritten assertion or an unseen
decorator means "left alone". Globals, closure cells, defaults, file name and line numbers stay
the original's.
"""

import ast
import copy
import functools
import linecache
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any


class Unfusable(Exception):
    """Why a forward cannot be rewritten."""


def plain_forward(cls: type) -> FunctionType:
    """The function that `cls` defines as forward, out of the wrappers that subclassing puts
    around it.

    transformers' GradientCheckpointingLayer wraps forward in __init_subclass__: a subclass made
    by us gets the same wrapper again, so the function inside is the one to rewrite. No other
    wrapper is.
    """
    hooks = set(_subclass_hooks(cls))
    forward: Any = cls.forward  # type: ignore[attr-defined]
    used = set()
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__"):
        owner = next((h for h in hooks if forward.__code__ in h.co_consts), None)
        if owner is None:
            raise Unfusable("its forward is decorated")
        used.add(owner)
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType):
        raise Unfusable("its forward is not a Python function")
    if hooks - used:
        raise Unfusable("its class hooks into subclassing")
    return forward


def _subclass_hooks(cls: type) -> Iterator[CodeType]:
    for base in cls.__mro__:
        function: Any = getattr(vars(base).get("__init_subclass__"), "__func__", None)
        if hasattr(function, "__code__"):
            yield function.__code__


def definition(function: FunctionType) -> ast.FunctionDef:
    """A copy of the syntax tree of `function`; Unfusable where its source is missing."""
    return copy.deepcopy(_find(_scope(function), function))


def rewritten(
    function: FunctionType, transform: Callable[[ast.FunctionDef], ast.FunctionDef]
) -> FunctionType:
    """`function` with its definition passed through `transform`."""
    scope = copy.deepcopy(_scope(function))
    if _compile(scope, function) != function.__code__:
        raise Unfusable("its source is not what runs")
    node = _find(scope, function)
    node.body = transform(node).body
    code = _compile(ast.fix_missing_locations(scope), function)
    if code is None or code.co_freevars != function.__code__.co_freevars:
        raise Unfusable("its closure cannot be rebuilt")
    made = FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__annotations__ = dict(function.__annotations__)
    made.__qualname__, made.__module__ = function.__qualname__, function.__module__
    made.__doc__ = function.__doc__
    made.__dict__.update(function.__dict__)
    return made


def _scope(function: FunctionType) -> ast.Module:
    """The file of `function` without the classes and functions that it is not part of.

    Imports stay: which names are modules decides how calls of their attributes are compiled.
    """
    file = function.__code__.co_filename
    lines = linecache.getlines(file, function.__globals__)
    if not lines:
        raise Unfusable("it has no source")
    line = function.__code__.co_firstlineno
    body = [
        s
        for s in _parse("".join(lines)).body
        if _first(s) <= line <= (s.end_lineno or line)
        or not isinstance(s, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return ast.Module(body, [])


@functools.lru_cache(maxsize=8)
def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:
        raise Unfusable("its source cannot be parsed") from None


def _compile(scope: ast.Module, function: FunctionType) -> CodeType | None:
    """The code of `function` within `scope`, compiled as the original file was."""
    old = function.__code__
    return _search(compile(scope, old.co_filename, "exec", dont_inherit=True), old)


def _search(code: CodeType, old: CodeType) -> CodeType | None:
    if (code.co_name, code.co_firstlineno) == (old.co_name, old.co_firstlineno):
        return code
    inside = (_search(c, old) for c in code.co_consts if isinstance(c, CodeType))
    return next((c for c in inside if c is not None), None)


def _first(node: Any) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def _find(tree: ast.Module, function: FunctionType) -> Any:
    code = function.__code__
    for node in ast.walk(tree):
        named = isinstance(node, ast.FunctionDef) and node.name == code.co_name
        if named and _first(node) == code.co_firstlineno:
            return node
    raise Unfusable("its source is not one function")
