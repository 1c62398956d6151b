"""Digests of code: what counts and what does not, on packages of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from petlbench.core.errors import UserError
from petlbench.core.source_code.closure import closure, closure_of, of
from petlbench.core.source_code.names import Definition
from petlbench.core.source_code.text import Writer
from tests.code_kit import forget, write

Digest = Callable[..., str]


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Digest:
    """Call it with the files of a package for the digest of its `main:start`."""
    monkeypatch.syspath_prepend(tmp_path)

    def found(start: str = "main:start", **files: str) -> str:
        write(tmp_path / "fpkit", {name.replace("__in__", "/"): source for name, source in files.items()})
        return closure(f"fpkit.{start}").digest

    return found


# Sources of `main`; some use `low`, which is `def help(x, y=1): return x + y` and `WIDTH = 8`.
LOW = "WIDTH = 8\ndef help(x, y=1):\n    return x + y\n"
SAME = {
    "a comment and a docstring": ("def start(): return 1", 'def start():\n    """One."""\n    # so\n    return 1'),
    "pass and a text": ("def start():\n    return 1", 'def start():\n    pass\n    "so"\n    return 1'),
    "a docstring alone": ("class start: pass", 'class start:\n    """All."""'),
    "a local name": ("def start(a, /):\n    b = a\n    return b", "def start(c, /):\n    d = c\n    return d"),
    "a parameter": ("def start(a):\n    return a", "def start(b):\n    return b"),
    "a loop, a with, an except": (
        "def start():\n    with f() as a:\n        for b in a: g(b)\n    try: g()\n    except E as c: g(c)",
        "def start():\n    with f() as x:\n        for y in x: g(y)\n    try: g()\n    except E as z: g(z)",
    ),
    "a comprehension's and a walrus's": (
        "def start(n):\n    return [a for a in n if (b := a)], b",
        "def start(m):\n    return [c for c in m if (d := c)], d",
    ),
    "a match's": (
        "def start(n):\n    match n:\n        case [a, *b]: return a, b\n        case {'x': c, **d}: return c, d",
        "def start(m):\n    match m:\n        case [e, *f]: return e, f\n        case {'x': g, **h}: return g, h",
    ),
    "a nested function's": (
        "def start(a):\n    def inner(b): return a + b\n    return inner",
        "def start(x):\n    def within(y): return x + y\n    return within",
    ),
    "a lambda's": ("start = lambda a: a + 1", "start = lambda b: b + 1"),
    "a nonlocal's": (
        "def start():\n    a = 0\n    def inner():\n        nonlocal a\n        a += 1\n    return inner",
        "def start():\n    b = 0\n    def inner():\n        nonlocal b\n        b += 1\n    return inner",
    ),
    "a private function": (
        "def _f(): return 1\ndef start(): return _f()",
        "def _g(): return 1\ndef start(): return _g()",
    ),
    "a public class": (
        "class A:\n    x = 1\ndef start(): return A()",
        "class B:\n    x = 1\ndef start(): return B()",
    ),
    "a private method": (
        "class start:\n    def _f(self): return 1\n    def g(self): return self._f()",
        "class start:\n    def _h(self): return 1\n    def g(self): return self._h()",
    ),
    "a private attribute": (
        "class start:\n    def __init__(self): self._a, self._b = 1, 2\n    def g(self): return self._a",
        "class start:\n    def __init__(self): self._c, self._d = 1, 2\n    def g(self): return self._c",
    ),
    "the order of definitions": (
        "def a(): return 1\ndef b(): return 2\ndef start(): return a(), b()",
        "def start(): return a(), b()\ndef b(): return 2\ndef a(): return 1",
    ),
    "two that call each other": (
        "def a(n): return b(n)\ndef b(n): return a(n)\nstart = a",
        "def b(m): return c(m)\ndef c(m): return b(m)\nstart = b",
    ),
    "an annotation": (
        "def start(a: int) -> int:\n    b: int = a\n    c: str\n    return b",
        "def start(a):\n    b = a\n    return b",
    ),
    "an import for annotations": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING: from .low import WIDTH\ndef start(a: WIDTH): return a",
        "def start(a): return a",
    ),
    "another way to import": (
        "from fpkit.low import help\ndef start(): return help(1)",
        "from . import low as deep\ndef start(): return deep.help(1)",
    ),
    "a lazy import": (
        "from .low import help\ndef start(): return help(1)",
        "def start():\n    from .low import help as helped\n    return helped(1)",
    ),
    "the whole path": (
        "from .low import help\ndef start(): return help(1)",
        "import fpkit.low\ndef start(): return fpkit.low.help(1)",
    ),
    "a star": ("from .low import help\ndef start(): return help(1)", "from .low import *\ndef start(): return help(1)"),
    "an alias elsewhere": (
        "import torch.nn.functional as F\ndef start(): return F.relu",
        "from torch import nn\ndef start(): return nn.functional.relu",
    ),
    "a raise": (
        "def start(a):\n    raise ValueError(f'no {a}')",
        "def start(a):\n    raise ValueError('none', a.b) from None",
    ),
    "an error for people": (
        "from petlbench.core.errors import UserError\ndef start(a):\n    raise UserError(say(a))\ndef say(a): return a",
        "from petlbench.core.errors import UserError\ndef start(a):\n    raise UserError(f'{a}: mend it')",
    ),
    "a text that an error quotes": (
        "from petlbench.core.errors import UserError\ndef start(a):\n"
        "    told = f'no {a}'\n    raise UserError(f'{told}!')",
        "from petlbench.core.errors import UserError\ndef start(a):\n    raise UserError('never')",
    ),
    "how an error speaks": (
        "from petlbench.core.errors import UserError\nclass E(UserError):\n    def __str__(self): return 'a'\n"
        "def start(): raise E('x')",
        "from petlbench.core.errors import UserError\nclass E(UserError):\n    pass\ndef start(): raise E('y')",
    ),
    "a print": ("def start(a): print(f'{a:.1f}')", "def start(a): print(f'{a:.2f}', flush=True)"),
    "a warning": (
        "import warnings\ndef start(a): warnings.warn('a')",
        "from warnings import warn\ndef start(a): warn(f'b {a}', stacklevel=2)",
    ),
    "a log": (
        "import logging\nlog = logging.getLogger()\ndef start(a): log.info('a')",
        "import logging\nlog = logging.getLogger()\ndef start(a): log.info('b %s', a)",
    ),
    "an assertion's message": ("def start(a): assert a, 'no'", "def start(a): assert a"),
    "what describes an option": (
        "from pydantic import BaseModel, Field\nclass start(BaseModel):\n    a: int = Field(3, description='a')",
        "from pydantic import BaseModel, Field\nclass start(BaseModel):\n    a: int = Field(3, title='b')",
    ),
    "a picture": (
        "from petlbench.api.task import Task\nclass start(Task):\n    def picture(self, row, prediction): return 1",
        "from petlbench.api.task import Task\nclass start(Task):\n    def picture(self, row, prediction): return 2",
    ),
    "drawing": (
        "from petlbench.core.drawing import wrap\ndef start(a): return wrap(a)",
        "from petlbench.core import drawing\ndef start(a): return drawing.wrap(a)",
    ),
    "what a script does": ("def start(): return 1\nif __name__ == '__main__':\n    start()", "def start(): return 1"),
    "what nothing uses": ("def start(): return 1\ndef other(): return 2\nX = 3", "def start(): return 1"),
}
CHANGED = {
    "a constant": ("def start(): return 1", "def start(): return 1.0"),
    "a truth": ("def start(): return 1", "def start(): return True"),
    "a text": ("def start(): return '1'", "def start(): return b'1'"),
    "an operator": ("def start(a): return a + 1", "def start(a): return a - 1"),
    "the order of operands": ("def start(a, b): return a - b", "def start(a, b): return b - a"),
    "the order of parameters": ("def start(a, b): return a - b", "def start(b, a): return a - b"),
    "a default": ("def start(a=1): return a", "def start(a=2): return a"),
    "a default of a nested function": (
        "def start():\n    return lambda a=1: a",
        "def start():\n    return lambda a=2: a",
    ),
    "names passed by name": (
        "def start(): return f(a=1, b=2)\ndef f(a, b): return a - b",
        "def start(): return f(a=1, b=2)\ndef f(b, a): return b - a",
    ),
    "the name at the call": (
        "def start(): return f(a=1)\ndef f(a): return a",
        "def start(): return f(b=1)\ndef f(b): return b",
    ),
    "names in a dictionary": (
        "def start(): return f(**{'a': 1, 'b': 2})\ndef f(a, b): return a - b",
        "def start(): return f(**{'a': 1, 'b': 2})\ndef f(b, a): return b - a",
    ),
    "names that only pass by name": (
        "def start(*, a, b): return a - b",
        "def start(*, b, a): return b - a",
    ),
    "names of a method": (
        "class start:\n    def f(self, a, b): return a - b",
        "class start:\n    def f(self, b, a): return b - a",
    ),
    "names of a static method": (
        "class start:\n    @staticmethod\n    def f(a, b): return a - b",
        "class start:\n    @staticmethod\n    def f(b, a): return b - a",
    ),
    "an attribute": ("def start(a): return a.b", "def start(a): return a.c"),
    "a private attribute of another's": ("def start(a): return a._b", "def start(a): return a._c"),
    "a private method that a base may call": (
        "from torch import optim\nclass start(optim.SGD):\n    def _f(self): return self._f()",
        "from torch import optim\nclass start(optim.SGD):\n    def _g(self): return self._g()",
    ),
    "a hook of torch's": (
        "from torch import nn\nclass start(nn.Module):\n    def _apply(self, f): return self._apply(f)",
        "from torch import nn\nclass start(nn.Module):\n    def _apple(self, f): return self._apple(f)",
    ),
    "one private attribute for another": (
        "class start:\n    def __init__(self): self._a, self._b = 1, 2\n    def g(self): return self._a",
        "class start:\n    def __init__(self): self._a, self._b = 1, 2\n    def g(self): return self._b",
    ),
    "a private method that a text begins": (
        "class start:\n    def _get_a(self): return self._get_a()\n    def g(self): return getattr(self, f'_get_{g}')",
        "class start:\n    def _get_b(self): return self._get_b()\n    def g(self): return getattr(self, f'_get_{g}')",
    ),
    "a private method that a text names": (
        "class start:\n    def _f(self): return 1\n    def g(self): return getattr(self, '_f')",
        "class start:\n    def _h(self): return 1\n    def g(self): return getattr(self, '_f')",
    ),
    "a decorator": (
        "from functools import cache\n@cache\ndef start(): return []",
        "def start(): return []",
    ),
    "a decorator of ours": (
        "def twice(f): return lambda: 2 * f()\n@twice\ndef start(): return 1",
        "def twice(f): return lambda: 3 * f()\n@twice\ndef start(): return 1",
    ),
    "a base": (
        "class A:\n    x = 1\nclass start(A): pass",
        "class A:\n    x = 2\nclass start(A): pass",
    ),
    "an annotation in a class": (
        "from pydantic import BaseModel\nclass start(BaseModel):\n    a: int",
        "from pydantic import BaseModel\nclass start(BaseModel):\n    a: str",
    ),
    "an annotation that a decorator reads": (
        "from x import register\n@register\ndef start(a: int): return a",
        "from x import register\n@register\ndef start(a: str): return a",
    ),
    "an option's bound": (
        "from pydantic import BaseModel, Field\nclass start(BaseModel):\n    a: int = Field(3, ge=1)",
        "from pydantic import BaseModel, Field\nclass start(BaseModel):\n    a: int = Field(3, ge=2)",
    ),
    "which error": ("def start(): raise ValueError('a')", "def start(): raise TypeError('a')"),
    "which error of ours": (
        "from petlbench.core.errors import UserError\nclass A(UserError): pass\nclass B(A): pass\ndef start():\n"
        "    try: f()\n    except A: pass\n    except B: raise",
        "from petlbench.core.errors import UserError\nclass A(UserError): pass\nclass B(A): pass\ndef start():\n"
        "    try: f()\n    except B: pass\n    except A: raise",
    ),
    "a value that an exception carries": (
        "class Found(Exception): pass\ndef start(a): raise Found(a + 1)",
        "class Found(Exception): pass\ndef start(a): raise Found(a + 2)",
    ),
    "a text that is used too": (
        "def start(a):\n    told = f'no {a}'\n    if not a: raise ValueError(told)\n    return told",
        "def start(a):\n    told = f'none {a}'\n    if not a: raise ValueError(told)\n    return told",
    ),
    "a print of ours": (
        "def print(a): return a\ndef start(): return print(1)",
        "def print(a): return a\ndef start(): return print(2)",
    ),
    "a table filled elsewhere": (
        "X = {}\nX['a'] = 1\ndef start(): return X",
        "X = {}\nX['a'] = 2\ndef start(): return X",
    ),
    "a table appended to": (
        "X = [1]\nX.append(2)\ndef start(): return X",
        "X = [1]\nX.append(3)\ndef start(): return X",
    ),
    "a table updated in place": ("X = {1}\nX |= {2}\nstart = X", "X = {1}\nX |= {3}\nstart = X"),
    "a table handed to a function": (
        "X = []\nfill(X, 1)\ndef start(): return X",
        "X = []\nfill(X, 2)\ndef start(): return X",
    ),
    "a class changed from outside": (
        "class A: pass\nA.x = 1\ndef start(): return A",
        "class A: pass\nA.x = 2\ndef start(): return A",
    ),
    "a class of others' changed": (
        "import torch\ntorch.x.y = 1\ndef start(): return 1",
        "import torch\ntorch.x.y = 2\ndef start(): return 1",
    ),
    "another alias changed": (
        "from .low import TABLE as T\nT.append(1)\ndef start(): return f()",
        "from .low import TABLE as T\nT.append(2)\ndef start(): return f()",
    ),
    "one of two definitions": (
        "if f():\n    def start(): return 1\nelse:\n    def start(): return 2",
        "if f():\n    def start(): return 1\nelse:\n    def start(): return 3",
    ),
    "the condition": (
        "if f(1):\n    def start(): return 1\nelse:\n    def start(): return 2",
        "if f(2):\n    def start(): return 1\nelse:\n    def start(): return 2",
    ),
    "a name bound again": ("x = 1\nx = x + 1\ndef start(): return x", "x = 1\nx = x + 2\ndef start(): return x"),
    "a name bound with others": ("x, y = 1, 2\ndef start(): return y", "x, y = 1, 3\ndef start(): return y"),
    "what a module does": ("f(1)\ndef start(): return 1", "f(2)\ndef start(): return 1"),
    "a loop at the top": (
        "for n in 1, 2: f(n)\ndef start(): return 1",
        "for n in 1, 3: f(n)\ndef start(): return 1",
    ),
    "a registered function": (
        "T = {}\ndef put(f): T[1] = f\n@put\ndef one(): return 1\ndef start(): return T",
        "T = {}\ndef put(f): T[1] = f\n@put\ndef one(): return 2\ndef start(): return T",
    ),
    "a class that its base notes": (
        "class A:\n    def __init_subclass__(cls): f(cls)\nclass B(A):\n    x = 1\ndef start(): return 1",
        "class A:\n    def __init_subclass__(cls): f(cls)\nclass B(A):\n    x = 2\ndef start(): return 1",
    ),
    "subclasses": (
        "class A: pass\nclass B(A):\n    x = 1\ndef start(): return A.__subclasses__()",
        "class A: pass\nclass B(A):\n    x = 2\ndef start(): return A.__subclasses__()",
    ),
    "globals": ("X = 1\ndef start(a): return globals()[a]", "X = 2\ndef start(a): return globals()[a]"),
    "a name that a module makes up": (
        "from . import main\ndef __getattr__(name): return 1\ndef start(): return main.other",
        "from . import main\ndef __getattr__(name): return 2\ndef start(): return main.other",
    ),
    "a global": (
        "x = 0\ndef start():\n    global x\n    x = 1",
        "x = 0\ndef start():\n    x = 1",
    ),
    "a class's own name": (
        "x = 1\nclass start:\n    x = x + 1",
        "x = 2\nclass start:\n    x = x + 1",
    ),
    "a closure's": (
        "def start(a, b):\n    def inner(c): return a + c\n    return inner",
        "def start(a, b):\n    def inner(c): return b + c\n    return inner",
    ),
    "a comprehension's first source": (
        "def start(a, b): return [a for a in a]",
        "def start(a, b): return [a for a in b]",
    ),
    "where an import is from": (
        "from torch import nn\ndef start(): return nn.Linear",
        "from jax import nn\ndef start(): return nn.Linear",
    ),
    "where a star is from": (
        "from torch import *\ndef start(): return abs",
        "from jax import *\ndef start(): return abs",
    ),
    "a method that is no task's": (
        "class start:\n    def picture(self): return 1",
        "class start:\n    def picture(self): return 2",
    ),
    "an empty class and one with a base": ("class start: pass", "class start(Exception): pass"),
    "async": ("async def start(): return 1", "def start(): return 1"),
}


@pytest.mark.parametrize("case", SAME)
def test_what_computes_nothing_does_not_count(digest: Digest, case: str) -> None:
    before, after = (digest(main=source, low=LOW) for source in SAME[case])
    assert before == after


@pytest.mark.parametrize("case", CHANGED)
def test_what_computes_counts(digest: Digest, case: str) -> None:
    before, after = (digest(main=source, low=LOW + "TABLE = []\n") for source in CHANGED[case])
    assert before != after


@pytest.mark.parametrize(
    "main",
    [
        "from .low import X\ndef start(): return X",
        "from . import low\ndef start(): return low.X",
        "from fpkit import low as l\ndef start(): return l.X",
        "import fpkit.low\ndef start(): return fpkit.low.X",
        "import fpkit.low as l\ndef start(): return l.X",
        "from . import low\ndef start(name): return getattr(low, name)",
        "from . import low\nMODULES = [low]\ndef start(): return MODULES",
        "from .low import *\ndef start(): return X",
        "from .between import Y\ndef start(): return Y",
        "from .deep import Z\ndef start(): return Z",
        "from .deep.below import Z\ndef start(): return Z",
        "def start():\n    from .low import X\n    return X",
        "def start():\n    from . import low\n    return low.X",
        "def start():\n    import importlib\n    return importlib.import_module('fpkit.low')",
        "def start():\n    import importlib\n    return importlib.import_module('.low', __package__)",
        "class start:\n    from .low import X",
        "class start:\n    def f(self, a=None):\n        from .low import X\n        return lambda: X",
        "try:\n    from .low import X\nexcept ImportError:\n    X = 0\ndef start(): return X",
        "try:\n    from . import low\nexcept ImportError:\n    low = None\ndef start(): return low.X",
        "def start():\n    try:\n        from .low import X\n    except ImportError:\n        X = 0\n    return X",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from .low import X\ndef start(): return X",
        "if not TYPE_CHECKING:\n    from .low import X\ndef start(): return X",
        "from .low import X\ndef start(a=X): return a",
        "from .low import X\n@X\ndef start(): return 1",
        "from .low import X\nclass start(X): pass",
        "from .low import X\nclass start(metaclass=X): pass",
        "from .low import X\nclass start:\n    a: X",
        "from .low import X\nclass start:\n    a: 'X'",
        "from .low import X\ndef start(): return f'{X:>{X}}'",
        "from .low import X\ndef start(a):\n    match a:\n        case X.y: return 1",
        "from .low import X\nTABLE = {}\nTABLE['x'] = X\ndef start(): return TABLE",
        "import fpkit.effects\ndef start(): return 1",
        "def start():\n    import fpkit.effects",
    ],
)
def test_what_is_used_counts_however_it_is_imported(digest: Digest, main: str) -> None:
    files = {
        "main": main,
        "between": "from .low import X as Y",
        "deep__in____init__": "from .below import Z",
        "deep__in__below": "from ..low import X as Z",
        "effects": "from .low import X\nprint(X)\nf(X)",
    }
    before, after = (digest(low=f"X = {value}", **files) for value in (1, 2))
    assert before != after


@pytest.mark.parametrize(
    "main",
    [
        "if TYPE_CHECKING:\n    from .low import X\ndef start(a: X): return a",
        "import typing\nif typing.TYPE_CHECKING:\n    from .low import X\ndef start(a: X) -> X: return a",
        "from ..low import X\ndef start(): return X",
        "from .nowhere import X\ndef start(): return X",
        "import low\ndef start(): return low.X",
        "from .low import X\ndef start(): return 1",
        "from .low import X\ndef start(X): return X",
        "from .low import X\nAlias = list[X]\ndef start(a: Alias): return a",
    ],
)
def test_what_is_not_used_does_not_count(digest: Digest, main: str) -> None:
    assert digest(main=main, low="X = 1") == digest(main=main, low="X = 2")


def test_a_file_that_moves_changes_nothing(digest: Digest) -> None:
    main = "from .layers import Bottleneck\nclass start:\n    layer = Bottleneck"
    layers = "from . import sizes\nclass Bottleneck:\n    width = sizes.WIDTH"
    before = digest(main=main, layers=layers, sizes="WIDTH = 8")
    moved = {
        "deep__in____init__": "from .inside import Bottleneck as Narrow",
        "deep__in__inside": layers.replace("from .", "from .."),
        "sizes": "WIDTH = 8",
    }
    assert before == digest(
        main=main.replace(".layers import Bottleneck", ".deep import Narrow as Bottleneck"), **moved
    )
    one = "WIDTH = 8\nclass start:\n    layer = Low\nclass Low:\n    width = WIDTH"
    assert before == digest(start="other:start", other=one) != digest(start="other:start", other=one.replace("8", "9"))


def test_a_package_counts_by_what_it_does(digest: Digest) -> None:
    main = {"main": "def start(): return 1"}
    plain, quiet, acting = (digest(__init__=code, **main) for code in ("", "import os\nX = 1", "f(1)"))
    assert plain == quiet != acting
    namespace = [digest(main="from .bare.x import X\ndef start(): return X", bare__in__x=f"X = {n}") for n in (1, 2)]
    assert namespace[0] != namespace[1]


def test_a_compiled_module_counts_by_its_content(digest: Digest, tmp_path: Path) -> None:
    import sysconfig

    found = []
    for content in (b"a", b"b"):
        main = "from .fast import run\ndef start(): return run()"
        write(tmp_path / "fpkit", {"main": main})
        (tmp_path / "fpkit" / f"fast{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(content)
        forget()
        found.append(closure("fpkit.main:start").digest)
    assert found[0] != found[1]


@pytest.mark.parametrize("source", ["def f(:\n", "x = '\0'\n", "\xff\n"])
def test_what_is_no_python_is_named_with_its_file(digest: Digest, tmp_path: Path, source: str) -> None:
    digest(main="from .low import X\ndef start(): return X", low="X = 1")
    (tmp_path / "fpkit" / "low.py").write_bytes(source.encode("latin-1"))
    forget()
    with pytest.raises(UserError) as caught:
        closure("fpkit.main:start")
    assert str(caught.value).startswith(str(tmp_path / "fpkit" / "low.py")) and "\n" not in str(caught.value)


def test_a_start_that_the_code_does_not_name_is_the_whole_module(digest: Digest) -> None:
    assert digest(main="for n in 'ab': globals()[n] = 1") != digest(main="for n in 'ab': globals()[n] = 2")
    assert digest(start="main", main="X = 1") != digest(start="main", main="X = 2")
    assert digest(start="main:Outer.Inner [extra]", main="class Outer:\n    class Inner: x = 1") != digest(
        start="main:Outer.Inner [extra]", main="class Outer:\n    class Inner: x = 2"
    )
    with pytest.raises(UserError, match=r"module fpkit\.nowhere"):
        digest(start="nowhere:start")


def test_a_digest_is_the_same_on_every_python(digest: Digest) -> None:
    """Python 3.12 parses f-strings anew, and later versions add fields to nodes; the digest is fixed here for all."""
    source = r"""
x = 3; w = 5; u = u"text"; big = 1e400, 1j, b"\xff", "\ue000\U0001fae8", ...
a = f"a{{b}}{x!r:>{w}}" "tail" f"{x=}" f"{x = :>4}" "b" f"{{" rf"\d{x}\{x}" f"{x:%Y}" f"" "" f"{x}" ""
def start(a, /, *rest, b=None, **k) -> "int":
    match a:
        case {"x": 1, **r} if r: return None
        case [1, *_] | None: return {**k, "b": [lambda: (yield), *rest], "c": globals()}
"""
    assert digest(main=source) == "b07bbdc6fb9cae3f"


def test_a_sum_of_many_terms_is_no_error(digest: Digest) -> None:
    terms = " + ".join(["1"] * 2000)
    assert digest(main=f"start = {terms}") != digest(main=f"start = {terms} + 1")
    assert digest(main=f"def start(a): raise ValueError('a' + {terms})")


def test_a_class_without_a_file_has_no_closure() -> None:
    made = type("Made", (), {"__module__": "__main__"})
    nowhere = type("Made", (), {"__module__": "no.such.module"})
    assert closure_of(made) is closure_of(nowhere) is None
    assert closure_of(Writer) == of(Definition("petlbench.core.source_code.text", "Writer"))
