"""The code of a submission: what of this folder a command reaches, and its bytes.

A submission carries the source that runs, no more. It is found without running it: from the command's file along its import
statements, and inside each file along the names that top-level definitions use. What the code could do beyond that is refused
(`UserError` naming the line), since no reading of the text can tell its size: importing by a computed name, executing strings, other
search paths, packages that are neither Python's own nor the track's. Data that a program reads with `open` is the sandbox's business.

    python evaluate.py          # the script: a zip archive behind a comment, which Python runs as it is
    unzip evaluate.py           # shows the starter and `code`, the sources as JSON under LZMA
"""

from __future__ import annotations

import ast
import functools
import io
import json
import lzma
import sys
import tokenize
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parts.files import UserError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT_NAME = "evaluate.py"
# What a machine of this track has installed. Another package's size would not be counted, so that it may not be imported.
PACKAGES = frozenset(
    [
        "torch",
        "triton",
        "numpy",
        "sentencepiece",
        "safetensors",
        "brotli",
        "zstandard",
        "constriction",
        "fla",
        "tilelang",
        "flash_attn",
        "flash_attn_interface",
    ]
)
_DYNAMIC_MODULES = frozenset(["runpy", "imp", "pkgutil", "zipimport", "pickle", "marshal", "code", "codeop"])
_DYNAMIC_NAMES = frozenset(["__import__", "exec", "eval", "globals", "locals", "__builtins__", "__loader__", "__path__"])


# ----------------------------------------------------------------------------------------------------------------------
# Text of one file
# ----------------------------------------------------------------------------------------------------------------------
def strip_source(text: str) -> str:
    """Python source without comments, blank lines and the docstrings of functions and classes; otherwise letter for letter.

    Module docstrings stay: they are what --help shows. Works on tokens and line ranges, not on a reprinted syntax tree, so that the
    result is the same under every Python version. If it does not parse to the same program, the source is returned as it is.
    """
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    inside: set[int] = set()  # lines that begin within a string
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() + "\n"
        elif token.end[0] > token.start[0] and token.type not in (tokenize.NEWLINE, tokenize.NL):
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            if len(node.body) > 1 and first.lineno > node.lineno and node.body[1].lineno > first.end_lineno:
                docstrings.update(range(first.lineno, first.end_lineno + 1))
                del node.body[0]
    kept = [line for number, line in enumerate(lines, 1) if number not in docstrings and (number in inside or line.strip())]
    stripped = "".join(kept)
    return stripped if ast.dump(ast.parse(stripped)) == ast.dump(tree) else text


def _root(node: ast.expr) -> str | None:
    """`a` of the expressions a, a.b, a.b(c) and a[b].c: whose object they act on."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call, ast.Starred)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


@dataclass(eq=False)
class Statement:
    """A top-level statement: what it binds, and which names of its module it acts on (None: it always runs)."""

    node: ast.stmt
    binds: frozenset[str]
    needed_by: frozenset[str] | None

    @property
    def lines(self) -> range:
        first = min([self.node.lineno, *(decorator.lineno for decorator in getattr(self.node, "decorator_list", ()))])
        return range(first, self.node.end_lineno + 1)


class Module:
    """One source file under ROOT, its comments gone, as top-level statements. `kept` grows as something reaches into it."""

    def __init__(self, name: str, path: Path | None, is_entry: bool):
        self.name, self.path, self.is_entry = name, path, is_entry
        self.label = path.relative_to(ROOT).as_posix() if path else name
        self.text = strip_source(path.read_text(encoding="utf-8")) if path else ""
        tree = ast.parse(self.text)
        nodes = tree.body
        self.defined = {name for node in nodes for name in self._bound(node)}
        self.imported = {name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for name in self._bound(node)}
        self.statements = [self._statement(node) for node in nodes]
        self.kept: set[Statement] = set()
        self.reached: set[str] = set()
        mentioned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        self.unmentioned = self.imported - mentioned  # imported for what importing does
        self.maybe_modules: dict[str, list[str]] = {}  # imported name -> modules that it may stand for
        for node in nodes:
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                name = _binding(node, alias)
                full = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name if alias.asname else name
                self.maybe_modules.setdefault(name, []).append(full)

    @staticmethod
    def _bound(node: ast.stmt) -> frozenset[str]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return frozenset([node.name])
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return frozenset(_binding(node, alias) for alias in node.names)
        inner = (_bound_inside(child) for child in ast.walk(node))
        return frozenset(name for names in inner for name in names)

    def _statement(self, node: ast.stmt) -> Statement:
        binds = self._bound(node)
        own = self.defined - self.imported
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            needed = set(binds)
            for decorator in node.decorator_list:
                if (root := _root(decorator)) in own:
                    if not isinstance(decorator.func if isinstance(decorator, ast.Call) else decorator, ast.Attribute):
                        return Statement(node, binds, None)  # `@register` may put it anywhere
                    needed.add(root)  # `@operator.register_fake` acts on that operator
            return Statement(node, binds, frozenset(needed))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            return Statement(node, binds, None if future else binds)
        targets = getattr(node, "targets", [])  # of an assignment
        if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
            targets = [node.value.func]  # operator.register_autograd(…)
        roots = {_root(target) for target in targets if not isinstance(target, (ast.Tuple, ast.List))}
        if targets and binds | roots <= own:
            return Statement(node, binds, frozenset(binds | roots))
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and binds and roots <= {None} | own:
            return Statement(node, binds, binds)
        if isinstance(node, ast.If) and not self.is_entry and ast.unparse(node.test) == "__name__ == '__main__'":
            return Statement(node, frozenset(), frozenset())  # imported, it never is
        return Statement(node, binds, None)

    def source(self) -> str:
        """The kept statements, letter for letter; of an import, the names that are used."""
        lines, kept = self.text.splitlines(keepends=True), []
        taken: set[int] = set()
        for statement in self.statements:
            if taken & set(statement.lines):
                raise UserError(f"{self.label}, line {statement.node.lineno}: two statements in a line")
            taken |= set(statement.lines)
            if statement not in self.kept:
                continue
            node = statement.node
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not statement.binds <= self.reached and statement.needed_by is not None:
                names = [alias for alias in node.names if _binding(node, alias) in self.reached]
                again = ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)
                kept.append(ast.unparse(again) + "\n")
            else:
                kept += lines[statement.lines.start - 1 : statement.lines.stop - 1]
        return "".join(kept)


def _binding(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    """The name that an import binds: `import a.b` binds a."""
    return alias.asname or (alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name)


def _bound_inside(node: ast.AST) -> list[str]:
    """What a node of a compound statement binds. Names inside its functions count too: that keeps too much, never too little."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return [node.id]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [_binding(node, alias) for alias in node.names]
    return []


# ----------------------------------------------------------------------------------------------------------------------
# What a command reaches
# ----------------------------------------------------------------------------------------------------------------------
class Reach:
    """Modules under ROOT that `entry` (a module's name) runs, and in each the top-level statements that it can come to."""

    def __init__(self, entry: str):
        self.modules: dict[str, Module] = {}
        self._located: dict[str, Path | None] = {}
        self._queue: list[tuple[Module, Statement]] = []
        self._enter(entry, is_entry=True)
        while self._queue:
            module, statement = self._queue.pop()
            if not isinstance(statement.node, (ast.Import, ast.ImportFrom)):
                self._follow(module, statement.node)

    def sources(self) -> dict[str, str]:
        """Path relative to ROOT -> what is kept of it, for every file that runs."""
        return {module.label: module.source() for module in sorted(self.modules.values(), key=lambda m: m.label) if module.path}

    def _locate(self, name: str) -> Path | None:
        """The file of a module under ROOT; the folder itself for a package without __init__.py; None where it is not ours."""
        if name not in self._located:
            base = ROOT.joinpath(*name.split("."))
            files = [path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()]
            for path in files or [base.with_suffix(".py")]:
                compiled = [other.name for kind in (".so", ".pyd", ".pyc") for other in path.parent.glob(f"{path.stem}*{kind}")]
                if compiled := [other for other in compiled if other.startswith(f"{path.stem}.")]:
                    raise UserError(f"{compiled[0]} would be imported for {name}: the size of a submission's code could not be told")
            folder = base if base.is_dir() and any(base.glob("*.py")) else None
            self._located[name] = files[0] if files else folder
        return self._located[name]

    def _enter(self, name: str, is_entry: bool = False) -> Module | None:
        """The module, with its packages and whatever runs when it is imported; None where it is not ours."""
        if name in self.modules:
            return self.modules[name]
        path = self._locate(name)
        if path is None:
            return None
        if "." in name:
            self._enter(name.rpartition(".")[0])
        if name == __name__:  # the packer is no part of what it packs: see _SCRIPT_MAIN
            return None
        module = self.modules[name] = Module(name, path if path.is_file() else None, is_entry)
        for statement in module.statements:
            if statement.needed_by is None:
                self._keep(module, statement)
        for alias in sorted(module.unmentioned):
            self._reach(module, alias)
        return module

    def _keep(self, module: Module, statement: Statement) -> None:
        if statement not in module.kept:
            module.kept.add(statement)
            self._queue.append((module, statement))

    def _reach(self, module: Module, name: str) -> None:
        """Keep what `module` binds `name` to, and what acts on it."""
        if name in module.reached:
            return
        module.reached.add(name)
        for statement in module.statements:
            if name in statement.binds and isinstance(statement.node, (ast.Import, ast.ImportFrom)):
                self._keep(module, statement)
                self._import(module, statement.node, name)
            elif statement.needed_by and name in statement.needed_by:
                self._keep(module, statement)

    def _reach_attribute(self, module: Module, name: str) -> None:
        """`name` of an imported module of ours: a definition, or a module of that package."""
        if name in module.defined:
            self._reach(module, name)
        elif inner := self._enter(f"{module.name}.{name}"):
            self._reach_all(inner)

    def _reach_all(self, module: Module) -> None:
        for name in sorted(module.defined):
            self._reach(module, name)

    def _import(self, module: Module, node: ast.Import | ast.ImportFrom, only: str | None = None) -> None:
        """Follow an import statement (of a name, or whole); refuse what cannot be counted."""
        if isinstance(node, ast.ImportFrom) and node.level:
            self._refuse(module, node, "imports relatively")
        for alias in node.names:
            if only is not None and _binding(node, alias) != only:
                continue
            if isinstance(node, ast.Import):
                self._check_package(module, node, alias.name)
                self._enter(alias.name)
                continue
            self._check_package(module, node, node.module)
            if self._enter(f"{node.module}.{alias.name}"):
                continue  # a module of a package: its attributes are followed where they are used
            if source := self._enter(node.module):
                self._reach_all(source) if alias.name == "*" else self._reach_attribute(source, alias.name)

    def _check_package(self, module: Module, node: ast.stmt, name: str) -> None:
        top = name.partition(".")[0]
        if top in _DYNAMIC_MODULES or (top == "importlib" and name != "importlib.util"):
            self._refuse(module, node, f"imports {name}, which runs code that is not in these files")
        if not self._locate(top) and top not in sys.stdlib_module_names and top not in PACKAGES:
            self._refuse(module, node, f"imports {top}, which is neither in this folder nor one of the track's packages")

    def _module_alias(self, module: Module, name: str) -> Module | None:
        """The module of ours that `name` stands for in `module`."""
        for full in module.maybe_modules.get(name, ()):
            if self._locate(full):
                return self._enter(full)
        return None

    def _follow(self, module: Module, node: ast.AST) -> None:
        """Everything that the code under `node` names."""
        for child in _uses(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                self._import(module, child)
                for alias in child.names:
                    inner = self._enter(alias.name if isinstance(child, ast.Import) else f"{child.module}.{alias.name}")
                    if inner:  # under a local name: not followed further, so all of it
                        self._reach_all(inner)
                continue
            name = child.id if isinstance(child, ast.Name) else _root(child)
            target = self._module_alias(module, name) if name else None
            if isinstance(child, ast.Attribute):
                self._check_attribute(module, child)
                if isinstance(child.value, ast.Name):
                    self._reach(module, name)
                    if target:
                        self._reach_attribute(target, child.attr)
            elif name in _DYNAMIC_NAMES - module.defined:
                self._refuse(module, child, f"uses {name}")
            else:
                self._reach(module, name)
                if target:  # the module itself goes somewhere
                    self._reach_all(target)

    def _check_attribute(self, module: Module, node: ast.Attribute) -> None:
        text = ast.unparse(node)
        importing = text.startswith("importlib.") and not "importlib.util.find_spec".startswith(text)
        if importing or text in ("sys.path", "sys.modules", "sys.meta_path", "sys.path_hooks", "builtins.exec", "builtins.eval"):
            self._refuse(module, node, f"uses {text}")

    def _refuse(self, module: Module, node: ast.AST, what: str):
        raise UserError(f"{module.label} {what} ({ast.unparse(node)[:60]!r}): the size of a submission's code could not be told")


def _uses(node: ast.AST) -> Iterator[ast.Name | ast.Attribute | ast.Import | ast.ImportFrom]:
    """Names read, attributes and imports under `node`. Of `packing.seal`, the attribute alone: the name is known by it."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return  # a local variable, or the field of `eval: EvalConfig`
    if isinstance(node, (ast.Name, ast.Attribute, ast.Import, ast.ImportFrom)):
        yield node
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        for child in ast.iter_child_nodes(node):
            yield from _uses(child)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------
# Python runs a zip archive behind a comment as it is, on any platform, under torchrun too, and the payload stays raw LZMA (base85 in a
# string would add a quarter). It unpacks into a temporary folder, because compiled kernels need source files that exist, and
# runs on the artifact beside it unless told otherwise. In place of this module it puts its own bytes: what is asked there is how large the
# script is that runs, and nobody has to be believed.
_SCRIPT_HEAD = b"#!/usr/bin/env python3\n# Self-extracting: Python runs this zip archive as it is; `unzip` shows what is inside.\n"
_SCRIPT_MAIN = """\
import json, lzma, os, runpy, sys, tempfile, zipfile
script = os.path.dirname(os.path.abspath(__file__))
own = f"def code_script():\\n    return open({script!r}, 'rb').read()\\ndef code_bytes():\\n    return len(code_script())\\n"
with tempfile.TemporaryDirectory() as folder:
    sources = json.loads(lzma.decompress(zipfile.ZipFile(script).read("code")))
    for name, text in {**sources, "PACKER": own}.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    sys.path.insert(0, folder)
    if not any(argument.endswith(".bin") for argument in sys.argv[1:]):
        sys.argv.append(os.path.join(os.path.dirname(script), "artifact.bin"))
    runpy.run_module("ENTRY", run_name="__main__", alter_sys=True)
"""


@functools.cache
def reached_sources(entry: str) -> dict[str, str]:
    """Path relative to ROOT -> what a command runs of that file. Found once a process. Raises UserError."""
    return Reach(entry).sources()


@functools.cache
def code_script(entry: str = "eval_ttt") -> bytes:
    """The self-extracting script of a command; the same bytes for the same sources. Made once a process. Raises UserError."""
    # lc=4: sources are text, whose next letter depends on the last one.
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    payload = lzma.compress(json.dumps(reached_sources(entry), ensure_ascii=False).encode(), format=lzma.FORMAT_ALONE, filters=filters)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        starter = _SCRIPT_MAIN.replace("ENTRY", entry).replace("PACKER", __name__.replace(".", "/") + ".py")
        for name, data in (("__main__.py", starter.encode()), ("code", payload)):
            file.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)
    return _SCRIPT_HEAD + archive.getvalue()


def code_bytes(entry: str = "eval_ttt") -> int:
    """Size of a command's code as it would be submitted; within a submission, of the script that runs."""
    return len(code_script(entry))
