"""Define the checks that every data source must pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from weighted_mtp_core.api import SPLITS, BuildContext, DataSource, Example, Problem, Split, WmtpError
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.testing.component import ComponentSuite, select

Build = Callable[[], DataSource]
_JUDGED = 3  # problems per split, because judging each problem starts a sandboxed program
# Builds the data source in a new process and prints a digest of all its examples, in order.
_DIGEST = """
import hashlib, json, sys
from pathlib import Path
from weighted_mtp_core.api import SPLITS, BuildContext
from weighted_mtp_core.plugins.loading import Kind
from weighted_mtp_core.plugins.selection import ComponentSelector

address, options, storage = sys.argv[1:]
selected = ComponentSelector().select(Kind.DATA, address, options=json.loads(options))
source = selected.build(BuildContext(seed=7, storage=Path(storage)))
examples = [list(source.examples(split)) for split in SPLITS]
print(hashlib.sha256(repr(examples).encode()).hexdigest())
"""


class DataSourceSuite(ComponentSuite):
    """Checks the examples, splits and version of a data source, and its verdicts if it judges completions.

    Override the fixture `changed_options` to also check that the version changes when the data change.
    """

    kind: ClassVar[Kind] = Kind.DATA

    @pytest.fixture
    def changed_options(self) -> Mapping[str, Any] | None:
        """Options that select other data, such as a file with one changed byte; None skips the check."""
        return None

    @pytest.fixture
    def source(self, build: Build) -> DataSource:
        """The data source, built in the same way as in a run."""
        return build()

    @pytest.fixture(params=SPLITS)
    def split(self, request: pytest.FixtureRequest) -> Split:
        """The name of a split; pytest runs the test once for each split."""
        split: Split = request.param
        return split

    def test_there_is_something_to_train_on(self, source: DataSource) -> None:
        """The split `train` must have examples both for the critic and for the policy."""
        assert len(source.examples("train")) > 0
        assert len(source.policy_examples("train")) > 0

    def test_examples_are_random_access(self, source: DataSource, split: Split) -> None:
        """The sequence of examples must support access by index, because batches are drawn by index."""
        examples = source.examples(split)
        in_order = list(examples)

        assert len(examples) == len(in_order)
        assert [examples[i] for i in reversed(range(len(examples)))] == in_order[::-1]
        assert all(isinstance(example, Example) for example in in_order)

    def test_prompts_and_responses_hold_text(self, source: DataSource, split: Split) -> None:
        """Prompts and responses must not be empty."""
        empty = [e.example_id for e in source.examples(split) if not e.prompt or not e.response]

        assert empty == []

    def test_the_same_examples_come_twice_in_the_same_order(self, build: Build, split: Split) -> None:
        """Repeated calls, and other sources with the same options, must return equal lists of examples."""
        source = build()
        first = list(source.examples(split))

        assert list(source.examples(split)) == first
        assert list(build().examples(split)) == first

    def test_examples_do_not_depend_on_the_hash_seed(
        self, options: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """The examples must not have the order of a set of strings, which differs between processes."""
        found = set()
        for seed in ("0", "1"):
            command = [sys.executable, "-c", _DIGEST, self.address, json.dumps(dict(options))]
            done = subprocess.run(
                [*command, str(tmp_path / f"storage-{seed}")],
                env={**os.environ, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            found.add(done.stdout.strip().splitlines()[-1])

        assert len(found) == 1

    def test_example_ids_are_unique(self, source: DataSource) -> None:
        """Ids of examples must be unique over all splits, because caches and reports use these ids."""
        ids = [example.example_id for split in SPLITS for example in source.examples(split)]

        assert len(ids) == len(set(ids))

    def test_splits_share_no_problem(self, source: DataSource) -> None:
        """No problem may be in two splits, because results on problems seen in training are meaningless."""
        owners: dict[str, set[Split]] = {}
        for split in SPLITS:
            for example in [*source.examples(split), *source.policy_examples(split)]:
                owners.setdefault(example.problem_id, set()).add(split)
            for problem in source.problems(split):
                owners.setdefault(problem.problem_id, set()).add(split)

        assert {problem: splits for problem, splits in owners.items() if len(splits) > 1} == {}

    def test_the_version_names_the_data(self, build: Build) -> None:
        """`version` must return a name, a version and a SHA-256, which are the same for each call."""
        version = build().version()

        assert version.name.strip()
        assert version.version.strip()
        assert re.fullmatch(r"[0-9a-f]{64}", version.sha256)
        assert build().version() == version

    def test_other_data_have_another_sha256(
        self,
        build: Build,
        changed_options: Mapping[str, Any] | None,
        context: BuildContext,
    ) -> None:
        """The SHA-256 must change even if only one byte of the data changes."""
        if changed_options is None:
            pytest.skip("override the fixture `changed_options` to have this checked")
        changed = select(self.kind, self.address, changed_options).build(context)

        assert changed.version().sha256 != build().version().sha256

    def test_verdicts_tell_right_from_wrong_in_order(self, source: DataSource, split: Split) -> None:
        """A known solution must pass and an empty completion must fail, in the order of the attempts."""
        problems = [each for each in source.problems(split) if each.solution is not None][:_JUDGED]
        if not problems:
            pytest.skip("no problem of this split has a known solution")
        attempts = [attempt for problem in problems for attempt in _right_and_wrong(problem)]
        verdicts = source.verify(attempts)

        assert [verdict.passed for verdict in verdicts] == [True, False] * len(problems)

    def test_a_source_without_problems_says_so(self, source: DataSource) -> None:
        """If a source has no problems, its `verify` must raise an error instead of returning verdicts."""
        if any(source.problems(split) for split in SPLITS):
            return
        problem = Problem(problem_id="none", prompt="", entry_point="f", tests="")
        with pytest.raises(WmtpError):
            source.verify([(problem, "")])


def _right_and_wrong(problem: Problem) -> tuple[tuple[Problem, str], tuple[Problem, str]]:
    assert problem.solution is not None
    return (problem, problem.solution), (problem, "")
