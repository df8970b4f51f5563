"""A recipe is merged from files, preset and `--set`; later layers win; a resolved recipe loads again."""

from pathlib import Path

import attrs
import pytest
import tomli
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.recipe.layers import core_files, read_document
from weighted_mtp_core.recipe.load import load_recipe, recipe_to_toml
from weighted_mtp_core.recipe.schema import (
    CriticTable,
    DataTable,
    EvaluateTable,
    LossTable,
    MicroTable,
    ModelTable,
    PolicyTrainTable,
    Recipe,
    RunTable,
    Selection,
    TrackerTable,
    TrainTable,
)
from weighted_mtp_core.recipe.structure import structure

SMALLEST = """
    run.name = "r"
    data.use = "p.data"
    weighting.use = "p.weights"
"""


def test_a_recipe_needs_a_name_a_source_and_a_weighting_and_nothing_else(write_recipe):
    recipe = load_recipe(write_recipe(SMALLEST))

    assert recipe == Recipe(
        run=RunTable(name="r"), data=DataTable(use="p.data"), weighting=Selection(use="p.weights")
    )


def test_later_layers_win_tables_merge_and_arrays_replace(write_recipe):
    write_recipe("model.n_future = 2\nmodel.base = 'low'\n[run]\ntags = ['a:1', 'b:2']\nseed = 1", "low.toml")
    write_recipe("model.n_future = 3\n[run]\nseed = 2", "middle.toml")
    path = write_recipe(
        f"extends = ['low.toml', 'middle.toml']\n{SMALLEST}\nrun.tags = ['c:3']".replace("    ", "")
    )

    recipe = load_recipe(path)

    assert (recipe.model.n_future, recipe.model.base, recipe.run.seed) == (3, "low", 2)
    assert recipe.run.tags == ("c:3",)


def test_extends_is_relative_to_its_own_file(write_recipe):
    write_recipe("model.n_future = 7", "configs/deep/low.toml")
    write_recipe("extends = ['deep/low.toml']", "configs/defaults.toml")
    path = write_recipe(
        "extends = ['../configs/defaults.toml']" + SMALLEST.replace("    ", ""), "mine/recipe.toml"
    )

    files = ["configs/deep/low.toml", "configs/defaults.toml", "mine/recipe.toml"]

    assert load_recipe(path).model.n_future == 7
    assert read_document(path).files == files


def test_a_preset_wins_over_the_recipe_and_set_wins_over_all(write_recipe):
    write_recipe("train.steps = 8\ntrain.batch_size = 2", "presets/quick.toml")
    path = write_recipe(SMALLEST + "    train.steps = 100")

    recipe = load_recipe(path, preset="quick", overrides=["train.batch_size=4"])

    assert (recipe.train.steps, recipe.train.batch_size) == (8, 4)


def test_a_preset_beside_the_recipe_wins_over_the_one_of_core(write_recipe):
    path = write_recipe(SMALLEST, "mine/recipe.toml")
    of_core = load_recipe(path, preset="ci")
    write_recipe("train.steps = 2", "mine/presets/ci.toml")

    assert (of_core.train.steps, of_core.train.batch_size) == (8, 8)
    assert (load_recipe(path, preset="ci").train.steps, load_recipe(path).train.steps) == (2, 300)


def test_a_preset_may_extend_the_one_of_core_with_the_same_name(write_recipe):
    path = write_recipe(SMALLEST)
    write_recipe("extends = ['core:presets/ci.toml']\ntrain.steps = 2", "presets/ci.toml")

    recipe = load_recipe(path, preset="ci")

    assert (recipe.train.steps, recipe.train.batch_size) == (2, 8)


def test_a_recipe_anywhere_extends_the_files_of_core(write_recipe):
    path = write_recipe("extends = ['core:defaults.toml']" + SMALLEST.replace("    ", ""), "mine/deep/r.toml")

    assert read_document(path, preset="ci").files == [
        "core:defaults.toml",
        "mine/deep/r.toml",
        "core:presets/ci.toml",
    ]
    assert [tracker.use for tracker in load_recipe(path).tracker] == ["core.mlflow"]


def test_the_files_of_core_are_applied_once_at_the_bottom(write_recipe):
    write_recipe("extends = ['core:defaults.toml']\nrun.seed = 5", "one.toml")
    path = write_recipe("extends = ['one.toml', 'core:defaults.toml']" + SMALLEST.replace("    ", ""))

    assert load_recipe(path).run.seed == 5


def test_a_fault_in_a_value_of_core_names_the_file_of_core_and_its_line(write_recipe, repository):
    path = write_recipe(
        "extends = ['core:defaults.toml']" + SMALLEST.replace("    ", "") + "evaluate.samples = 3"
    )
    text = (repository / "weighted_mtp_core" / "recipe" / "defaults.toml").read_text()
    line = 1 + next(i for i, each in enumerate(text.splitlines()) if each.startswith("temperature"))

    with pytest.raises(
        WmtpError, match=rf"core:defaults\.toml, line {line}, evaluate\.temperature: must be > 0"
    ):
        load_recipe(path)


@pytest.mark.parametrize(("named", "max_tokens"), [("p.data", 9), ("p.other", 512)])
def test_a_presets_table_for_another_component_is_ignored(write_recipe, named, max_tokens):
    write_recipe(f"[data]\nuse = '{named}'\nmax_tokens = 9", "presets/quick.toml")

    data = load_recipe(write_recipe(SMALLEST), preset="quick").data

    assert (data.use, data.max_tokens) == ("p.data", max_tokens)


def test_a_presets_critic_table_applies_only_to_a_recipe_with_a_critic(write_recipe):
    write_recipe("[critic.train]\nsteps = 8", "presets/quick.toml")
    without = write_recipe(SMALLEST, "without.toml")
    with_critic = write_recipe(SMALLEST + "    critic.use = 'p.critic'", "with.toml")

    assert load_recipe(without, preset="quick").critic is None
    assert load_recipe(with_critic, preset="quick").critic.train.steps == 8


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.base=micro", "micro"),
        ("model.base = some/folder/model.gguf", "some/folder/model.gguf"),
        ("model.base='1'", "1"),
        ('model.base="a=b"', "a=b"),
        ("model.base=", ""),
        ("model.base=a\ninjected = 1", "a\ninjected = 1"),
    ],
)
def test_set_takes_toml_and_a_bare_word_is_a_string(write_recipe, override, value):
    assert load_recipe(write_recipe(SMALLEST), overrides=[override]).model.base == value


def test_set_takes_numbers_arrays_and_inline_tables(write_recipe):
    overrides = ["train.learning_rate=1e-3", "loss.head_weights=[1, 2, 3, 4]", "critic={use = 'p.c'}"]

    recipe = load_recipe(write_recipe(SMALLEST), overrides=overrides)

    assert recipe.train.learning_rate == 1e-3
    assert recipe.loss.head_weights == (1.0, 2.0, 3.0, 4.0)
    assert recipe.critic == CriticTable(use="p.c")


def test_set_reaches_into_arrays_of_tables_and_makes_missing_tables(write_recipe):
    path = write_recipe(SMALLEST + "    tracker = [{use = 'p.a'}, {use = 'p.b'}]")

    recipe = load_recipe(path, overrides=["tracker.1.options.deep.x=1", "tracker.0.use=p.c"])

    assert recipe.tracker == (TrackerTable(use="p.c"), TrackerTable(use="p.b", options={"deep": {"x": 1}}))


def test_another_use_discards_the_options_of_the_old_component(write_recipe):
    write_recipe(
        "[weighting]\nuse = 'p.old'\noptions = {beta = 1.0}\n[data]\nuse = 'p.d'\noptions = {n = 1}",
        "low.toml",
    )
    path = write_recipe("extends = ['low.toml']\nrun.name = 'r'\nweighting.use = 'p.new'\ndata.use = 'p.d'")

    recipe = load_recipe(path)

    assert recipe.weighting == Selection(use="p.new")
    assert recipe.data == DataTable(use="p.d", options={"n": 1})


@pytest.mark.parametrize("swap", [False, True])
def test_set_may_name_a_component_and_its_options_in_any_order(write_recipe, swap):
    path = write_recipe(SMALLEST + "    weighting.options.old = 1")
    overrides = ["weighting.use=p.new", "weighting.options.beta=2"]

    recipe = load_recipe(path, overrides=overrides[::-1] if swap else overrides)

    assert recipe.weighting == Selection(use="p.new", options={"beta": 2})


def test_every_fault_has_its_file_and_line(write_recipe):
    write_recipe("[train]\n\nsteps = true\nbatch_size = 0", "configs/defaults.toml")
    write_recipe("[evaluate]\nsampels = 2", "configs/presets/quick.toml")
    path = write_recipe(
        """
        extends = ["defaults.toml"]
        [run]
        name = "not a name"
        [data]
        use = 3
        [model]
        micro = { layers = 1 }
        [[tracker]]
        ues = "core.mlflow"
        """,
        "configs/recipe.toml",
    )

    with pytest.raises(WmtpError) as caught:
        load_recipe(path, preset="quick", overrides=["loss.normalise=mean"])

    keys = (
        "pass_at_k, samples, temperature, second_temperature, max_new_tokens, decoding, batch_size, "
        "problems, examples"
    )
    unknown = f"unknown key `sampels`; known keys: {keys}"
    assert str(caught.value).splitlines() == [
        "configs/recipe.toml: 10 problems",
        "  weighting.use: missing; expected str",
        "  line 3, run.name: must match regex '[A-Za-z0-9][A-Za-z0-9._-]*' ('not a name' doesn't)",
        "  line 5, data.use: expected str, got int 3",
        "  line 7, model.micro.layers: must be >= 2: 1",
        "  line 8, tracker.0.use: missing; expected str",
        (
            "  line 9, tracker.0.ues: unknown key `ues`; known keys: use, options, close_seconds; "
            "did you mean `use`?"
        ),
        "  configs/defaults.toml, line 3, train.steps: expected int, got bool True",
        "  configs/defaults.toml, line 4, train.batch_size: must be >= 1: 0",
        f"  configs/presets/quick.toml, line 2, evaluate.sampels: {unknown}; did you mean `samples`?",
        "  --set, loss.normalise: expected one of `weights`, `tokens`, got str 'mean'",
    ]


def test_the_key_that_model_heads_replaced_is_an_error_that_names_it(write_recipe):
    path = write_recipe(SMALLEST + '        [model]\n        head = "linear"\n')

    with pytest.raises(WmtpError, match=r"model\.head: unknown key `head`; .*; did you mean `heads`\?"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"kind": "medusa", "shared": "true"}, 'shared: needs `kind = "sequential"`: `medusa` heads cannot'),
        ({"kind": "parallel", "serve": "vllm"}, 'serve: needs `kind = "sequential"`: `parallel` heads are'),
        ({"kind": "sequential", "serve": "vllm"}, 'heads: must have `shared = true` for `serve = "vllm"`'),
    ],
)
def test_settings_that_a_kind_of_heads_does_not_have_are_errors(write_recipe, settings, fault):
    overrides = [f"model.heads.{key}={value}" for key, value in settings.items()]

    with pytest.raises(WmtpError, match="model\\.heads") as caught:
        load_recipe(write_recipe(SMALLEST), overrides=overrides)

    assert fault in str(caught.value)


def test_sequential_heads_can_share_a_module_for_any_server(write_recipe):
    for serve in ("transformers", "vllm"):
        overrides = ["model.heads.kind=sequential", "model.heads.shared=true", f"model.heads.serve={serve}"]
        table = load_recipe(write_recipe(SMALLEST), overrides=overrides).model.heads

        assert (table.kind, table.shared, table.serve) == ("sequential", True, serve)


def test_a_replaced_key_is_no_fault(write_recipe):
    write_recipe("train.steps = true", "low.toml")
    path = write_recipe("extends = ['low.toml']\ntrain.steps = 3" + SMALLEST.replace("    ", ""))

    assert load_recipe(path).train.steps == 3


# --------------------------------------------------------------------------- resolved recipes

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
paths = words.filter(lambda text: not text.startswith("~"))  # `~` is expanded
finite = st.floats(allow_nan=False, allow_infinity=False)
option_values = st.recursive(
    words | st.booleans() | st.integers(-(2**63), 2**63 - 1) | finite,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=5,
)
options = st.dictionaries(words, option_values, max_size=3)
addresses = st.from_regex(r"[a-z]{1,5}\.[a-z]{1,5}", fullmatch=True)
trains = {
    "steps": st.integers(1, 10**6),
    "batch_size": st.just(16),
    "accumulation": st.sampled_from([1, 2, 4, 16]),
    "learning_rate": st.floats(1e-12, 1e12),
    "final_learning_rate": st.floats(0, 1),
}


def key_of(tag):
    return tag.split(":")[0]


recipes = st.builds(
    Recipe,
    run=st.builds(
        RunTable,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True),
        seed=st.integers(0, 2**32 - 1),
        tags=st.lists(st.from_regex(r"t[a-z]{1,5}:[a-z:]{1,5}", fullmatch=True), unique_by=key_of).map(tuple),
        storage=paths,
        output_dir=st.none() | paths,
        experiment=st.none() | st.just("a/b"),
    ),
    model=st.builds(
        ModelTable, base=words, n_future=st.integers(1, 16), micro=st.just(MicroTable(hidden_size=64))
    ),
    data=st.builds(DataTable, use=addresses, options=options),
    weighting=st.builds(Selection, use=addresses, options=options),
    critic=st.none()
    | st.builds(CriticTable, use=addresses, options=options, train=st.builds(TrainTable, **trains)),
    loss=st.builds(LossTable, head_weights=st.lists(st.floats(0.1, 1e6), max_size=4).map(tuple)),
    train=st.builds(
        PolicyTrainTable, **trains, select_by=st.sampled_from([None, "head_1", "later_heads", "acceptance"])
    ),
    evaluate=st.builds(
        EvaluateTable, samples=st.just(5), temperature=st.floats(0.1, 2), pass_at_k=st.just((1, 5))
    ),
    tracker=st.lists(st.builds(TrackerTable, use=addresses, options=options), max_size=2).map(tuple),
)


@given(recipes)
def test_a_written_recipe_reads_back_equal(recipe):
    assert structure(Recipe, tomli.loads(recipe_to_toml(recipe))) == (recipe, [])


def test_defaults_toml_agrees_with_the_schema(repository):
    """A missing key must have the same default, whether or not a recipe extends `core:defaults.toml`."""
    written = tomli.loads((repository / "weighted_mtp_core" / "recipe" / "defaults.toml").read_text())
    recipe = Recipe(run=RunTable(name="r"), data=DataTable(use="p"), weighting=Selection(use="p"))

    for table, keys in written.items():
        if table == "tracker":
            continue
        default = getattr(recipe, table)
        required = {"run": {"name": "r"}, "data": {"use": "p"}}.get(table, {})
        assert structure(type(default), keys | required) == (default, [])


def test_every_default_is_shown_in_defaults_toml(repository):
    written = tomli.loads((repository / "weighted_mtp_core" / "recipe" / "defaults.toml").read_text())

    for table in attrs.fields(Recipe):
        if table.name in {"weighting", "critic", "tracker"}:
            continue
        for key in attrs.fields(table.type):
            has_default = key.default is not attrs.NOTHING and key.default is not None
            assert key.alias in written[table.name] or not has_default or key.name == "options", key.name
            inner = attrs.fields(type(key.default)) if attrs.has(type(key.default)) else ()
            for nested in inner:
                shown = written[table.name][key.alias]
                assert nested.alias in shown or nested.default is None, f"{key.alias}.{nested.alias}"


@pytest.mark.parametrize(
    "table", [RunTable, ModelTable, PolicyTrainTable, EvaluateTable, LossTable, MicroTable]
)
def test_every_number_in_the_schema_has_a_range(table):
    for key in attrs.fields(attrs.resolve_types(table)):
        if key.type in {int, float}:
            assert key.validator is not None, key.name


def test_every_shipped_recipe_loads_with_and_without_every_preset(repository, monkeypatch):
    monkeypatch.chdir(repository)
    recipes = [*Path("configs").glob("*.toml"), *Path("configs/study").glob("**/*.toml")]
    presets = [Path(name).stem for name in core_files() if "presets/" in name]

    assert {"baseline", "verifiable", "smollm2_humaneval"} <= {path.stem for path in recipes}
    assert {"ci", "local-light"} <= set(presets)
    for path in recipes:
        for preset in [None, *presets]:
            load_recipe(path, preset=preset)
            assert read_document(path, preset=preset).files[0] == "core:defaults.toml"


@pytest.mark.parametrize("encode", [lambda text: ("\ufeff" + text).encode(), lambda text: text.encode()])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_recipe_is_read_as_editors_write_it(write_recipe, encode, line_end):
    path = write_recipe(SMALLEST + '    run.tags = ["a:b"]\n    train.steps = -1')
    path.write_bytes(encode(path.read_text().replace("\n", line_end)))
    line = path.read_bytes().count(b"\n") + 1

    with pytest.raises(WmtpError, match=f"line {line}, train.steps"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run.name = 'x'".encode("utf-16"), "the file is UTF-16; expected UTF-8"),
        ("# a\nrun.name = 'gr\xfcn'".encode("latin-1"), "line 2: not UTF-8 (byte 0xfc)"),
    ],
)
def test_a_recipe_of_another_encoding_is_refused_with_its_name(write_recipe, content, message):
    path = write_recipe("")
    path.write_bytes(content)

    with pytest.raises(WmtpError) as refused:
        load_recipe(path)

    assert str(refused.value) == f"recipe.toml: {message}"


def test_a_file_that_several_others_extend_is_applied_once_at_the_bottom(write_recipe):
    write_recipe("run.seed = 42\ntrain.steps = 300", "lowest.toml")
    write_recipe("extends = ['lowest.toml']\nrun.seed = 5", "one.toml")
    write_recipe("extends = ['./lowest.toml']\ntrain.steps = 7", "two.toml")
    path = write_recipe("extends = ['lowest.toml', 'one.toml', 'two.toml']" + SMALLEST.replace("    ", ""))

    recipe = load_recipe(path)

    assert (recipe.run.seed, recipe.train.steps) == (5, 7)
    assert read_document(path).files == ["lowest.toml", "one.toml", "two.toml", "recipe.toml"]


def test_a_preset_that_extends_the_defaults_resets_nothing(write_recipe):
    write_recipe("run.seed = 42\ntrain.steps = 300", "lowest.toml")
    write_recipe("extends = ['../lowest.toml']\ntrain.steps = 8", "presets/quick.toml")
    path = write_recipe("extends = ['lowest.toml']" + SMALLEST.replace("    ", "") + "run.seed = 5")

    recipe = load_recipe(path, preset="quick")

    assert (recipe.run.seed, recipe.train.steps) == (5, 8)


@pytest.mark.parametrize("value", ["123", "1e3", "true", "2026-01-02", "inf"])
def test_set_tells_how_to_quote_a_text_that_looks_like_another_value(write_recipe, value):
    path = write_recipe(SMALLEST)

    with pytest.raises(WmtpError) as refused:
        load_recipe(path, overrides=[f"run.name={value}"])

    assert refused.value.hint.endswith("""--set 'run.name="..."'""")
    assert load_recipe(path, overrides=[f'run.name="{value}"']).run.name == value


def test_a_home_folder_is_expanded(write_recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    path = write_recipe(SMALLEST)

    run = load_recipe(path, overrides=["run.storage=~/kept", "run.output_dir=~"]).run

    assert (run.storage, run.output_dir) == ("/home/ann/kept", "/home/ann")
    with pytest.raises(WmtpError, match=r"run.storage: there is no user `~nobody-here`"):
        load_recipe(path, overrides=["run.storage=~nobody-here/x"])
