"""`python -m kdpipe.pipelines.cli`: the command line without the console script, as torchrun starts it."""

import sys

if not getattr(sys.flags, "safe_path", False):
    # `python -m` looks into the current folder first, where a clone of mmdetection would hide what is installed
    del sys.path[0]

from kdpipe.pipelines.cli.main import main

main()
