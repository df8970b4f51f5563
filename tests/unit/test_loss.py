"""The fused loss and its gradients are those of the formula, for any shapes, masks, weights and chunks."""

import copy
import functools
import math
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.model import chunked_unembedding
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.targets import IGNORED, target_mask

V = 23


@functools.cache
def policy(n_future=3, head="parallel", *, tied=False):
    """Return a small policy with parameters far from their initial scale, at which heads are alike."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    made = make_policy(LlamaForCausalLM(config), n_future=n_future, head_kind=head)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def case(seed, *, rows=2, length=7, n_future=3, share=0.6):
    """Return ids, and the loss's arguments with labels on a share of the pairs and uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, length, n_future
    labels_BTK = torch.randint(0, V, shape, generator=generator)
    labels_BTK[torch.rand(shape, generator=generator) >= share] = IGNORED
    target_BTK = target_mask(labels_BTK)
    weight_BTK = torch.rand(shape, generator=generator).mul(3).where(target_BTK, 0.0)
    return torch.randint(0, V, shape[:2], generator=generator), {
        "labels_BTK": labels_BTK,
        "weight_BTK": weight_BTK,
        "normaliser_K": normalisers(weight_BTK, target_BTK, normalise="weights"),
        "head_share_K": torch.arange(1.0, n_future + 1) / sum(range(1, n_future + 1)),
    }


def inside(labels_BTK):
    """Return the labels without those of head k at the last k positions, whose targets would be outside."""
    length, n_future = labels_BTK.shape[1:]
    is_inside_TK = torch.arange(length)[:, None] + torch.arange(1, n_future + 1) < length
    return labels_BTK.where(is_inside_TK, IGNORED)


def with_unembedding(model, weight_VH):
    """Return a copy of a policy with another unembedding."""
    twin = copy.deepcopy(model)
    twin.unembedding.weight = torch.nn.Parameter(weight_VH)
    return twin


def gradients(model):
    """Return every parameter's gradient, 0 for None."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def fused(model, ids_BT, **arguments):
    """Return the loss and every gradient of the fused path."""
    model.zero_grad()
    loss = weighted_mtp_loss(model, model.trunk_states(ids_BT), **arguments).loss
    return loss, gradients(model)


def detached_logits(model, k, hidden_BTH):
    """Return head k's logits; only its own parameters have a gradient."""
    state_BTH = model.heads.run(k, hidden_BTH.detach())
    if model.head_kind == "parallel":  # Llama's final norm
        size_BT1 = state_BTH.square().mean(dim=-1, keepdim=True) + model.norm.variance_epsilon
        state_BTH = model.norm.weight.detach() * state_BTH / size_BT1.sqrt()
    return state_BTH @ model.unembedding.weight.detach().T


def plain(model, ids_BT, *, labels_BTK, weight_BTK, normaliser_K, head_share_K, detach_trunk=False):
    """Return the loss and every gradient of the formula: all logits at once, gradients by autograd."""
    model.zero_grad()
    hidden_BTH = model.trunk_states(ids_BT)
    logits_of = [detached_logits if detach_trunk and k else Policy.logits for k in range(model.n_future)]
    logits = [logits_of[k](model, k + 1, hidden_BTH) for k in range(model.n_future)]
    logits_BTKV = torch.stack(logits, dim=2)
    ce_BTK = torch.nn.functional.cross_entropy(
        logits_BTKV.movedim(-1, 1), labels_BTK, ignore_index=IGNORED, reduction="none"
    )
    weighted_BTK = ce_BTK if weight_BTK is None else weight_BTK * ce_BTK
    loss = (head_share_K / normaliser_K * weighted_BTK.sum(dim=(0, 1))).sum()
    loss.backward()
    return loss.detach(), gradients(model)


def close(one, other, *, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(one[0], other[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=atol)


# ------------------------------------------------------------------ comparison with the formula


SHAPES = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 3),
        "length": st.integers(1, 9),
        "n_future": st.integers(1, 4),
        "share": st.floats(0, 1),
    }
)
MODELS = st.tuples(st.sampled_from(["parallel", "medusa"]), st.booleans())
BLOCKS = st.tuples(st.integers(1, 12), st.sampled_from([7, V]))  # rows and columns


@settings(max_examples=40)
@given(st.integers(0, 2**16), SHAPES, MODELS, BLOCKS, st.booleans())
def test_loss_and_every_gradient_are_those_of_the_formula(seed, shape, kind, block, detach_trunk):
    model = policy(shape["n_future"], kind[0], tied=kind[1])
    ids_BT, arguments = case(seed, **shape)
    arguments["detach_trunk"] = detach_trunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_unembedding, "CHUNK", block[0])
        patch.setattr(chunked_unembedding, "_COLUMNS", block[1])
        close(fused(model, ids_BT, **arguments), plain(model, ids_BT, **arguments))


@pytest.mark.parametrize("chunk", [13, 14, 15, 7, 1])
def test_chunk_boundaries_do_not_change_the_result(chunk, monkeypatch):
    ids_BT, arguments = case(3, share=1.0)  # 14 pairs a head
    whole = fused(policy(), ids_BT, **arguments)
    monkeypatch.setattr(chunked_unembedding, "CHUNK", chunk)

    close(fused(policy(), ids_BT, **arguments), whole)


def test_gradients_add_up_over_calls():
    ids_BT, arguments = case(4)
    model = policy(tied=True)
    once = fused(model, ids_BT, **arguments)[1]

    weighted_mtp_loss(model, model.trunk_states(ids_BT), **arguments)

    torch.testing.assert_close(gradients(model), {name: 2 * grad for name, grad in once.items()})


@given(seed=st.integers(0, 2**16), n_future=st.integers(1, 4), chunk=st.integers(1, 9))
def test_losses_entropies_and_head_sums_are_those_of_a_loop_over_pairs(seed, n_future, chunk):
    model = policy(n_future)
    ids_BT, arguments = case(seed, n_future=n_future)
    labels_BTK = arguments["labels_BTK"]
    expected_BTK = torch.zeros(labels_BTK.shape)
    choice_BTK = torch.zeros(labels_BTK.shape)
    entropy_BTK = torch.zeros(labels_BTK.shape)
    with torch.no_grad():
        hidden_BTH = model.trunk_states(ids_BT)
        for b, t, k in target_mask(labels_BTK).nonzero().tolist():
            logits_V = model.logits(k + 1, hidden_BTH)[b, t]
            expected_BTK[b, t, k] = -logits_V.log_softmax(dim=0)[labels_BTK[b, t, k]]
            entropy_BTK[b, t, k] = torch.distributions.Categorical(logits=logits_V).entropy()
            choice_BTK[b, t, k] = logits_V.argmax()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_unembedding, "CHUNK", chunk)
        predictions = PairPredictions(model, hidden_BTH, labels_BTK)
        losses_BTK, entropies_BTK, sums = predictions.losses(), predictions.entropies(), predictions.sums()

    torch.testing.assert_close(losses_BTK, expected_BTK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies_BTK, entropy_BTK, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums.ce_sum_K, expected_BTK.sum(dim=(0, 1)), rtol=1e-4, atol=1e-5)
    assert sums.correct_K.tolist() == (choice_BTK == labels_BTK).sum(dim=(0, 1)).tolist()
    assert sums.count_K.tolist() == target_mask(labels_BTK).sum(dim=(0, 1)).tolist()


def most_held_for_backward(n_future, heads):
    """Return the most bytes that autograd holds at a time while the heads learn, without parameters."""
    model = policy(n_future)
    ids_BT, arguments = case(0, n_future=n_future, share=1.0)  # no head has more pairs than head 1
    arguments["labels_BTK"] = inside(arguments["labels_BTK"])
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held = {"now": 0, "most": 0}

    def release(size):
        held["now"] -= size

    def pack(tensor):
        kept = tensor.detach()
        size = 0 if tensor.data_ptr() in parameters else tensor.nbytes
        weakref.finalize(kept, release, size)
        held["now"] += size
        held["most"] = max(held.values())
        return kept

    with torch.no_grad():
        hidden_BTH = model.trunk_states(ids_BT)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weighted_mtp_loss(model, hidden_BTH.requires_grad_(), heads=heads, **arguments)
    return held["most"]


@pytest.mark.parametrize("heads", ["labels", "kl"])
def test_what_is_held_for_backward_does_not_grow_with_the_number_of_heads(heads):
    assert most_held_for_backward(4, heads) == most_held_for_backward(1, "labels") > 0


class WidestLogits(TorchDispatchMode):
    """Records the most rows of logits in one tensor."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == V:
            self.rows = max(self.rows, result.numel() // V)
        return result


@pytest.mark.parametrize("heads", ["labels", "kl", "both"])
@pytest.mark.parametrize("measure", [PairPredictions.losses, PairPredictions.sums])
def test_no_more_than_one_chunk_of_logits_ever_exists(measure, heads, monkeypatch):
    monkeypatch.setattr(chunked_unembedding, "CHUNK", 32)  # more than H: a transposed matrix is [H, V]
    ids_BT, arguments = case(0, length=40, share=1.0)
    arguments["labels_BTK"] = inside(arguments["labels_BTK"])
    model = policy()

    with WidestLogits() as learning:
        weighted_mtp_loss(model, model.trunk_states(ids_BT), heads=heads, **arguments)
    with WidestLogits() as measuring:
        measure(PairPredictions(model, model.trunk_states(ids_BT), arguments["labels_BTK"]))

    assert learning.rows == measuring.rows == 32


@pytest.mark.parametrize(("length", "rows"), [(70, 48), (80, 32), (1000, 16)])
def test_chunks_shrink_as_other_buffers_grow_with_the_batch(length, rows, monkeypatch):
    room = 150 * V * 4
    monkeypatch.setattr(chunked_unembedding, "CHUNK", 150)
    monkeypatch.setattr(chunked_unembedding, "_BUDGET", room)
    monkeypatch.setattr(chunked_unembedding, "_FEWEST", 16)
    ids_BT, arguments = case(0, rows=1, length=length, share=1.0)
    model = policy()

    with WidestLogits() as seen:
        weighted_mtp_loss(model, model.trunk_states(ids_BT), **arguments)

    states = 2 * length * 16 * 4  # a head's gradient of [1, T, 16] and the sum over heads, float32
    assert seen.rows == rows == max(16, (room - states) // (V * 4) // 16 * 16)


GIB = 1 << 30


@given(memory=st.integers(GIB, 200 * GIB), vocab_size=st.integers(2, 300_000), extra=st.integers(0, 20 * GIB))
def test_a_larger_cuda_device_has_larger_chunks_that_take_a_small_share_of_it(memory, vocab_size, extra):
    def rows(size):
        return chunked_unembedding.chunk_rows(vocab_size, 2, extra_bytes=extra, memory=size)

    assert 192 <= rows(memory) <= rows(2 * memory) <= 4096
    assert rows(memory) % 64 == 0
    assert rows(memory) * vocab_size * 8 <= memory / 64 or rows(memory) == 192


def test_rows_of_usual_devices():
    def rows(vocab_size, memory):
        return chunked_unembedding.chunk_rows(vocab_size, 2, extra_bytes=0, memory=memory)

    assert [rows(v, 24 * GIB) for v in (32_000, 49_152, 128_256)] == [1536, 1024, 384]
    assert [rows(v, 80 * GIB) for v in (32_000, 49_152, 128_256)] == [4096, 3392, 1280]
    assert rows(49_152, None) == 192


# ------------------------------------------------------------------ known answers


@pytest.mark.parametrize("normalise", ["weights", "tokens"])
def test_uniform_logits_lose_ln_v(normalise):
    model = with_unembedding(policy(), torch.zeros(V, 16))
    ids_BT, arguments = case(5)
    weight_BTK = arguments["weight_BTK"] if normalise == "weights" else None
    target_BTK = target_mask(arguments["labels_BTK"])
    arguments |= {
        "weight_BTK": weight_BTK,
        "normaliser_K": normalisers(arguments["weight_BTK"], target_BTK, normalise=normalise),
    }

    loss, _ = fused(model, ids_BT, **arguments)

    assert float(loss) == pytest.approx(math.log(V), rel=1e-6)


def test_weights_move_the_optimum_as_a_unigram_model_says():
    """Counts (10, 5, 1) times weights (0.1, 1, 3) are (1, 5, 3), so the optimum is (1/9, 5/9, 3/9)."""
    labels_BTK = torch.tensor([0] * 10 + [1] * 5 + [2]).reshape(1, 16, 1)
    weight_BTK = torch.tensor([0.1, 1.0, 3.0])[labels_BTK]
    logits_V = torch.full((V,), -1e4)
    logits_V[:3] = torch.tensor([1.0, 5.0, 3.0]).log()
    hidden_BTH = torch.zeros(1, 16, 16)
    hidden_BTH[..., 0] = 1.0
    weight_VH = torch.zeros(V, 16)
    weight_VH[:, 0] = logits_V

    model = with_unembedding(policy(1, "medusa"), weight_VH)

    loss = weighted_mtp_loss(
        model,
        hidden_BTH,
        labels_BTK=labels_BTK,
        weight_BTK=weight_BTK,
        normaliser_K=normalisers(weight_BTK, labels_BTK >= 0, normalise="weights"),
        head_share_K=torch.ones(1),
    ).loss

    gradient_VH = model.unembedding.weight.grad
    shares = (1 / 9, 5 / 9, 3 / 9)
    assert float(loss) == pytest.approx(-sum(share * math.log(share) for share in shares), rel=1e-6)
    torch.testing.assert_close(gradient_VH, torch.zeros_like(gradient_VH), rtol=0, atol=1e-7)


@pytest.mark.parametrize("count", [257, 1001, 24003])
def test_counts_are_exact_in_any_dtype_of_the_model(count):
    model = with_unembedding(policy(1, "medusa"), torch.zeros(V, 16))
    labels_BTK = torch.arange(count).remainder(V).reshape(1, count, 1)
    hidden_BTH = torch.zeros(1, count, 16)
    ones_BTK = torch.ones(1, count, 1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        normaliser_K = normalisers(ones_BTK, labels_BTK >= 0, normalise="weights")
        result = weighted_mtp_loss(
            model,
            hidden_BTH,
            labels_BTK=labels_BTK,
            weight_BTK=ones_BTK,
            normaliser_K=normaliser_K,
            head_share_K=torch.ones(1),
        )
        sums = PairPredictions(model, hidden_BTH, labels_BTK).sums()

    assert normaliser_K.tolist() == result.count_K.tolist() == sums.count_K.tolist() == [count]
    assert {result.loss.dtype, result.ce_sum_K.dtype, sums.correct_K.dtype} == {torch.float32}
    assert float(sums.ce_sum_K) == pytest.approx(count * math.log(V), rel=1e-5)  # a bf16 sum is off by 4e-3


# ------------------------------------------------------------------ laws of weights


def test_weights_of_1_are_the_unweighted_loss_bit_for_bit():
    ids_BT, arguments = case(6)
    target_BTK = target_mask(arguments["labels_BTK"])
    arguments |= {
        "weight_BTK": target_BTK.float(),
        "normaliser_K": normalisers(target_BTK.float(), target_BTK, normalise="weights"),
    }
    weighted = fused(policy(), ids_BT, **arguments)

    arguments |= {
        "weight_BTK": None,
        "normaliser_K": normalisers(target_BTK.float(), target_BTK, normalise="tokens"),
    }
    unweighted = fused(policy(), ids_BT, **arguments)

    close(weighted, unweighted, rtol=0, atol=0)


@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 100))
@example(seed=0, scale=10.0)
def test_the_scale_of_all_weights_changes_nothing(seed, scale):
    ids_BT, arguments = case(seed)
    target_BTK = target_mask(arguments["labels_BTK"])
    scaled_BTK = scale * arguments["weight_BTK"]
    once = fused(policy(), ids_BT, **arguments)
    arguments |= {
        "weight_BTK": scaled_BTK,
        "normaliser_K": normalisers(scaled_BTK, target_BTK, normalise="weights"),
    }

    close(fused(policy(), ids_BT, **arguments), once)


def test_the_scale_of_one_weight_changes_loss_and_gradient():
    ids_BT, arguments = case(7)
    target_BTK = target_mask(arguments["labels_BTK"])
    before, gradients_before = fused(policy(), ids_BT, **arguments)
    weight_BTK = arguments["weight_BTK"].clone()
    weight_BTK[tuple(target_BTK.nonzero()[0])] *= 10
    arguments |= {
        "weight_BTK": weight_BTK,
        "normaliser_K": normalisers(weight_BTK, target_BTK, normalise="weights"),
    }
    after, gradients_after = fused(policy(), ids_BT, **arguments)

    assert abs(float(after - before)) > 1e-3
    assert not torch.allclose(
        gradients_after["unembedding.weight"], gradients_before["unembedding.weight"], rtol=1e-3
    )


@pytest.mark.parametrize("normalise", ["weights", "tokens"])
@pytest.mark.parametrize("nothing", ["no targets", "no weights"])
def test_without_targets_loss_and_gradients_are_0(nothing, normalise):
    ids_BT, arguments = case(8, share=0.0 if nothing == "no targets" else 1.0)
    target_BTK = target_mask(arguments["labels_BTK"])
    zero_BTK = torch.zeros_like(arguments["weight_BTK"])
    arguments |= {
        "weight_BTK": zero_BTK,
        "normaliser_K": normalisers(zero_BTK, target_BTK, normalise=normalise),
    }

    loss, found = fused(policy(), ids_BT, **arguments)

    assert float(loss) == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found.values())


def test_a_head_without_targets_does_not_change_the_others():
    ids_BT, arguments = case(9)
    arguments["labels_BTK"][:, :, 1] = IGNORED
    arguments["weight_BTK"][:, :, 1] = 0
    arguments["normaliser_K"][1] = 1

    loss, found = fused(policy(), ids_BT, **arguments)

    assert 0 < float(loss) < math.inf
    assert all(not grad.any() for name, grad in found.items() if name.startswith("heads.1."))
    close((loss, found), plain(policy(), ids_BT, **arguments))
