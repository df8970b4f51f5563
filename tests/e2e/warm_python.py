"""An interpreter that has already imported torch and all modules of a run, so that a tiny run takes a second.

    python warm_python.py serve SOCKET PYTHON     wait for requests; PYTHON is the script that sends them
    python warm_python.py run SOCKET ARGUMENTS    what PYTHON calls; ARGUMENTS are those of `python`

Each request becomes a fork of the server with the caller's folder, environment and output. SIGINT and
SIGTERM for the caller are forwarded to its fork, and the exit code of the fork becomes that of the caller.
"""

import array
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

_END_S = 0.02


def serve(address: str, python: str) -> list[str]:
    """Answer requests until stdin closes; in the fork of a request, return the request's arguments."""
    import matplotlib.figure  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import weighted_mtp_core.compare.mlflow_record
    import weighted_mtp_core.run  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns once

    if threading.active_count() > 1:
        sys.exit("a thread would not survive a fork")
    sys.executable = python
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    callers = {}
    while True:
        ready, _, _ = select.select([listener, 0], [], [], _END_S)
        if 0 in ready:
            sys.exit()
        if listener in ready:
            caller, _ = listener.accept()
            request, descriptors = receive(caller)
            child = os.fork()
            if child == 0:
                listener.close()
                begin(request, descriptors)
                return request["arguments"]
            for descriptor in descriptors:
                os.close(descriptor)
            caller.sendall(b"%d\n" % child)
            callers[child] = caller
        with suppress(ChildProcessError):
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended:
                with callers.pop(ended) as caller, suppress(OSError):
                    caller.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def receive(caller: socket.socket) -> tuple[dict, list[int]]:
    text, descriptors, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    return json.loads(text), descriptors


def begin(request: dict, descriptors: list[int]) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])


def run(address: str, arguments: list[str]) -> int:
    """Carry out a request and return its exit code."""
    while arguments[0] != "-m":
        if arguments[0] == "-c":  # run without a fork, because the program may replace this process by PYTHON
            sys.executable = os.environ["WARM_PYTHON"]
            program, *sys.argv[1:] = arguments[1:]
            exec(program, {})
        arguments = arguments[1:]
    request = {"cwd": str(Path.cwd()), "environment": dict(os.environ), "arguments": arguments[1:]}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], array.array("i", [0, 1, 2]))
        answers = server.makefile()
        child = int(answers.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(child, number))
        code = int(answers.readline())
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(run(sys.argv[2], sys.argv[3:]))
    name, *sys.argv[1:] = serve(*sys.argv[2:])
    runpy.run_module(name, run_name="__main__", alter_sys=True)
