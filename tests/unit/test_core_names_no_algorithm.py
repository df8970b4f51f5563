"""Core names no plugin, no algorithm and no task: these are in packages of their own."""

import re
from pathlib import Path

import weighted_mtp_core

ALGORITHMS = r"verifiable|baseline_mtp|td_error(?!_mean\b)|group_advantage|rho1|excess_loss|random_matched"
TASKS = r"code_tasks|code-tasks|micro_code|human_?eval|mbpp|gsm8k|code_contests"
PACKAGES = r"weighted_mtp_(?=baseline|code|controls|dft|given|rho1|verifiable)"
NAMED = re.compile(f"{ALGORITHMS}|{TASKS}|{PACKAGES}")
TEXTS = {".py", ".tmpl", ".html", ".css", ".js", ".toml"}


def test_no_file_of_the_core_names_a_plugin():
    (root,) = weighted_mtp_core.__path__
    files = sorted(path for path in Path(root).rglob("*") if path.suffix in TEXTS)

    named = [
        f"{file.relative_to(root)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if NAMED.search(line)
    ]

    assert len(files) > 150
    assert named == []
