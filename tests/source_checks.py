"""What a file's source says: imports, private names of peers, replaced methods. For the tests of floors."""

import ast
import re
from collections.abc import Mapping

PEERS = ("peft", "transformers")


def imports(source: str, module: str) -> list[tuple[str, str | None]]:
    """(dotted module, name taken from it or None) of every import, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            found += [(".".join(filter(None, [base, node.module])), alias.name) for alias in node.names]
    return found


def private_imports(source: str, module: str) -> list[str]:
    """Underscored modules and names of the peers that a file imports."""
    return sorted(
        f"{dotted}:{name}"
        for dotted, name in imports(source, module)
        if dotted.split(".")[0] in PEERS
        and any(part.startswith("_") and not part.startswith("__") for part in [*dotted.split("."), name or ""])
    )


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


# Private attributes of torch and of Python that we use, for what they have no public name.
NOT_OF_PEERS = {
    "_C", "_apply", "_asdict", "_backward_hooks", "_backward_pre_hooks", "_current_level", "_fields", "_forward_hooks",
    "_forward_pre_hooks", "_functorch", "_get_tracing_state", "_len_torch_dispatch_stack", "_load_from_state_dict",
    "_make_subclass", "_make_wrapper_subclass", "_modules", "_parameters", "_schema", "_version",
}  # fmt: skip


# Calls that take the name of an attribute, and at which place.
ATTRIBUTE_CALLS = {
    **dict.fromkeys(("getattr", "setattr", "hasattr", "delattr"), 1),
    **dict.fromkeys(("attrgetter", "methodcaller", "__getattribute__"), 0),
}


def name_of(node: ast.AST) -> str:
    """``f`` of the expressions ``f`` and ``module.f``; empty for any other."""
    return getattr(node, "id", "") or getattr(node, "attr", "")


def is_self(node: ast.AST) -> bool:
    return getattr(node, "id", "") in ("self", "cls", "ctx")


def is_dict_of_other(node: ast.AST) -> bool:
    """``x.__dict__`` or ``vars(x)``, unless x is ``self``."""
    if isinstance(node, ast.Attribute):
        return node.attr == "__dict__" and not is_self(node.value)
    return isinstance(node, ast.Call) and name_of(node.func) == "vars" and not any(map(is_self, node.args))


def targets_of(node: ast.AST) -> list[ast.AST]:
    """What a statement assigns to or deletes, tuples taken apart."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:
        return []
    return [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def own_names(source: str) -> set[str]:
    """Private names that a file defines: functions, classes, fields, and attributes that it sets on ``self``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        for target in (part for each in targets_of(node) for part in ast.walk(each)):
            if isinstance(target, ast.Name):
                found.add(target.id)
            elif isinstance(target, ast.Attribute) and is_self(target.value):
                found.add(target.attr)
    return {name for name in found if is_private(name)}


def constants_of(source: str) -> dict[str, object]:
    """What names stand for that a file assigns a constant to."""
    return {
        target.id: node.value.value
        for node in ast.walk(ast.parse(source))
        for target in targets_of(node)
        if isinstance(target, ast.Name) and isinstance(getattr(node, "value", None), ast.Constant)
    }


def peers_of(source: str) -> set[str]:
    """Names under which a file has the peers' modules, classes and functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {
                alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in PEERS
            }
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in PEERS:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def root_of(node: ast.AST) -> str:
    """``a`` of the expression ``a.b.c``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", "")


def private_attributes(source: str, own: set[str]) -> list[str]:
    """Private attributes that are neither ours nor torch's, also where they are named by a string."""
    found, constants = set(), constants_of(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and name_of(node.func) in ATTRIBUTE_CALLS:
            at = ATTRIBUTE_CALLS[name_of(node.func)]
            named = (constants.get(getattr(arg, "id", ""), getattr(arg, "value", "")) for arg in node.args[at:])
            found |= {part for name in named if isinstance(name, str) for part in name.split(".")}
        elif isinstance(node, ast.Subscript) and is_dict_of_other(node.value) and isinstance(node.slice, ast.Constant):
            found.add(node.slice.value)
    return sorted({name for name in found if is_private(name)} - own - NOT_OF_PEERS)


# What a layer does, to the rest of a model: nothing else is written under these names.
BEHAVIOUR = ("forward", "merge", "unmerge", "__class__", "__call__")
WRITES_TO_A_DICT = ("update", "setdefault", "pop", "clear", "__setitem__")


def replacements(source: str) -> list[str]:
    """Where a file changes what an object of other code is or does: its class, a method, its ``__dict__``."""
    functions = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    peers = peers_of(source)

    def is_function(value: ast.AST | None) -> bool:
        is_bound = isinstance(value, ast.Call) and name_of(value.func) in ("MethodType", "partial", "__get__")
        return isinstance(value, ast.Lambda) or getattr(value, "id", None) in functions or is_bound

    def is_written_by(call: ast.Call) -> bool:
        if name_of(call.func) in WRITES_TO_A_DICT:
            return isinstance(call.func, ast.Attribute) and is_dict_of_other(call.func.value)
        if name_of(call.func) not in ("setattr", "delattr", "__setattr__", "__delattr__") or len(call.args) < 2:
            return False
        holder, name, *value = call.args
        is_behaviour = isinstance(name, ast.Constant) and name.value in BEHAVIOUR
        return root_of(holder) in peers or (not is_self(holder) and (is_behaviour or any(map(is_function, value))))

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and is_written_by(node):
            found.append(ast.unparse(node))
        for target in targets_of(node):
            # vars(x)["forward"] = ..., x.__dict__ |= ...
            is_replaced = is_dict_of_other(target.value if isinstance(target, ast.Subscript) else target)
            if isinstance(target, ast.Attribute):
                is_behaviour = target.attr in BEHAVIOUR or is_function(getattr(node, "value", None))
                is_replaced |= target.attr == "__class__" or (is_behaviour and not is_self(target.value))
                is_replaced |= root_of(target) in peers
            if is_replaced:
                found.append(ast.unparse(target))
    return found


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of imports; empty where there is none. A package's own files do not count as importing it."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph[node]):
            circle = visit(target, [*path, node])
            if circle:
                return circle
        done.add(node)
        return []

    for start in sorted(graph):
        circle = visit(start, [])
        if circle:
            return circle
    return []


# Above a list of methods that is written by hand, or at the end of its first line: why it is not the registry's.
REASON_FOR_A_LIST = re.compile(r"# By hand: \w")


def lists_of_methods(source: str, names: Mapping[str, str]) -> list[int]:
    """Lines of lists of methods that are written by hand, without :data:`REASON_FOR_A_LIST`.

    A list of methods is a literal list, tuple, set or dict of which at least half names methods, and two different
    ones. What something is compared with is none, nor are the ids of a list. A dict that is joined to another with
    ``|``, or a list with a starred part, adds to what the other has.

    Args:
        source: a file's.
        names: what names a method, its config and its spec among them, and which method that is.
    """
    lines, tree = source.splitlines(), ast.parse(source)
    exempt: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            exempt |= {part for part in (node.left, node.right) if isinstance(part, ast.Dict)}
        elif isinstance(node, ast.Compare):
            exempt |= {node.left, *node.comparators}
        elif isinstance(node, ast.keyword) and node.arg == "ids":
            exempt.add(node.value)

    def methods_of(node: ast.AST | None) -> set[str]:
        if isinstance(node, ast.Tuple):
            return set().union(*map(methods_of, node.elts))
        called = node.func if isinstance(node, ast.Call) else node
        named = called.value if isinstance(called, ast.Constant) else name_of(called) if called else ""
        return {names[named]} if named in names else set()

    found = []
    for node in ast.walk(tree):
        if node in exempt:
            continue
        if isinstance(node, ast.Dict):
            each = [methods_of(key) or methods_of(value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.List | ast.Tuple | ast.Set) and not any(
            isinstance(part, ast.Starred) for part in node.elts
        ):
            each = [methods_of(part) for part in node.elts]
        else:
            continue
        named = [methods for methods in each if methods]
        above = "\n".join(lines[max(node.lineno - 2, 0) : node.lineno])
        if len(set().union(*named)) > 1 and 2 * len(named) >= len(each):
            exempt |= set(ast.walk(node))  # its parts belong to it
            found += [] if REASON_FOR_A_LIST.search(above) else [node.lineno]
    return sorted(found)
