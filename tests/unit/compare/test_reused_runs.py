"""A finished run is used again for the same recipe, seed and data, and for no others."""

import pytest
from weighted_mtp_core.compare.jobs import Job, plan_jobs, refuse_other_data
from weighted_mtp_core.errors import WmtpError


def test_a_finished_run_is_found_by_its_recipe_and_seed(arms, finish):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    finish(job, seed=42)
    path = finish(job)

    assert job.wanted.finished().absolute() == path


@pytest.mark.parametrize(
    "other",
    [
        {"status": "KILLED"},
        {"train__steps": "7"},
        {"weighting__options__beta": "0.1"},
        {"distributions": {"x": "2"}},
        {
            "changed": ["train.steps"]
        },  # resumed with more steps, so its first steps are those of a shorter run
    ],
)
def test_another_run_is_not_taken_for_it(arms, other, finish):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    finish(job, **other)

    assert job.wanted.finished() is None


def test_where_a_run_was_tracked_does_not_matter(arms, finish):
    job = Job(arm=arms(("one", ""))[0], seed=43)
    path = finish(job, run__resume="never", tracker__0__use="example.paper", run__tags='["a:b"]')

    assert job.wanted.finished().absolute() == path


def test_runs_of_different_contents_of_one_data_file_are_refused(arms, finish):
    jobs = plan_jobs(arms(("one", ""), ("two", "")), [1, 2])
    runs = {job: finish(job) for job in jobs[:3]}
    refuse_other_data(runs)
    runs[jobs[3]] = finish(jobs[3], data="d2")

    with pytest.raises(WmtpError) as caught:
        refuse_other_data(runs)

    assert str(caught.value) == (
        f"the data changed between runs: their SHA-256 is d1 in `{runs[jobs[0]]}` and d2 in `{runs[jobs[3]]}`"
    )
    assert caught.value.hint == (
        "delete the folders of the runs with the old data, restore the old data, or allow the difference: "
        "--allow-difference data.sha256"
    )
    refuse_other_data(runs, allowed=["data.sha256"])


def test_arms_with_other_options_of_the_data_may_have_other_data(arms, finish):
    every = (*arms(("one", "")), *arms(("two", ""), overrides=['data.options.folder="there"']))

    refuse_other_data({job: finish(job, data=job.arm.name) for job in plan_jobs(every, [1, 2])})
