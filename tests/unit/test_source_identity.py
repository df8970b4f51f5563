"""A result depends on source, not on a version: plugins are edited while their version stays 0.1.0."""

import json
import shutil
from typing import ClassVar

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from weighted_mtp_core.api import DatasetVersion, WmtpError
from weighted_mtp_core.checkpointing.resume import refuse_changes, run_to_resume
from weighted_mtp_core.compare.arms import read_arms
from weighted_mtp_core.compare.jobs import Job
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.token_cache import TokenCache
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.plugins import source_identity as module
from weighted_mtp_core.plugins.discovery import find
from weighted_mtp_core.plugins.source_identity import source_identity
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.tracking.run_folder import RunFolder
from weighted_mtp_core.training.score_cache import scores_key

RECIPE = """
    [run]
    name = "first"
    storage = "storage"
    [data]
    use = "example.lines"
    options = { folder = "x" }
    [weighting]
    use = "example.flat"
    [[tracker]]
    use = "example.paper"
"""
WRAPPER = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingChoice, hookimpl

    @frozen(kw_only=True)
    class Options:
        of: WeightingChoice

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="around", summary="", options=Options, build=lambda options, context: None)
"""


@pytest.fixture
def edit(site):
    """Append a line to a file of an installed plugin, and forget the sums, as a new process does."""

    def edit(name, line="# another formula\n"):
        with (site / name).open("a") as file:
            file.write(line)
        module._sha256.cache_clear()

    return edit


def identity(*names):
    module._sha256.cache_clear()
    return source_identity(find()[name] for name in names)


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_core_torch_and_transformers_are_always_named(example_plugin):
    found = identity(example_plugin)

    assert sorted(found) == ["torch", "transformers", "weighted-mtp-core", "wmtp-example"]
    assert found["wmtp-example"].startswith("1.2.3, source ")
    assert "+" not in found["torch"]


def test_an_edited_file_changes_the_source_of_its_distribution_alone(install_plugin, edit):
    install_plugin("one", version="0.1.0")
    install_plugin("two", version="0.1.0")
    before = identity("one", "two")
    edit("wmtp_one.py")
    after = identity("one", "two")

    assert [name for name in before if before[name] != after[name]] == ["wmtp-one"]


def test_the_folder_of_an_installation_does_not_count(install_plugin, site, tmp_path, monkeypatch):
    install_plugin("example")
    before = identity("example")
    shutil.copytree(site, tmp_path / "elsewhere")
    shutil.rmtree(site)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))

    assert identity("example") == before


@pytest.mark.parametrize("name", ["_formula.py", "table.json", "deep/er/_more.py"])
def test_every_file_of_a_package_counts(install_plugin, site, name):
    install_plugin("example", module="my_package")
    write(site / "my_package" / "__init__.py", (site / "my_package.py").read_text())
    (site / "my_package.py").unlink()
    write(site / "my_package" / name, "1")
    before = identity("example")
    write(site / "my_package" / name, "2")

    assert identity("example") != before


@pytest.mark.parametrize("name", ["__pycache__/_formula.pyc", ".hidden", "_formula.py~"])
def test_caches_and_the_copies_of_editors_do_not_count(install_plugin, site, name):
    install_plugin("example", module="my_package")
    (site / "my_package.py").unlink()
    write(site / "my_package" / "__init__.py")
    before = identity("example")
    write(site / "my_package" / name, "x")

    assert identity("example") == before


def test_a_second_package_of_an_editable_distribution_counts(install_plugin, site, tmp_path, monkeypatch):
    metadata = install_plugin("example")
    source = tmp_path / "checkout" / "src"
    helper = write(source / "formulas" / "__init__.py", "A = 1\n")
    (site / "wmtp_example.py").rename(source / "wmtp_example.py")
    tests = write(source / "tests" / "__init__.py")
    write(site / "_editable_impl_example.pth", f"{source}\n")
    write(metadata / "RECORD", f"_editable_impl_example.pth,,\n{metadata.name}/METADATA,,\n")
    monkeypatch.syspath_prepend(str(source))
    before = identity("example")
    write(tests, "# another test\n")

    assert identity("example") == before

    write(helper, "A = 2\n")

    assert identity("example") != before


def test_an_editable_requirement_counts_with_its_source(install_plugin, site):
    install_plugin("example", requires="my-formulas")
    metadata = site / "my_formulas-0.1.0.dist-info"
    write(metadata / "METADATA", "Metadata-Version: 2.1\nName: my-formulas\nVersion: 0.1.0\n")
    write(metadata / "top_level.txt", "my_formulas\n")
    formulas = write(site / "my_formulas.py", "A = 1\n")

    assert "my-formulas" not in identity("example")  # its version decides

    write(metadata / "direct_url.json", json.dumps({"url": "file:///x", "dir_info": {"editable": True}}))
    before = identity("example")
    formulas.write_text("A = 2\n")

    assert before["my-formulas"] != identity("example")["my-formulas"]


@pytest.mark.parametrize(("name", "same"), [("report/page.py", True), ("model/loss.py", False)])
def test_what_changes_no_number_of_core_does_not_count(tmp_path, name, same):
    package = tmp_path / "weighted_mtp_core"
    file = write(package / name, "a")
    before = module._sha256((package,))
    file.write_text("b")
    module._sha256.cache_clear()

    assert (module._sha256((package,)) == before) is same


# ------------------------------------------------------------------ what is known by it


def test_a_plan_counts_wrapped_weightings_and_no_trackers(install_plugin, write_recipe):
    for name in ("example", "inner", "books"):
        install_plugin(name)
    install_plugin("wrapper", WRAPPER)
    overrides = (
        "weighting.use=wrapper",
        "weighting.options.of.use=inner.flat",
        "tracker.0.use=books.paper",
    )
    plan = make_plan(write_recipe(RECIPE), overrides=overrides)

    ours = [name for name in plan.distributions if name.startswith("wmtp-")]
    assert ours == ["wmtp-example", "wmtp-inner", "wmtp-wrapper"]
    assert plan.identity["distributions"] == plan.distributions


def test_compare_trains_again_after_an_edit(example_plugin, write_recipe, edit):
    path = write_recipe(RECIPE)

    def job():
        (arm,) = read_arms([path], preset=None, overrides=(), allowed=())
        return Job(arm=arm, seed=42)

    leave(job().arm.plan, "FINISHED")

    assert job().wanted.finished() is not None

    edit("wmtp_example.py")

    assert job().wanted.finished() is None


def test_a_resumed_run_names_the_edit_and_takes_it_on_if_allowed(example_plugin, write_recipe, edit):
    path = write_recipe(RECIPE)
    folder = leave(make_plan(path), "KILLED")
    edit("wmtp_example.py")
    edited = make_plan(path)

    with pytest.raises(
        WmtpError, match=r"  distributions\.wmtp-example: 1\.2\.3, source \w{64} -> 1\.2\.3, "
    ) as e:
        refuse_changes(folder, edited, allowed=())

    assert e.value.hint.endswith("--allow-change distributions.wmtp-example")
    refuse_changes(folder, edited, allowed=["distributions.wmtp-example"])


def test_a_killed_run_of_the_source_before_is_not_continued_by_itself(example_plugin, write_recipe, edit):
    path = write_recipe(RECIPE)
    overrides = ('run.resume="auto"',)
    folder = leave(make_plan(path, overrides=overrides), "KILLED")

    assert run_to_resume(make_plan(path, overrides=overrides), None) == folder

    edit("wmtp_example.py")

    assert run_to_resume(make_plan(path, overrides=overrides), None) is None


def test_tokens_are_made_again_after_an_edit_of_the_data_source(example_plugin, write_recipe, edit, tmp_path):
    path = write_recipe(RECIPE)
    version = DatasetVersion(name="lines", version="1", sha256="a" * 64)
    letters = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    codec = TextCodec(PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>"))

    def fingerprint():
        data = make_plan(path).data
        return TokenCache(tmp_path, version, data=data, codec=codec, max_tokens=8).fingerprint

    before = fingerprint()

    assert fingerprint() == before

    edit("wmtp_example.py")

    assert fingerprint() != before


def test_scores_are_computed_again_after_an_edit_of_the_critic(example_plugin, write_recipe, edit):
    path = write_recipe(RECIPE)
    overrides = ("critic.use=example.judge",)

    def key():
        chosen = make_plan(path, overrides=overrides).critic
        compute = Compute.resolve(device="cpu", dtype="float32")
        return scores_key(NoCritic(), chosen, inputs=(), batches=NoBatches(), accumulation=1, compute=compute)

    before = key()

    assert key() == before

    edit("wmtp_example.py")

    assert key() != before


class NoCritic:
    """Has no state."""

    def state_dict(self):
        return {}


class NoBatches:
    """Batches of no data."""

    order: ClassVar = {}
    tokens = DatasetVersion(name="none", version="1", sha256="a" * 64)


def leave(plan, status):
    """Leave a run folder as a process of that plan would, with this status."""
    folder = RunFolder.create(plan.runs_folder, experiment=plan.experiment, name=plan.recipe.run.name)
    folder.record(status=status, **plan.identity)
    folder.close()
    return folder.path
