"""Forks Python processes that have all their imports behind them: each costs milliseconds in place of seconds.

    python fork_server.py FOLDER MODULE...

Reads a JSON line per request and answers with one: {"code", "args", "env", "cwd", "out", "err"} starts a process that
runs the code, and gives its id; {"poll": id} gives its exit code, or null while it runs; {"end": true} ends the server.
"""

import importlib
import json
import os
import sys
import traceback
from typing import Any


def become(request: dict[str, Any]) -> int:
    """Run a request in this process, a child; returns the exit code."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["-c", *request["args"]]
    try:
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve() -> None:
    """Answer requests until one says that it is the last."""
    sys.path.insert(0, sys.argv[1])
    for name in sys.argv[2:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "end" in request:
            print("null", flush=True)
            os._exit(0)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            os._exit(become(request))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
