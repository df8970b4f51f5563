"""Plugin `core`: the data sources `core.jsonl` and `core.chat`, and the tracker `core.mlflow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weighted_mtp_core.api import Component, DataSource, JsonlOptions, RowFiles, Tracker, hookimpl
from weighted_mtp_core.builtin.chat import build_chat
from weighted_mtp_core.builtin.jsonl import build_jsonl
from weighted_mtp_core.builtin.mlflow import MlflowOptions, build_mlflow, examine_mlflow


@hookimpl
def wmtp_data_sources() -> Iterable[Component[Any, DataSource]]:
    """Declare the data sources for files of examples and of chats."""
    yield Component(
        name="jsonl",
        summary="Your own examples: rows with a prompt and a response, from JSON lines or parquet.",
        options=JsonlOptions,
        build=build_jsonl,
    )
    yield Component(
        name="chat",
        summary="Your own chats: rows with messages, from JSON lines or parquet.",
        options=RowFiles,
        build=build_chat,
    )


@hookimpl
def wmtp_trackers() -> Iterable[Component[Any, Tracker]]:
    """Declare the tracker for MLflow."""
    yield Component(
        name="mlflow",
        summary="An MLflow server, or a store of its own below the storage root.",
        options=MlflowOptions,
        build=build_mlflow,
        examine=examine_mlflow,
    )
