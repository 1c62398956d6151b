"""Former names: plug-ins may use them for one version after a renaming, and a warning gives the new name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar


def warn_of(former: str, name: str) -> None:
    """Warn that `former` will be removed; the warning points at the caller of the function that calls this one."""
    warnings.warn(f"`{former}` is called `{name}` now; the former name goes in the next version", DeprecationWarning, 3)


class FormerNames:
    """A base class whose subclasses and instances may set attributes by their former names."""

    former_names: ClassVar[Mapping[str, str]] = {}  # former name: present name

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for former in cls.former_names.keys() & vars(cls).keys():
            warn_of(f"{cls.__name__}.{former}", cls.former_names[former])
            setattr(cls, cls.former_names[former], vars(cls)[former])

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.former_names:
            warn_of(f"{type(self).__name__}.{name}", self.former_names[name])
            name = self.former_names[name]
        super().__setattr__(name, value)
