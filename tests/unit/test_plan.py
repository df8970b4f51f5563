"""A plan is a recipe with its components selected, its options filled in and its names checked."""

import hashlib
import json
from pathlib import Path

import pytest
import tomli
from weighted_mtp_core.api import BuildContext
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.plan import make_plan

RECIPE = """
    [run]
    name = "first"
    tags = ["env:local", "team: a:b "]
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
    [[tracker]]
    use = "example.paper"
"""
BUILD_FAILS = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WmtpError, hookimpl
    from weighted_mtp_core.errors import RunFailedError

    @frozen(kw_only=True)
    class Options:
        how: str

    def build(options, context):
        if options.how == "mistake":
            raise WmtpError("no folder `x`", hint="make it")
        if options.how == "failure":
            raise RunFailedError("server down", hint="wait")
        raise ZeroDivisionError("division by zero")

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="weights", summary="", options=Options, build=build)
"""


@pytest.fixture
def plan(example_plugin, write_recipe):
    """Return a function that plans the text of a recipe, by default `RECIPE`."""

    def plan(text=RECIPE, *overrides, **arguments):
        return make_plan(write_recipe(text), overrides=overrides, **arguments)

    return plan


def test_components_are_selected_with_full_address_and_structured_options(plan):
    made = plan(RECIPE, "weighting.options.clip=[1, 2]")

    assert (made.data.address, made.data.plugin.version) == ("example.lines", "1.2.3")
    assert (made.data.options.folder, made.data.options.count) == ("f", 3)
    assert made.weighting.options.clip == (1.0, 2.0)
    assert [tracker.address for tracker in made.trackers] == ["example.paper"]
    assert made.critic is None


def test_the_resolved_recipe_has_full_addresses_and_every_option(plan):
    recipe = plan().recipe

    assert recipe.data.use == "example.lines"
    assert recipe.data.options == {"folder": "f", "count": 3, "workers": 0}
    assert recipe.weighting.options == {"beta": 0.9, "clip": [0.1, 3.0]}


def test_the_resolved_recipe_plans_to_itself(plan, write_recipe):
    made = plan(RECIPE, "critic.use=example.judge", run_name="other")

    again = make_plan(write_recipe(made.recipe_toml, "resolved.toml"))

    assert again.recipe == made.recipe
    assert again.recipe_toml == made.recipe_toml
    assert again.recipe_sha256 == hashlib.sha256(made.recipe_toml.encode()).hexdigest()
    assert (again.tags, again.params, again.experiment) == (made.tags, made.params, made.experiment)
    assert again.weighting.options == made.weighting.options


def test_a_run_name_wins_over_the_recipe_and_is_a_string(plan):
    assert plan(RECIPE, "run.name=b", run_name="2").recipe.run.name == "2"


def test_tags_name_the_algorithm_components_plugins_and_recipe(plan):
    made = plan(RECIPE, "critic.use=example.judge")

    assert made.tags == {
        "env": "local",
        "team": "a:b",
        "algo": "example",
        "wmtp.weighting": "example.flat",
        "wmtp.critic": "example.judge",
        "wmtp.data": "example.lines",
        "wmtp.plugin.example": "wmtp-example==1.2.3",
        "wmtp.recipe_sha256": made.recipe_sha256,
        "wmtp.source_sha256": hashlib.sha256(json.dumps(made.distributions).encode()).hexdigest(),
    }


def test_params_are_the_resolved_recipe_as_dotted_keys(plan):
    params = plan().params

    assert params["run.name"] == "first"
    assert params["run.seed"] == "42"
    assert params["model.micro.layers"] == "4"
    assert params["train.learning_rate"] == "0.0003"
    assert params["data.options.folder"] == "f"
    assert params["weighting.options.clip"] == "[0.1, 3.0]"
    assert params["tracker.0.use"] == "example.paper"
    assert params["run.tags"] == '["env:local", "team: a:b "]'
    assert all(isinstance(value, str) for value in params.values())


@pytest.mark.parametrize(
    ("overrides", "experiment"),
    [
        ([], "weighted_mtp/example"),
        (["tracker=[]"], "weighted_mtp/example"),
        (["tracker.0.options.experiment_prefix=team/a"], "team/a/example"),
        (["run.experiment=mine/v1.0"], "mine/v1.0"),
    ],
)
def test_the_experiment_is_the_recipes_or_prefix_and_weighting_plugin(plan, overrides, experiment):
    assert plan(RECIPE, *overrides).experiment == experiment


@pytest.mark.parametrize(
    "name", ["../../evil", "..", "", "a//b", "/a", "a/", ".hidden", "a b", "a..b", "a\\u0000", "é"]
)
@pytest.mark.parametrize("key", ["run.experiment", "tracker.0.options.experiment_prefix"])
def test_names_that_would_leave_their_folder_are_refused(plan, key, name):
    with pytest.raises(WmtpError, match=f"--set, {key}: each part of"):
        plan(RECIPE, f'{key}="{name}"')


def test_a_weighting_that_needs_values_gets_them_from_a_critic(plan):
    made = plan(RECIPE, "weighting.use=example.valued", "critic.use=example.judge")

    assert made.critic.address == "example.judge"


LOGARITHMS = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, Signal, hookimpl

    @frozen(kw_only=True)
    class NoOptions:
        pass

    def build(options, context):
        return options

    def component(name, **signals):
        return Component(name=name, summary="", options=NoOptions, build=build, **signals)

    @hookimpl
    def wmtp_weighting_strategies():
        yield component("ratio", needs=frozenset({Signal.LOG_VALUE}))
        yield component("error", needs=frozenset({Signal.VALUE}))

    @hookimpl
    def wmtp_critics():
        yield component("contrast", provides=frozenset({Signal.LOG_VALUE}))
        yield component("judge", provides=frozenset({Signal.VALUE}))
"""


@pytest.mark.parametrize("critic", ["logs.contrast", "logs.judge"])
def test_a_critic_of_values_provides_their_logarithms(plan, install_plugin, critic):
    install_plugin("logs", LOGARITHMS)

    made = plan(RECIPE.replace("example.flat", "logs.ratio"), f"critic.use={critic}")

    assert made.critic.address == critic


def test_values_that_are_known_up_to_a_factor_are_no_values(plan, install_plugin):
    install_plugin("logs", LOGARITHMS)

    with pytest.raises(WmtpError) as caught:
        plan(RECIPE.replace("example.flat", "logs.error"), "critic.use=logs.contrast")

    expected = (
        "weighting `logs.error` needs the signal `value`, which critic `logs.contrast` does not provide"
    )
    assert str(caught.value) == expected
    assert caught.value.hint == 'in table `[critic]`: use = "example.judge"'


def test_a_critic_that_no_weighting_needs_is_allowed(plan):
    assert plan(RECIPE, "critic.use=example.judge").critic.address == "example.judge"


REFUSES = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, Signal, WeightingChoice, hookimpl

    @frozen(kw_only=True)
    class Options:
        of: WeightingChoice | None = None

    @frozen(kw_only=True)
    class Ranks:
        scale: str = "ranks"

    def build(options, context):
        return options

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="ratio", summary="", options=Options, build=build, needs=frozenset({Signal.VALUE}),
            refuse_critic=lambda critic: "needs probabilities" if critic.scale == "ranks" else None,
        )
        yield Component(name="outer", summary="", options=Options, build=build)

    @hookimpl
    def wmtp_critics():
        yield Component(
            name="ranks", summary="", options=Ranks, build=build, provides=frozenset({Signal.VALUE})
        )
"""


@pytest.mark.parametrize(
    "weighting", ["{use='refuses.ratio'}", "{use='refuses.outer', options={of={use='refuses.ratio'}}}"]
)
def test_a_weighting_may_refuse_the_options_of_the_critic(plan, install_plugin, weighting):
    install_plugin("refuses", REFUSES)
    chosen = (
        RECIPE.replace('use = "example.flat"', ""),
        f"weighting={weighting}",
        "critic.use=refuses.ranks",
    )

    assert plan(*chosen, "critic.options.scale=chances").critic is not None
    with pytest.raises(WmtpError) as caught:
        plan(*chosen, "critic.options.scale=ranks")
    assert "critic.options: weighting `refuses.ratio` needs probabilities" in str(caught.value)


def test_faults_of_options_and_tables_are_listed_together(plan):
    text = (
        RECIPE.replace('"f"', "3, size = 1")
        + """
    [train]
    steps = "x"
    [weighting.options]
    beta = -1.0
    """
    )

    with pytest.raises(WmtpError) as caught:
        plan(text)

    assert str(caught.value).splitlines() == [
        "recipe.toml: 4 problems",
        "  line 6, data.options.folder: expected str, got int 3",
        "  line 6, data.options.size: unknown key `size`; known keys: folder, count, workers",
        "  line 13, train.steps: expected int, got str 'x'",
        "  line 15, weighting.options.beta: must be > 0: -1.0",
    ]


def test_planning_builds_nothing(plan, install_plugin):
    install_plugin("builds", BUILD_FAILS)

    plan(RECIPE, "weighting.use=builds", "weighting.options.how=crash")


@pytest.mark.parametrize(
    ("how", "error", "text", "hint"),
    [
        ("mistake", WmtpError, "no folder `x`", "make it"),
        ("failure", RunFailedError, "server down", "wait"),
        ("crash", WmtpError, "ZeroDivisionError: division by zero", None),
    ],
)
def test_a_component_that_cannot_be_built_is_named(plan, install_plugin, *, how, error, text, hint):
    install_plugin("builds", BUILD_FAILS)
    made = plan(RECIPE, "weighting.use=builds", f"weighting.options.how={how}")

    with pytest.raises(error) as caught:
        made.weighting.build(BuildContext(seed=0, storage=Path()))

    assert (
        str(caught.value) == f"plugin `builds` (wmtp-builds 0.3.0) could not build `builds.weights`: {text}"
    )
    assert caught.value.hint == hint
    assert type(caught.value) is error


def test_a_component_is_built_from_its_options(plan):
    made = plan()

    assert made.data.build(BuildContext(seed=0, storage=Path())) is made.data.options


def test_recipe_toml_is_toml_of_the_resolved_recipe(plan):
    made = plan()

    assert tomli.loads(made.recipe_toml)["weighting"] == {
        "use": "example.flat",
        "options": {"beta": 0.9, "clip": [0.1, 3.0]},
    }
