"""Let transformers read a model in shards: each process reads only its rows of the matrices from the files.

transformers reads only a shard of a tensor if the parameter is a `DTensor` when the files are opened, so the
matrices of a model are sharded while the model is still on the device `meta`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from weighted_mtp_core.runtime.sharding import decoder_layers, shard_matrices


def sharded_class(model_class: Any, source: Path | str, mesh: DeviceMesh) -> Any:
    """Return a subclass of a model's class with a constructor that shards the matrices of the model.

    Args:
        model_class: One of transformers' `Auto...` classes, or the class of the model itself.
        source: A transformers directory or a hub id.
        mesh: The processes over which the matrices are sharded.
    """
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = getattr(model_class, "_model_mapping", None)
    own = model_class if mapping is None else _get_model_class(AutoConfig.from_pretrained(source), mapping)

    def make(model: Any, *given: Any, **named: Any) -> None:
        own.__init__(model, *given, **named)
        with torch.device("cpu"):  # transformers makes models inside a context of the device `meta`
            shard_matrices([*decoder_layers(model), *_outside_layers(model)], mesh)

    # transformers looks up the source code of a class by the name of its module.
    return type(own.__name__, (own,), {"__init__": make, "__module__": own.__module__})


def finish_loading(model: Any, info: Any, mesh: DeviceMesh) -> None:
    """Restore a model's class, move the model to its device, and merge the reports of all processes.

    Args:
        model: A model that was loaded with a result of `sharded_class`.
        info: transformers' report about the loading; its list of tensors with wrong shapes is replaced with
            the union of the lists of all processes.
        mesh: The processes over which the model is sharded.
    """
    (model.__class__,) = type(model).__bases__
    model.to(mesh.device_type)
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, info["mismatched_keys"], group=mesh.get_group())
    info["mismatched_keys"] = set().union(*found)


def _outside_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the embeddings of a model and, if the model has one, the unembedding."""
    yield from (each for each in model.modules() if isinstance(each, nn.Embedding))
    unembedding: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator] # of transformers
    if unembedding is not None:
        yield unembedding
