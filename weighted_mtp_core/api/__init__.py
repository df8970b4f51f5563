"""What a plugin imports from core: the kinds of component, the data they exchange, the hook marker.

Importing this package imports neither torch nor transformers nor mlflow.

The words of this API. Model:

- *trunk*: a causal language model without its output layer; it maps token ids to states `[B, T, H]`.
- *head k*, k from 1 to K: predicts the token k positions ahead from the trunk's state. Head 1 is the ordinary
  language model.
- *unembedding*: the matrix `[V, H]` that turns a head's output into logits; all heads share it.
- *policy*: trunk, heads and unembedding: the model that is trained with weighted tokens.
- *critic*: scores every token of a batch: a value, or the loss of a *reference model*.

Data:

- *problem*, *example*: a problem is one task. An example is one *prompt* with one *response* to a problem,
  and the *reward* of the response, in [0, 1]: 1 if it was verified to be correct (`is_correct`).
- *document*: an example as tokens: prompt, response and EOS. *Packing* puts several documents into one row
  of a batch; no prediction crosses from one to another. *Padding* fills the rest of the row.
- *target token*: a token that the policy learns to predict: the tokens of responses, EOS included.
- *pair (t, k)*: one prediction: source position t, head k, target token t + k. It *counts* if the target is a
  target token of the document of its source.
- *split*: `train`, `validation` or `test`; no problem is in two of them.
- *verdict*: the result of checking one completion of a problem, for example by running tests.

Weighting:

- *signal*: something known about the tokens of a batch. A weighting `needs` signals; core computes some of
  them, a critic `provides` the others.
- *weighting*: computes a weight for each target token, or for each pair, from the signals.
- *value* V_t: the reward that is expected for a response, estimated from the prefix that ends at token t.
- *TD error* of token t: `r_t + gamma V_t - V_{t-1}`, the change of that expectation; r_t is the reward at the
  last token of the response and 0 before, and the value after the last token is 0.
- *advantage*: the sum of the TD errors from t on, discounted by gamma lambda a token; with gamma = lambda = 1
  it is `reward - V_{t-1}`.
- *global batch*: all rows of one optimiser step, of all processes and all *micro-batches* into which gradient
  accumulation splits it. `batch_size` is its number of rows, and a weighting sees all of it at once.

Running:

- *plugin*: a distribution that declares components by implementing *hooks* (`weighted_mtp_core.hookspecs`).
- *component*: a data source, critic, weighting or tracker, with its *options*. A *recipe*, the TOML file that
  describes a run, names it by its *address*: `<plugin>.<component>`, or `<plugin>` if it is the only one.
- *stage*: a run prepares data and model (stage 0), trains the critic (1), trains the policy (2) and evaluates
  it (3).
- *step*: one update of the parameters by the optimiser.
- *checkpoint*: the state of a run on disk. A run that resumes from it gives the result of one that was never
  interrupted, so a component saves everything that affects its later results (`Stateful`).
- *tracker*: sends metrics, tags and files of a run to another system, such as MLflow.
"""

from __future__ import annotations

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
    Split,
    Verdict,
    VerdictKind,
    is_correct,
)
from weighted_mtp_core.api.datasets import (
    StoredDataset,
    example_statistics,
    sha256_of_file,
    store_dataset,
)
from weighted_mtp_core.api.jsonl import JsonlOptions, JsonlSource
from weighted_mtp_core.api.jsonl_rows import JsonlRow
from weighted_mtp_core.api.records import (
    ProblemIds,
    Record,
    int_field,
    json_lines,
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
    "RunFailedError",
    "RunInfo",
    "RunOutcome",
    "Scores",
    "Signal",
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
    "example_statistics",
    "hookimpl",
    "int_field",
    "is_correct",
    "json_lines",
    "read_records",
    "sha256_of_file",
    "store_dataset",
    "text_field",
    "text_list_field",
]
