"""Takes torchvision's place where the installed one was built for another torch and cannot load.

nnU-Net's search for a trainer imports all of its own, some import timm, and timm torchvision; none
of it is used. Every submodule and every name in it exists here and does nothing.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class StandIn(types.ModuleType):
    __path__: tuple[str, ...] = ()
    __getattr__ = Anything.__getattr__


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith("torchvision."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
sys.modules[__name__].__class__ = StandIn
