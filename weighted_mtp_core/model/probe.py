"""Compare a policy with the model from which it is made, before anything is trained.

Model families differ in ways that configs do not record reliably: scaled or capped logits, dropout between
layers, attention windows, and layers that depend on their own index. The model and the policy are therefore
run on a few tokens before training. Head 1 must give the logits of the model in evaluation mode and in
training mode, and the states of heads 1 and 2 must be the same if only some positions are read. The
unembedding is also compared on scaled-up states, because a soft-cap hardly changes small logits. During the
test, attention windows are made shorter than the text. Two other tests are in `generation.decoding_probe`,
which determines how a policy can be decoded, and in `packing_probe`, which determines whether rows may
contain several documents.

Shape letters: B rows, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model.families import (
    LIMITED_LENGTH,
    REFUSED,
    body_of,
    layers_of,
    logit_forms,
    text_config,
)
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.sparse_feed_forward import one_position_per_row, sparse_rows
from weighted_mtp_core.model.unembedding import Unembedding
from weighted_mtp_core.runtime.device import evaluation_mode

_TOLERANCE = 1e-4  # largest accepted difference of fp32 logits, relative to the largest logit
_LENGTH = 24
_WINDOW = 8
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
_SPARE_ROWS = 8  # largest number of rows of a position table beyond its positions; OPT's table has two
_CAPPED = 60.0  # the largest logit is scaled up at least to this size, because usual soft-caps are 15 to 50
_OTHER_MODEL = "use another base model, for example one of the Llama, Qwen or Gemma families"


@frozen(kw_only=True, eq=False)
class Answers:
    """The logits of a causal LM for the text of the probe, float32 `[B, T, V]`, and the LM's unembedding.

    Attributes:
        ids_BT: Token ids of the probe's text; the first halves of its rows are equal.
        logits_BTV: The logits in evaluation mode.
        training_BTV: The logits in training mode, with the random numbers of `seeded` for dropout.
        unembedding: Computes `logits_BTV` from the states of the model's body.
    """

    ids_BT: Tensor
    logits_BTV: Tensor
    training_BTV: Tensor
    unembedding: Unembedding


def probe_ids(config: Any, *, rows: int = 2) -> Tensor:
    """Return token ids `[B, T]` without special tokens; the first halves of the rows are equal."""
    config = text_config(config)
    named = [value for name, value in vars(config).items() if name.endswith("_token_id")]
    special = {each for value in named for each in (value if isinstance(value, list) else [value])}
    usual = [token for token in range(min(int(config.vocab_size), 4096)) if token not in special]
    positions = getattr(config, "max_position_embeddings", None) or -1
    length = min(_LENGTH, positions) if positions > 0 else _LENGTH
    start_T = torch.arange(length) * 37
    start_T[length // 2 :] += 11
    ids_BT = start_T.repeat(rows, 1)
    ids_BT[:, length // 2 :] += 5 * torch.arange(rows)[:, None]
    return torch.tensor(usual)[ids_BT.remainder(len(usual))]


@torch.no_grad()
def observe(base: Any) -> Answers:
    """Run a causal LM on the probe's text.

    Raises:
        WmtpError: The model cannot be a trunk, for one of these reasons: the model is in `REFUSED`, has no
            body apart from its unembedding, has no unembedding matrix, or attends to later tokens; its
            forward pass raises an exception; its logits are not finite; or no `Unembedding` computes its
            logits from the states of its body.
    """
    name = base.config.model_type
    why = REFUSED.get(name)
    linear = base.get_output_embeddings()
    if why is None and body_of(base) is base:
        why = "it has no body apart from its unembedding"
    if why is None and not isinstance(getattr(linear, "weight", None), nn.Parameter):
        why = "it has no matrix that turns states into logits"
    if why is not None:
        raise WmtpError(f"a `{name}` model cannot be a trunk: {why}", hint=_OTHER_MODEL)
    ids_BT = probe_ids(base.config).to(linear.weight.device)
    try:
        with evaluation_mode(base), windows_of(base, _WINDOW):
            states_BTH, logits_BTV = _run(base, ids_BT)
            up = max(2.0, _CAPPED / float(logits_BTV.abs().max().clamp(min=1e-6)))
            _, scaled_BTV = _run(base, ids_BT, scale=up)
            base.train()
            with seeded():
                _, training_BTV = _run(base, ids_BT)
    except Exception as error:  # an unknown model can raise any exception
        raise WmtpError(
            f"a `{name}` model cannot be a trunk: it cannot be run with token ids only ({reason(error)})",
            hint=_OTHER_MODEL,
        ) from error
    if not bool(logits_BTV.isfinite().all()):
        raise WmtpError(
            f"the logits of this `{name}` model are not finite: some of its weights are damaged",
            hint="restore the model's files, or use another base model",
        )
    half = ids_BT.shape[1] // 2
    if not _near(logits_BTV[1, :half], logits_BTV[0, :half]):
        raise WmtpError(
            f"a `{name}` model cannot be a trunk: its predictions depend on later tokens", hint=_OTHER_MODEL
        )
    for scale, soft_cap in logit_forms(base.config):
        unembedding = Unembedding(linear, scale=scale, soft_cap=soft_cap)
        if states_BTH.shape[-1] != linear.weight.shape[1]:
            break
        if _near(unembedding(states_BTH), logits_BTV) and _near(unembedding(up * states_BTH), scaled_BTV):
            return Answers(
                ids_BT=ids_BT,
                logits_BTV=logits_BTV,
                training_BTV=training_BTV,
                unembedding=unembedding,
            )
    raise WmtpError(
        f"a `{name}` model cannot be a trunk: between its body and its logits there is more than "
        "a matrix, a bias, a scale and a soft-cap",
        hint=_OTHER_MODEL,
    )


@torch.no_grad()
def compare(policy: Policy, answers: Answers) -> bool:
    """Check that head 1 of a policy gives the logits of the model from which the policy was made.

    The function also checks that heads 1 and 2 give the same states if only some positions are read.

    Returns:
        Whether `Policy.sparse_trunk` may be true: each head reads the trunk's state at its own position only,
        and the trunk gives the same states if only some positions are read.

    Raises:
        WmtpError: A head raises an exception, head 1 gives other logits than the model, or head 1 or 2 gives
            other states if only some positions are read.
    """
    try:
        with evaluation_mode(policy), windows_of(policy, _WINDOW):
            hidden_BTH = policy.trunk_states(answers.ids_BT)
            logits_BTV = policy.logits(1, hidden_BTH)
            gap = _gap(logits_BTV, answers.logits_BTV)
            found = [(1, f"is not the model itself (logits differ by {gap:.2g})", gap)]
            for k in range(1, min(policy.n_future, 2) + 1):
                for gap in _sparse_gaps(policy, k, hidden_BTH, ids_BT=answers.ids_BT):
                    what = f"gives other states if only some are read (states differ by {gap:.2g})"
                    found.append((k, what, gap))
            is_sparse = policy.heads.pointwise and _can_be_sparse(policy, hidden_BTH, ids_BT=answers.ids_BT)
            policy.train()
            with seeded():
                training_BTV = policy.logits(1, policy.trunk_states(answers.ids_BT))
            gap = _gap(training_BTV, answers.training_BTV)
            found.append((1, f"is not the model itself in training (logits differ by {gap:.2g})", gap))
    except Exception as error:  # an unknown model can raise any exception
        raise _unfit(policy, "", f"cannot be run ({reason(error)})") from error
    for k, what, gap in found:
        if not gap <= _TOLERANCE:  # also True for NaN
            raise _unfit(policy, f"head {k} of ", what)
    return is_sparse


@contextmanager
def windows_of(model: nn.Module, size: int) -> Iterator[None]:
    """Inside this context, the attention windows of a model have `size` tokens, if it has windows."""
    configs = {id(each): each for module in model.modules() for each in _configs(module)}
    holders: list[Any] = [*model.modules(), *configs.values()]
    changed = [
        (holder, name, value)
        for holder in holders
        for name in _WINDOWS
        if type(value := vars(holder).get(name)) is int
    ]
    try:
        for holder, name, _ in changed:
            setattr(holder, name, size)
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


@contextmanager
def seeded() -> Iterator[None]:
    """Inside this context, use random numbers from a fixed seed; afterwards, restore the previous state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _configs(module: nn.Module) -> Iterator[Any]:
    """Yield a module's transformers configs."""
    config = vars(module).get("config")
    if config is not None:
        yield config
        yield from (value for value in vars(config).values() if hasattr(value, "model_type"))


def _run(base: Any, ids_BT: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the states of a model's body, and the logits that the model computes from the scaled states."""
    states: list[Tensor] = []

    def scale_up(_: nn.Module, __: Any, output: Any) -> Any:
        states.append(output.last_hidden_state)
        output.last_hidden_state = scale * output.last_hidden_state
        return output

    with body_of(base).register_forward_hook(scale_up):
        logits: Tensor = base(input_ids=ids_BT, use_cache=False).logits
    return states[-1], logits.float()


def _sparse_gaps(policy: Policy, k: int, hidden_BTH: Tensor, *, ids_BT: Tensor) -> tuple[float, float]:
    """Return how much head k's states differ if a few positions, or one of each row, are read."""
    rows, length = hidden_BTH.shape[:2]
    states_BTH = policy.head_states(k, hidden_BTH, ids_BT=ids_BT)
    if states_BTH.ndim != 3:
        raise ValueError(f"the states of head {k} have the shape {list(states_BTH.shape)}")
    whole, some = states_BTH.flatten(0, 1), _some(states_BTH)
    with sparse_rows(policy.heads.layer(k), some):
        few = policy.head_states(k, hidden_BTH, ids_BT=ids_BT).flatten(0, 1)[some]
    one = torch.arange(rows, device=whole.device) * length + 3
    with one_position_per_row(policy.heads.layer(k), one):
        single = policy.head_states(k, hidden_BTH, ids_BT=ids_BT).flatten(0, 1)[one]
    return _gap(few, whole[some]), _gap(single, whole[one])


def _can_be_sparse(policy: Policy, hidden_BTH: Tensor, *, ids_BT: Tensor) -> bool:
    """Return whether the trunk's states are the same if the last layer's network skips some positions."""
    some = _some(hidden_BTH)
    try:
        with sparse_rows(layers_of(policy.trunk)[-1], some):
            few_BTH = policy.trunk_states(ids_BT)
    except Exception:  # noqa: BLE001 - a layer of another model can raise any exception
        return False
    return _near(few_BTH.flatten(0, 1)[some], hidden_BTH.flatten(0, 1)[some])


def _some(state_BTH: Tensor) -> Tensor:
    """Return a few positions, int64 indices into the flattened `[B, T]`."""
    return torch.tensor([2, 5, state_BTH.shape[:2].numel() - 1], device=state_BTH.device)


def _gap(actual: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest expected value.

    The result is infinite if the shapes differ.
    """
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.float() - expected.float()).abs().max() / expected.abs().max().clamp(min=1e-9))


def _near(actual: Tensor, expected: Tensor) -> bool:
    return _gap(actual, expected) <= _TOLERANCE


def _unfit(policy: Policy, which: str, what: str) -> WmtpError:
    return WmtpError(
        f"{which}a `{policy.config.model_type}` model with `{policy.head_kind}` heads {what}",
        hint='set `model.heads.kind = "medusa"`' if policy.heads.bodies else _OTHER_MODEL,
    )


@torch.no_grad()
def check_positions(policy: Policy, tokens: int) -> None:
    """Check that a policy has enough positions for a document of `tokens` tokens.

    Raises:
        WmtpError: The model has too few positions, for example a learned table that is too short.
    """
    config = text_config(policy.config)
    limit = getattr(config, "max_position_embeddings", None) or tokens
    if limit >= tokens or limit < 0:
        return
    token = probe_ids(policy.config)[:1, :1]
    fails = config.model_type in LIMITED_LENGTH
    if not fails and policy.unembedding.weight.device.type == "cuda":
        # On a CUDA device, a look-up past the end of a table would end the process, so the sizes of the
        # tables are compared instead.
        tables = [each for each in policy.trunk.modules() if isinstance(each, nn.Embedding)]
        fails = any(limit <= each.num_embeddings < tokens + _SPARE_ROWS for each in tables)
    elif not fails:
        try:
            policy.trunk_states(token, position_BT=torch.tensor([[tokens - 1]]))
        except (IndexError, RuntimeError):
            fails = True
    if fails:
        raise WmtpError(
            f"this `{config.model_type}` model cannot read a document of {tokens} tokens, since its table of "
            f"positions ends at {limit}",
            hint=f"set `data.max_tokens = {limit}` or less, or use a base model with more positions",
        )
