"""The tags of a run: the keys that the framework sets and reserves, and the tags in a recipe.

docs/commands.md describes the values of the tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# set by plan.py
ALGO = "algo"
WEIGHTING, CRITIC, DATA = "wmtp.weighting", "wmtp.critic", "wmtp.data"
PLUGIN_PREFIX = "wmtp.plugin."
RECIPE_SHA256 = "wmtp.recipe_sha256"
SOURCE_SHA256 = "wmtp.source_sha256"
# set by run.py
MODEL_VERSION = "model_version"
UNINFORMATIVE_CRITIC = "wmtp.uninformative_critic"
ORACLE = "wmtp.oracle"
STOPPED_EARLY_PREFIX = "wmtp.stopped_early."
# set by tracking/recorder.py
RESUMED = "wmtp.resumed"
CHANGED_PREFIX = "wmtp.changed."
ERROR_CLASS = "wmtp.error_class"
# set by the tracker `core.mlflow`
RUN_ID = "wmtp.run_id"
# set by compare/grid.py, as tags of the recipe
GRID_PREFIX = "grid."
# set by compare/mlflow_record.py; PARENT_RUN is also set by compare/mlflow_runs.py
COMPARED_ARMS = "wmtp.compare"
PARENT_RUN = "mlflow.parentRunId"

_RESERVED = re.compile(r"algo|model_version|wmtp\..*|mlflow\..*")
_KEY = re.compile(r"[A-Za-z0-9_./ -]+")  # accepted by every MLflow store


def check_tags(tags: Sequence[str]) -> None:
    """Check the tags in a recipe.

    Raises:
        ValueError: A tag does not have the form "key:value", or its key is reserved or given twice.
    """
    seen = set()
    for tag, (key, value) in zip(tags, tag_pairs(tags), strict=True):
        if not value or not _KEY.fullmatch(key):
            raise ValueError(f'expected "key:value", got {tag!r}')
        if _RESERVED.fullmatch(key):
            raise ValueError(f"tag `{key}` is written by the run itself; choose another key")
        if key in seen:
            raise ValueError(f"tag `{key}` is given twice")
        seen.add(key)


def tag_pairs(tags: Sequence[str]) -> list[tuple[str, str]]:
    """Return (key, value) of each tag, which is split at its first colon."""
    split = [tag.partition(":") for tag in tags]
    return [(key.strip(), value.strip()) for key, _, value in split]
