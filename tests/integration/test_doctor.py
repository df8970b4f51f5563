"""`doctor` with real servers: it reports no fault if all servers work, and the right line for each fault."""

import pytest
from weighted_mtp_core.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def doctor(capsys, stack, monkeypatch):
    """Run `doctor`; return its exit code and the lines that are not `ok`."""

    def doctor(**changes):
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        code = main(["doctor"])
        shown = capsys.readouterr().out
        for secret in (stack.password, stack.secret_key, "planted"):
            assert secret not in shown
        return code, [line for line in shown.splitlines() if " ok " not in line]

    return doctor


def test_a_stack_that_works_is_ticked(doctor, capsys):
    code, wrong = doctor()

    assert (code, wrong) == (0, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MLFLOW_TRACKING_PASSWORD": "planted-wrong"}, "refuses the login"),
        ({"MLFLOW_TRACKING_URI": "http://tracking.invalid"}, "is not known"),
        ({"MLFLOW_TRACKING_URI": "https://127.0.0.1:{port}"}, "no secure connection"),
        ({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "nothing answers"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "AWS_ACCESS_KEY_ID is set, but AWS_SECRET_ACCESS_KEY is not"),
    ],
)
def test_what_is_wrong_is_named(doctor, stack, changes, said):
    changes = {name: value.format(port=stack.ports["nginx"]) for name, value in changes.items()}

    code, wrong = doctor(**changes)

    assert code == 1
    assert said in wrong[0]


def test_a_bucket_that_is_gone_is_named(doctor, stack):
    stack.s3.kill()

    code, wrong = doctor()

    assert code == 1
    assert "FAILED  artifacts: the artifact store of the tracking server" in wrong[0]


def test_a_database_that_is_down_is_noticed_though_health_says_ok(doctor, stack):
    stack.postgres.kill()

    code, wrong = doctor()

    assert code == 1
    assert "FAILED  tracking" in wrong[0]
