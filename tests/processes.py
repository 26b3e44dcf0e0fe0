"""How a process of a group ends."""

import os
import sys
from typing import NoReturn


def leave() -> NoReturn:
    """End this process with all its work written, without taking the interpreter down.

    Gloo's threads may still hold tensors of Python by then. One that lets go of them while the interpreter is being
    taken down aborts the process ("terminate called without an active exception",
    https://github.com/pytorch/pytorch/pull/179291), now and then, with nothing wrong.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
