"""The exact texts of messages about mistakes that are found before a run starts."""

import pytest
from weighted_mtp_core import cli
from weighted_mtp_core.api import BuildContext
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import quoted
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
from weighted_mtp_core.plugins.selection import resolve

RECIPE = """
    [run]
    name = "first"
    [data]
    use = "example"
    options = { folder = "f" }
    [weighting]
    use = "example.flat"
"""
OPTIONS = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, hookimpl

    @frozen(kw_only=True)
    class Options:
        pass

    def declare(name, options=Options, build=lambda options, context: None):
        return Component(name=name, summary="", options=options, build=build)
"""
COMMANDS = quoted(module.__name__.rpartition(".")[2] for module in cli.COMMANDS)
NUMBERED = "its elements are numbered from 0; to replace the whole array: --set 'tracker=[...]'"
NOT_CALLABLE = "'build' must be callable (got None that is a <class 'NoneType'>)."


def error_of(action):
    with pytest.raises(WmtpError) as caught:
        action()
    return f"error: {caught.value}" + (f"\nhint: {caught.value.hint}" if caught.value.hint else "")


@pytest.fixture
def registry(site):
    """Return a registry of the plugins that the test has installed so far."""
    return lambda: PluginRegistry(found=find([str(site)]))


@pytest.fixture
def load_error(install_plugin, registry):
    """Install plugin `mine` with the given source; return the error of loading it."""

    def load_error(source, **metadata):
        install_plugin("mine", source, **metadata)
        return error_of(lambda: registry().load("mine"))

    return load_error


@pytest.fixture
def resolve_error(example_plugin, registry):
    """Return the error of looking an address up in plugin `example`."""

    return lambda kind, use: error_of(lambda: resolve(registry(), kind, use))


@pytest.fixture
def plan_error(example_plugin, write_recipe):
    """Return the error of planning a recipe."""

    def plan_error(*overrides, text=RECIPE, preset=None):
        path = write_recipe(text)
        return error_of(lambda: make_plan(path, overrides=overrides, preset=preset))

    return plan_error


# --------------------------------------------------------------------------- finding and loading plugins


def test_no_such_plugin(install_plugin, registry):
    for name in ("first", "second", "third"):
        install_plugin(name, "")

    assert error_of(lambda: registry().load("secnd")) == (
        "error: no plugin named `secnd` is installed; installed: `first`, `second`, `third`\n"
        "hint: did you mean `second`?"
    )
    assert error_of(lambda: registry().load("x")) == (
        "error: no plugin named `x` is installed; installed: `first`, `second`, `third`\n"
        "hint: install the package that offers it, then: plugins list"
    )


def test_two_packages_claim_a_name(install_plugin, registry):
    install_plugin("mine", distribution="wmtp-dup", version="0.3.0")
    install_plugin("mine", distribution="weighted-mtp-mine", version="0.1.0")

    assert error_of(lambda: registry().load("mine")) == (
        "error: two installed packages both claim the plugin name `mine`: "
        "weighted-mtp-mine 0.1.0 and wmtp-dup 0.3.0\n"
        "hint: uninstall one, for example: pip uninstall wmtp-dup"
    )


def test_a_name_that_is_no_address(install_plugin, registry):
    install_plugin("My-Plugin", "", distribution="mine")

    assert error_of(lambda: registry().load("My-Plugin")) == (
        "error: plugin `My-Plugin` (mine 0.3.0) has a name that is not valid in an address: "
        "expected `[a-z][a-z0-9_]*`"
    )


@pytest.mark.parametrize("written", [">=0.4,<0.5", "<0.5,>=0.4"])
def test_made_for_another_core(load_error, written):
    """Build back ends sort the parts of the range; the message shows the range as people write it."""
    assert load_error("", requires=f"weighted-mtp-core{written}") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) needs weighted-mtp-core>=0.4,<0.5, but 0.1.0 is installed\n"
        "hint: install a version of wmtp-mine made for weighted-mtp-core 0.1.0"
    )


@pytest.mark.parametrize("before", ["", "weighted-mtp-core>=0.1\nRequires-Dist: "])
def test_metadata_that_cannot_be_read(load_error, before):
    assert load_error("", requires=f"{before}numpy >>> 1") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) has metadata that cannot be read: `numpy >>> 1`"
    )


def test_a_failing_import(load_error):
    assert load_error("import package_that_does_not_exist") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) failed to import `wmtp_mine`: "
        "ModuleNotFoundError: No module named 'package_that_does_not_exist'"
    )


def test_an_import_that_exits_the_program(load_error):
    assert load_error("raise SystemExit('bye')") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) failed to import `wmtp_mine`: SystemExit: bye"
    )


def test_a_hook_that_core_does_not_have(load_error):
    source = """
        from weighted_mtp_core.api import hookimpl

        @hookimpl
        def wmtp_weighting_strategy():
            return []
    """

    assert load_error(source) == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares a hook core does not have: "
        "unknown hook `wmtp_weighting_strategy`\n"
        "hint: did you mean `wmtp_weighting_strategies`?"
    )


def test_an_unknown_hook_without_a_near_miss(load_error):
    assert load_error("from weighted_mtp_core.api import hookimpl\n@hookimpl\ndef zzz(): pass\n") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares a hook core does not have: unknown hook `zzz`\n"
        "hint: core has `wmtp_data_sources`, `wmtp_critics`, `wmtp_weighting_strategies`, `wmtp_trackers`"
    )


def test_a_hook_with_arguments(load_error):
    assert load_error(
        "from weighted_mtp_core.api import hookimpl\n@hookimpl\ndef wmtp_critics(config): return []\n"
    ) == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares arguments of `wmtp_critics`: `config`; "
        "hooks have none"
    )


def test_an_undecorated_hook(load_error):
    assert load_error("def wmtp_weighting_strategies(): return []") == (
        "error: plugin `mine` (wmtp-mine 0.3.0) defines `wmtp_weighting_strategies` without @hookimpl, "
        "so core would never call it\n"
        "hint: from weighted_mtp_core.api import hookimpl"
    )


def test_two_plugins_that_are_one_module(install_plugin, registry):
    install_plugin("first", "")
    install_plugin("second", "", module="wmtp_first")
    both = registry()
    both.load("first")

    assert error_of(lambda: both.load("second")) == (
        "error: plugin `second` (wmtp-second 0.3.0) and plugin `first` are the same module: `wmtp_first`"
    )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise KeyError('x')", "failed in `wmtp_critics`: KeyError: 'x'"),
        ("pass", "failed in `wmtp_critics`: TypeError: 'NoneType' object is not iterable"),
        ("return [Options]", "returns a type from `wmtp_critics`; expected a Component"),
        ("return [declare('a'), declare('a')]", "declares two critics named `mine.a`"),
        (
            "return [declare('a', options=dict)]",
            "declares options of `mine.a` that are not an attrs class: <class 'dict'>",
        ),
        (
            "return [declare('A-b')]",
            "failed in `wmtp_critics`: ValueError: 'name' must match regex '[a-z][a-z0-9_]*' ('A-b' doesn't)",
        ),
        (
            "return [declare('a', build=None)]",
            f"failed in `wmtp_critics`: NotCallableError: {NOT_CALLABLE}",
        ),
    ],
)
def test_a_hook_that_declares_nonsense(load_error, body, text):
    source = f"{OPTIONS}\n    @hookimpl\n    def wmtp_critics():\n        {body}\n"

    assert load_error(source) == f"error: plugin `mine` (wmtp-mine 0.3.0) {text}"


def test_options_of_a_type_that_cannot_be_found(load_error):
    source = """
        from __future__ import annotations
        from attrs import frozen
        from weighted_mtp_core.api import Component, hookimpl

        @frozen
        class Options:
            size: Missing = 1

        @hookimpl
        def wmtp_critics():
            yield Component(name="a", summary="", options=Options, build=print)
    """

    assert load_error(source) == (
        "error: plugin `mine` (wmtp-mine 0.3.0) declares an option of `mine.a` with an unknown type: "
        "name 'Missing' is not defined"
    )


# --------------------------------------------------------------------------- addresses


def test_no_such_component(resolve_error):
    assert resolve_error(Kind.WEIGHTING, "example.valud") == (
        "error: plugin `example` has no weighting named `valud`; it has `example.flat`, `example.valued`\n"
        "hint: did you mean `example.valued`?"
    )
    assert resolve_error(Kind.WEIGHTING, "example.zzz") == (
        "error: plugin `example` has no weighting named `zzz`; it has `example.flat`, `example.valued`"
    )


def test_a_component_of_another_kind(resolve_error):
    assert resolve_error(Kind.WEIGHTING, "example.judge") == (
        "error: plugin `example` has no weighting named `judge`; it has `example.flat`, `example.valued`\n"
        "hint: `example.judge` is a critic: name it in `[critic]`"
    )


def test_a_plugin_alone_that_offers_several(resolve_error):
    assert resolve_error(Kind.WEIGHTING, "example") == (
        "error: plugin `example` has 2 weightings: `example.flat`, `example.valued`\n"
        'hint: name one: use = "example.flat"'
    )


def test_a_plugin_that_offers_none_of_the_kind(install_plugin, registry):
    install_plugin(
        "mine", f"{OPTIONS}\n    @hookimpl\n    def wmtp_critics():\n        return [declare('a')]\n"
    )

    assert error_of(lambda: resolve(registry(), Kind.DATA, "mine")) == (
        "error: plugin `mine` has no data source\nhint: it has `mine.a`"
    )


BROKEN = "raise RuntimeError('broken')"


def declaring(hook, *names):
    """Return a plugin's source whose one hook declares components of these names."""
    return f"{OPTIONS}\n    @hookimpl\n    def {hook}():\n        return [declare(n) for n in {names}]\n"


@pytest.fixture
def moved(install_plugin, registry):
    """`core_like` has data `jsonl`, `tasks` has data `micro` and weighting `jsonl`; `broken` raises."""
    install_plugin("broken", BROKEN)
    install_plugin("core_like", declaring("wmtp_data_sources", "jsonl"))
    install_plugin(
        "tasks",
        declaring("wmtp_data_sources", "micro")
        + "\n    @hookimpl\n    def wmtp_weighting_strategies():\n        return [declare('jsonl')]\n",
    )
    return lambda use: error_of(lambda: resolve(registry(), Kind.DATA, use))


def test_a_component_that_another_plugin_has(moved):
    assert moved("core_like.micro") == (
        "error: plugin `core_like` has no data source named `micro`; it has `core_like.jsonl`\n"
        "hint: did you mean `tasks.micro`?"
    )
    # A weighting named `jsonl` is no data source: only components of the same kind are suggested.
    assert moved("tasks.jsonl") == (
        "error: plugin `tasks` has no data source named `jsonl`; it has `tasks.micro`\n"
        "hint: `tasks.jsonl` is a weighting: name it in `[weighting]`"
    )


def test_a_component_of_a_plugin_that_is_not_installed(moved):
    none_named = "is installed; installed: `broken`, `core_like`, `tasks`"

    assert moved("zzz.micro") == (
        f"error: no plugin named `zzz` {none_named}\nhint: did you mean `tasks.micro`?"
    )
    assert moved("micro") == f"error: no plugin named `micro` {none_named}\nhint: did you mean `tasks.micro`?"
    assert moved("core_lik.micro") == (
        f"error: no plugin named `core_lik` {none_named}\nhint: did you mean `core_like` or `tasks.micro`?"
    )
    assert moved("task.micro") == f"error: no plugin named `task` {none_named}\nhint: did you mean `tasks`?"
    assert moved("zzz.zzz") == (
        f"error: no plugin named `zzz` {none_named}\n"
        "hint: install the package that offers it, then: plugins list"
    )


def test_a_near_miss_beside_a_component_that_other_plugins_have(install_plugin, registry):
    install_plugin("one", declaring("wmtp_critics", "value_heads"))
    install_plugin("two", declaring("wmtp_critics", "value_head"))
    install_plugin("three", declaring("wmtp_critics", "value_head"))

    assert error_of(lambda: resolve(registry(), Kind.CRITIC, "one.value_head")) == (
        "error: plugin `one` has no critic named `value_head`; it has `one.value_heads`\n"
        "hint: did you mean `one.value_heads`, `three.value_head` or `two.value_head`?"
    )


def test_a_plugin_with_no_component_of_the_kind_and_one_with_one(install_plugin, registry):
    install_plugin("one", declaring("wmtp_critics", "head"))
    install_plugin("two", declaring("wmtp_data_sources", "micro"))

    assert error_of(lambda: resolve(registry(), Kind.DATA, "one.micro")) == (
        "error: plugin `one` has no data source\nhint: did you mean `two.micro`?"
    )


# --------------------------------------------------------------------------- plans


def test_an_error_about_an_address_names_file_line_and_key(plan_error):
    assert plan_error("weighting.use=exmaple.flat").splitlines()[1:] == [
        "  --set, weighting.use",
        "hint: did you mean `example`?",
    ]
    assert plan_error(text=RECIPE.replace("example.flat", "example.flt")) == (
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


def test_a_password_in_a_recipe(plan_error):
    assert plan_error(
        text=RECIPE
        + '    [[tracker]]\n    use = "example.paper"\n    options = { tracking_uri = "https://a:b@c" }'
    ) == (
        "error: recipe.toml: 1 problem\n"
        "  line 10, tracker.0.options.tracking_uri: contains a user name and password: str 'https://***@c'\n"
        "hint: a recipe must not contain secrets: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
        "in the environment or in `.env`"
    )


# --------------------------------------------------------------------------- files and overrides


def test_no_such_recipe(write_recipe):
    write_recipe("", "configs/first.toml")
    write_recipe("", "configs/second.toml")

    assert cli_error("check", "configs/frist.toml") == (
        "error: there is no recipe `configs/frist.toml`\nhint: did you mean `first.toml`?\n"
    )
    assert cli_error("check", "configs/zzz") == (
        "error: there is no recipe `configs/zzz`\nhint: `configs` holds `first.toml`, `second.toml`\n"
    )
    assert cli_error("check", "nowhere/x.toml") == "error: there is no recipe `nowhere/x.toml`\n"


def test_no_such_file_to_extend(write_recipe):
    write_recipe('extends = ["default.toml"]')

    assert cli_error("check", "recipe.toml") == (
        "error: there is no recipe `default.toml`, which `recipe.toml` extends\n"
        "hint: did you mean `core:defaults.toml`?\n"
    )


def test_no_such_file_of_core_to_extend(write_recipe):
    write_recipe('extends = ["core:default.toml"]')
    write_recipe('extends = ["core:../../x"]', "outside.toml")
    names = "`core:defaults.toml`, `core:presets/ci.toml`, `core:presets/local-light.toml`"

    assert cli_error("check", "recipe.toml") == (
        "error: there is no recipe `core:default.toml`, which `recipe.toml` extends\n"
        "hint: did you mean `core:defaults.toml`?\n"
    )
    assert cli_error("check", "outside.toml") == (
        f"error: there is no recipe `core:../../x`, which `outside.toml` extends\nhint: core holds {names}\n"
    )


def test_a_folder_or_bytes_instead_of_a_recipe(write_recipe):
    path = write_recipe("", "configs/first.toml")
    path.write_bytes(b"\xff")

    assert cli_error("check", "configs") == ("error: cannot read the recipe `configs`: Is a directory\n")
    assert cli_error("check", str(path)) == (
        "error: configs/first.toml: line 1: not UTF-8 (byte 0xff)\nhint: save it as UTF-8\n"
    )


def test_a_file_that_is_no_toml(write_recipe):
    write_recipe("[run]\nname = first")

    assert cli_error("check", "recipe.toml") == (
        "error: recipe.toml: not valid TOML: Invalid value (at line 2, column 8)\n"
    )


def test_extends_that_is_no_array(write_recipe):
    write_recipe('\nextends = "defaults.toml"')

    assert cli_error("check", "recipe.toml") == (
        "error: recipe.toml: line 1, extends: expected array of str, got str 'defaults.toml'\n"
    )


def test_recipes_that_extend_each_other(write_recipe):
    write_recipe('extends = ["b.toml"]', "a.toml")
    write_recipe('extends = ["a.toml"]', "b.toml")

    assert cli_error("check", "a.toml") == (
        "error: recipes extend each other in a circle: `a.toml` -> `b.toml` -> `a.toml`\n"
    )


def test_no_such_preset(write_recipe):
    write_recipe(RECIPE)

    write_recipe("", "presets/mine.toml")

    assert cli_error("check", "recipe.toml", "--preset", "local-lite") == (
        "error: there is no preset `local-lite`; available: `ci`, `local-light`, `mine`\n"
        "hint: did you mean `local-light`?\n"
    )
    assert cli_error("check", "recipe.toml", "--preset", "../x") == (
        "error: there is no preset `../x`; available: `ci`, `local-light`, `mine`\n"
        "hint: presets are files like `presets/NAME.toml`\n"
    )


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", "train.st eps=3"])
def test_an_override_that_is_no_key_and_value(write_recipe, text):
    write_recipe(RECIPE)

    assert cli_error("check", "recipe.toml", "--set", text) == (
        f"error: cannot read `--set {text}`\nhint: write --set KEY=VALUE, for example: --set train.steps=50\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "loss.head_weights=[1, 2",
            "cannot read the value in `--set loss.head_weights=[1, 2`: Unclosed array (at end of document)",
        ),
        ("run.name.x=3", "--set run.name.x: `run.name` is not a table but str 'first'"),
        ("run.name.x.y=3", "--set run.name.x: `run.name` is not a table but str 'first'"),
        (
            "tracker.1.use=x",
            f"--set tracker.1: `tracker` is an array of 1\nhint: {NUMBERED}",
        ),
        (
            "tracker.use=x",
            f"--set tracker.use: `tracker` is an array of 1\nhint: {NUMBERED}",
        ),
    ],
)
def test_an_override_that_leads_nowhere(write_recipe, text, message):
    write_recipe(RECIPE + '    [[tracker]]\n    use = "example.paper"\n')

    assert cli_error("check", "recipe.toml", "--set", text) == f"error: {message}\n"


# --------------------------------------------------------------------------- the command line


@pytest.fixture(autouse=True)
def read_errors(capsys):
    """Let `cli_error` read what `main` printed."""
    cli_error.capsys = capsys


def cli_error(*arguments):
    assert main(arguments) == 2
    return cli_error.capsys.readouterr().err


def test_no_such_command():
    assert cli_error("chek", "x") == (
        f"error: there is no command `chek`; commands: {COMMANDS}\nhint: did you mean `check`?\n"
    )
    assert cli_error("zzz") == (
        f"error: there is no command `zzz`; commands: {COMMANDS}\n"
        "hint: see: python -m weighted_mtp_core --help\n"
    )


def test_wrong_arguments():
    assert cli_error("check") == (
        "error: the following arguments are required: RECIPE\n"
        "hint: see: python -m weighted_mtp_core check --help\n"
    )
    assert cli_error("run", "x.toml", "--fast") == (
        "error: unrecognized arguments: --fast\nhint: see: python -m weighted_mtp_core --help\n"
    )


def test_building_too_early(tmp_path):
    assert error_of(lambda: BuildContext(seed=0, storage=tmp_path).model) == (
        "error: this component is built before the policy exists, so `context.model` is empty"
    )
