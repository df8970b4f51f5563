"""The exit codes of the commands.

`runtime/interrupts.py` converts OS signals to exceptions; `main` in `cli/__init__.py` converts exceptions to
exit codes.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_RUN_FAILED = 1
"""A command failed although its input was valid, for example because of a NaN loss or a server outage."""
EXIT_BAD_INPUT = 2
"""The input (a recipe, data, an argument or an installed plugin) has a mistake that the user can correct."""
EXIT_INTERRUPTED = 130
"""The command ended after SIGINT (Ctrl-C): 128 + 2, the convention of shells, because SIGINT is signal 2."""
EXIT_PIPE_CLOSED = 141
"""The reader of the output closed the pipe, as in `plugins list | head -1`; 141 = 128 + 13 (SIGPIPE)."""
EXIT_TERMINATED = 143
"""The command ended after SIGTERM, for example from a scheduler, or SIGHUP; 143 = 128 + 15 (SIGTERM)."""
