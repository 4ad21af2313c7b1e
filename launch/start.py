"""`python start.py MODULE ARGUMENTS`: torchrun or msrun, without a traceback of its own where its worker has failed.

The worker has said in one line what was wrong. torchrun's exit status becomes the worker's, 128 + n after signal n.
"""

from __future__ import annotations

import runpy
import sys
import warnings

warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
sys.argv = sys.argv[1:]
del sys.path[0]  # this directory, whose folders are named like frameworks
launcher = sys.argv[0]
try:
    runpy.run_module(launcher, run_name="__main__", alter_sys=True)
except KeyboardInterrupt:
    sys.exit(130)
except Exception as error:
    if hasattr(error, "get_first_failure"):  # torch's ChildFailedError
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status >= 0 else 128 - status)
    sys.exit(f"error: {launcher}: {' '.join(str(error).split()) or type(error).__name__}")
