"""`recipe new` writes a recipe that `check` accepts, and shows every option with its default and meaning."""

import re

import pytest
import tomli
from weighted_mtp_core.cli import main
from weighted_mtp_core.plan import make_plan

PLUGIN = '''
    from attrs import field, frozen
    from attrs import validators as v
    from weighted_mtp_core.api import Component, Signal, hookimpl

    @frozen(kw_only=True)
    class Inner:
        """Inner options.

        Attributes:
            depth: How deep
                it goes.
        """

        depth: int = 2

    @frozen(kw_only=True)
    class Base:
        """Options of several components.

        Attributes:
            folder: Where the data is.
        """

        folder: str | None = None

    @frozen(kw_only=True)
    class DataOptions(Base):
        """`[data.options]` of `shop.goods`.

        Attributes:
            count: How many; at least 1.

        Raises:
            ValueError: Never.
        """

        count: int = field(default=3, validator=v.ge(1))
        inner: Inner = Inner()
        shares: tuple[float, ...] = (0.5, 0.25)
        marks: dict[str, int] = field(factory=dict)

    @frozen(kw_only=True)
    class Required:
        """`pattern` is a regular expression."""

        pattern: str

    @frozen(kw_only=True)
    class NoOptions:
        """There are none."""

    def build(options, context):
        return options

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="plain", summary="Plain weights.", options=NoOptions, build=build)
        yield Component(name="matched", summary="Matched weights.", options=Required, build=build)
        yield Component(
            name="valued", summary="V.", options=NoOptions, build=build, needs=frozenset({Signal.VALUE})
        )

    @hookimpl
    def wmtp_critics():
        yield Component(
            name="judge", summary="J.", options=NoOptions, build=build, provides=frozenset({Signal.VALUE})
        )

    @hookimpl
    def wmtp_data_sources():
        yield Component(name="goods", summary="Goods to learn.", options=DataOptions, build=build)
'''
CHOSEN = ("--data", "shop.goods", "--weighting", "shop.plain")
UNSET = re.compile(r"^#(?! )", re.MULTILINE)


@pytest.fixture(autouse=True)
def shop(install_plugin, tmp_path, monkeypatch):
    install_plugin("shop", PLUGIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(*arguments):
    return main(["recipe", "new", *arguments])


def resolved(file, **settings):
    return make_plan(file, **settings).recipe_toml


def test_the_recipe_is_the_smallest_one_that_extends_the_defaults(shop):
    (shop / "smallest.toml").write_text(
        'extends = ["core:defaults.toml"]\nrun.name = "first"\n'
        'data.use = "shop.goods"\nweighting.use = "shop.plain"'
    )

    assert new("first.toml", *CHOSEN) == 0

    assert main(["check", "first.toml"]) == 0
    assert resolved(shop / "first.toml") == resolved(shop / "smallest.toml")


def test_a_line_that_loses_its_mark_changes_nothing(shop):
    new("as_written.toml", *CHOSEN, "--set", "run.name=same")
    text = (shop / "as_written.toml").read_text()
    defaults = UNSET.sub("", text.replace("#folder = ...\n", ""))
    (shop / "uncommented.toml").write_text(defaults)
    options = tomli.loads(defaults)["data"]["options"]

    assert options == {"count": 3, "inner": {"depth": 2}, "shares": [0.5, 0.25], "marks": {}}
    assert resolved(shop / "uncommented.toml") == resolved(shop / "as_written.toml")


def test_each_option_has_its_type_and_meaning_above_it(shop):
    new("recipe.toml", *CHOSEN)

    assert (
        '[data]\n# Goods to learn.\nuse = "shop.goods"\n[data.options]\n'
        "# str, optional: Where the data is.\n#folder = ...\n"
        "# int: How many; at least 1.\n#count = 3\n"
        "# int: How deep it goes.\n#inner.depth = 2\n"
        "# array of float\n#shares = [0.5, 0.25]\n"
    ) in (shop / "recipe.toml").read_text()


def test_options_described_in_a_sentence_keep_it(shop):
    new("--data", "shop.goods", "--weighting", "shop.matched", "--set", "weighting.options.pattern='[0-9]+'")

    assert (
        '[weighting]\n# Matched weights.\nuse = "shop.matched"\n[weighting.options]\n'
        '# `pattern` is a regular expression.\n# str\npattern = "[0-9]+"\n'
    ) in (shop / "recipe.toml").read_text()


def test_all_that_was_set_is_in_the_recipe(shop):
    overrides = [
        "data.options.count=7",
        'data.options.marks={"a b" = 1, c = 2}',
        "data.options.inner.depth=5",
        "data.options.shares=[1, 2.5]",
        "critic.train.steps=5",
        "loss.head_decay=0.5",
        "model.micro.layers=2",
        "tracker.0.options.experiment_prefix=team",
        'run.tags=["a:b"]',
    ]
    settings = [part for each in overrides for part in ("--set", each)]
    new("plain.toml", *CHOSEN, "--critic", "shop.judge")
    new("set.toml", *CHOSEN, "--critic", "shop.judge", "--base", 'some "model"', *settings)

    expected = resolved(
        shop / "plain.toml", overrides=[*overrides, "run.name=set", "model.base='some \"model\"'"]
    )

    assert resolved(shop / "set.toml") == expected
    assert 'experiment_prefix = "team"' in expected


def test_no_tracker_may_be_set(shop):
    new(*CHOSEN, "--set", "tracker=[]")

    assert make_plan(shop / "recipe.toml").trackers == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--data", "shop.goodz", "--weighting", "shop.plain"),
            (
                "plugin `shop` has no data source named `goodz`; it has `shop.goods`\n  --data, data.use\n"
                "hint: did you mean `shop.goods`?"
            ),
        ),
        (
            ("--data", "shop.goods", "--weighting", "shopp.plain"),
            (
                "no plugin named `shopp` is installed; installed: `core`, `shop`\n  "
                "--weighting, weighting.use\nhint: did you mean `shop`?"
            ),
        ),
        (
            ("--data", "shop.goods", "--weighting", "shop.matched"),
            "recipe.toml: 1 problem\n  --weighting, weighting.options.pattern: missing; expected str",
        ),
        (
            (*CHOSEN, "--set", "data.options.cuont=1"),
            (
                "recipe.toml: 1 problem\n  --set, data.options.cuont: unknown key `cuont`; known keys: "
                "folder, count, inner, shares, marks; did you mean `count`?"
            ),
        ),
        (
            ("--data", "shop.goods", "--weighting", "shop.valued"),
            (
                "weighting `shop.valued` needs the signal `value`, which no critic provides\n"
                'hint: in table `[critic]`: use = "shop.judge"'
            ),
        ),
        (
            ("--data", "shop.goods"),
            "`recipe new` needs --weighting\nhint: `recipe new --list` shows what is installed",
        ),
        (
            ("my recipe.toml", *CHOSEN),
            (
                "my recipe.toml: 1 problem\n  FILE, run.name: must match regex '[A-Za-z0-9][A-Za-z0-9._-]*' "
                "('my recipe' doesn't)"
            ),
        ),
        (("no/folder.toml", *CHOSEN), "cannot write `no/folder.toml`: No such file or directory"),
    ],
)
def test_what_check_would_refuse_is_not_written(shop, capsys, arguments, message):
    before = list(shop.iterdir())

    assert new(*arguments) == 2

    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(shop.iterdir()) == before


def test_an_existing_file_is_kept(shop, capsys):
    (shop / "recipe.toml").write_text("mine")

    assert new(*CHOSEN) == 2

    assert (
        capsys.readouterr().err
        == "error: `recipe.toml` exists\nhint: name another file: recipe new FILE ...\n"
    )
    assert (shop / "recipe.toml").read_text() == "mine"


def test_the_list_shows_every_component_and_names_plugins_that_fail(shop, install_plugin, capsys):
    install_plugin("broken", "import nothing_of_this_name")

    assert new("--list") == 0

    shown = capsys.readouterr()
    assert re.findall(
        r"^(data source|critic|weighting|tracker) +(shop\.\w+|core\.mlflow)", shown.out, re.MULTILINE
    ) == [
        ("data source", "shop.goods"),
        ("critic", "shop.judge"),
        ("weighting", "shop.matched"),
        ("weighting", "shop.plain"),
        ("weighting", "shop.valued"),
        ("tracker", "core.mlflow"),
    ]
    assert "Goods to learn." in shown.out
    assert shown.err.startswith("warning: plugin `broken`")
    assert not (shop / "recipe.toml").exists()
