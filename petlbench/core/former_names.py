"""Names that plug-ins may still use for one version after a renaming, with a warning that says the new one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar


def warn_of(former: str, name: str) -> None:
    """Warn whoever called the caller's caller that a name is going."""
    warnings.warn(f"`{former}` is called `{name}` now; the former name goes in the next version", DeprecationWarning, 3)


class FormerNames:
    """Subclasses, and their instances, may set attributes by the names that these had before."""

    former_names: ClassVar[Mapping[str, str]] = {}  # the name now, by the former one

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
