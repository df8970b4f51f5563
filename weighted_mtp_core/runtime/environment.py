"""Settings that torch and its libraries read once, when they are loaded or first used."""

from __future__ import annotations

import logging
import os

from weighted_mtp_core.errors import WmtpError

SPIN_COUNT = 1000
"""How often a thread checks a barrier before it sleeps; GNU OpenMP's own default is 300,000."""

_REPRODUCIBLE = (":4096:8", ":16:8")  # values for which cuBLAS is deterministic; the first one is faster


def prepare_environment_for_torch() -> None:
    """Set the variables that torch reads when it is imported, unless the user has set them.

    Call this function before the first import of torch.

    - `PYTORCH_ENABLE_MPS_FALLBACK`: an operator that Apple's GPUs do not support runs on the CPU.
    - `GOMP_SPINCOUNT`: threads that wait at a barrier sleep sooner. By default, waiting threads spin for
      milliseconds; if another process is busy, they occupy the core that the awaited thread needs (figures in
      docs/performance.md). The number of threads does not change, so results are bitwise equal.
      `GOMP_SPINCOUNT` is not set if the user has set `OMP_WAIT_POLICY`, which controls the same behaviour.

    The function also silences warnings of libraries. If torchao is installed, transformers imports it. On
    import, torchao warns about CUDA kernels that it cannot load, and torch warns about classes of torchao.
    Core uses neither the kernels nor the classes. On some CPUs, bitsandbytes warns that an optional package
    with a faster kernel is not installed.
    """
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def require_reproducible_cublas() -> None:
    """Make cuBLAS choose the same algorithm for equal matrix products in every run, as NVIDIA prescribes.

    The function sets CUBLAS_WORKSPACE_CONFIG, unless the user has set the variable. Call the function before
    the first matrix product on a CUDA device.

    Raises:
        WmtpError: The user has set a value with which results may differ between runs.
    """
    value = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _REPRODUCIBLE[0])
    if value not in _REPRODUCIBLE:
        raise WmtpError(
            f"`model.deterministic` needs another value of CUBLAS_WORKSPACE_CONFIG than `{value}`",
            hint=f"unset the variable, or set it to {' or '.join(_REPRODUCIBLE)}",
        )
