"""`data sample`: a model's own texts as judged data, from a policy or from a server, also after a kill."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from weighted_mtp_core.api import BuildContext, JsonlOptions, JsonlSource
from weighted_mtp_core.cli import main

PLUGIN = """
    class Halves(Sums):
        # Judges the first character only; sums/3 is never decided.

        def completion(self, problem, text):
            return text[:1]

        def judge(self, problem, text):
            if problem.problem_id == "sums/3":
                return Verdict(kind=VerdictKind.CPU_LIMIT, detail=str(id(text)))
            return super().judge(problem, text)

        def version(self):
            return DatasetVersion(name="halves", version="1", sha256="6" * 64)

    class Unjudged(Sums):
        def problems(self, split):
            return ()

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="flat", summary="Flat.", options=SumsOptions, build=lambda o, c: Flat())

    @hookimpl(specname="wmtp_data_sources")
    def more_data_sources():
        yield Component(name="halves", summary="Halves.", options=SumsOptions, build=lambda o, c: Halves())
        yield Component(name="unjudged", summary="None.", options=SumsOptions, build=lambda o, c: Unjudged())
"""
RECIPE = """
    tracker = []
    [run]
    name = "tiny"
    seed = 1
    [model]
    n_future = 2
    micro = { hidden_size = 32, layers = 2, attention_heads = 2, vocab_size = 300 }
    [data]
    use = "sums.sums"
    [weighting]
    use = "sums.flat"
    [train]
    steps = 100
    batch_size = 16
    learning_rate = 3e-3
    [evaluate]
    problems = 1
    max_new_tokens = 6
    batch_size = 8
"""
SERVER = Path(__file__).with_name("completions_server.py")
OFTEN = ("--samples", "6", "--temperature", "1.5")


def run_id(folder):
    (run,) = (file.parent for file in (folder / "storage" / "runs").rglob("run.json"))
    return run.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory, judged_plugin):
    """A folder with `recipe.toml`, a finished run that mostly solves its sums, and its export `model`."""
    folder = tmp_path_factory.mktemp("sampling")
    metadata = folder / "site" / "wmtp_own-0.3.0.dist-info"
    metadata.mkdir(parents=True)
    source = judged_plugin.replace("hookimpl\n)", "WeightingStrategy, Weights, hookimpl\n)") + dedent(PLUGIN)
    (folder / "site" / "wmtp_own.py").write_text(source)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wmtp_own\nVersion: 0.3.0\nRequires-Dist: weighted-mtp-core>=0.1,<0.2\n"
    )
    (metadata / "entry_points.txt").write_text("[weighted_mtp_core]\nsums = wmtp_own\n")
    (folder / "recipe.toml").write_text(dedent(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder / "site"))
        assert main(["run", "recipe.toml"]) == 0
        assert main(["export", run_id(folder), "--to", "model"]) == 0
        yield folder


@pytest.fixture
def sample(folder, tmp_path, capsys):
    """Sample into a storage of this test; return exit code, stdout and stderr."""

    def sample(*words, model=None, storage="new"):
        words = (
            "--to",
            "mine",
            "--runs",
            "storage/runs",
            "--set",
            f"run.storage={tmp_path / storage}",
            *words,
        )
        model = model or run_id(folder)
        return (main(["data", "sample", model, "recipe.toml", *words]), *capsys.readouterr())

    return sample


@pytest.fixture
def written(sample, tmp_path):
    """Sample, and return the folder of the data set."""

    def written(*words, storage="new", **how):
        before = set((tmp_path / storage).glob("datasets_v2/mine/*/"))
        code, _, err = sample(*words, storage=storage, **how)
        assert code == 0, err
        (made,) = set((tmp_path / storage).glob("datasets_v2/mine/*/")) - before
        return made

    return written


def rows(file):
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def reference(folder, row, tokens):
    """The log-probabilities of tokens at temperature 1, from one forward pass of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    prompt = AutoTokenizer.from_pretrained(folder / "model")(row["prompt"])["input_ids"]
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*prompt, *tokens]])).logits[0].double()
    logprobs_TV = logits_TV.log_softmax(-1)
    return [logprobs_TV[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]


def test_a_row_holds_the_text_and_its_origin(written):
    (first, *_) = found = rows(written(*OFTEN) / "samples.jsonl")

    assert {row["task_id"] for row in found} == {f"sums/{n}" for n in range(16)}
    assert list(first) == [
        *("task_id", "sample", "prompt", "response", "completion", "verdict", "is_correct"),
        *("tokens", "logprobs", "sampler", "temperature", "seed", "metadata"),
    ]
    assert (first["sample"], first["prompt"], first["temperature"]) == (0, "What is 0 and 0?", 1.5)
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", first["sampler"])
    for row in found:
        assert "".join(row["tokens"]) == row["response"] + "<eos>"
        assert row["metadata"] == {"logprob": pytest.approx(math.fsum(row["logprobs"]), abs=1e-5)}


def test_log_probabilities_are_those_of_a_forward_pass_at_temperature_1(written, folder):
    found = rows(written(*OFTEN) / "samples.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    assert len({row["response"] for row in found}) > 10
    for row in found[:40]:
        ids = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) == len(row["tokens"]):  # the tokenizer may split a text into other tokens
            assert row["logprobs"] == pytest.approx(reference(folder, row, ids), abs=2e-5)


@pytest.mark.parametrize("use", ["sums.sums", "sums.halves"])
def test_verdicts_are_those_of_verify(written, tmp_path, use):
    data = written(*OFTEN, "--set", f"data.use={use}")
    kept, left_out = rows(data / "samples.jsonl"), rows(data / "left_out.jsonl")
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *left_out]))

    words = ("--set", f"data.use={use}", "--split", "train", "--samples", str(both), "--out")
    assert main(["verify", "recipe.toml", *words, str(tmp_path / "verdicts.jsonl")]) == 0

    verdicts = rows(tmp_path / "verdicts.jsonl")
    assert [row["verdict"] for row in [*kept, *left_out]] == [row["verdict"] for row in verdicts]
    assert [row["is_correct"] for row in kept] == [row["passed"] for row in verdicts[: len(kept)]]
    assert {row["is_correct"] for row in kept} == {True, False}


def test_undecided_and_unfinished_texts_are_no_data(written):
    data = written(*OFTEN, "--set", "data.use=sums.halves", "--set", "evaluate.max_new_tokens=2")
    kept, left_out = rows(data / "samples.jsonl"), rows(data / "left_out.jsonl")

    assert len(kept) + len(left_out) == 16 * 6
    assert {row["left_out"] for row in left_out} >= {"unfinished", "cpu_limit"}
    for row in [*kept, *left_out]:
        why = row.get("left_out")
        assert (why is None) == ("is_correct" in row)
        assert (why == "unfinished") == (not row["tokens"][-1].endswith("<eos>"))
        if why != "unfinished":
            assert (why == "cpu_limit") == (row["task_id"] == "sums/3")
            assert why != "empty" or row["response"] == ""
            assert why != "not_utf8" or "\N{REPLACEMENT CHARACTER}" in row["response"]
            assert why is not None or (row["response"] and "\N{REPLACEMENT CHARACTER}" not in row["response"])
    assert {row["completion"] for row in kept} == {row["response"][:1] for row in kept}
    statistics = json.loads((data / "statistics.json").read_text())
    assert statistics["texts"] == 16 * 6
    assert sum(statistics["left out"].values()) == len(left_out)


def test_without_any_finished_text_there_are_no_data(sample, tmp_path):
    code, _, err = sample(*OFTEN, "--set", "evaluate.max_new_tokens=1")

    assert code == 1
    assert "error: none of the 96 texts can become data: 96 unfinished\n" in err
    assert "hint: raise `evaluate.max_new_tokens`" in err
    assert list(tmp_path.glob("new/datasets_v2/mine/*/manifest.json")) == []


def test_a_run_is_looked_for_where_the_recipe_stores_runs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("data", "sample", run_id(folder), str(folder / "recipe.toml"), "--to", "elsewhere", *OFTEN)

    assert main([*words, "--set", f"run.storage={folder / 'storage'}"]) == 0
    assert len(list(folder.glob("storage/datasets_v2/elsewhere/*/samples.jsonl"))) == 1
    assert main([*words, "--set", "run.storage=other"]) == 2
    assert "other/runs" in capsys.readouterr().err


def test_the_seed_decides_every_byte(written):
    one, again = (written(*OFTEN, storage=storage) for storage in ("one", "again"))
    other = written(*OFTEN, "--set", "run.seed=2", storage="one")

    assert (again.name, contents(again)) == (one.name, contents(one))
    assert other.name != one.name
    responses = [[row["response"] for row in rows(each / "samples.jsonl")] for each in (one, other)]
    assert responses[0] != responses[1]


def test_other_options_of_the_data_are_another_version(written):
    first = written(*OFTEN)

    assert written(*OFTEN, "--set", "data.bos=always").name != first.name


def test_samples_are_those_that_evaluate_judges(written, folder, tmp_path, capsys):
    data = written(*OFTEN, "--split", "test")
    words = ("--split", "test", "--samples", "6", "--temperature", "1.5", "--problems", "0", "--out")
    assert main(["evaluate", run_id(folder), *words, str(tmp_path / "evaluated")]) == 0

    found = [*rows(data / "samples.jsonl"), *rows(data / "left_out.jsonl")]
    assert sorted((row["task_id"], row["completion"]) for row in found) == sorted(
        (row["task_id"], row["completion"]) for row in rows(tmp_path / "evaluated" / "samples.jsonl")
    )


def test_the_command_prints_where_the_data_are_and_what_passed(sample, tmp_path):
    code, out, _ = sample(*OFTEN)
    again, same, err = sample(*OFTEN)

    (file,) = tmp_path.glob("new/datasets_v2/mine/*/samples.jsonl")
    left_out = rows(file.with_name("left_out.jsonl"))
    passed = sum(row["verdict"] == "passed" for row in [*rows(file), *left_out])
    assert (code, again, same) == (0, 0, out)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["data"] == f"mine {file.parent.name}"
    assert lines["file"] == str(file)
    assert lines["texts"] in {
        f"96: {passed} passed, {96 - passed} wrong",
        f"96: {96 - passed} wrong, {passed} passed",
    }
    assert lines["passed"] == f"{passed / 96:.1%} of the texts"
    assert f"{sum(row['left_out'] == 'unfinished' for row in left_out)} unfinished" in lines["left"]
    assert "sample" not in err  # the data are in storage


def test_a_killed_command_continues_and_writes_the_same_bytes(folder, sample, written, tmp_path):
    often = ("--samples", "48", "--temperature", "1.5")
    words = (
        run_id(folder),
        "recipe.toml",
        "--to",
        "mine",
        "--runs",
        "storage/runs",
        "--set",
        f"run.storage={tmp_path / 'killed'}",
        *often,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "weighted_mtp_core", "data", "sample", *words],
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
        stderr=subprocess.DEVNULL,
    )
    lines = 0
    while lines < 3:
        assert process.poll() is None, "the command ended before it could be killed"
        time.sleep(0.01)
        found = list(tmp_path.glob("killed/sampling/*.jsonl"))
        lines = found[0].read_bytes().count(b"\n") if found else 0
    process.kill()
    process.wait()
    (journal,) = found
    os.truncate(journal, journal.stat().st_size - 7)  # as if the last write was not complete
    assert list(tmp_path.glob("killed/datasets_v2/mine/*/manifest.json")) == []

    code, _, err = sample(*often, storage="killed")

    assert code == 0, err
    assert int(re.search(r"continues: texts of (\d+) of 16 problems are there", err)[1]) >= 2
    (killed,) = tmp_path.glob("killed/datasets_v2/mine/*/")
    assert contents(killed) == contents(written(*often, storage="whole"))
    assert list(tmp_path.glob("killed/sampling/*")) == []


def test_a_damaged_journal_is_refused(sample, tmp_path):
    assert sample(*OFTEN, "--set", "evaluate.max_new_tokens=1")[0] == 1
    (journal,) = tmp_path.glob("new/sampling/*.jsonl")
    journal.write_bytes(journal.read_bytes().replace(b'"finished":false', b'"finished":true', 1))

    code, _, err = sample(*OFTEN, "--set", "evaluate.max_new_tokens=1")

    assert code == 2
    assert f"error: `{journal}` is damaged\nhint: delete it, then the command begins anew\n" in err


def test_the_data_are_rows_that_core_jsonl_reads(written, tmp_path):
    data = written(*OFTEN)
    kept = rows(data / "samples.jsonl")

    options = JsonlOptions(path=str(data / "samples.jsonl"), validation_share=0, test_share=0)
    source = JsonlSource(options, BuildContext(seed=0, storage=tmp_path))

    found = source.examples("train")
    assert [(each.problem_id, each.prompt, each.response, each.reward) for each in found] == [
        (row["task_id"], row["prompt"], row["response"], float(row["is_correct"])) for row in kept
    ]
    assert [each.metadata for each in found] == [row["metadata"] for row in kept]


def test_a_run_learns_from_what_an_earlier_run_wrote(written, folder, tmp_path, capsys):
    samples, shares = written(*OFTEN) / "samples.jsonl", "validation_share = 0.3, test_share = 0.3"
    (tmp_path / "next.toml").write_text(
        dedent(RECIPE)
        .replace('use = "sums.sums"', f'use = "core.jsonl"\noptions = {{ path = "{samples}", {shares} }}')
        .replace("steps = 100", "steps = 2")
    )

    words = ("--set", f"run.storage={tmp_path / 'next'}", "--set", "model.base=model")
    assert main(["run", str(tmp_path / "next.toml"), *words]) == 0

    assert re.search(r"^data samples .*^head 2 +test loss", capsys.readouterr().out, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "../mine"), "error: `--to ../mine` must match"),
        (("--problems", "-1"), "error: `--problems -1`: expected 0 or more"),
        (("--in-flight", "0"), "error: `--in-flight 0`: expected a positive number"),
        (("--timeout", "nan"), "error: `--timeout nan`: expected a positive number"),
        (("--samples", "2"), "must be > 0 for `samples` = 2, or every sample is the same"),
        (("--endpoint", "localhost:8000"), "error: `localhost:8000` is not the address of a server"),
        (
            ("--set", "data.use=sums.unjudged"),
            "error: data source `sums.unjudged` has no problems in the split `train`\nhint: use a recipe",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(sample, words, message):
    code, _, err = sample(*words)

    assert code == 2
    assert message in err


# --------------------------------------------------------------------------- a server


@pytest.fixture(scope="module")
def process(folder):
    """The address of a server of the exported model `model`, a process of its own."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "model"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def serving(process, seen):
    """Give the next requests some faults; return the address of the API.

    A command that fails leaves requests open. They would end with the process of the command, but here they
    can outlive a test, so this fixture first waits until no request is open.
    """

    def serving(*faults):
        quiet = 0
        while quiet < 3:
            quiet = 0 if seen()["open"] else quiet + 1
            time.sleep(0.1)
        requests.put(f"{process}/faults", json=faults, timeout=10).raise_for_status()
        return f"{process}/v1"

    return serving


@pytest.fixture
def seen(process):
    """Return what the server has seen since the last call of `serving`."""
    return lambda: requests.get(f"{process}/seen", timeout=10).json()


@pytest.fixture
def server(serving):
    """The address of the API of a server without faults."""
    return serving()


def test_a_server_gives_rows_of_the_same_form(server, written, folder):
    own, data = written(*OFTEN, storage="own"), written(*OFTEN, "--endpoint", server, model="model")
    kept = rows(data / "samples.jsonl")
    (first, *_) = rows(own / "samples.jsonl")

    assert len(kept) + len(rows(data / "left_out.jsonl")) == 96
    assert all(list(row) == list(first) for row in kept)
    assert len({row["seed"] for row in kept}) == len(kept)
    assert {row["sampler"] for row in kept} == {"model"}
    assert all(row["is_correct"] == (row["completion"] == str(2 * int(row["task_id"][5:]))) for row in kept)
    assert {row["is_correct"] for row in kept} == {True, False}


def test_log_probabilities_of_a_server_are_those_of_the_policy(server, written, folder):
    kept = rows(written(*OFTEN, "--endpoint", server, model="model") / "samples.jsonl")
    own = rows(written("--temperature", "0", storage="own") / "samples.jsonl")
    served = written("--temperature", "0", "--endpoint", server, model="model", storage="served")

    assert [row["response"] for row in rows(served / "samples.jsonl")] == [row["response"] for row in own]
    for row, other in zip(rows(served / "samples.jsonl"), own, strict=True):
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=2e-5)
        assert row["tokens"] == other["tokens"]
    assert len({row["response"] for row in kept}) > 10


def test_busy_broken_and_silent_servers_are_asked_again(written, serving, seen):
    words = (*OFTEN, "--timeout", "2", "--in-flight", "4", "--endpoint")
    whole = written(*words, serving(), model="model", storage="whole")
    data = written(*words, serving("500", "429", "hang", "503", "429"), model="model")

    assert seen()["requests"] == 96 + 5
    assert contents(data) == contents(whole)


def test_no_more_requests_are_in_flight_than_allowed(written, serving, seen):
    written(*OFTEN, "--endpoint", serving(), "--in-flight", "3", model="model")

    assert seen()["most"] == 3
    assert seen()["requests"] == 96


def test_a_server_that_stays_broken_ends_the_command_and_the_next_one_continues(
    sample, written, serving, tmp_path
):
    words = (*OFTEN, "--in-flight", "1", "--retries", "1", "--endpoint")
    url = serving(*["ok"] * 40, *["500"] * 2)
    code, _, err = sample(*words, url, model="model")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        elsewhere = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    gone, _, silence = sample(*words, elsewhere, model="model")
    again, _, more = sample(*words, serving(), model="model")

    assert (code, gone, again) == (1, 1, 0)
    assert f"error: `{url}` still answers 500 Internal Server Error: fault 500 after 1 retries\n" in err
    assert "hint: the same command continues where it stopped\n" in err
    assert re.search(rf"error: `{elsewhere}` does not answer: .*Connection refused", silence)
    assert "continues: texts of 6 of 16 problems are there" in more
    (data,) = tmp_path.glob("new/datasets_v2/mine/*/")
    assert contents(data) == contents(written(*words, url, model="model", storage="whole"))


def test_a_model_that_the_server_does_not_have_is_a_wrong_input(server, sample):
    code, _, err = sample(*OFTEN, "--endpoint", server, model="other")

    assert code == 2
    assert f"error: `{server}` refuses the request: 404 Not Found: The model `other` does not exist.\n" in err


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret-key")


@pytest.mark.usefixtures("key")
def test_the_key_of_a_server_is_sent_and_never_shown(written, sample, serving, seen, tmp_path):
    data = written(*OFTEN, "--endpoint", serving(), model="model")
    keys = seen()["keys"]
    code, out, err = sample(*OFTEN, "--endpoint", serving("401"), model="model", storage="refused")

    assert (code, keys) == (2, ["Bearer very-secret-key"])
    assert "401 Unauthorized: fault 401, key Bearer ***\nhint: set its key: OPENAI_API_KEY\n" in err
    assert all(b"secret" not in content for content in contents(data).values())
    assert "secret" not in out + err
    assert "secret" not in "".join(file.read_text() for file in tmp_path.rglob("sampling/*.jsonl"))


def test_an_answer_without_log_probabilities_is_refused(sample, serving):
    url = serving("bare")
    code, _, err = sample(*OFTEN, "--endpoint", url, model="model")

    assert code == 2
    assert f"error: `{url}` answers without log-probabilities of the tokens: KeyError('logprobs')\n" in err
