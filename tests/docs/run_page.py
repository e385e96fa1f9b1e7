"""Runs the Python code of one page, block after block in one namespace: `python -m tests.docs.run_page PAGE`.

A page may hold code for the test alone in a comment: `<!-- run` on a line, code, `-->` on a line. It makes what a
reader has (an application, a request) or calls what a block defines. A block that is no complete program on purpose
is marked by `<!-- not run: the reason -->` on the line before.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
import types
from pathlib import Path

_CODE = re.compile(
    r"^(?P<indent> *)(?:<!-- run\n(?P<hidden>.*?)^ *-->|(?P<skip><!-- not run: [^\n]+ -->\n\s*)?```python[^\n]*\n(?P<shown>.*?)^ *```)$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> list[tuple[int, str]]:
    """Return line number and source of every block that is run."""
    found = []
    for match in _CODE.finditer(text):
        if match["skip"]:
            continue
        name = "hidden" if match["hidden"] is not None else "shown"
        indent = len(match["indent"])
        source = "".join(line[indent:] if line[:indent].isspace() else line for line in match[name].splitlines(keepends=True))
        found.append((text.count("\n", 0, match.start(name)), source))
    return found


def run(path: Path) -> int:
    """Run a page's code; what fails, fails with the page's own line numbers."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    found = blocks(path.read_text())
    with asyncio.Runner() if sys.version_info >= (3, 11) else _Runner() as runner:
        for line, source in found:
            tree = ast.parse(source, str(path))
            ast.increment_lineno(tree, line)
            code = compile(tree, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            if code.co_flags & inspect.CO_COROUTINE:
                runner.run(types.FunctionType(code, module.__dict__)())
            else:
                exec(code, module.__dict__)
    return len(found)


class _Runner:
    """`asyncio.Runner` for Python 3.10."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def run(self, coroutine):
        return asyncio.run(coroutine)


if __name__ == "__main__":
    print(f"{run(Path(sys.argv[1]))} blocks")
