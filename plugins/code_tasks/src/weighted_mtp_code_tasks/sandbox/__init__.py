"""Judge untrusted programs.

The program runs alone in a sandbox; tests never enter its process. A trusted process runs the tests, and only
bounded plain data crosses between the two, so no program can forge a verdict: it can only answer.

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
