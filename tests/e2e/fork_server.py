"""Run commands of the program as child processes of one process that has imported everything already.

    python fork_server.py

Importing torch, transformers and MLflow takes seconds, during which a process writes nothing. Each line of
the input is a JSON object with `cwd`, `arguments`, `output` (a file) and `kill_after_s` (the seconds after
which the process is killed, or null). The answer is a line with the exit code of the process and the seconds
that the process took.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import weighted_mtp_core.builtin._mlflow_tracker
import weighted_mtp_core.run  # noqa: F401


def serve() -> list[str]:
    """Answer requests in this process; in the child process of a request, return the request's arguments."""
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            begin(Path(request["cwd"]), Path(request["output"]))
            return request["arguments"]
        limit_s = request["kill_after_s"]
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            took_s = time.monotonic() - began
            if ended:
                break
            if limit_s is not None and took_s > limit_s:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        print(os.waitstatus_to_exitcode(status), took_s, flush=True)
    sys.exit()


def begin(cwd: Path, output: Path) -> None:
    """Set the child's working folder, and redirect its input and output."""
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)


if __name__ == "__main__":
    if threading.active_count() > 1:
        sys.exit("a thread would not survive a fork")
    sys.argv[1:] = serve()
    runpy.run_module("weighted_mtp_core", run_name="__main__", alter_sys=True)
