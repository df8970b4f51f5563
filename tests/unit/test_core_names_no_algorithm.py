"""The core knows no algorithm: whatever one needs, it brings in its own package."""

import re
from pathlib import Path

import weighted_mtp_core

ALGORITHMS = re.compile(r"verifiable|baseline_mtp|td_error(?!_mean\b)|rho1|excess_loss|random_matched")


def test_no_module_of_the_core_names_an_algorithm():
    (root,) = weighted_mtp_core.__path__
    modules = sorted(Path(root).rglob("*.py"))

    named = [
        f"{module.relative_to(root)}:{number}: {line.strip()}"
        for module in modules
        for number, line in enumerate(module.read_text().splitlines(), start=1)
        if ALGORITHMS.search(line)
    ]

    assert len(modules) > 10
    assert named == []
