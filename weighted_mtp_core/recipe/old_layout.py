"""The YAML layout before recipes: where each of its keys went, and why some have no place any more.

`RULES` is the whole mapping; `docs/migration.md` shows it. Which algorithm a file meant is not among them:
that was code, and is a plugin now.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from attrs import field, frozen

from weighted_mtp_core.identifiers import NAME, check_path
from weighted_mtp_core.recipe.credentials import credential_faults


class DroppedError(Exception):
    """A value has no place in a recipe; says why."""


@frozen(kw_only=True)
class Old:
    """An old file, flat, and what its numbers come to.

    Attributes:
        values: By dotted key; lists are values.
        processes: How many GPUs it ran on: batch sizes were those of one.
    """

    values: Mapping[str, Any]
    processes: int = 1

    @property
    def accumulation(self) -> int:
        """Micro-batches a step."""
        return int(self.training("gradient_accumulation_steps", 1))

    @property
    def batch_size(self) -> int:
        """Rows a step, over all micro-batches and processes."""
        return int(self.training("batch_size", 1)) * self.accumulation * self.processes

    @property
    def epochs(self) -> float | None:
        """Passes over the data."""
        found = self.training("n_epochs", self.training("num_epochs", None))
        return None if found is None else float(found)

    @property
    def steps(self) -> int | None:
        """Steps of stage 2, where the file says how many examples there are."""
        samples = self.values.get(
            "data_sampling.n_samples", self.values.get("data.sampling.stage2.n_samples")
        )
        if samples is None or self.epochs is None:
            return None
        return max(1, math.ceil(self.epochs * int(samples) / self.batch_size))

    def training(self, key: str, default: Any) -> Any:
        """Return a value of stage 2, which had a table of its own or not."""
        return self.values.get(f"training.stage2.{key}", self.values.get(f"training.{key}", default))


@frozen(kw_only=True)
class Rule:
    """Where one key, or all that match a pattern, went.

    Attributes:
        old: The key; `*` stands for anything.
        new: The new key; empty if there is none.
        note: How its value changes, or why there is none.
        change: Turns the value; raises `DroppedError` where it cannot.
    """

    old: str
    new: str = ""
    note: str = ""
    change: Callable[[Any, Old], Any] = field(default=lambda value, _: value)


# --------------------------------------------------------------------------- values


def _run_name(value: Any, _: Old) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", str(value)).strip("._-")
    if not re.fullmatch(NAME, name):
        raise DroppedError("it is no name")
    return name


def _tags(value: Any, _: Old) -> list[str]:
    every = value if isinstance(value, list) else [value]
    tags = [each if ":" in str(each) else f"{_run_name(each, _)}:true" for each in every]
    return list(dict.fromkeys(tags))


def _dtype(value: Any, _: Old) -> str:
    return str(value) if value in {"float32", "bfloat16"} else "auto"


def _shard(value: Any, _: Old) -> bool:
    return str(value) == "FULL_SHARD"


def _steps(_: Any, old: Old) -> int:
    if old.steps is None:
        raise DroppedError("how many steps that is depends on the number of examples: set `train.steps`")
    return old.steps


def _batch_size(_: Any, old: Old) -> int:
    return old.batch_size


def _warmup(value: Any, old: Old) -> int:
    if old.steps is None:
        raise DroppedError(
            "it is a share of the steps, which the file does not tell: set `train.warmup_steps`"
        )
    return round(float(value) * old.steps)


def _checkpoint_every(value: Any, old: Old) -> int:
    if old.steps is None or not old.epochs:
        raise DroppedError("it is a share of an epoch: set `checkpoint.every` in steps")
    return max(1, round(float(value) * old.steps / old.epochs))


def _samples(value: Any, _: Old) -> list[int]:
    return [int(each) for each in value]


def _tracking_uri(value: Any, _: Old) -> str:
    if not value:
        raise DroppedError("it was empty: without one, an embedded store under `run.storage` is used")
    if credential_faults(value) or not re.match(
        r"(https?|sqlite|postgresql(\+\w+)?)://|file:///", str(value)
    ):
        raise DroppedError("set MLFLOW_TRACKING_URI in the environment or in `.env` instead")
    return str(value)


def _experiment(value: Any, _: Old) -> str:
    try:
        check_path(str(value))
    except ValueError as error:
        raise DroppedError(str(error)) from error
    return str(value)


def _number(value: Any, _: Old) -> float:
    return float(value)  # YAML reads 1e-5 as text


_IN_STAGE_2 = "of stage 2"
_LOW_RANK = "every parameter is trained; low-rank adapters of a critic are options of its plugin"
_ELSEWHERE = "the run folder and the trackers decide"
_OWN_CRITIC = (
    "checkpoints of the old code are not read; a critic is trained in stage 1, or `critic.checkpoint`"
)
_SAMPLING = "data come as they are; choose examples when the file is written"
_MODEL_SAYS = "the model's own `config.json` says it"

_OF_STAGE_2 = (
    ("learning_rate", "train.learning_rate", "", _number),
    ("batch_size", "train.batch_size", "times accumulation and processes: rows of a whole step", _batch_size),
    ("gradient_accumulation_steps", "train.accumulation", "", None),
    ("n_epochs", "train.steps", "epochs x examples / rows of a step, rounded up", _steps),
    ("num_epochs", "train.steps", "as `n_epochs`", _steps),
    ("max_steps", "train.steps", "", None),
    ("max_grad_norm", "train.max_grad_norm", "", _number),
    ("weight_decay", "train.weight_decay", "", _number),
    ("warmup_steps", "train.warmup_steps", "", None),
    ("lr_scheduler.warmup_ratio", "train.warmup_steps", "times steps", _warmup),
    ("lr_scheduler.min_lr_ratio", "train.final_learning_rate", "", _number),
    ("lr_scheduler.type", "", "always a cosine", None),
    ("log_interval", "train.log_every", "", None),
    ("val_interval", "train.validate_every", "", None),
    ("n_future_tokens", "model.n_future", "", None),
    ("beta", "weighting.options.beta", "if the weighting has it, as all options", _number),
    ("weight_clip_min", "weighting.options.clip", "the lower of the two", None),
    ("weight_clip_max", "weighting.options.clip", "the upper of the two", None),
    ("gamma", "weighting.options.gamma", "", _number),
    ("td_lambda", "weighting.options.lam", "", _number),
    ("temperature", "weighting.options.temperature", "", _number),
    ("k_percent", "weighting.options.keep", "", _number),
    ("value_coef", "", "the critic has a stage of its own and shares no loss", None),
    ("loss_type", "", "the critic's plugin chooses its loss", None),
    ("td_ema_*", "", "how values are whitened is an option of the weighting", None),
    ("use_lora", "", _LOW_RANK, None),
    ("lora.*", "", _LOW_RANK, None),
    ("use_weighting", "", "the weighting says it", None),
    ("algo", "weighting.use", "the plugin named on the command line", None),
    ("stages", "", "a recipe has a stage 1 if it has a critic", None),
)


def _training_rules() -> list[Rule]:
    """Return the rules of `[training]`, with and without a table for stage 2, and those of stage 1."""
    rules = [
        Rule(old=f"training.{prefix}{old}", new=new, note=note, **({"change": change} if change else {}))
        for old, new, note, change in _OF_STAGE_2
        for prefix in ("", "stage2.")
    ]
    of_stage_1 = (
        "learning_rate",
        "batch_size",
        "gradient_accumulation_steps",
        "max_grad_norm",
        "warmup_steps",
    )
    names = {"gradient_accumulation_steps": "accumulation"}
    changes: dict[str, Callable[[Any, Old], Any]] = {"learning_rate": _number, "max_grad_norm": _number}
    rules += [
        Rule(
            old=f"training.stage1.{key}",
            new=f"critic.train.{names.get(key, key)}",
            note="where there is a critic",
            **({"change": changes[key]} if key in changes else {}),
        )
        for key in of_stage_1
    ]
    return [*rules, Rule(old="training.stage1.*", note="set `critic.train.steps` and the others by hand")]


RULES: tuple[Rule, ...] = (
    Rule(old="experiment.name", new="run.name", note="letters, digits and `._-` only", change=_run_name),
    Rule(old="experiment.tags", new="run.tags", note="`tag` becomes `tag:true`", change=_tags),
    Rule(old="experiment.stage", new="weighting.use", note="the plugin named on the command line"),
    Rule(old="experiment.description", note="it becomes the recipe's first line"),
    Rule(old="experiment.critic_checkpoint", note=_OWN_CRITIC),
    Rule(old="project.*", note="the package's own metadata say it"),
    Rule(old="models.policy.path", new="model.base"),
    Rule(old="models.policy.params.n_future_tokens", new="model.n_future"),
    Rule(old="models.policy.n_future_tokens", new="model.n_future"),
    Rule(
        old="models.policy.dtype",
        new="model.dtype",
        note="float16 becomes `auto`: its range is too small to train in",
        change=_dtype,
    ),
    Rule(old="models.policy.params.*", note=_MODEL_SAYS),
    Rule(old="models.policy.tokenizer_path", note="the tokenizer lies with the model"),
    Rule(old="models.policy.name", note="`model.base` names it"),
    Rule(old="models.value_model.*", note=_OWN_CRITIC),
    Rule(old="models.reference.*", note="name a checkpoint of a run in `critic.options`"),
    Rule(old="models.*", note="no such model is used"),
    Rule(old="dataset.train", new="data.options.train"),
    Rule(old="dataset.validation", new="data.options.validation"),
    Rule(old="dataset.test", new="data.options.test"),
    Rule(old="dataset.split.train", new="data.options.train"),
    Rule(old="dataset.split.validation", new="data.options.validation"),
    Rule(old="dataset.split.test", new="data.options.test"),
    Rule(old="dataset.max_length", new="data.max_tokens"),
    Rule(old="dataset.name", note="the files name it; `data.use` is `core.jsonl`"),
    Rule(old="data_sampling.n_samples", note="gives `train.steps`; " + _SAMPLING),
    Rule(old="data_sampling.val_n_samples", new="train.validation_examples"),
    Rule(old="data_sampling.*", note=_SAMPLING),
    Rule(old="data.sampling.*", note=_SAMPLING),
    *_training_rules(),
    Rule(old="checkpoint.save_total_limit", new="checkpoint.keep"),
    Rule(
        old="checkpoint.save_checkpoint_every",
        new="checkpoint.every",
        note="a share of an epoch becomes steps",
        change=_checkpoint_every,
    ),
    Rule(old="checkpoint.*", note="the best and the last are always kept, in the run folder"),
    Rule(old="runtime.seed", new="run.seed"),
    Rule(old="runtime.device", new="model.device"),
    Rule(old="runtime.mixed_precision", note="`model.dtype` says it"),
    Rule(
        old="distributed.fsdp.sharding_strategy",
        new="model.shard",
        note="`FULL_SHARD` is true",
        change=_shard,
    ),
    Rule(old="distributed.*", note="`torchrun` and `model.shard` say it"),
    Rule(old="storage.root", new="run.storage"),
    Rule(old="storage.*", note="folders below the root have fixed names"),
    Rule(
        old="mlflow.tracking_uri",
        new="tracker.0.options.tracking_uri",
        note="without user and password; else from the environment",
        change=_tracking_uri,
    ),
    Rule(old="mlflow.experiment", new="run.experiment", change=_experiment),
    Rule(old="mlflow.experiment_name", new="run.experiment", change=_experiment),
    Rule(old="mlflow.s3_artifacts", new="tracker.0.options.artifact_root"),
    Rule(old="mlflow.*", note=_ELSEWHERE),
    Rule(old="evaluation.pass_at_k", new="evaluate.pass_at_k", note="with as many samples", change=_samples),
    Rule(old="evaluation.*", note="every run measures the same"),
    Rule(old="logging.*", note="the log has one form"),
)
"""All rules; the first that matches a key holds."""


def rule_of(key: str) -> Rule | None:
    """Return the rule that holds for an old key."""
    return next((each for each in RULES if fnmatchcase(key, each.old)), None)
