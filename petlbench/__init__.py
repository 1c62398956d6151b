"""petlbench: parameter-efficient transfer learning on vision-language models, measured fairly.

This file is the table of contents of the public API. Nothing is imported before it is used: `import petlbench` costs
milliseconds, and torch comes with what needs it. What a plug-in imports stands in `petlbench.api`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from petlbench.core.version import __version__

if TYPE_CHECKING:
    from petlbench.core.errors import UserError
    from petlbench.pipeline.run import run

__all__ = ["UserError", "__version__", "run"]

_HOMES = {"UserError": "petlbench.core.errors", "run": "petlbench.pipeline.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'petlbench' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
