"""What a plugin imports from core: base classes of components, data that components exchange, and `hookimpl`.

Importing this package imports neither torch nor transformers nor mlflow.

The terms of this API are defined below. Shapes use the letters B (rows of a batch), T (positions in a row),
H (size of a hidden state) and V (size of the vocabulary).

Terms for the model:

- *trunk*: a causal language model without its output layer and, for some kinds of heads, without its last
  layer or its final norm; the trunk maps token ids `[B, T]` to hidden states `[B, T, H]`.
- *head k* (k from 1 to K): predicts the token k positions ahead from the trunk's hidden state; `sequential`
  heads also read the tokens in between. Head 1 predicts the next token, like an ordinary language model.
- *unembedding*: the matrix `[V, H]` that turns a head's output into logits; all heads share one unembedding.
- *policy*: the model that is trained with weighted tokens; it consists of trunk, heads and unembedding.
- *critic*: a component that gives every token of a batch a score. The score of a token is its value V_t (see
  *value*), the logarithm of V_t, or the loss of the token under a *reference model*, which is another
  language model.

Terms for the data:

- *problem*: one task, to which there may be several responses.
- *example*: one *prompt* with one *response* to a problem, and the *reward* of the response. A reward is
  in [0, 1]; a response counts as correct if its reward is at least 0.5 (`is_correct`). An example may also be
  a chat; the messages of the assistant that are learned are then the response.
- *document*: the tokens of one example, that is, prompt, response and EOS (the end-of-sequence token).
- *packing*: the arrangement of several documents in one row of a batch. A token is never predicted from
  tokens of another document.
- *padding*: tokens without meaning that fill a row after its last document.
- *target token*: a token that the policy learns to predict, that is, a token of a response or its EOS.
- *pair (t, k)*: the prediction of token t + k by head k from source position t. A pair (t, k) *counts*
  if token t + k is a target token of the document that contains token t.
- *split*: `train`, `validation` or `test`; each problem is in one split only.
- *verdict*: the result of checking one completion of a problem, for example by running tests.

Terms for the weighting:

- *signal*: a quantity known for each token, or for each pair, of a batch, such as the reward or the policy's
  loss. A weighting declares the signals that it `needs`, and a critic declares the signals that it
  `provides`; core computes all other signals or reads them from the data.
- *weighting*: a component that computes from the signals a weight for each target token, or for each pair.
- *value* V_t: the expected reward of a response, estimated from the prefix that ends at token t.
- *TD error* of token t: the change of the expected reward at token t, `r_t + gamma V_t - V_{t-1}`, with the
  discount gamma, the value V_t, which is set to 0 at the last token, and r_t, which is the reward of the
  response at its last token and 0 at all other tokens.
- *advantage* of token t: the sum over all l >= 0 of `(gamma lambda)^l` times the TD error of token t + l,
  with discount gamma and decay lambda (generalised advantage estimation, GAE). With gamma = lambda = 1, the
  advantage of token t is `reward - V_{t-1}`.
- *global batch*: all rows of one optimiser step, over all processes and all *micro-batches* of gradient
  accumulation. The option `batch_size` is the number of rows of the global batch, although some batches of
  an epoch may have fewer rows. A weighting receives all rows of the global batch at once.

Terms for a run:

- *plugin*: a distribution that declares components by implementing *hooks* (`weighted_mtp_core.hookspecs`).
- *component*: a data source, critic, weighting or tracker. A component may have *options*.
- *recipe*: the TOML file that describes a run. A recipe names a component by its *address*:
  `<plugin>.<component>`, or `<plugin>` if the plugin has only one component of that kind.
- *stage*: a part of a run. Stage 0 prepares data and model, stage 1 trains the critic, stage 2 trains the
  policy and stage 3 evaluates the policy.
- *step*: one update of the parameters by the optimiser.
- *checkpoint*: the state of a run on disk. A run that resumes from a checkpoint gives the same result as an
  uninterrupted run, so a component must save everything that affects its later results (`Stateful`).
- *tracker*: a component that sends metrics, tags and files of a run to another system, such as MLflow.
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
