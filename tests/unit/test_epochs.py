"""The length of a stage in epochs instead of steps: in the layers of a recipe, and by counted batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.data.batches import StepBatches
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.load import load_recipe, recipe_to_toml
from weighted_mtp_core.recipe.schema import DataTable
from weighted_mtp_core.recipe.train_table import PolicyTrainTable, TrainTable

RECIPE = """
    extends = ["core:defaults.toml"]
    run.name = "epochs"
    data.use = "example.lines"
    weighting.use = "example.flat"
"""


@pytest.fixture
def load(write_recipe):
    def load(text="", *overrides, **options):
        return load_recipe(write_recipe(RECIPE + text, "recipe.toml"), overrides=overrides, **options)

    return load


def length(table):
    return table.epochs, table.given_steps


def test_without_either_key_there_are_300_steps():
    assert length(TrainTable()) == (None, 300)


def test_a_layer_that_gives_one_key_replaces_the_other_key_of_the_layers_below(load):
    assert length(load().train) == (None, 300)
    assert length(load("train.epochs = 2").train) == (2.0, None)
    assert length(load("train.epochs = 2", "train.epochs=0.5").train) == (0.5, None)
    assert length(load("train.epochs = 2", "train.steps=7").train) == (None, 7)
    assert length(load("train.epochs = 2", preset="ci").train) == (None, 8)
    assert length(load("train.steps = 9", "train.epochs=3").train) == (3.0, None)


def test_the_critic_has_a_length_of_its_own(load):
    recipe = load('critic.use = "example.judge"\ncritic.train.steps = 5', "critic.train.epochs=2")

    assert (length(recipe.critic.train), length(recipe.train)) == ((2.0, None), (None, 300))


def test_a_layer_with_both_keys_is_refused(load):
    with pytest.raises(WmtpError, match=r"train\.steps: must be left out if `epochs` is given"):
        load("train.epochs = 2\ntrain.steps = 9")


def test_options_of_components_with_these_names_are_not_affected(load):
    recipe = load("weighting.options.steps = 1", "weighting.options.epochs=2")

    assert recipe.weighting.options == {"steps": 1, "epochs": 2}


def test_the_resolved_recipe_gives_the_key_that_the_recipe_gives(load, write_recipe):
    text = recipe_to_toml(load("train.epochs = 2"))
    again = load_recipe(write_recipe(text, "resolved.toml"))

    assert "epochs = 2.0" in text
    assert again == load("train.epochs = 2")


def test_the_number_of_steps_is_not_known_before_the_data_are():
    table = TrainTable(epochs=2)

    assert table.length == "2 epochs"
    with pytest.raises(RuntimeError, match="not known before stage 0"):
        _ = table.steps


@given(st.integers(1, 50), st.integers(1, 1000), st.integers(1, 64))
def test_whole_epochs_take_as_many_steps_as_they_have_batches(epochs, documents, batch_size):
    batches = -(-documents // batch_size)

    table = PolicyTrainTable(epochs=epochs, batch_size=batch_size).for_epochs(batches)

    assert length(table) == (None, epochs * batches)
    assert table.batch_size == batch_size


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.3, 3), (0.25, 3), (1e-9, 1), (2.01, 21)])
def test_a_part_of_a_step_is_a_step(epochs, steps):
    assert TrainTable(epochs=epochs).for_epochs(10).steps == steps


@pytest.mark.parametrize("packing", ["none", "documents"])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_an_epoch_has_each_document_once(packing, batch_size):
    generator = np.random.default_rng(0)
    length_D = generator.integers(8, 30, size=53)
    tokens = TokenSet(
        ids_N=np.ones(length_D.sum(), dtype=np.int32),
        start_D1=np.concatenate([[0], length_D.cumsum()]),
        prompt_D=np.full(53, 2, dtype=np.int32),
        reward_D=np.ones(53, dtype=np.float32),
        problem_D=np.arange(53),
        example_ids=[str(d) for d in range(53)],
    )
    data = DataTable(use="example", packing=packing, max_tokens=32, pack_tokens=64)
    batches = StepBatches(tokens, data, batch_size=batch_size, seed=0, device=torch.device("cpu"))

    table = TrainTable(epochs=1, batch_size=batch_size).for_epochs(batches.batches_per_epoch)
    seen = [name for step in range(table.steps) for row in batches(step).names for name in row]

    assert sorted(seen, key=int) == [str(d) for d in range(53)]
