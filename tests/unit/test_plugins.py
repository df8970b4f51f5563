"""Finding plugins imports nothing, loading imports only the named plugin, and addresses are unambiguous."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import importlib_metadata
import pytest
import weighted_mtp_core
from packaging.version import Version
from weighted_mtp_core.api import Signal
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plugins.discovery import FoundPlugin, find, metadata_faults
from weighted_mtp_core.plugins.loading import Kind, PluginRegistry
from weighted_mtp_core.plugins.selection import resolve

RAISES = "raise RuntimeError('imported')"


@pytest.fixture
def load_named(site):
    """Load plugins by name from what the test installed, and nothing else; return the registry."""

    def load_named(*names):
        registry = PluginRegistry(found=find([str(site)]))
        for name in names:
            registry.load(name)
        return registry

    return load_named


def test_found_plugins_are_sorted_and_described_by_metadata_alone(install_plugin, site):
    install_plugin("zebra", RAISES, distribution="Wmtp_Zebra.Plus", version="2.0")
    install_plugin("ape", RAISES)

    found = find([str(site)])

    assert list(found) == ["ape", "zebra"]
    assert found["zebra"] == FoundPlugin(
        name="zebra",
        distribution="wmtp-zebra-plus",
        version="2.0",
        module="wmtp_zebra",
        requires=("weighted-mtp-core>=0.1,<0.2",),
    )
    assert "wmtp_zebra" not in sys.modules


def test_installed_means_on_the_path(example_plugin):
    assert example_plugin in find()
    assert find()["core"].distribution == "weighted-mtp-core"


def test_one_distribution_listed_twice_is_one_plugin(install_plugin, site, tmp_path):
    """A virtual environment with a `lib64` link lists everything twice."""
    install_plugin("twice")
    again = tmp_path / "lib64"
    again.symlink_to(site)

    (plugin,) = find([str(site), str(again)]).values()

    assert plugin.conflicts == ()
    assert len(plugin.folders) == 1


def test_two_versions_in_one_folder_are_both_named_and_refused(install_plugin, site, capsys):
    """An installer that failed half-way leaves the metadata of the old version behind."""
    install_plugin("stale", RAISES, version="0.1.0")
    install_plugin("stale", RAISES, version="0.2.0")

    with pytest.raises(WmtpError, match=r"wmtp_stale-0\.1\.0.*wmtp_stale-0\.2\.0") as refused:
        PluginRegistry(found=find([str(site)])).load("stale")

    assert "delete the folders of versions that are not in use" in refused.value.hint
    assert main(["plugins", "list"]) == 0
    listed = capsys.readouterr().out
    assert "0.1.0    >=0.1,<0.2  (several versions)" in listed
    assert "0.2.0    >=0.1,<0.2  (several versions)" in listed


def test_a_version_that_is_left_over_without_entry_points_is_refused_too(install_plugin, site):
    (install_plugin("left", RAISES, version="0.1.0") / "entry_points.txt").unlink()
    install_plugin("left", version="0.2.0")

    (plugin,) = find([str(site)]).values()

    assert [Path(folder).name for folder in plugin.folders] == [
        "wmtp_left-0.2.0.dist-info",
        "wmtp_left-0.1.0.dist-info",
    ]


def test_the_first_version_on_the_path_is_used_and_the_hidden_one_is_named(install_plugin, site, tmp_path):
    hidden = install_plugin("shadowed", version="0.1.0")
    later = tmp_path / "later"
    later.mkdir()
    hidden.rename(later / hidden.name)
    install_plugin("shadowed", version="0.2.0")
    path = [str(site), str(later)]

    (plugin,) = find(path).values()
    (fault,) = metadata_faults(path)

    assert (plugin.version, len(plugin.folders)) == ("0.2.0", 1)
    assert fault.startswith(f"`{later / hidden.name}` is not used")


def test_a_plugin_that_an_earlier_package_of_the_same_name_hides_is_not_found(install_plugin, site, tmp_path):
    """Python would import the module of the earlier one, which may not be a plugin."""
    later = tmp_path / "later"
    later.mkdir()
    hidden = install_plugin("shadowed", version="0.2.0")
    hidden.rename(later / hidden.name)
    (install_plugin("shadowed", version="0.1.0") / "entry_points.txt").unlink()

    assert find([str(site), str(later)]) == {}
    assert len(metadata_faults([str(site), str(later)])) == 1


def test_metadata_without_a_name_is_named_by_its_folder(install_plugin, site):
    for name in ("one", "two"):
        (install_plugin(name) / "METADATA").unlink()

    found = find([str(site)])

    assert {plugin.distribution for plugin in found.values()} == {"wmtp-one", "wmtp-two"}
    assert {plugin.version for plugin in found.values()} == {"0.3.0"}
    assert len(metadata_faults([str(site)])) == 2


@pytest.mark.parametrize(
    "entry_points",
    [
        "\ufeff[weighted_mtp_core]\nodd=wmtp_odd\n".encode(),
        b"[weighted_mtp_core]\r\nodd = wmtp_odd \r\n",
        b"[weighted_mtp_core]\nodd = wmtp_odd # note\n; c = d\n",
        b"[weighted_mtp_core] ; ours\n odd=wmtp_odd\n",
        b"[console_scripts]\nx = gr\xfcn:main\n[weighted_mtp_core]\nodd = wmtp_odd\n",
    ],
)
def test_entry_points_are_read_as_other_tools_write_them(install_plugin, site, entry_points):
    (install_plugin("odd") / "entry_points.txt").write_bytes(entry_points)

    (plugin,) = find([str(site)]).values()

    assert (plugin.name, plugin.module) == ("odd", "wmtp_odd")


@pytest.mark.parametrize("text", [b"\xff\xfeN\x00a\x00", b"Name: gr\xfcn\n\x00", b"", b"\n\nName: x\n"])
def test_descriptions_that_cannot_be_read_break_nothing(install_plugin, site, text):
    (install_plugin("odd") / "METADATA").write_bytes(text)

    assert list(find([str(site)])) == ["odd"]
    assert metadata_faults([str(site)])


def test_a_stranger_that_cannot_be_decoded_is_ignored_and_named(install_plugin, site):
    """Importing torch reads the entry points of all packages, and fails on such a file unless core helps."""
    (install_plugin("stranger") / "entry_points.txt").write_bytes(b"[console_scripts]\nx = gr\xfcn:main\n")
    environment = {**os.environ, "PYTHONPATH": str(site)}

    done = subprocess.run(
        [sys.executable, "-m", "weighted_mtp_core", "doctor"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "wmtp_stranger-0.3.0.dist-info/entry_points.txt` is not UTF-8" in done.stdout
    assert "device: " in done.stdout


@pytest.mark.parametrize(
    "entry_points",
    [
        "nonsense [\n=\n[weighted_mtp_core\nx",
        "[weighted_mtp_core]\nno equals sign\n# comment = x\n",
        "[console_scripts]\nx = weighted_mtp_core:main\n",
    ],
)
def test_entry_points_that_make_no_sense_are_somebody_elses(install_plugin, site, entry_points):
    (install_plugin("odd") / "entry_points.txt").write_text(entry_points)

    assert find([str(site)]) == {}


# If a package (such as MLflow) imports the backport, the backport's finder replaces the standard library's.
@pytest.mark.parametrize("package", [importlib.metadata, importlib_metadata])
def test_metadata_without_a_name_breaks_nothing(install_plugin, site, monkeypatch, package):
    others = [each for each in sys.meta_path if not hasattr(each, "find_distributions")]
    monkeypatch.setattr(sys, "meta_path", [package.MetadataPathFinder(), *others])
    (install_plugin("odd") / "METADATA").write_text("")
    install_plugin("fine")

    assert set(find([str(site)])) == {"fine", "odd"}


def test_only_named_plugins_are_imported(install_plugin, example_plugin, load_named):
    install_plugin("broken", RAISES)

    assert set(load_named(example_plugin).loaded) == {example_plugin}


def test_only_an_error_looks_into_plugins_that_nobody_named(install_plugin, example_plugin, site):
    install_plugin("other", "")
    registry = PluginRegistry(found=find([str(site)]))

    resolve(registry, Kind.WEIGHTING, "example.flat")
    assert set(registry.loaded) == {"example"}
    assert "wmtp_other" not in sys.modules

    with pytest.raises(WmtpError):
        resolve(registry, Kind.WEIGHTING, "example.zzz")
    assert "wmtp_other" in sys.modules


@pytest.mark.parametrize(
    "mistake",
    [
        "@hookimpl\ndef wmtp_critics(): return None",
        "@hookimpl\ndef wmtp_critics(): return [1]",
        "@hookimpl\ndef wmtp_crtics(): return []",
        "@hookimpl(specname='wmtp_critics')\ndef other(argument): return []",
        "def wmtp_critics(): return []",
    ],
)
def test_one_plugins_mistake_is_never_anothers(install_plugin, example_plugin, site, mistake):
    install_plugin("mistaken", f"from weighted_mtp_core.api import hookimpl\n{mistake}")
    registry = PluginRegistry(found=find([str(site)]))

    for _ in range(2):  # the second time as the first: nothing of the plugin stays registered
        with pytest.raises(WmtpError, match="mistaken"):
            registry.load("mistaken")

    assert registry.load(example_plugin).addresses(Kind.CRITIC) == ["example.judge", "example.reference"]
    assert set(registry.loaded) == {example_plugin}


def test_two_claims_to_a_name_matter_only_to_who_names_it(install_plugin, example_plugin, load_named):
    install_plugin("claimed", RAISES, distribution="one")
    install_plugin("claimed", RAISES, distribution="two")

    load_named(example_plugin)

    with pytest.raises(WmtpError, match="both claim the plugin name `claimed`"):
        load_named("claimed")


@pytest.mark.parametrize(
    ("requires", "fits"),
    [
        (None, True),
        ("weighted-mtp-core", True),
        ("weighted-mtp-core>=0.1,<0.2", True),
        ("Weighted_MTP.core ~= 0.1", True),
        ("weighted-mtp-core[testing]>=9; extra == 'testing'", True),
        ("attrs>=9999", True),
        ("weighted-mtp-core>=0.2", False),
        ("weighted-mtp-core<0.1", False),
        ("weighted-mtp-core!=0.1.*", False),
    ],
)
def test_the_range_of_core_versions_is_checked_before_import(
    install_plugin, load_named, monkeypatch, requires, fits
):
    monkeypatch.setattr(weighted_mtp_core, "__version__", "0.1.7")
    install_plugin("ranged", "" if fits else RAISES, requires=requires)

    if fits:
        load_named("ranged")
    else:
        with pytest.raises(WmtpError, match=r"needs weighted-mtp-core.*, but 0\.1\.7 is installed"):
            load_named("ranged")


def test_core_knows_its_own_version(repository):
    assert Version(weighted_mtp_core.__version__) == Version(find()["core"].version)


def test_components_are_indexed_by_kind_and_address(example_plugin, load_named):
    registry = load_named(example_plugin)

    assert {kind: registry.loaded[example_plugin].addresses(kind) for kind in Kind} == {
        Kind.DATA: ["example.lines"],
        Kind.CRITIC: ["example.judge", "example.reference"],
        Kind.WEIGHTING: ["example.flat", "example.valued"],
        Kind.TRACKER: ["example.paper"],
    }


def test_a_plugin_alone_names_its_only_component_of_the_kind(example_plugin, load_named):
    registry = load_named(example_plugin)

    plugin, component = resolve(registry, Kind.DATA, "example")

    assert (plugin.name, plugin.version, component.name) == ("example", "1.2.3", "lines")
    assert resolve(registry, Kind.DATA, "example.lines") == (plugin, component)


def test_one_name_may_serve_two_kinds(install_plugin, load_named):
    install_plugin(
        "both",
        """
        from attrs import frozen
        from weighted_mtp_core.api import Component, hookimpl

        @frozen
        class Options:
            pass

        same = Component(name="same", summary="", options=Options, build=lambda options, context: None)

        @hookimpl
        def wmtp_critics():
            return [same]

        @hookimpl
        def wmtp_weighting_strategies():
            return [same]
        """,
    )

    assert resolve(load_named("both"), Kind.CRITIC, "both.same")[1].name == "same"


def test_a_plugin_may_be_an_object_in_a_module(install_plugin, load_named):
    metadata = install_plugin(
        "object",
        """
        from weighted_mtp_core.api import hookimpl

        class Plugin:
            @hookimpl
            def wmtp_critics(self):
                return []

        plugin = Plugin()
        """,
    )
    (metadata / "entry_points.txt").write_text("[weighted_mtp_core]\nobject = wmtp_object:plugin\n")

    assert load_named("object").loaded["object"].addresses(Kind.CRITIC) == []


def test_providers_of_a_signal_are_the_loaded_critics_that_say_so(example_plugin, load_named):
    registry = load_named(example_plugin)

    assert registry.providers(Signal.VALUE) == ["example.judge"]
    assert registry.providers(Signal.REFERENCE_LOSS) == ["example.reference"]
    assert registry.providers(Signal.GROUP) == []
