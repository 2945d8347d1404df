"""The order in which a model runs its modules, read from the code of their forwards.

`named_modules()` gives the order in which modules were made, which is another one: diffusers' UNets make their middle
block last, and a block makes all its attentions before all its temporal ones. A forward's code says which child it
turns to first, and which lists of children it walks through side by side.
"""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from headscope.models.structure.source import source_tree

# calls that look at a module without running it
_LOOKS = frozenset({"len", "hasattr", "getattr", "isinstance"})
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class Part(NamedTuple):
    """An attribute of self that a forward uses, or elements of one: an index or a slice of it."""

    name: str
    elements: int | slice | None = None


class Turn(NamedTuple):
    """One place of a forward's code.

    Attributes:
        parts: one, or several through which a loop walks side by side.
        runs: whether it is called or walked through; else its name is only mentioned.
    """

    parts: tuple[Part, ...]
    runs: bool


def execution_order(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Names of `named_modules()` in the order in which a forward first reaches each, as far as its code says.

    Children that the code doesn't name come last, in the order in which they were made.
    """
    modules = dict(model.named_modules())
    wanted = {id(modules[name]): name for name in names}
    # those, and whatever holds one
    holding = {id(modules[part]) for name in names for part in _prefixes(name)}
    return [wanted[id(module)] for module in _reached(model, holding) if id(module) in wanted]


def _prefixes(name: str) -> list[str]:
    """The path of a module and the paths of all modules that hold it."""
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _reached(module: nn.Module, left: set[int]) -> Iterator[nn.Module]:
    """Yield the module and all below it whose ids are in `left`, and remove them from it."""
    if id(module) not in left:
        return
    left.discard(id(module))
    yield module
    # not named_children(), which gives a module of two names one of them
    children = {name: child for name, child in module._modules.items() if child is not None}
    turns = () if not children or isinstance(module, _LISTS) else _turns_of_class(type(module))
    run = {part.name for turn in turns if turn.runs for part in turn.parts}
    for turn in turns:
        parts = [part for part in turn.parts if part.name in children and (turn.runs or part.name not in run)]
        rows = [_elements(children[part.name], part.elements, alone=len(parts) == 1) for part in parts]
        # a loop over several ends with the shortest
        for index in range(min(map(len, rows), default=0)):
            for row in rows:
                yield from _reached(row[index], left)
    for child in children.values():
        yield from _reached(child, left)


def _elements(child: nn.Module, elements: int | slice | None, alone: bool) -> list[nn.Module]:
    """The parts that a loop meets one after the other, or a call runs."""
    if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) or (alone and elements is None):
        return [child]
    members = list(child.children())
    if isinstance(elements, int):
        return members[elements:][:1]
    return members if elements is None else members[elements]


@cache
def _turns_of_class(kind: type) -> tuple[Turn, ...]:
    return tuple(_with_methods(kind, "forward", frozenset()))


def _with_methods(kind: type, name: str, within: frozenset[str]) -> Iterator[Turn]:
    """The turns of a method, with those of the methods that it names in their place."""
    for turn in _turns_of(getattr(kind, name)):
        named = turn.parts[0].name
        if inspect.isfunction(getattr(kind, named, None)):
            if named not in within:
                yield from _with_methods(kind, named, within | {name, named})
        else:
            yield turn


@cache
def _turns_of(function: Callable[..., Any]) -> tuple[Turn, ...]:
    """The attributes of self that a function's code names, in its order; () where there is no source."""
    return tuple(_Reader().turns(source_tree(function)))


class _Reader:
    """Reads one function's code in the order in which it runs."""

    def __init__(self) -> None:
        # what local names stand for, as in blocks = zip(self.resnets, self.attentions)
        self._locals: dict[str, tuple[Part, ...]] = {}

    def turns(self, node: ast.AST) -> Iterator[Turn]:
        part = _part(node)
        if part is not None:
            yield Turn((part,), runs=False)
        elif isinstance(node, ast.Call):
            yield from self._of_call(node)
        elif isinstance(node, ast.FunctionDef):
            yield from self._of_function(node)
        elif isinstance(node, (ast.For, ast.comprehension)):
            yield from self._of_loop(node)
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            yield from self._of_each([*node.generators, node.elt])
        else:
            yield from self._of_each(ast.iter_child_nodes(node))

    def _of_each(self, nodes: Iterable[ast.AST]) -> Iterator[Turn]:
        for node in nodes:
            yield from self.turns(node)

    def _of_function(self, node: ast.FunctionDef) -> Iterator[Turn]:
        for statement in node.body:
            # not inside of an if: there the name may stand for something else
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                self._locals[statement.targets[0].id] = self._walked(statement.value)
            yield from self.turns(statement)

    def _of_call(self, node: ast.Call) -> Iterator[Turn]:
        if getattr(node.func, "id", None) in _LOOKS:
            return
        called = _part(node.func)
        yield from self._of_each(part for part in _arguments_first(node) if not (called and part is node.func))
        if called:
            yield Turn((called,), runs=True)

    def _of_loop(self, node: ast.For | ast.comprehension) -> Iterator[Turn]:
        walked = self._walked(node.iter)
        # what the body takes by the loop's counter goes side by side, too
        walked += tuple(part for statement in getattr(node, "body", ()) for part in _counted(statement))
        if walked:
            yield Turn(walked, runs=True)
        yield from self._of_each(child for child in ast.iter_child_nodes(node) if child is not node.iter)

    def _walked(self, node: ast.AST) -> tuple[Part, ...]:
        """The parts in an expression that a loop walks through."""
        part = _part(node)
        if part is not None:
            return (part,)
        if isinstance(node, ast.Name):
            return self._locals.get(node.id, ())
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in _LOOKS:
            return ()
        return tuple(part for child in ast.iter_child_nodes(node) for part in self._walked(child))


def _part(node: ast.AST) -> Part | None:
    """X of `self.X`, and i of `self.X[i]`."""
    if isinstance(node, ast.Subscript):
        whole = _part(node.value)
        return None if whole is None or whole.elements is not None else Part(whole.name, _constant(node.slice))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return Part(node.attr)
    return None


def _constant(node: ast.AST) -> int | slice | None:
    """An index or slice that the code spells out; None for others, which may be any element."""
    try:
        if isinstance(node, ast.Slice):
            bounds = [
                None if bound is None else ast.literal_eval(bound) for bound in (node.lower, node.upper, node.step)
            ]
            return slice(*bounds)
        index = ast.literal_eval(node)
    except ValueError:
        return None
    return index if isinstance(index, int) else None


def _counted(node: ast.AST) -> Iterator[Part]:
    """X of every `self.X[i]` in a loop's body."""
    part = _part(node) if isinstance(node, ast.Subscript) else None
    if part is not None and isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name):
        yield part
        return
    for child in _arguments_first(node):
        yield from _counted(child)


def _arguments_first(node: ast.AST) -> Iterable[ast.AST]:
    """The parts of a node; of a call of self's, what computes its arguments before what is called."""
    if isinstance(node, ast.Call) and _part(node.func) is not None:
        return [*node.args, *node.keywords, node.func]
    return ast.iter_child_nodes(node)
