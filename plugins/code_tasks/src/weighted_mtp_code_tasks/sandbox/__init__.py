"""Judge untrusted programs.

Each program runs alone in a process that never contains tests. This process is in a sandbox, unless the
settings select the back end `trusted`. A trusted process runs the tests. The two processes exchange only
plain data of limited size, so a program cannot forge a verdict; it can only return values.

    with Sandbox(settings) as sandbox:
        verdicts = sandbox.judge([Job(program, "add", "def check(candidate): assert candidate(1, 2) == 3")])
"""

from weighted_mtp_code_tasks.sandbox.backends import (
    SANDBOX_VERSION,
    BackendStatus,
    available_backends,
)
from weighted_mtp_code_tasks.sandbox.jobs import AssertsJob, Job, StdinJob, humaneval_tests
from weighted_mtp_code_tasks.sandbox.sandbox import Sandbox

__all__ = [
    "SANDBOX_VERSION",
    "AssertsJob",
    "BackendStatus",
    "Job",
    "Sandbox",
    "StdinJob",
    "available_backends",
    "humaneval_tests",
]
