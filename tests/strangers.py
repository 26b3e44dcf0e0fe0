"""Source of processes in which the package cannot be imported."""

#: Defines what keeps it out.
BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_vdneuron":
            raise ImportError("blocked")
"""

#: Keeps it out, from the first line on.
WITHOUT_THE_PACKAGE = f"{BLOCKER}\nsys.meta_path.insert(0, Blocker())\n"
