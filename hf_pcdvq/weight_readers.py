"""Finds layers and embeddings whose weight is read by other code than their own, which a packed weight would refuse.

Most modules call their layers. Some compute with `self.proj.weight` instead, or take its dtype for that of their
inputs. Whether they do is in their source: no inputs are needed, and branches that only other devices take count too.
Branches that the module's configuration rules out do not (`if self.config.pretraining_tp > 1`).
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from functools import cache
from typing import Any

from torch import nn

_WEIGHT = "weight"
_HARMLESS = {"device", "is_meta", "requires_grad"}  # a packed weight has the same as a dense one
# The path from a variable to the layer that is read: of `self.blocks[i].down_proj.weight` it is
# ("self", "blocks", "*", "down_proj").
Path = tuple[str, ...]
_COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ORDER = {ast.Lt, ast.LtE, ast.Gt, ast.GtE}
_UNKNOWN = object()


def read_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The linear layers and embeddings of a model whose weight the forward pass of another module reads, each with the reason.

    Reads are followed through methods and properties of the module that reads, through local variables and loops. Of
    a variable whose origin is not clear (`for i, block in enumerate(...)`), only the rest of the path counts. A module
    without source code, such as one defined in an interactive session, is taken to read nothing.
    """
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        paths = _paths_read_by(owner)
        if not paths:
            continue
        for layer in _layers_at(owner, paths):
            found.setdefault(layer, f"{type(owner).__name__} reads its weight")
    return found


def reads_own_weight(module: nn.Module) -> bool:
    """Whether an embedding of a class of its own computes with its weight, beside what `nn.Embedding` does with it."""
    return ("self",) in _all_paths_read_by(module, nn.Embedding)


def _layers_at(owner: nn.Module, paths: set[Path]) -> list[nn.Module]:
    kinds = (nn.Linear, nn.Embedding)
    layers = {name: module for name, module in owner.named_modules() if isinstance(module, kinds) and name}
    patterns = []
    for root, *names in paths:
        rest = r"\.".join("[^.]+" if name == "*" else re.escape(name) for name in names)
        patterns.append(re.compile(rest if root == "self" else rf"(.+\.)?{rest}"))
    return [layer for name, layer in layers.items() if any(pattern.fullmatch(name) for pattern in patterns)]


def _paths_read_by(owner: nn.Module) -> set[Path]:
    """Paths to the layers whose weight the forward pass of a module reads."""
    from transformers import PreTrainedModel  # here: it imports much, and this module is imported to register

    return {path for path in _all_paths_read_by(owner, PreTrainedModel) if len(path) > 1}


def _all_paths_read_by(owner: nn.Module, known: type[nn.Module]) -> set[Path]:
    """The same, and that to the module itself if it reads its own weight. What `known` and its bases do does not count."""
    own = [base for base in type(owner).__mro__ if base not in known.__mro__]
    paths: set[Path] = set()
    visited: set[str] = set()
    pending = ["forward"]
    while pending:
        name = pending.pop()
        if name in visited:
            continue
        visited.add(name)
        for base in own:
            if name not in vars(base):
                continue
            tree = _source(vars(base)[name])
            if tree is not None:
                reader = _Reader(owner)
                reader.visit(tree)
                paths |= reader.paths
                pending += reader.used
            if tree is None or not reader.calls_super:
                break
    return paths


def _source(member: Any) -> ast.AST | None:
    """The syntax tree of a method or property; None for anything else, and for what has no source."""
    if isinstance(member, property):
        member = member.fget
    member = inspect.unwrap(member.__func__ if isinstance(member, (classmethod, staticmethod)) else member)
    return _parsed(member) if inspect.isfunction(member) else None


@cache
def _parsed(function: Any) -> ast.AST | None:
    try:
        source = inspect.getsource(function)
    except OSError:
        return None
    return ast.parse(f"if True:\n{source}" if source[0].isspace() else source)


class _Reader(ast.NodeVisitor):
    """Collects what one function reads.

    Args:
        owner: the module whose function it is; its configuration decides between branches.

    Attributes:
        paths: of the layers whose weight it reads.
        used: names of the attributes of `self` that it uses, methods among them.
        calls_super: whether it may continue in a base class.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner
        self.paths: set[Path] = set()
        self.used: list[str] = []
        self.calls_super = False
        self._variables: dict[str, Path] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, self._path(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind_element(node)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        for generator in node.generators:  # which follow the element in the tree
            self._bind_element(generator)
        self.generic_visit(node)

    visit_GeneratorExp = visit_ListComp

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        value = self._value(node.test)
        for statement in [*(node.body if value else []), *(node.orelse if value is _UNKNOWN or not value else [])]:
            self.visit(statement)

    def _value(self, node: ast.expr) -> Any:
        """What a condition on the module's own settings is; `_UNKNOWN`, which is true, if it depends on anything else."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            return self._setting(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            return _UNKNOWN if value is _UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            values = [self._value(part) for part in node.values]
            decisive = isinstance(node.op, ast.Or)
            if any(value is not _UNKNOWN and bool(value) is decisive for value in values):
                return decisive
            return _UNKNOWN if _UNKNOWN in values else not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARISONS:
            pair = self._value(node.left), self._value(node.comparators[0])
            same = _UNKNOWN not in pair and (type(pair[0]) is type(pair[1]) or None in pair)
            unordered = None in pair and type(node.ops[0]) in _ORDER
            return _COMPARISONS[type(node.ops[0])](*pair) if same and not unordered else _UNKNOWN
        return _UNKNOWN

    def _setting(self, node: ast.Attribute) -> Any:
        """The value of a plain attribute of the module, of its configuration mostly."""
        path = self._path(node)
        if path is None or path[0] != "self" or path[-1] == "training":
            return _UNKNOWN
        value: Any = self._owner
        for name in path[1:]:
            value = getattr(value, name, _UNKNOWN)
        return value if value is None or isinstance(value, (bool, int, float, str)) else _UNKNOWN

    def _bind_element(self, loop: ast.For | ast.comprehension) -> None:
        path = self._path(loop.iter)
        self._bind(loop.target, None if path is None else (*path, "*"))

    def _bind(self, target: ast.expr, path: Path | None) -> None:
        if isinstance(target, ast.Name):
            self._variables[target.id] = (target.id,) if path is None else path

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is not None and node.attr in _HARMLESS and path[-2:-1] == (_WEIGHT,):
            return
        if path == ("self", _WEIGHT, "dtype"):  # a packed weight says the dense one's
            return
        if path is not None and node.attr == _WEIGHT:
            self.paths.add(path[:-1])
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            self.used.append(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.calls_super = self.calls_super or node.id == "super"

    def _path(self, node: ast.AST) -> Path | None:
        """The path that an expression spells; None if it is not a chain of attributes of a variable."""
        names: list[str] = []
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            names.append(node.attr if isinstance(node, ast.Attribute) else "*")
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        return (*self._variables.get(node.id, (node.id,)), *reversed(names))
