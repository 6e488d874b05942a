"""Budgets for size: short files, short functions, shallow nesting, no copied stretches."""

import ast
import itertools
import tokenize
from pathlib import Path

import pytest

from hf_eff.contracts.spec import KINDS

PACKAGE = Path(__file__).parent.parent / "hf_eff"
SOURCES = sorted(PACKAGE.rglob("*.py"))
METHOD_FILES = sorted(path for kind in KINDS for path in (PACKAGE / kind).glob("[a-z]*.py"))

METHOD_LINES, FILE_LINES, FUNCTION_LINES, NESTING, SHARED_RUN = 200, 400, 40, 3, 10
_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _name(path):
    return str(path.relative_to(PACKAGE))


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS))
            and ast.get_docstring(node, clean=False) is not None
        ):
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_lines(path):
    """Numbers of the lines that hold code: no docstring, no comment, no blank."""
    quiet = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with tokenize.open(path) as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in quiet]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return lines - docstring_lines(ast.parse(path.read_text(encoding="utf-8")))


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, _FUNCTIONS)]


def nesting(node, depth=0):
    """Depth of blocks inside a function; ``elif`` does not add, nor does a nested function's own body."""
    deepest = depth
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (*_FUNCTIONS, ast.Lambda)):
                continue
            is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If)
            deeper = isinstance(child, _BLOCKS) and not is_elif
            deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def statements_text(path):
    """Stripped code lines without imports, which two files may well share."""
    text = path.read_text(encoding="utf-8")
    imports = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = text.splitlines()
    return [lines[number - 1].strip() for number in sorted(code_lines(path) - imports)]


def longest_shared_run(first, second):
    """Length and text of the longest stretch of equal lines in two lists."""
    best, end = 0, 0
    previous = [0] * (len(second) + 1)
    for i, line in enumerate(first, start=1):
        current = [0] * (len(second) + 1)
        for j, other in enumerate(second, start=1):
            if line == other:
                current[j] = previous[j - 1] + 1
                if current[j] > best:
                    best, end = current[j], i
        previous = current
    return best, first[end - best : end]


@pytest.mark.parametrize("path", METHOD_FILES, ids=_name)
def test_method_file_is_short(path):
    assert len(code_lines(path)) <= METHOD_LINES


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_file_is_short(path):
    assert len(code_lines(path)) <= FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_functions_are_short_and_flat(path):
    lines = code_lines(path)
    long = {
        node.name: size
        for node in functions(path)
        if (size := sum(node.lineno <= line <= node.end_lineno for line in lines)) > FUNCTION_LINES
    }
    deep = {node.name: depth for node in functions(path) if (depth := nesting(node)) > NESTING}
    assert not long
    assert not deep


def test_no_copied_stretch_between_methods():
    texts = {_name(path): statements_text(path) for path in METHOD_FILES}
    runs = {
        f"{a} / {b}": run
        for a, b in itertools.combinations(texts, 2)
        if (run := longest_shared_run(texts[a], texts[b]))[0] >= SHARED_RUN
    }
    assert not runs


def test_the_measures_measure(tmp_path):
    source = (
        '"""Head.\n\nMore.\n"""\n\nimport os\n\n# comment\ndef f(x):\n    """Doc."""\n'
        "    if x:\n        for _ in x:\n            while x:\n                with x:\n                    pass\n"
        "    elif not x:\n        pass\n"
    )
    path = tmp_path / "sample.py"
    path.write_text(source)
    assert len(code_lines(path)) == 9
    assert nesting(functions(path)[0]) == 4
    assert statements_text(path)[0] == "def f(x):"
    assert longest_shared_run(list("abcdef"), list("xbcdyf")) == (3, ["b", "c", "d"])
