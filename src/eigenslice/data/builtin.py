"""English text that ships with CPython: no network, no download. Technical prose, so only a stopgap."""

import ast
import sys
import sysconfig
from pathlib import Path


def language_reference() -> list[str]:
    """Topics of `help()`: chapters of the Python reference, about half a megabyte."""
    from pydoc_data.topics import topics

    return [text.strip() for _, text in sorted(topics.items())]


def library_docstrings() -> list[str]:
    """Docstrings of the standard library's modules, classes and functions of at least 400 characters.

    They are read from the source files, which are parsed and not run.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, None] = {}
    for name in sorted(sys.stdlib_module_names):
        file = root / f"{name}.py"
        for path in [file] if file.is_file() else sorted((root / name).glob("*.py")):
            tree = ast.parse(path.read_bytes())
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    docstring = ast.get_docstring(node)
                    if docstring and len(docstring) >= 400:
                        texts[docstring] = None
    return list(texts)
