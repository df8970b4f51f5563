"""Weights that come with the data, by row and by span: on tokens, in the loss and in gradients."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from weighted_mtp_core.api import Example, Signal, WeightingStrategy, Weights, WmtpError
from weighted_mtp_core.data.batches import collate, collate_packed, split_rows
from weighted_mtp_core.data.documents import Document
from weighted_mtp_core.data.given_weights import given_weights
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.tokens import open_tokens, tokenise
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

CPU = torch.device("cpu")
SMILE = "\N{SLIGHTLY SMILING FACE}"


def byte_level():
    """Return a tokenizer of bytes with a few merges: most characters outside ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, hello there", "서울 서울"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


CODEC = TextCodec(byte_level())


def example(response, *, prompt="q", number=0, **keys):
    return Example(
        example_id=f"e{number}", problem_id=f"p{number}", prompt=prompt, response=response, reward=1.0, **keys
    )


def document(each, ids, prompt):
    return Document(example=each, ids=ids, prompt=prompt)


def pieces(text):
    """Return the tokens of a response as bytes."""
    ((_, ids),) = CODEC.encode_documents([("q", text)])
    letters = pre_tokenizers.ByteLevel.alphabet()
    assert len(letters) == 256
    tokens = CODEC.tokenizer.convert_ids_to_tokens(ids)
    table = {letter: byte for byte, letter in _byte_letters().items()}
    return [bytes(table[letter] for letter in token) for token in tokens]


def _byte_letters():
    """Return GPT-2's letter of each byte, as published with its tokenizer."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def laid(each):
    """Return the weights of the tokens of a response, EOS last."""
    ((prompt, response),) = CODEC.encode_documents([(each.prompt, each.response)])
    weights = given_weights([document(each, [*prompt, *response, CODEC.eos_id], len(prompt))], CODEC)
    assert weights.dtype == np.float32
    assert not weights[: len(prompt)].any()
    return weights[len(prompt) :]


def by_bytes(text, char_weights):
    """Return each token's weight from its bytes: the mean over its non-blank (if none, all) characters."""
    character_of = [i for i, character in enumerate(text) for _ in character.encode()]
    weights, at = [], 0
    for piece in pieces(text):
        own = sorted(set(character_of[at : at + len(piece)]))
        chosen = [i for i in own if not text[i].isspace()] or own
        weights.append(float(np.mean([char_weights[i] for i in chosen])))
        at += len(piece)
    assert at == len(text.encode())
    return weights


# ------------------------------------------------------------------ on tokens


@given(
    parts=st.lists(
        st.tuples(
            st.text(alphabet=f"ab 서울한{SMILE}é\n", min_size=1, max_size=4),
            st.sampled_from([0.0, 0.3, 2.5, None]),
        ),
        min_size=1,
        max_size=6,
    ),
    weight=st.sampled_from([None, 0.5, 1.0, 3.0]),
)
def test_each_token_has_the_mean_weight_of_its_characters(parts, weight):
    text = "".join(part for part, _ in parts)
    spans, char_weights = [], []
    for part, value in parts:
        if value is not None:
            spans.append((len(char_weights), len(char_weights) + len(part), value))
        char_weights += [1.0 if value is None else value] * len(part)
    row = 1.0 if weight is None else weight

    weights = laid(example(text, weight=weight, spans=tuple(spans)))

    expected = [row * each for each in by_bytes(text, char_weights)]
    assert weights.tolist() == pytest.approx([*expected, row], rel=1e-6)


def test_the_tokens_of_a_span_have_exactly_its_weight_also_in_korean_and_emoji():
    text = f"hello 서울 {SMILE}한 world"
    start = text.index("서")

    weights = laid(example(text, spans=((start, start + 5, 0.3),))).tolist()

    inside = b"".join(piece for piece, weight in zip(pieces(text), weights, strict=False) if weight != 1.0)
    assert inside.decode().strip() == f"서울 {SMILE}한"
    assert set(weights) == {1.0, float(np.float32(0.3))}


def test_the_blank_before_a_word_does_not_dilute_the_weight_of_the_word():
    text = "hello world"
    assert pieces(text)[-1] == b" world"

    weights = laid(example(text, spans=((6, 11, 0.0),)))

    assert weights.tolist() == [1.0, 0.0, 1.0]


def test_a_token_that_straddles_the_edge_of_a_span_has_the_mean_of_its_characters():
    text = "hello"
    assert pieces(text) == [b"hello"]

    weights = laid(example(text, spans=((0, 2, 0.0),)))

    assert weights.tolist() == pytest.approx([3 / 5, 1.0])


def test_one_weight_a_row_reaches_eos_and_spans_do_not():
    assert laid(example("hello", weight=0.5)).tolist() == [0.5, 0.5]
    assert laid(example("hello", weight=0.5, spans=((0, 5, 0.5),))).tolist() == [0.25, 0.5]
    assert laid(example("hello", spans=((0, 5, 0.5),))).tolist() == [0.5, 1.0]
    assert laid(example("hello", weight=3, spans=((0, 5, 0.5),))).tolist() == [1.5, 3.0]


def test_a_tokenizer_without_offsets_is_refused_for_spans_only():
    class NoOffsets(TextCodec):
        def response_offsets(self, prompt, response):
            return None

    codec = NoOffsets(byte_level())
    plain = [document(example("hello", weight=0.5), [5, 6, 0], 1)]

    assert given_weights(plain, codec).tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(
        WmtpError, match="example `e0` has weights of spans, but the tokenizer does not report"
    ):
        given_weights([document(example("hello", spans=((0, 5, 0.5),)), [5, 6, 0], 1)], codec)


# ------------------------------------------------------------------ in token sets and batches


@pytest.fixture
def tokens(tmp_path):
    """Tokenise examples into a new folder."""

    def make(*examples):
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        tokenise(examples, CODEC, max_tokens=99, folder=folder)
        return open_tokens(folder, sha256="")

    return make


def test_without_weights_there_is_no_array(tokens):
    assert tokens(example("hello")).given_N is None
    assert tokens(example("hello", spans=())).given_N.tolist() == [0.0, 1.0, 1.0]


def test_targets_before_the_first_weight_count_as_one_and_prompts_as_zero(tokens, monkeypatch):
    monkeypatch.setattr("weighted_mtp_core.data.tokens._CHUNK", 2)
    examples = [example("hello", number=i) for i in range(5)]
    made = tokens(*examples, example("hello", number=5, weight=0.25))
    inside = np.arange(len(made.ids_N)) >= 15

    assert len(made.given_N) == len(made.ids_N) == 18
    assert made.given_N[inside].tolist() == [0.0, 0.25, 0.25]
    assert made.given_N[~inside].tolist() == [0.0, 1.0, 1.0] * 5


def test_a_batch_lays_the_weights_beside_their_tokens_packed_or_not(tokens):
    made = tokens(example("hello", weight=0.5), example("hello world", number=1, spans=((0, 5, 2.0),)))

    alone = collate(made, [0, 1], device=CPU)
    packed = collate_packed(made, [np.array([1, 0])], device=CPU)

    assert alone.given_BT.tolist() == [[0.0, 0.5, 0.5, 0.0], [0.0, 2.0, 1.0, 1.0]]
    assert packed.given_BT.tolist() == [[0.0, 2.0, 1.0, 1.0, 0.0, 0.5, 0.5]]
    assert [part.given_BT.tolist() for part in split_rows(alone, 2)] == [
        [alone.given_BT[0].tolist()],
        [alone.given_BT[1].tolist()],
    ]


# ------------------------------------------------------------------ in the loss and its gradients


class Given(WeightingStrategy):
    """The weights of the data."""

    def weigh(self, view):
        return Weights(weight=view.given_BT)


class Uniform(WeightingStrategy):
    """Gives every target the weight 1."""

    def weigh(self, view):
        return Weights(weight=view.response_BT.float())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=CODEC.size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


def step(model, batch, strategy, *, n_future=1, needs=frozenset({Signal.GIVEN}), **table):
    """Return the loss of one step and the gradient of each parameter of the base model."""
    torch.manual_seed(1)
    base = copy.deepcopy(model)
    policy = make_policy(base, n_future=n_future, head_kind="medusa")
    learner = PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=strategy, needs=needs, critic=None, label="weighting `w` of plugin `p`"),
        loss=LossTable(**table),
        steps=1,
        pairs_per_step=target_mask(batch_labels(batch, n_future)).sum(dim=(0, 1)).tolist(),
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )
    value = learner.learn(batch, step=0).loss
    return value, {name: each.grad for name, each in base.named_parameters()}


def own_gradient(model, tokens, document):
    """Return the gradient of the summed next-token losses of a document's targets, by transformers alone."""
    own = copy.deepcopy(model)
    start, end = tokens.start_D1[document : document + 2]
    ids = torch.from_numpy(tokens.ids_N[start:end].astype(np.int64))
    prompt = int(tokens.prompt_D[document])
    logits = own(ids[None]).logits[0]
    cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="sum").backward()
    return torch.cat([parameter.grad.flatten() for parameter in own.parameters()])


def shares(model, tokens, **table):
    """Return a, b in `gradient = a * own(first) + b * own(second)`, for a step on both documents."""
    _, gradient = step(model, collate(tokens, [0, 1], device=CPU), Given(), **table)
    whole = torch.cat([each.flatten() for each in gradient.values()])
    own = torch.stack([own_gradient(model, tokens, document) for document in (0, 1)], dim=1)
    solved = torch.linalg.lstsq(own.double(), whole.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(own.double() @ solved, whole.double(), rtol=1e-3, atol=1e-6)
    return solved.tolist()


def test_a_row_weight_of_one_half_halves_the_share_of_its_gradient(model, tokens):
    texts = "hello world", f"hello 서울 {SMILE}"
    full, other = shares(model, tokens(example(texts[0], weight=1), example(texts[1], number=1)))
    same, half = shares(model, tokens(example(texts[0], weight=1), example(texts[1], number=1, weight=0.5)))

    assert full == pytest.approx(other, rel=1e-3)
    assert half / same == pytest.approx(0.5, rel=1e-3)


def test_a_negative_weight_turns_its_gradient_round_and_counts_by_its_size(model, tokens):
    texts = "hello world", f"hello 서울 {SMILE}"
    positive = tokens(example(texts[0], weight=1), example(texts[1], number=1, weight=0.5))
    negative = tokens(example(texts[0], weight=1), example(texts[1], number=1, weight=-0.5))

    first, second = shares(model, positive)
    same, turned = shares(model, negative, negative_weights=True)

    assert same == pytest.approx(first, rel=1e-3)  # divided by the same sum of absolute values
    assert turned == pytest.approx(-second, rel=1e-3)


def test_a_token_of_weight_zero_has_no_gradient(model, tokens):
    cut, silent = "hello world", "hello there"
    made = tokens(example(cut, weight=1), example(silent, number=1, weight=0))

    _, with_silent = step(model, collate(made, [0, 1], device=CPU), Given())
    _, alone = step(model, collate(made, [0], device=CPU), Given())

    for name, gradient in alone.items():
        torch.testing.assert_close(with_silent[name], gradient, rtol=1e-4, atol=1e-7)


def test_weights_of_one_are_uniform_training_bit_for_bit(model, tokens):
    made = tokens(example("hello world", weight=1), example("hello", number=1, spans=((1, 3, 1.0),)))
    batch = collate(made, [0, 1], device=CPU)

    loss, gradient = step(model, batch, Given(), n_future=3)
    uniform_loss, uniform_gradient = step(model, batch, Uniform(), n_future=3)

    assert loss.item() == uniform_loss.item()
    assert all(torch.equal(gradient[name], uniform_gradient[name]) for name in uniform_gradient)


def test_a_batch_without_weights_counts_as_one(model, tokens):
    batch = collate(tokens(example("hello world"), example("hello", number=1)), [0, 1], device=CPU)

    assert step(model, batch, Given())[0].item() == step(model, batch, Uniform())[0].item()


# ------------------------------------------------------------------ undeclared signals


def test_a_signal_that_is_read_but_not_declared_is_named(model, tokens):
    batch = collate(tokens(example("hello", weight=1)), [0], device=CPU)

    with pytest.raises(RunFailedError) as caught:
        step(model, batch, WithReward(), needs=frozenset({Signal.GIVEN}))

    assert str(caught.value).startswith("weighting `w` of plugin `p` failed: TypeError: ")
    assert caught.value.hint == (
        "`view.reward_BT` is None unless the component declares the signal: "
        "add `Signal.REWARD` to its `needs`"
    )


class WithReward(WeightingStrategy):
    """Reads one signal that is declared and one that is not."""

    def weigh(self, view):
        return Weights(weight=view.given_BT * view.reward_BT)
