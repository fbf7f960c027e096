"""Finds a residual addition and the norm that follows it in a block's forward, and fuses the two.

    h = residual + h                        h, n = self._fastllm_add_norm(residual, h, self.norm)
    residual = h                  ->        residual = h
    h = self.norm(h)                        h = n

    x = x + self.f(y)                       x, n = self._fastllm_add_norm(x, self.f(y), self.norm2)
    x = x + self.g(self.norm2(x))    ->     x = x + self.g(n)

    self.norm(h + residual)       ->        self._fastllm_norm_of_sum(self.norm, h, residual)

Between addition and norm only names may be assigned to names: nothing else could see another
order. An `if` whose test cannot depend on the sum is handled by moving addition and norm into
both of its branches.
"""

import ast
import copy
import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

from fastllm.swap.fused import add_norm, norm_of_sum
from fastllm.swap.recompile import Unfusable, definition, plain_forward, rewritten


@dataclass(frozen=True)
class FuseAdds:
    """The recipe of a block: `norms` names the norm children whose addition is fused into them."""

    norms: tuple[str, ...]

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: type) -> dict[str, Any]:
        helpers = {
            "_fastllm_add_norm": staticmethod(add_norm),
            "_fastllm_norm_of_sum": staticmethod(norm_of_sum),
        }
        try:
            function = plain_forward(base)
            change = rewritten(function, lambda node: _Rewriter(node, self.norms).run())
            return {**helpers, "forward": change}
        except Unfusable:  # a pickle loaded where the source is another one: the original runs
            return helpers


def sites(base: type, block: nn.Module) -> tuple[str, ...]:
    """Names of the children of `block` that its forward calls on a sum.

    Raises Unfusable where there are some and the forward cannot be rewritten, or has no source to
    tell.
    """
    names = tuple(name for name, child in block._modules.items() if child is not None)
    inner = inspect.unwrap(base.forward)  # type: ignore[attr-defined]
    if not isinstance(inner, FunctionType):
        return ()
    rewriter = _Rewriter(definition(inner), names, block)
    rewriter.run()
    found = tuple(dict.fromkeys(rewriter.found))
    if found:
        rewritten(plain_forward(base), lambda node: _Rewriter(node, found).run())
    return found


class _Rewriter:
    """Rewrites one function in place; `found` lists the norms of the places that can be reached."""

    def __init__(
        self, node: ast.FunctionDef, norms: tuple[str, ...], block: nn.Module | None = None
    ) -> None:
        self.node, self.norms, self.block = node, frozenset(norms), block
        first = [*node.args.posonlyargs, *node.args.args][:1]
        self.me = first[0].arg if first else ""
        self.found: list[str] = []
        self.dead = 0
        self.count = 0

    def run(self) -> ast.FunctionDef:
        stored = (n for n in ast.walk(self.node) if isinstance(n, ast.Name))
        if any(n.id == self.me and not isinstance(n.ctx, ast.Load) for n in stored):
            raise Unfusable(f"its forward assigns to {self.me}")
        self.node.body = self.statements(self.node.body)
        return self.node

    def statements(self, body: list[ast.stmt]) -> list[ast.stmt]:
        body = list(body)
        out: list[ast.stmt] = []
        at = left = 0
        while at < len(body):
            name = _sum(body[at])
            if name is not None:
                self.split(body, at, name)
            if _sum(body[at]) is not None:
                self.fuse(body, at)
            out.append(self.inside(body[at]))
            if self.leaves(body[at]):
                left += 1
                self.dead += 1
            at += 1
        self.dead -= left
        return out

    def split(self, body: list[ast.stmt], at: int, name: str) -> None:
        """sum; if test: ...; norm  ->  if test: sum; ...; norm  else: sum; norm."""
        branch = body[at + 1] if at + 1 < len(body) else None
        if not isinstance(branch, ast.If) or not _pure(branch.test, name):
            return
        end = self.norm_after(body, at + 1, {name})
        if end is None:
            return
        tail = body[at + 2 : end[0] + 1]
        whole = ast.If(
            branch.test,
            [body[at], *branch.body, *tail],
            [copy.deepcopy(s) for s in (body[at], *branch.orelse, *tail)],
        )
        body[at : end[0] + 1] = [ast.copy_location(whole, branch)]

    def norm_after(
        self, body: list[ast.stmt], at: int, names: set[str]
    ) -> tuple[int, ast.Call] | None:
        """The first norm call on one of `names` after body[at], past assignments of names only."""
        names = set(names)
        for index in range(at + 1, len(body)):
            statement = body[index]
            call = self.first_call(statement)
            if call is not None:
                argument = call.args[0]
                return (
                    (index, call)
                    if isinstance(argument, ast.Name) and argument.id in names
                    else None
                )
            alias = _alias(statement)
            if alias is None:
                return None
            target, source = alias
            if source in names:
                names.add(target)
            else:
                names.discard(target)
        return None

    def first_call(self, statement: ast.stmt) -> ast.Call | None:
        """The norm call that a statement evaluates before anything else that does something."""
        simple = ast.Assign | ast.AugAssign | ast.Return | ast.Expr
        if not isinstance(statement, simple) or statement.value is None:
            return None
        for node in _evaluated(statement.value):
            if isinstance(node, ast.Call):
                return node if self.norm_name(node) is not None else None
            if not isinstance(node, ast.Name | ast.Attribute | ast.Constant):
                return None
        return None

    def norm_name(self, node: ast.Call) -> str | None:
        """The child's name in `self.child(argument)`."""
        func = node.func
        if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
            return None
        if not isinstance(func, ast.Attribute) or not isinstance(func.value, ast.Name):
            return None
        return func.attr if func.value.id == self.me and func.attr in self.norms else None

    def fuse(self, body: list[ast.stmt], at: int) -> None:
        statement: Any = body[at]
        name = statement.targets[0].id
        place = self.norm_after(body, at, {name})
        if place is None:
            return
        index, call = place
        normed = f"_fastllm_{self.count}"
        self.count += 1
        total = statement.value
        self.note(call)
        helper = self.helper("_fastllm_add_norm", [total.left, total.right, call.func], total)
        target = ast.Tuple(
            [ast.Name(name, ast.Store()), ast.Name(normed, ast.Store())], ast.Store()
        )
        body[at] = ast.copy_location(
            ast.Assign([ast.copy_location(target, total)], helper), statement
        )
        use = _Replace(call, ast.copy_location(ast.Name(normed, ast.Load()), call))
        body[index] = use.visit(body[index])
        if not isinstance(body[index], ast.Return):  # or memory would be held to the end of forward
            drop = ast.Delete([ast.Name(normed, ast.Del())])
            body.insert(index + 1, ast.copy_location(drop, body[index]))

    def inside(self, statement: ast.stmt) -> ast.stmt:
        """The blocks of a compound statement, and norm(a + b) in its expressions."""
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return statement
        alive = self.alive(statement)
        for field, value in ast.iter_fields(statement):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                dead = field in ("body", "orelse") and alive not in (None, field)
                self.dead += dead
                setattr(statement, field, self.statements(value))
                self.dead -= dead
            elif isinstance(value, list) and value and isinstance(value[0], ast.ExceptHandler):
                for handler in value:
                    handler.body = self.statements(handler.body)
            elif isinstance(value, ast.expr):
                setattr(statement, field, _Sums(self).visit(value))
        return statement

    def alive(self, statement: ast.stmt) -> str | None:
        """Which branch of `if self.flag:` this block takes, if the flag is its own."""
        test = getattr(statement, "test", None)
        if not isinstance(statement, ast.If) or not isinstance(test, ast.Attribute):
            return None
        if not isinstance(test.value, ast.Name) or test.value.id != self.me or self.block is None:
            return None
        flag = vars(self.block).get(test.attr)
        return None if type(flag) is not bool else "body" if flag else "orelse"

    def leaves(self, statement: ast.stmt) -> bool:
        """Whether `if self.flag:` always takes a branch that ends the function."""
        taken: Any = getattr(statement, self.alive(statement) or "", None)
        return bool(taken) and isinstance(taken[-1], ast.Return | ast.Raise)

    def note(self, call: ast.Call) -> None:
        if not self.dead:
            self.found.append(self.norm_name(call) or "")

    def helper(self, name: str, args: list[ast.expr], like: ast.AST) -> ast.Call:
        func = ast.Attribute(ast.Name(self.me, ast.Load()), name, ast.Load())
        return ast.copy_location(ast.Call(ast.copy_location(func, like), args, []), like)


class _Sums(ast.NodeTransformer):
    """self.norm(a + b) within one expression."""

    def __init__(self, rewriter: _Rewriter) -> None:
        self.rewriter = rewriter

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self.rewriter.norm_name(node) is None or not _is_sum(node.args[0]):
            return node
        self.rewriter.note(node)
        total: Any = node.args[0]
        return self.rewriter.helper(
            "_fastllm_norm_of_sum", [node.func, total.left, total.right], node
        )

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node  # may run at another time, with another self


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _sum(statement: ast.stmt) -> str | None:
    """The name in `name = a + b`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Name) and _is_sum(statement.value):
            return target.id
    return None


def _alias(statement: ast.stmt) -> tuple[str, str] | None:
    """(target, source) of `target = source`."""
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
        target = statement.targets[0]
        if len(statement.targets) == 1 and isinstance(target, ast.Name):
            return target.id, statement.value.id
    return None


def _pure(test: ast.expr, name: str) -> bool:
    """Whether a test only asks about identity, and not about `name`."""
    nodes = ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Name | ast.Constant | ast.Attribute
    kinds = ast.Is | ast.IsNot | ast.And | ast.Or | ast.Not | ast.Load
    top = test.operand if isinstance(test, ast.UnaryOp) else test
    parts = top.values if isinstance(top, ast.BoolOp) else [top]
    return all(isinstance(p, ast.Compare) for p in parts) and all(
        isinstance(n, kinds) or (isinstance(n, nodes) and getattr(n, "id", None) != name)
        for n in ast.walk(test)
    )


def _evaluated(node: ast.expr) -> Any:
    """Sub-expressions in the order of evaluation, until one that this does not know."""
    if isinstance(node, ast.Attribute):
        yield from _evaluated(node.value)
    elif isinstance(node, ast.BinOp):
        yield from _evaluated(node.left)
        yield from _evaluated(node.right)
    elif isinstance(node, ast.Call):
        yield from _evaluated(node.func)
        for argument in node.args:
            yield from _evaluated(argument)
    elif isinstance(node, ast.Tuple):
        for element in node.elts:
            yield from _evaluated(element)
        return
    yield node
