"""A training of `kdpipe compare`, as a process that ends when the process that started it does.

python -m kdpipe.pipelines.cli.cell PARENT train-student ...
"""

import ctypes
import os
import signal
import sys

from kdpipe.pipelines.cli.main import end_interrupted, main

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it has ended already
        end_interrupted()
    main(sys.argv[2:])
