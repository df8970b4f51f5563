"""What a plugin imports from core: the component base classes, the data they exchange and the hook marker.

Importing this package imports neither torch nor transformers nor mlflow.

The words of this API. Model:

- *trunk*: a causal language model without its output layer; it maps token ids to states `[B, T, H]`.
- *head k*, k from 1 to K: predicts the token k positions ahead from the trunk's state. Head 1 is the ordinary
  language model.
- *unembedding*: the matrix `[V, H]` that turns a head's output into logits; all heads share it.
- *policy*: the model that is trained with weighted tokens: trunk, heads and unembedding.
- *critic*: gives every token of a batch a score: a value, or the loss of a *reference model*.

Data:

- *problem*, *example*: a problem is one task. An example is one *prompt* with one *response* to a problem,
  and the *reward* of the response, in [0, 1]: 1 if it was verified to be correct (`is_correct`).
- *document*: an example as tokens: prompt, response and EOS. *Packing* puts several documents into one row of
  a batch; no document is predicted from another. *Padding* fills the rest of the row.
- *target token*: a token that the policy learns to predict, that is, a token of a response or its EOS.
- *pair (t, k)*: the prediction of token t + k by head k from source position t. The pair *counts*
  if its target is a target token of the document that contains token t.
- *split*: `train`, `validation` or `test`; each problem is in one split only.
- *verdict*: the result of checking one completion of a problem, for example by running tests.

Weighting:

- *signal*: a quantity known for each token of a batch, such as the reward or the policy's loss. A weighting
  declares the signals that it `needs`; core computes most signals, and a critic `provides` the others.
- *weighting*: computes a weight for each target token, or for each pair, from the signals.
- *value* V_t: the expected reward of a response, estimated from the prefix that ends at token t.
- *TD error* of token t: `r_t + gamma V_t - V_{t-1}`, the change of the expected reward at token t. gamma is
  the discount, and r_t is the reward of the response at its last token and 0 at the other tokens. V_t is 0 at
  the last token.
- *advantage* of token t: the sum of the TD errors of token t and all later tokens, discounted by gamma times
  lambda per token (GAE); with gamma = lambda = 1 it is `reward - V_{t-1}`.
- *global batch*: all rows of one optimiser step, over all processes and all *micro-batches* of gradient
  accumulation. `batch_size` is the number of its rows, and a weighting receives all of them at once.

Running:

- *plugin*: a distribution that declares components by implementing *hooks* (`weighted_mtp_core.hookspecs`).
- *component*: a data source, critic, weighting or tracker, with its *options*. A *recipe*, the TOML file that
  describes a run, names a component by its *address*: `<plugin>.<component>`, or `<plugin>` if the plugin has
  only one component of that kind.
- *stage*: a run prepares data and model (stage 0), trains the critic (1), trains the policy (2) and evaluates
  it (3).
- *step*: one update of the parameters by the optimiser.
- *checkpoint*: the state of a run on disk. A run that resumes from a checkpoint gives the same result as an
  uninterrupted run, so a component must save everything that affects its later results (`Stateful`).
- *tracker*: sends metrics, tags and files of a run to another system, such as MLflow.
"""

from __future__ import annotations

from weighted_mtp_core.api.adapters import add_adapters
from weighted_mtp_core.api.components import (
    SAME_RESULT,
    BuildContext,
    Component,
    Critic,
    Finding,
    ModelContext,
    Stateful,
    WeightingChoice,
    WeightingStrategy,
    hookimpl,
)
from weighted_mtp_core.api.data import (
    SPLITS,
    DatasetVersion,
    DataSource,
    Example,
    Problem,
    Span,
    Split,
    Verdict,
    VerdictKind,
    is_correct,
)
from weighted_mtp_core.api.data_files import from_hub
from weighted_mtp_core.api.datasets import (
    StoredDataset,
    example_statistics,
    sha256_of_file,
    store_dataset,
)
from weighted_mtp_core.api.jsonl import JsonlOptions, JsonlSource, RowFiles
from weighted_mtp_core.api.jsonl_rows import JsonlRow, checked_row
from weighted_mtp_core.api.records import (
    ProblemIds,
    Record,
    int_field,
    read_records,
    text_field,
    text_list_field,
)
from weighted_mtp_core.api.tensors import Batch, CriticLoss, Scores, Signal, StepView, Weights
from weighted_mtp_core.api.tracking import KeptRun, MetricPoint, RunInfo, RunOutcome, Tracker
from weighted_mtp_core.errors import RunFailedError, WmtpError

__all__ = [
    "SAME_RESULT",
    "SPLITS",
    "Batch",
    "BuildContext",
    "Component",
    "Critic",
    "CriticLoss",
    "DataSource",
    "DatasetVersion",
    "Example",
    "Finding",
    "JsonlOptions",
    "JsonlRow",
    "JsonlSource",
    "KeptRun",
    "MetricPoint",
    "ModelContext",
    "Problem",
    "ProblemIds",
    "Record",
    "RowFiles",
    "RunFailedError",
    "RunInfo",
    "RunOutcome",
    "Scores",
    "Signal",
    "Span",
    "Split",
    "Stateful",
    "StepView",
    "StoredDataset",
    "Tracker",
    "Verdict",
    "VerdictKind",
    "WeightingChoice",
    "WeightingStrategy",
    "Weights",
    "WmtpError",
    "add_adapters",
    "checked_row",
    "example_statistics",
    "from_hub",
    "hookimpl",
    "int_field",
    "is_correct",
    "read_records",
    "sha256_of_file",
    "store_dataset",
    "text_field",
    "text_list_field",
]
