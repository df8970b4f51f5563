"""The exact texts of messages about recipes that can be read but not run: wrong values, missing signals."""

import pytest
from weighted_mtp_core.plan import make_plan


@pytest.fixture
def plan_error(example_plugin, write_recipe, recipe_text, error_of):
    """Return the error of planning a recipe."""

    def plan_error(*overrides, text=recipe_text, preset=None):
        path = write_recipe(text)
        return error_of(lambda: make_plan(path, overrides=overrides, preset=preset))

    return plan_error


def test_an_error_about_an_address_names_file_line_and_key(plan_error, recipe_text):
    assert plan_error("weighting.use=exmaple.flat").splitlines()[1:] == [
        "  --set, weighting.use",
        "hint: did you mean `example`?",
    ]
    assert plan_error(text=recipe_text.replace("example.flat", "example.flt")) == (
        "error: plugin `example` has no weighting named `flt`; it has `example.flat`, `example.valued`\n"
        "  recipe.toml, line 7, weighting.use\n"
        "hint: did you mean `example.flat`?"
    )


def test_a_signal_that_no_critic_provides(plan_error):
    assert plan_error("weighting.use=example.valued") == (
        "error: weighting `example.valued` needs the signal `value`, which no critic provides\n"
        'hint: in table `[critic]`: use = "example.judge"'
    )


def test_a_signal_that_the_critic_does_not_provide(plan_error):
    assert plan_error("weighting.use=example.valued", "critic.use=example.reference") == (
        "error: weighting `example.valued` needs the signal `value`, "
        "which critic `example.reference` does not provide\n"
        'hint: in table `[critic]`: use = "example.judge"'
    )


def test_options_of_a_component(plan_error):
    assert plan_error("weighting.options.beta=-1.0", "weighting.options.clp=[1, 2]") == (
        "error: recipe.toml: 2 problems\n"
        "  --set, weighting.options.beta: must be > 0: -1.0\n"
        "  --set, weighting.options.clp: unknown key `clp`; known keys: beta, clip, mode; "
        "did you mean `clip`?"
    )


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        ('["env"]', "expected \"key:value\", got 'env'"),
        ('["env:"]', "expected \"key:value\", got 'env:'"),
        ('[":x"]', "expected \"key:value\", got ':x'"),
        ('["a:1", "a:2"]', "tag `a` is given twice"),
        ('["algo:mine"]', "tag `algo` is written by the run itself; choose another key"),
        ('["wmtp.data:x"]', "tag `wmtp.data` is written by the run itself; choose another key"),
        ('["model_version:x"]', "tag `model_version` is written by the run itself; choose another key"),
        ('["mlflow.user:x"]', "tag `mlflow.user` is written by the run itself; choose another key"),
    ],
)
def test_tags(plan_error, tags, text):
    assert plan_error(f"run.tags={tags}") == f"error: recipe.toml: 1 problem\n  --set, run.tags: {text}"


def test_an_experiment_that_is_no_path(plan_error):
    assert plan_error("run.experiment=../evil") == (
        "error: recipe.toml: 1 problem\n"
        "  --set, run.experiment: each part of '../evil' must match `[A-Za-z0-9][A-Za-z0-9._-]*`, "
        "without `..`; '..' does not"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("evaluate.pass_at_k=[1, 5]", "evaluate.pass_at_k: must be between 1 and `samples` = 1: [1, 5]"),
        (
            "evaluate.samples=2",
            "evaluate.temperature: must be > 0 for `samples` = 2, or every sample is the same: 0.0",
        ),
        ("train.accumulation=3", "train.accumulation: must divide `batch_size` = 16 evenly: 3"),
        ("loss.head_weights=[0, 0]", "loss.head_weights: must be >= 0 and not all 0: [0.0, 0.0]"),
        (
            "loss.head_weights=[1, 2]",
            "loss.head_weights: expected one number for each of `model.n_future` = 4 heads, got 2",
        ),
        (
            "model={n_future=1, train='heads'}",
            "model.train: `heads` trains heads 2..K: `model.n_future` must be >= 2",
        ),
        (
            "loss={head_weights=[0, 1, 1, 1], head_schedule='forward'}",
            "loss.head_schedule: must be `constant` if head 1 has weight 0: forward",
        ),
        (
            "loss={head_schedule='step', head_schedule_end=1.0}",
            "loss.head_schedule_end: must be < 1 with the schedule `step`, or only head 1 is trained: 1.0",
        ),
        (
            "loss.head_schedule_end=0.3",
            'loss.head_schedule_end: has no effect with `head_schedule = "constant"`; leave it out: 0.3',
        ),
        (
            "loss={heads='kl', negative_weights=true}",
            "loss.heads: must be `labels` with `negative_weights`, or heads 2..K unlearn head 1: kl",
        ),
        (
            "model.micro.hidden_size=60",
            "model.micro.attention_heads: must divide `hidden_size` = 60 into parts of even size: 4",
        ),
        (
            "model.base_dtype='nf4'",
            'model.base_dtype: needs `train = "adapters"`: with `all`, the base stays in float32',
        ),
        (
            "model={train='adapters', base_dtype='bfloat16', adapters={dora=true}}",
            "model.base_dtype: must be `float32` for `adapters.dora`, which trains norms of float32 matrices",
        ),
        (
            "model={train='adapters', adapters={heads='adapted'}, heads={kind='medusa'}}",
            'model.adapters: must have `heads = "whole"`: `medusa` heads have no decoder layer to adapt',
        ),
        ("model.adapters.dropout=1.0", "model.adapters.dropout: must be < 1: 1.0"),
        ("run.seed=-1", "run.seed: must be >= 0: -1"),
        (
            "data={use='example.lines',options={folder='f'},packing='documents',pack_tokens=100}",
            "data.pack_tokens: must be >= `max_tokens` = 512, or a row is too short: 100",
        ),
    ],
)
def test_keys_that_do_not_fit_each_other(plan_error, override, text):
    assert plan_error(override) == f"error: recipe.toml: 1 problem\n  --set, {text}"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ("model.train='heads'", "loss.head_weights=[1, 0, 0, 0]"),
            'loss.head_weights: with `model.train = "heads"`, heads 2..K need a weight above 0',
        ),
        (
            ("model.train='heads'", "loss.head_schedule='reverse'"),
            'loss.head_schedule: with `model.train = "heads"`, nothing is trained after the end of `reverse`',
        ),
        (
            ("model.train='heads'", "train.select_by='head_1'"),
            'train.select_by: with `model.train = "heads"`, head 1 stays as it is and selects nothing',
        ),
        (
            ("model.train='adapters'", "loss={head_weights=[0, 1, 1, 1], detach_trunk=true}"),
            (
                "model.train: with `loss.detach_trunk` and no weight on head 1, adapters learn nothing: "
                "`heads` trains heads 2..K alone"
            ),
        ),
        (
            ("model.n_future=1", "train.select_by='later_heads'"),
            "train.select_by: `later_heads` needs `model.n_future` >= 2",
        ),
        (
            ("model.n_future=1", "loss.heads='kl'"),
            "loss.heads: `kl` is for heads 2..K: `model.n_future` must be >= 2",
        ),
        (
            ("loss.heads='kl'", "loss.head_weights=[1, 0, 0, 0]"),
            "loss.heads: `kl` needs a weight above 0 for one of heads 2..K in `loss.head_weights`",
        ),
        (
            ("train.head_learning_rate=0.1", "loss.head_weights=[1, 0, 0, 0]"),
            "train.head_learning_rate: needs a weight above 0 for one of heads 2..K in `loss.head_weights`",
        ),
        (
            ("model.n_future=1", "train.head_learning_rate=0.1"),
            "train.head_learning_rate: the learning rate of heads 2..K needs `model.n_future` >= 2",
        ),
        (
            ("model.train='heads'", "train.embedding_learning_rate=0.1"),
            'train.embedding_learning_rate: the embeddings are not trained with `model.train = "heads"`',
        ),
        (
            ("critic.use=example.judge", "critic.train.optimiser.name=muon"),
            (
                "critic.train.optimiser.name: `muon` is for the policy: a critic does not declare which "
                "parameters are embeddings"
            ),
        ),
        (
            ("model.n_future=1", "train.select_by='acceptance'"),
            "train.select_by: `acceptance` needs `model.n_future` >= 2",
        ),
    ],
)
def test_keys_about_heads_that_do_not_fit_each_other(plan_error, overrides, text):
    assert plan_error(*overrides) == f"error: recipe.toml: 1 problem\n  --set, {text}"


def test_a_password_in_a_recipe(plan_error, recipe_text):
    assert plan_error(
        text=recipe_text
        + '    [[tracker]]\n    use = "example.paper"\n    options = { tracking_uri = "https://a:b@c" }'
    ) == (
        "error: recipe.toml: 1 problem\n"
        "  line 10, tracker.0.options.tracking_uri: contains a user name and password: str 'https://***@c'\n"
        "hint: a recipe must not contain secrets: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
        "in the environment or in `.env`"
    )
