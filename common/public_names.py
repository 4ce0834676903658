"""Public names that a package exports, imported when they are first asked for."""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType


def export(package: str, homes: Mapping[str, str]) -> None:
    """Lets `from PACKAGE import NAME` work for the names of the paper's release, while importing PACKAGE stays cheap.

    Some classes lie in a module of their own name (`ddpm/BiFlowNet.py`), to which the import system sets the package's
    attribute as soon as anything imports the module. Here the attribute is the class, whatever was imported first, as
    it is where a package imports its classes at once. Who means the module by it (`import ddpm.BiFlowNet as flow`)
    finds the module's exported names as attributes of the class; `from ddpm.BiFlowNet import ...` is left as it is.

    Arguments:
        package: its `__name__`.
        homes: public name -> module below the package that defines it.
    """

    class Package(ModuleType):
        def __getattr__(self, name: str):
            if name not in homes:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value: object) -> None:
            if name in homes and isinstance(value, ModuleType):
                module, value = value, getattr(value, name)
                for other in (other for other, home in homes.items() if home == homes[name]):
                    setattr(value, other, getattr(module, other))
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *homes})

    module = sys.modules[package]
    module.__all__ = list(homes)
    module.__class__ = Package
