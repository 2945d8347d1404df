"""The diffusers classes that reach scaled_dot_product_attention, told from their source."""

import ast
import inspect
import sys
from functools import cache
from types import FunctionType

import diffusers.models
from diffusers.models.modeling_utils import ModelMixin

ATTENTION = frozenset({"scaled_dot_product_attention", "dispatch_attention_fn"})
# they name attention, but as machinery that every model shares
_SHARED = ("diffusers.models.modeling_utils", "diffusers.models.attention_dispatch")

# why a class whose source reaches attention has no entry
WITHOUT_ENTRY = {
    "MultiControlNetUnionModel": "runs several ControlNetUnionModel, which has an entry",
    "MotionAdapter": "holds weights for UNetMotionModel and has no forward of its own",
    "ControlNetXSAdapter": "holds weights for UNetControlNetXSModel and has no forward of its own",
}


@cache
def reaching_classes() -> frozenset[str]:
    """Names of the public model classes from whose source, name by name, an attention call can be reached.

    The closure is generous: a class counts that could be built with attention, in whatever configuration.
    """
    return frozenset(kind.__name__ for kind in _model_classes() if _reaches(kind))


def _model_classes() -> list[type]:
    found = []
    for name in dir(diffusers.models):
        try:
            value = getattr(diffusers.models, name)
        # names of classes whose own requirements aren't installed
        except (ImportError, RuntimeError):
            continue
        if inspect.isclass(value) and issubclass(value, ModelMixin):
            found.append(value)
    return found


def _reaches(kind: type) -> bool:
    todo, seen = [kind], set()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        names = _names(value.__module__, value.__name__)
        if names & ATTENTION:
            return True
        scope = vars(sys.modules[value.__module__])
        todo += [scope[name] for name in names if _followed(scope.get(name))]
    return False


def _followed(value: object) -> bool:
    if not isinstance(value, (type, FunctionType)):
        return False
    return value.__module__.startswith("diffusers.models") and not value.__module__.startswith(_SHARED)


@cache
def _names(module: str, definition: str) -> frozenset[str]:
    """Every name and attribute that a class's or function's source mentions."""
    node = _definitions(module).get(definition)
    if node is None:
        return frozenset()
    names = {entry.id for entry in ast.walk(node) if isinstance(entry, ast.Name)}
    return frozenset(names | {entry.attr for entry in ast.walk(node) if isinstance(entry, ast.Attribute)})


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {node.name: node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
