"""The code of a submission: stripped, cut to what is reached, packed; and what is refused because its size could not be told."""

from __future__ import annotations

import ast
import builtins
import hashlib
import os
import random
import subprocess
import symtable
import sys
import zipfile

import pytest
from conftest import ROOT

from parts import code
from parts.files import UserError


def test_stripped_source_is_the_same_program():
    source = '''"""Module."""
# comment

def f(a):  # trailing
    """Doc."""
    text = """keeps  # this

    and blank lines"""
    return f"{a}#" + text  # end

class Only:
    """Nothing else in here."""
'''
    stripped = code.strip_source(source)
    assert "# comment" not in stripped and "Doc." not in stripped and "keeps  # this\n\n    and" in stripped
    assert '"""Module."""' in stripped and "Nothing else" in stripped
    scope, original = {}, {}
    exec(stripped, scope)
    exec(source, original)
    assert scope["f"](1) == original["f"](1)
    once = code.strip_source((ROOT / "parts" / "packing.py").read_text())
    assert code.strip_source(once) == once and len(once) < 0.8 * (ROOT / "parts" / "packing.py").stat().st_size


PROJECT = {
    "entry.py": '''"""Shown by --help."""
import functools, json, math
from parts import tools
from parts.tools import registered, twice as double
import parts.plain as plain
LIMIT, OTHER = 3, 4
@functools.singledispatch
def used(x): return math.floor(plain.ONE) + x
@used.register(str)
def _(x): return "text"
@functools.singledispatch
def unused(x): return json.dumps(x)
@unused.register(str)
def _(x): return json.loads(x)
used.note = "kept"
unused.note = "dropped"
class Fields:
    exotic: int = 1  # no use of the function of that name
def exotic(): return 'rare'
def main():
    from parts.late import late
    Fields()
    print(used(double(LIMIT)), used(''), used.note, tools.thrice(2), registered(), late())
if __name__ == "__main__":
    main()
''',
    "parts/__init__.py": "",
    "parts/tools.py": '''
TABLE = {}
def register(function):
    TABLE[function.__name__] = function
    return function
@register
def first(): return helper()
def helper(): return 1
def registered(): return TABLE["first"]()
def twice(x): return 2 * x
def thrice(x): return 3 * x
def never(x): return twice(x)
if __name__ == "__main__":
    print(never(1))
''',
    "parts/plain.py": "ONE = 1.5\nTWO = 2\n",
    "parts/late.py": "def late(): return 'late'\ndef later(): return 'later'\n",
    "parts/stray.py": "STRAY = 1\n",
}  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of sources that the packer takes for its own; -> write(path, text)."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    for path, text in PROJECT.items():
        write(path, text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    yield write
    code.reached_sources.cache_clear()


def run(folder, script: str) -> str:
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_never_reached_is_left_out_and_the_rest_runs(project, tmp_path):
    sources = code.Reach("entry").sources()
    assert set(sources) == {"entry.py", "parts/__init__.py", "parts/tools.py", "parts/plain.py", "parts/late.py"}
    for gone in ("unused", "json", "dropped", "never", "later", "TWO", "rare"):
        assert not any(gone in text for text in sources.values()), gone
    assert "OTHER" in sources["entry.py"] and '"""Shown by --help."""' in sources["entry.py"]
    expected = run(tmp_path, "entry.py")
    assert expected == "7 text kept 6 1 late\n"
    for path, text in sources.items():
        project(path, text)
    assert run(tmp_path, "entry.py") == expected
    assert code.Reach("entry").sources() == sources  # of what is left, nothing more goes


@pytest.mark.parametrize(
    "line",
    [
        "import importlib; importlib.import_module('parts.stray')",
        "from importlib import import_module; import_module('parts.stray')",
        "__import__('parts.stray')",
        "exec('import parts.stray')",
        "import runpy; runpy.run_path('parts/stray.py')",
        "import pickle",
        "import sys; sys.path.append('elsewhere')",
        "import surely_not_a_package_of_the_track",
        "from . import stray",
        "import importlib.util as util, importlib; importlib.reload(plain)",
    ],
)
def test_ways_around_the_count_are_refused(project, line):
    project("parts/plain.py", "def away():\n    " + line + "\nONE = 1.5\n")
    code.Reach("entry")  # nothing reaches it
    project("parts/plain.py", "def away():\n    " + line + "\nONE = away() or 1.5\n")
    with pytest.raises(UserError, match=r"parts/plain\.py.*size of a submission's code"):
        code.Reach("entry")


def test_compiled_modules_are_refused(project, tmp_path):
    (tmp_path / "parts" / f"plain.{sys.implementation.cache_tag}-x.so").write_bytes(b"\x7fELF")
    with pytest.raises(UserError, match=r"would be imported for parts\.plain"):
        code.Reach("entry")


def test_size_follows_what_is_imported(project):
    def size() -> int:
        code.reached_sources.cache_clear()
        return len(code.code_script.__wrapped__("entry"))

    before, noise = size(), random.Random(0).randbytes(6000).hex()
    project("parts/stray.py", f"STRAY = {noise!r}\n")
    project(".bundle", "empty")
    assert size() == before
    project("parts/late.py", "def late():\n    import parts.stray\n    return parts.stray.STRAY[:0] + 'late'\n")
    assert size() > before + 5000


def test_the_real_script():
    """Deterministic (another process, another hash seed), complete (no name lost), without the trainer; its own size inside itself."""
    script = code.code_script()
    probe = "import sys, hashlib; from parts import code; print(hashlib.sha256(code.code_script()).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(script).hexdigest()
    assert code.code_bytes() == len(script) < 90_000
    sources = code.reached_sources("eval_ttt")
    assert {"train_gpt.py", "eval_ttt.py", "parts/__init__.py", "parts/packing.py", "parts/audit.py"} <= set(sources)
    assert not {"quantize.py", "parts/code.py"} & set(sources) and "class Trainer" not in sources["train_gpt.py"]
    for entry in ("eval_ttt", "train_gpt"):
        for path, text in code.reached_sources(entry).items():
            assert not lost_names(text), path


def lost_names(text: str) -> set[str]:
    """Global names that the functions and classes of a module use and nothing in it defines."""
    top = symtable.symtable(text, "text", "exec")
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()}
    known |= set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
    annotations = {
        name.id
        for node in ast.walk(ast.parse(text))
        for name in ast.walk(getattr(node, "annotation", None) or ast.Pass())
        if isinstance(name, ast.Name)
    }
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() or (table is top and symbol.is_referenced())}
    return used - known - annotations


def test_lost_names_are_seen():
    assert lost_names("def f():\n    return g(len([]))\n") == {"g"} and not lost_names("import g\ndef f():\n    return g(1)\n")


def test_script_unpacks_to_its_sources(tmp_path):
    (tmp_path / "evaluate.py").write_bytes(code.code_script())
    assert zipfile.ZipFile(tmp_path / "evaluate.py").namelist() == ["__main__.py", "code"]
