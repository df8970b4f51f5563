"""The exit codes of the commands.

`runtime/interrupts.py` turns OS signals into exceptions; `main` in `cli/__init__.py` turns exceptions into
these codes.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_RUN_FAILED = 1
"""The input was valid and the run failed, for example because a loss became NaN or a server is down."""
EXIT_BAD_INPUT = 2
"""The input is wrong and the user can correct it: a recipe, an argument, an installed plugin."""
EXIT_INTERRUPTED = 130
"""The command ended after SIGINT (Ctrl-C): 128 + 2, the shell's code for a process ended by signal 2."""
EXIT_PIPE_CLOSED = 141
"""The reader closed the output, as in `plugins list | head -1`: 128 + 13 (SIGPIPE)."""
EXIT_TERMINATED = 143
"""The command ended after SIGTERM (from a scheduler, `docker stop`) or SIGHUP (closed terminal): 128 + 15."""
