"""The file that a model's folder carries along, so that transformers alone can load it: `model.plain` and all it uses, as one file.

It is put together from this package's own sources, definition by definition, when a folder is written: there is no second copy of the
model that could fall behind. What stands in it is only what `model.plain` and `model.plain_processor` come to use.
"""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megainter.files import write_atomically

FILE = "modeling_interbert.py"
PROCESSOR = "InterBertProcessor"
AUTO_CLASSES = {
    "AutoConfig": "InterBertConfig",
    "AutoModel": "InterBertModel",
    "AutoModelForPreTraining": "InterBertForPreTraining",
    # whether two things belong together, class 0 = they do: what InterBERT's matching head says of a caption and an image
    "AutoModelForNextSentencePrediction": "InterBertForRetrieval",
    "AutoModelForMultipleChoice": "InterBertForMultipleChoice",
    "AutoModelForSequenceClassification": "InterBertForSequenceClassification",
    "AutoProcessor": PROCESSOR,
}
_ROOTS = ("megainter.model.plain", "megainter.model.plain_processor")
# Methods for packed training, which nothing in the file calls.
_LEFT_OUT = {("Decoder", "forward"), ("PredictionHead", "losses")}
_ERROR = ("megainter.errors", "UsageError")
_HEADER = '''"""InterBERT (arXiv 2003.13198) in plain PyTorch, for `from_pretrained(..., trust_remote_code=True)`.

Put together by megainter from its own sources, of which each part names its module: change them there, not here.
SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations
'''


def auto_map() -> dict[str, str]:
    """Which class of the file answers to which of transformers' Auto classes: ``auto_map`` of config.json."""
    return {auto: f"{FILE.removesuffix('.py')}.{name}" for auto, name in AUTO_CLASSES.items()}


def processor_map() -> dict[str, Any]:
    """What processor_config.json says for AutoProcessor."""
    return {"processor_class": PROCESSOR, "auto_map": {"AutoProcessor": auto_map()["AutoProcessor"]}}


def write_remote_code(folder: Path) -> None:
    """Write the file into a model's folder."""
    write_atomically(folder / FILE, remote_code())


@cache
def remote_code() -> str:
    """The file's text."""
    needed, libraries = _needed()
    types, absent = _types(needed)
    parts = [_HEADER, _import_lines(libraries | types)]
    if absent:
        parts.append(f"# Types of megainter's packed batches, which this file does without.\n{' = '.join(sorted(absent))} = Any\n")
    for module in _in_order({module for module, _ in needed}):
        definitions = {id(node): node for name, node in _read(module).definitions.items() if (module, name) in needed}
        parts.append(f"\n# ---- {module}\n\n" + "\n\n".join(map(_read(module).text_of, definitions.values())))
    text = "\n".join(parts)
    compile(text, FILE, "exec")
    return text


@dataclass(frozen=True, order=True)
class _Import:
    """``from module import name as here``, or ``import module as here`` where there is no ``name``."""

    module: str
    name: str
    here: str


@dataclass(frozen=True)
class _Source:
    """A module of this package: its lines, its definitions by the names they bind, and where its imported names come from."""

    name: str
    lines: list[str]
    definitions: dict[str, ast.stmt]
    imports: dict[str, "_Import"]

    def text_of(self, node: ast.stmt) -> str:
        """A definition's lines with the comment above it, without what the file leaves out."""
        if (self.name, _bound(node)[0]) == _ERROR:
            return f'class {_ERROR[1]}(ValueError):\n    """An input or a setting that cannot be used as given."""\n'
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while self.lines[first - 2].startswith("#"):
            first -= 1
        dropped = {line for part in _left_out(node) for line in range(_first_line(part), (part.end_lineno or 0) + 1)}
        kept = [self.lines[line - 1] for line in range(first, (node.end_lineno or first) + 1) if line not in dropped]
        return "\n".join(kept).rstrip() + "\n"


@cache
def _read(module: str) -> _Source:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, _Import] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= {made.here: made for made in _imported(node)}
        definitions |= dict.fromkeys(_bound(node), node)
    return _Source(module, text.split("\n"), definitions, imports)


def _imported(node: ast.Import | ast.ImportFrom) -> list[_Import]:
    if isinstance(node, ast.Import):
        return [_Import(alias.name, "", alias.asname or alias.name) for alias in node.names]
    return [_Import(node.module or "", alias.name, alias.asname or alias.name) for alias in node.names]


def _import_lines(wanted: set[_Import]) -> str:
    whole = [f"import {made.module}" + (f" as {made.here}" if made.here != made.module else "") for made in sorted(wanted) if not made.name]
    lines = []
    for module in sorted({made.module for made in wanted if made.name}):
        names = [made for made in sorted(wanted) if made.name and made.module == module]
        lines.append(f"from {module} import " + ", ".join(n.name + (f" as {n.here}" if n.here != n.name else "") for n in names))
    return "\n".join([*whole, *lines]) + "\n"


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _needed() -> tuple[set[tuple[str, str]], set[_Import]]:
    """(module, name) of all definitions that the roots come to use, and the imports of libraries that these use."""
    waiting = [(module, name) for module in _ROOTS for name in _read(module).definitions]
    needed: set[tuple[str, str]] = set()
    libraries: set[_Import] = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in needed:
            continue
        needed.add((module, name))
        if (module, name) == _ERROR:
            continue
        for used in sorted(_names_in(_read(module).definitions[name], annotations=False)):
            place = _resolved(_read(module), used)
            if isinstance(place, tuple):
                waiting.append(place)
            elif place is not None:
                libraries.add(place)
    homes = [*(name for _, name in needed), *(made.here for made in libraries)]
    assert len(homes) == len(set(homes)), "two definitions of one name; one file has room for one"
    return needed, libraries


def _types(needed: set[tuple[str, str]]) -> tuple[set[_Import], set[str]]:
    """What only annotations name: the imports of libraries, and the names of this package's that the file does without."""
    libraries: set[_Import] = {_Import("typing", "Any", "Any")}
    absent: set[str] = set()
    for module, name in needed - {_ERROR}:
        for used in _names_in(_read(module).definitions[name], annotations=True):
            place = _resolved(_read(module), used)
            if isinstance(place, _Import):
                libraries.add(place)
            elif place is not None and place not in needed:
                absent.add(used)
    return libraries, absent


def _resolved(source: _Source, name: str) -> tuple[str, str] | _Import | None:
    """Where a global name is defined in this package, or how a library's comes in; None for what is local or built in."""
    if name in source.definitions:
        return source.name, name
    made = source.imports.get(name)
    if made is None or not made.module.startswith("megainter"):
        return made
    assert made.name, f"{source.name} imports {made.module} as a module"
    return _resolved(_read(made.module), made.name)


def _names_in(node: ast.AST, annotations: bool) -> set[str]:
    """Names that a definition reads when it is made or called, without what is left out; with ``annotations`` also those of types."""
    names: set[str] = set()
    skipped = {id(part) for part in _left_out(node)}
    waiting: list[ast.AST] = [node]
    while waiting:
        part = waiting.pop()
        if id(part) in skipped:
            continue
        assert not isinstance(part, ast.ImportFrom) or not (part.module or "").startswith("megainter"), ast.unparse(part)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load):
            names.add(part.id)
        types = [] if annotations else [getattr(part, field, None) for field in ("annotation", "returns")]
        waiting += [child for child in ast.iter_child_nodes(part) if child not in types]
    return names


def _left_out(node: ast.AST) -> list[ast.stmt]:
    """The parts of a definition that the file does without: Triton's forms, and methods of packed training."""
    triton = [part for part in ast.walk(node) if isinstance(part, ast.If) and _asks_for_triton(part.test)]
    methods = [
        part
        for owner in ast.walk(node)
        if isinstance(owner, ast.ClassDef)
        for part in owner.body
        if isinstance(part, ast.FunctionDef) and (owner.name, part.name) in _LEFT_OUT
    ]
    return [*triton, *methods]


def _asks_for_triton(test: ast.expr) -> bool:
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "has_triton"


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _in_order(modules: set[str]) -> list[str]:
    """Modules, each after those that it imports."""
    order: list[str] = []

    def visit(module: str) -> None:
        if module in order:
            return
        for made in _read(module).imports.values():
            if made.module.startswith("megainter") and made.module != module:
                visit(made.module)
        order.append(module)

    for root in _ROOTS:
        visit(root)
    return [module for module in order if module in modules]
