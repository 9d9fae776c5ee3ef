"""Ceph's own Python bindings, which come with the distribution and with nothing else.

They are C extensions of the system's Python. A virtual environment of the same Python does not see them; so exactly
these modules are taken from where the distribution keeps them, and nothing that lies beside them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Literal

from volumed.errors import ConfigError

_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# Debian and its kin; Fedora and its kin.
_FOLDERS = (
    "/usr/lib/python3/dist-packages",
    f"/usr/lib64/python{_VERSION}/site-packages",
    f"/usr/lib/python{_VERSION}/site-packages",
)


def load(name: Literal["rados", "rbd", "cephfs"]) -> ModuleType:
    """The module; loads the C libraries, so only where they are needed. Raises ConfigError naming the package."""
    if name != "rados":
        load("rados")  # the others import it by its name
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    except ImportError as error:
        raise _unusable(name, str(error)) from None
    spec = PathFinder.find_spec(name, _FOLDERS)
    if spec is None or spec.loader is None:
        raise _unusable(name, f"there is none for Python {_VERSION} in {', '.join(_FOLDERS)}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _unusable(name, str(error)) from None
    return sys.modules.setdefault(name, module)


def _unusable(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"Ceph's Python module {name} cannot be used: {reason}",
        hint=f"install python3-{name}, and run volumed with the distribution's own Python",
    )
