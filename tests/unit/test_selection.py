"""A component may wrap weightings: its options name them, and core checks, resolves and builds them."""

import pytest
import tomli
from weighted_mtp_core.api import BuildContext, Signal, WeightingChoice, WmtpError
from weighted_mtp_core.plan import make_plan

WRAPPER = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, Signal, WeightingChoice, hookimpl

    @frozen(kw_only=True)
    class WrapOptions:
        of: WeightingChoice
        strength: float = 1.0

    @frozen(kw_only=True)
    class ProductOptions:
        of: tuple[WeightingChoice, ...]

    def build_wrap(options, context):
        return ("wrap", context.build_weighting(options.of))

    def build_product(options, context):
        return [context.build_weighting(each) for each in options.of]

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="wrap", summary="One.", options=WrapOptions, build=build_wrap,
            needs=frozenset({Signal.TOKEN_LOSS}),
        )
        yield Component(name="product", summary="Some.", options=ProductOptions, build=build_product)
"""
RECIPE = """
    [run]
    name = "first"
    [data]
    use = "example"
    options = { folder = "f" }
    [critic]
    use = "example.judge"
    [weighting]
    use = "wrapper.wrap"
    [weighting.options.of]
    use = "example.valued"
    [weighting.options.of.options]
    beta = 0.5
"""


@pytest.fixture
def plan(example_plugin, install_plugin, write_recipe):
    """Plan a recipe whose text is given, with `RECIPE` as the default."""
    install_plugin("wrapper", WRAPPER)

    def plan(text=RECIPE, *overrides):
        return make_plan(write_recipe(text), overrides=overrides)

    return plan


@pytest.fixture
def context(tmp_path):
    return BuildContext(seed=1, storage=tmp_path)


def test_a_wrapper_needs_what_it_wraps_needs_too(plan):
    assert plan().weighting.needs == {Signal.TOKEN_LOSS, Signal.VALUE, Signal.REWARD}


def test_what_is_wrapped_must_have_its_signals(plan):
    without_critic = RECIPE.replace("[critic]", "").replace('use = "example.judge"', "")

    with pytest.raises(WmtpError, match=r"`wrapper.wrap` needs the signal `value`, which no critic provides"):
        plan(without_critic)


def test_what_is_wrapped_is_built_with_its_own_options(plan, context):
    _, built = plan().weighting.build(context)

    assert (built.beta, built.clip) == (0.5, (0.1, 3.0))


def test_a_wrapper_may_wrap_several(plan, context):
    two = '[{ use = "example.flat" }, { use = "example.valued", options = { beta = 2.0 } }]'

    built = plan(
        RECIPE.split("[weighting]", maxsplit=1)[0]
        + f'[weighting]\n    use = "wrapper.product"\n    options.of = {two}\n'
    ).weighting.build(context)

    assert [each.beta for each in built] == [0.9, 2.0]


def test_a_wrapper_may_wrap_a_wrapper(plan, context):
    nested = RECIPE.replace(
        'use = "example.valued"\n    [weighting.options.of.options]\n    beta = 0.5',
        'use = "wrapper.wrap"\n    [weighting.options.of.options.of]\n    use = "example.valued"',
    )

    made = plan(nested)

    assert made.weighting.build(context)[1][0] == "wrap"
    assert Signal.VALUE in made.weighting.needs


def test_options_of_what_is_wrapped_are_checked_where_they_stand(plan):
    with pytest.raises(WmtpError) as caught:
        plan(RECIPE.replace("beta = 0.5", "beta = -1.0\n    strenght = 2"))

    assert "line 13, weighting.options.of.options.beta: must be > 0: -1.0" in str(caught.value)
    assert "line 14, weighting.options.of.options.strenght: unknown key `strenght`" in str(caught.value)


def test_naming_what_is_not_there_says_where(plan):
    with pytest.raises(WmtpError) as caught:
        plan(RECIPE.replace("example.valued", "example.value"))

    assert str(caught.value).splitlines() == [
        "plugin `example` has no weighting named `value`; it has `example.flat`, `example.valued`",
        "  recipe.toml, line 11, weighting.options.of.use",
    ]
    assert caught.value.hint == "did you mean `example.valued`?"


def test_the_resolved_recipe_holds_what_is_wrapped_with_every_option(plan):
    made = plan()

    resolved = tomli.loads(made.recipe_toml)["weighting"]

    assert resolved["use"] == "wrapper.wrap"
    assert resolved["options"]["of"] == {
        "use": "example.valued",
        "options": {"beta": 0.5, "clip": [0.1, 3.0]},
    }
    assert plan(made.recipe_toml).recipe_toml == made.recipe_toml


def test_tags_name_the_plugin_of_what_is_wrapped(plan):
    tags = plan().tags

    assert (tags["algo"], tags["wmtp.weighting"]) == ("wrapper", "wrapper.wrap")
    assert tags["wmtp.plugin.example"] == "wmtp-example==1.2.3"


def test_a_choice_that_is_not_in_the_options_is_not_built(plan, install_plugin, context):
    install_plugin(
        "other",
        """
        from attrs import frozen
        from weighted_mtp_core.api import Component, WeightingChoice, hookimpl

        @frozen(kw_only=True)
        class NoOptions:
            pass

        def build(options, context):
            return context.build_weighting(WeightingChoice(use="example.flat"))

        @hookimpl
        def wmtp_weighting_strategies():
            yield Component(name="own", summary="Wraps what no option names.", options=NoOptions, build=build)
        """,
    )
    made = plan(RECIPE.split("[weighting]", maxsplit=1)[0] + '[weighting]\n    use = "other.own"\n')

    with pytest.raises(WmtpError, match=r": `example\.flat` is not named by an option of this component$"):
        made.weighting.build(context)


def test_an_unchecked_choice_is_not_built(context):
    with pytest.raises(WmtpError, match=r"`example\.flat` is not named by an option of this component"):
        context.build_weighting(WeightingChoice(use="example.flat"))
