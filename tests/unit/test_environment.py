"""The package sets environment variables before torch is imported, and keeps values that the user has set."""

import os
import subprocess
import sys

import pytest
from weighted_mtp_core.runtime.environment import SPIN_COUNT

OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTORCH_ENABLE_MPS_FALLBACK")


def run(program, **own):
    """Run a program in a process; of the variables in `OURS`, its environment has only those in `own`."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        [sys.executable, "-c", program], env=kept | own, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, str(SPIN_COUNT)),
        ({"OMP_NUM_THREADS": "2"}, str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "5"}, "5"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_the_spin_count_is_set_before_torch_is_there_unless_the_user_has_set_it(own, expected):
    program = (
        "import os, sys, weighted_mtp_core; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )

    assert run(program, **own).stdout == f"{expected} False\n"


@pytest.mark.skipif(sys.platform != "linux", reason="torch uses GNU OpenMP on Linux only")
def test_the_spin_count_is_in_effect_when_torch_is_there():
    display = run("import weighted_mtp_core, torch", OMP_DISPLAY_ENV="VERBOSE").stderr

    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in display


@pytest.mark.parametrize("module", ["cli", "testing.pytest_plugin"])
def test_it_is_set_however_a_process_starts(module):
    program = f"import os, weighted_mtp_core.{module}; print(os.environ['GOMP_SPINCOUNT'])"

    assert run(program).stdout == f"{SPIN_COUNT}\n"
