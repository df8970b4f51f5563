"""`--executor`: valid addresses, the message about a missing package, and workers that are refused."""

import sys

import attrs
import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.executors.address import local_slots, open_executor
from weighted_mtp_core.executors.same_code import SameCode, run_checked
from weighted_mtp_core.plan import make_plan

RECIPE = """
    [run]
    name = "one"
    [data]
    use = "example.lines"
    options.folder = "here"
    [weighting]
    use = "example.flat"
"""


@pytest.fixture
def recipe(write_recipe, example_plugin):
    return write_recipe(RECIPE)


@pytest.fixture
def code(recipe):
    return SameCode.of([make_plan(recipe)])


def test_an_address_is_a_number_of_slots_or_a_scheduler():
    assert local_slots("local:3") == 3
    assert local_slots("dask://node-0:8786") is None


@pytest.mark.parametrize(
    "address", ["3", "local:0", "local:", "dask://node-0", "dask://user:word@host:1", "ssh://x:1"]
)
def test_other_addresses_are_refused(address):
    with pytest.raises(WmtpError, match="expected `local:N` with N of 1 or more, or `dask://HOST:PORT`"):
        local_slots(address)


def test_tasks_of_local_run_in_this_process(recipe):
    with open_executor("local:2", []) as executor:
        assert list(executor.map(lambda n: n * n, [1, 2, 3])) == [1, 4, 9]


def test_without_the_package_of_dask_the_error_names_the_extra(recipe, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)

    code = main(["compare", str(recipe), "--executor", "dask://127.0.0.1:1"])

    assert code == 2
    error = capsys.readouterr().err
    assert "error: `--executor dask://127.0.0.1:1` needs the package `distributed`" in error
    assert "hint: pip install 'weighted-mtp-core[dask]'" in error


def test_a_worker_with_the_same_code_executes_a_task(code):
    assert run_checked(code, max, [2, 3]) == 3


def test_the_code_of_core_of_every_plugin_and_of_torch_is_compared(code):
    names = [name for name, _ in code.distributions]

    assert names == ["torch", "transformers", "weighted-mtp-core", "wmtp-example"]
    assert code.plugins == ("example",)


def test_a_worker_with_other_code_refuses_a_task_and_names_the_difference(code):
    core = dict(code.distributions)["weighted-mtp-core"]
    version, _, sha256 = core.partition(", source ")
    other = {**dict(code.distributions), "weighted-mtp-core": f"{version}, source {'0' * 64}", "torch": "1.0"}
    client = attrs.evolve(code, distributions=tuple(sorted(other.items())))

    with pytest.raises(WmtpError, match="does not run the code of the client: ") as error:
        run_checked(client, max, [2, 3])

    assert f"weighted-mtp-core {version} (source {'0' * 12}) at the client" in str(error.value)
    assert f"{version} (source {sha256[:12]}) there" in str(error.value)
    assert "torch 1.0 at the client" in str(error.value)
    assert error.value.hint.endswith("and restart the worker")


def test_a_worker_without_a_plugin_of_the_recipe_refuses_a_task(code):
    client = attrs.evolve(code, plugins=("example", "other"))

    with pytest.raises(WmtpError, match="plugin `other` is missing there"):
        run_checked(client, max, [2, 3])
