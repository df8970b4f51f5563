"""A refusal of an S3 store becomes fitting advice; the store in these tests answers like one that refuses."""

import hashlib
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from weighted_mtp_core.builtin._mlflow_errors import diagnose
from weighted_mtp_core.cli import main
from weighted_mtp_core.storage.s3 import S3Location

BUCKET = "/team"


class Store(BaseHTTPRequestHandler):
    """Keeps objects in memory; `server.mode` says what it objects to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        skew = 7200 if self.server.mode == "skew" else 0
        return formatdate(time.time() - skew, usegmt=True)

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, name, message):
        self.answer(code, f"<Error><Code>{name}</Code><Message>{message}</Message></Error>".encode())

    def do_HEAD(self):
        is_bucket = self.path == BUCKET
        match self.server.mode:
            case "region":
                self.answer(301, x_amz_bucket_region="eu-central-1")
            case "skew" | "keys":
                self.answer(403)
            case "objects" if not is_bucket:
                self.answer(403)
            case _ if is_bucket:
                self.answer(200)
            case _ if (kept := self.server.objects.get(self.path)) is not None:
                digest = hashlib.md5(kept, usedforsecurity=False).hexdigest()
                self.answer(200, ETag=f'"{digest}"', Content_Length=str(len(kept)))
            case _:
                self.answer(404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.mode == "checksum" and any(
            "checksum" in name for name in map(str.lower, self.headers)
        ):
            self.refuse(501, "NotImplemented", "Header 'x-amz-checksum-crc32' is not implemented")
        elif self.server.mode == "full":
            self.refuse(
                507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold"
            )
        else:
            self.server.objects[self.path] = body
            self.answer(200, ETag='"x"')


@pytest.fixture
def store(monkeypatch):
    """A running store, and the environment of a client of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.mode, server.objects = "", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def sync(tmp_path, monkeypatch, capsys):
    """Run `storage sync` on a storage with one model of one file; return exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"w")
    main(["storage", "add-model", "tiny", "1", "weights.bin"])

    def sync(to="s3://team/kept"):
        capsys.readouterr()
        code = main(["storage", "sync", "--to", to])
        return code, *capsys.readouterr()

    return sync


@pytest.mark.parametrize(
    ("mode", "code", "advice"),
    [
        ("region", 2, "is in the region `eu-central-1`\nhint: set AWS_DEFAULT_REGION=eu-central-1"),
        ("skew", 2, "refuses requests that are 120 minutes off\nhint: set the clock of this machine"),
        (
            "keys",
            2,
            "refuses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (403)\nhint: correct them, the bucket's",
        ),
        ("objects", 2, "does not let these keys look at objects (HeadObject)\nhint: allow s3:GetObject"),
        ("checksum", 1, "of this boto3\nhint: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required"),
        ("full", 1, "is full\nhint: free space in the store"),
    ],
)
def test_each_objection_has_its_own_advice(store, sync, mode, code, advice):
    store.mode = mode

    ended, _, errors = sync()

    assert ended == code
    assert advice in errors
    assert errors.count("\n") == 2


def test_the_advice_about_checksums_works(store, sync, monkeypatch):
    store.mode = "checksum"
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")

    assert sync()[0] == 0


@pytest.mark.parametrize("endpoint", ["minio:9000", "//minio:9000", "minio"])
def test_an_endpoint_without_a_scheme_is_named(sync, monkeypatch, endpoint):
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", endpoint)

    code, _, errors = sync()

    assert code == 2
    assert f"MLFLOW_S3_ENDPOINT_URL is `{endpoint}`, which is not a valid URL" in errors
    assert f"for example http://{endpoint.lstrip('/')}" in errors


def test_keys_are_no_urls(store, sync):
    code, shown, _ = sync("s3://team/a#b?c=1 %20/")

    assert code == 0
    assert set(store.objects) == {
        f"{BUCKET}/a%23b%3Fc%3D1%20%2520/models_v2/tiny/1/{name}" for name in ("weights.bin", "manifest.json")
    }
    assert "s3://team/a#b?c=1 %20/: all 2 files of models and data sets are there" in shown
    assert S3Location.parse("s3://b/x?y/#z") == S3Location("b", "x?y/#z/")


def test_sync_names_what_it_does_not_upload(store, sync, tmp_path):
    loose = tmp_path / "storage" / "models_v2" / "other" / "1" / "weights.bin"
    loose.parent.mkdir(parents=True)
    loose.touch()

    _, shown, _ = sync()

    assert "not uploaded: 1 files in `models_v2/other/1`, which no manifest lists" in shown


def test_the_tracker_gives_the_same_advice():
    """MLflow uploads with a client of its own, and wraps what boto3 raises."""
    from boto3.exceptions import S3UploadFailedError

    found = diagnose(
        S3UploadFailedError(
            "An error occurred (XMinioStorageFull) when calling the PutObject operation: full"
        ),
        "https://mlflow.example.org",
        what="the artifact store of ",
    )

    assert found.text == "the artifact store of the tracking server `https://mlflow.example.org` is full"
    assert found.hint.startswith("free space in the store")
