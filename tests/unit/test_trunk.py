"""A trunk that a component trains: it starts as a copy of the policy's and shares nothing with it."""

import attrs
import pytest
import torch
from weighted_mtp_core.api import Batch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.model.trunk import trainable_trunk
from weighted_mtp_core.recipe.schema import MicroTable, ModelTable

MICRO = ModelTable(micro=MicroTable(vocab_size=300, hidden_size=16, layers=3, attention_heads=2), n_future=2)
TEXTS = ("def f(xs):\n    return sorted(xs)\n",)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def loaded(storage):
    return load_policy(MICRO, storage=storage, texts=lambda: TEXTS, seed=1)


@pytest.fixture
def batch():
    ids_BT = torch.randint(2, 250, (2, 9), generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, 9)
    return Batch(
        ids_BT=ids_BT,
        document_BT=nothing.long(),
        response_BT=nothing.bool(),
        reward_BT=nothing,
        group_BT=nothing.long(),
    )


def copied(loaded, storage, base=None):
    return trainable_trunk(loaded.policy, base, storage=storage, tokenizer=loaded.tokenizer)


def test_it_starts_as_the_policys_trunk_and_learns_alone(loaded, storage, batch):
    trunk = copied(loaded, storage)
    before = loaded.policy.trunk_states(batch.ids_BT)

    states = trunk(batch)
    states.square().sum().backward()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.sub_(0.1 * parameter.grad)

    torch.testing.assert_close(states, before)
    assert states.shape[-1] == trunk.hidden_size
    assert not torch.allclose(trunk(batch), before)
    assert torch.equal(loaded.policy.trunk_states(batch.ids_BT), before)
    assert all(parameter.grad is None for parameter in loaded.policy.parameters())


def test_another_model_gives_the_states_of_its_whole_body(loaded, storage, batch):
    from transformers import AutoModel

    folder = storage / "models_v2" / loaded.base_name
    expected = AutoModel.from_pretrained(folder).eval()(batch.ids_BT).last_hidden_state

    torch.testing.assert_close(copied(loaded, storage, str(folder))(batch), expected)
    torch.testing.assert_close(copied(loaded, storage, loaded.base_name)(batch), expected)


def test_a_model_with_another_tokenizer_is_refused(loaded, storage):
    table = attrs.evolve(MICRO, micro=attrs.evolve(MICRO.micro, vocab_size=320))
    other = load_policy(table, storage=storage, texts=lambda: (*TEXTS, "other words " * 20), seed=1)

    with pytest.raises(WmtpError, match="differs from the policy's") as caught:
        copied(loaded, storage, other.base_name)

    assert caught.value.hint == "use a model of the policy's family"


def test_a_missing_model_is_an_error(loaded, storage):
    with pytest.raises(WmtpError, match=r"there is no model `\./nowhere`"):
        copied(loaded, storage, "./nowhere")
