"""A method compiled again from its own source, changed on the way.

Only source that compiles to the very bytecode of the function at hand is trusted, so that an edited file,
a rewritten assertion or an unseen decorator means: left alone. Globals, closure cells, defaults, file name
and line numbers are the original's; nothing is executed.
"""

import __future__

import ast
import inspect
from types import CodeType, FunctionType
from typing import Any

_FUTURE = 0
for _name in __future__.all_feature_names:
    _FUTURE |= getattr(__future__, _name).compiler_flag


class Unfusable(Exception):
    """Why a forward cannot be rewritten."""


def plain_forward(cls: type) -> FunctionType:
    """The function that `cls` defines as forward, out of the wrappers that subclassing puts around it.

    transformers' GradientCheckpointingLayer wraps forward in __init_subclass__: a subclass made by us
    gets the same wrapper again, so the function inside is the one to rewrite. No other wrapper is.
    """
    hooks = [
        vars(c)["__init_subclass__"].__func__.__code__
        for c in cls.__mro__
        if hasattr(vars(c).get("__init_subclass__"), "__func__")
        and hasattr(vars(c)["__init_subclass__"].__func__, "__code__")
    ]
    forward: Any = cls.forward
    used = set()
    while isinstance(forward, FunctionType) and hasattr(forward, "__wrapped__"):
        owner = next((h for h in hooks if forward.__code__ in h.co_consts), None)
        if owner is None:
            raise Unfusable("its forward is decorated")
        used.add(owner)
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType):
        raise Unfusable("its forward is not a Python function")
    if set(hooks) - used:
        raise Unfusable("its class hooks into subclassing")
    return forward


def parse(function: FunctionType) -> ast.FunctionDef:
    """The definition of `function` with its own line numbers, without annotations and decorators."""
    try:
        lines, start = inspect.getsourcelines(function)
        source = "".join(lines)
        indented = source[:1].isspace()
        tree = ast.parse("if 1:\n" + source if indented else source)
    except (OSError, TypeError, SyntaxError) as error:
        raise Unfusable(f"its source cannot be read ({type(error).__name__})") from None
    node: Any = tree.body[0]
    if indented:
        node = node.body[0]
    if not isinstance(node, ast.FunctionDef) or node.name != function.__name__:
        raise Unfusable("its source is not one function")
    ast.increment_lineno(node, start - (2 if indented else 1))
    node.decorator_list, node.returns = [], None
    arguments = node.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*every, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    if not _same(_compile(function, node), function.__code__):
        raise Unfusable("its source is not what runs")
    return node


def recompile(function: FunctionType, node: ast.FunctionDef) -> FunctionType:
    """`function` with the body `node`."""
    code, old = _compile(function, node), function.__code__
    if code.co_freevars != old.co_freevars:
        raise Unfusable("its closure cannot be rebuilt")
    changes: dict[str, Any] = {"co_firstlineno": old.co_firstlineno, "co_flags": old.co_flags}
    if hasattr(old, "co_qualname"):
        changes["co_qualname"] = old.co_qualname
    made = FunctionType(
        code.replace(**changes),
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


def _compile(function: FunctionType, node: ast.FunctionDef) -> CodeType:
    """The code of `node` in a scope like the original's: same free variables, same private names."""
    old = function.__code__
    outer = function.__qualname__.split(".")[:-1]
    inner: ast.stmt = node
    names = [node.name]
    if outer and outer[-1] != "<locals>":
        inner = ast.ClassDef(outer[-1], bases=[], keywords=[], body=[inner], decorator_list=[])
        names.insert(0, outer[-1])
        if "type_params" in ast.ClassDef._fields:
            inner.type_params = []  # type: ignore[attr-defined]
    free = [n for n in old.co_freevars if n != "__class__" or len(names) == 1]
    arguments = ast.arguments([], [ast.arg(n) for n in free], None, [], [], None, [])
    # never run; `global` keeps the method's uses of that name what they were
    body = [inner] if names[0] in free else [ast.Global([names[0]]), inner]
    factory = ast.FunctionDef("_factory", arguments, body, [], None)
    if "type_params" in ast.FunctionDef._fields:
        factory.type_params = []  # type: ignore[attr-defined]
    module = ast.Module([factory], [])
    code = compile(
        ast.fix_missing_locations(module),
        old.co_filename,
        "exec",
        flags=old.co_flags & _FUTURE,
        dont_inherit=True,
    )
    for name in ["_factory", *names]:
        inside = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name]
        code = inside[-1]
    return code


_FIELDS = ["co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_posonlyargcount", "co_kwonlyargcount"]


def _same(a: CodeType, b: CodeType) -> bool:
    if any(getattr(a, f) != getattr(b, f) for f in _FIELDS) or len(a.co_consts) != len(b.co_consts):
        return False
    if (a.co_flags ^ b.co_flags) & ~inspect.CO_NESTED:
        return False
    for x, y in zip(a.co_consts, b.co_consts, strict=True):
        if isinstance(x, CodeType) and isinstance(y, CodeType):
            if not _same(x, y):
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True
