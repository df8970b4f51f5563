"""Rows to write into files, and the source `core.jsonl` of such files."""

from weighted_mtp_core.api import BuildContext, JsonlOptions
from weighted_mtp_core.builtin.jsonl import build_jsonl

ROW = {
    "instruction": "Double a number.",
    "input": "",
    "output": "def f(n):\n    return 2 * n\n",
    "problem_id": "double",
    "is_correct": True,
    "metadata": {"level": 1},
}
PLAIN = {"prompt": "2 + 3 = ", "response": "5"}


def build(tmp_path, **options):
    context = BuildContext(seed=0, storage=tmp_path)
    return build_jsonl(JsonlOptions(**{key: str(value) for key, value in options.items()}), context)
