"""PostgreSQL, SeaweedFS, an MLflow server and nginx with Basic Auth on loopback, to start, break and stop.

All files are in one temporary folder. The servers listen only on free ports of 127.0.0.1 and on sockets in
this folder. Every server is stopped by stopping the process group in which it was started.
"""

import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from attrs import define, field

BUCKET = "wmtp"
FOREIGN = ("MLFLOW_", "AWS_")  # variables of the developer's shell that tests must not see
DEBIAN = ("nginx", "apache2-utils", "postgresql")
_BINARIES = ("nginx", "htpasswd", "initdb")

NGINX = Path(__file__).parents[2] / "docs" / "tracking" / "nginx.conf"


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in _BINARIES if _binary(name) is None] + ([] if _weed() else ["weed"])


def install(*packages: str) -> None:
    """Install missing Debian packages if possible; by default those of the stack."""
    lacking = [name for name in packages if shutil.which(name) is None] if packages else missing()
    if not lacking or shutil.which("apt-get") is None:
        return
    root = [] if os.getuid() == 0 else ["sudo", "-n"]
    settings = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *(packages or DEBIAN)]):
        subprocess.run([*root, "apt-get", "-qq", *command], env=settings, check=False)


def free_port() -> int:
    """Return a free port outside the range from which the kernel gives ports to other programs."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.randrange(15_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


@define
class Server:
    """One server: a command, run in a process group of its own."""

    name: str
    command: list[str]
    ready: Callable[[], bool]
    log: Path
    environment: dict[str, str] = field(factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def launch(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **self.environment},
                start_new_session=True,
            )

    def wait(self, *, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not self.ready():
            if self.process is None or self.process.poll() is not None or time.monotonic() > end:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                pytest.fail(f"{self.name} did not start:\n{tail}")
            time.sleep(0.1)

    def start(self) -> None:
        self.launch()
        self.wait()

    def send(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.send(number)
        self.send(signal.SIGCONT)
        if self.process is not None:
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                self.process.wait()

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


class Stack:
    """The whole stack; each server can be stopped and started separately."""

    def __init__(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="wmtp-stack-"))
        self.state.chmod(0o755)
        (self.state / "log").mkdir()
        self.user, self.password, self.access_key, self.secret_key, self.database_password = (
            secrets.token_hex(18) for _ in range(5)
        )
        self.ports = {name: free_port() for name in ("nginx", "postgres", "s3", "master", "volume", "filer")}
        self.root = os.getuid() == 0
        self.socket = self.state / "run" / "mlflow.sock"
        self.postgres = self._postgres()
        self.s3 = self._s3()
        self.mlflow = self._mlflow()
        self.nginx = self._nginx()

    # ------------------------------------------------------------------- what a client needs

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.ports['nginx']}"

    @property
    def database_uri(self) -> str:
        """URI of the database, for a client without the server; the password is in PGPASSWORD."""
        return f"postgresql+psycopg2://mlflow@127.0.0.1:{self.ports['postgres']}/mlflow"

    @property
    def s3_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.user,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            **self.s3_environment,
        }

    @property
    def s3_environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.s3_endpoint,
            # boto3 must not read ~/.aws or the address of the instance metadata
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def configure(self, patch: pytest.MonkeyPatch) -> None:
        """Configure this process for the stack, like the shell of a user."""
        for name in list(os.environ):
            if name.startswith(FOREIGN):
                patch.delenv(name)
        for name, value in self.environment.items():
            patch.setenv(name, value)

    def s3_client(self, **config: object):
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(**config),
        )

    # ------------------------------------------------------------------- up, down, faults

    def up(self) -> None:
        self.postgres.launch()
        self.s3.launch()
        self.postgres.wait()
        self._create_database()
        self.mlflow.launch()
        self.s3.wait()
        self.mlflow.wait()
        self.nginx.start()

    def down(self) -> None:
        for server in (self.nginx, self.mlflow):
            server.stop()
        self.s3.kill()  # a graceful stop takes 16 s
        self.postgres.stop(signal.SIGINT)
        shutil.rmtree(self.state, ignore_errors=True)

    def repair(self) -> None:
        """Start the servers that a test stopped, and restore the configuration of nginx."""
        self.mlflow.send(signal.SIGCONT)
        for server in (self.postgres, self.s3, self.mlflow, self.nginx):
            if server.process is None or server.process.poll() is not None:
                server.start()
        self.configure_nginx()
        self.nginx.wait()

    def configure_nginx(self, *, body: str = "0", extra: str = "") -> None:
        """Set the body limit and an extra directive such as `return 503;`; reload nginx if they change."""
        user = "user www-data;" if self.root else ""
        text = NGINX.read_text()
        values = {"STATE": self.state, "SOCKET": self.socket, "PORT": self.ports["nginx"], "USER": user}
        for name, value in {**values, "BODY": body, "EXTRA": extra}.items():
            text = text.replace(f"@{name}@", str(value))
        if (self.state / "nginx.conf").exists() and text == (self.state / "nginx.conf").read_text():
            return
        (self.state / "nginx.conf").write_text(text)
        if self.nginx.process is not None:
            os.kill(self.nginx.process.pid, signal.SIGHUP)
            time.sleep(0.5)

    # ------------------------------------------------------------------- the servers

    def _as(self, user: str, command: list[str]) -> list[str]:
        """Return the command, run as `user` if this process is root: PostgreSQL refuses to run as root."""
        return (
            ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
            if self.root
            else command
        )

    def _postgres(self) -> Server:
        data, sockets = self.state / "pg", self.state / "pgsock"
        for folder, mode in ((data, 0o700), (sockets, 0o755)):
            folder.mkdir(mode=mode)
            if self.root:
                account = pwd.getpwnam("postgres")
                os.chown(folder, account.pw_uid, account.pw_gid)
        password = sockets / "password"
        password.write_text(self.database_password)
        if self.root:
            os.chown(password, account.pw_uid, account.pw_gid)
        password.chmod(0o600)
        initdb = [
            _binary("initdb"),
            "-D",
            data,
            "-U",
            "mlflow",
            "--auth=scram-sha-256",
            f"--pwfile={password}",
        ]
        subprocess.run(
            self._as(
                "postgres", [str(part) for part in [*initdb, "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]]
            ),
            stdout=subprocess.DEVNULL,
            check=True,
            cwd="/",
        )
        port = self.ports["postgres"]
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(
                f"port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{sockets}'\n"
            )
        binary = str(Path(_binary("initdb")).resolve().parent / "postgres")
        return Server(
            "PostgreSQL",
            self._as("postgres", [binary, "-D", str(data)]),
            lambda: (sockets / f".s.PGSQL.{port}").exists() and self._psql("select 1"),
            self.state / "log" / "postgres.log",
        )

    def _psql(self, statement: str) -> bool:
        import psycopg2

        try:
            connection = psycopg2.connect(
                host="127.0.0.1",
                port=self.ports["postgres"],
                user="mlflow",
                password=self.database_password,
                dbname="postgres",
            )
        except psycopg2.OperationalError:
            return False
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
        connection.close()
        return True

    def _create_database(self) -> None:
        assert self._psql("create database mlflow")

    def dump_database(self, file: Path) -> None:
        self._pg("pg_dump", "-Fc", "-f", str(file), "mlflow")

    def restore_database(self, file: Path) -> None:
        """Replace the database of the running server with a dump."""
        assert self._psql("drop database mlflow with (force)")
        self._create_database()
        self._pg("pg_restore", "-d", "mlflow", str(file))

    def _pg(self, program: str, *arguments: str) -> None:
        where = ["-h", "127.0.0.1", "-p", str(self.ports["postgres"]), "-U", "mlflow"]
        environment = {"PATH": os.environ["PATH"], "PGPASSWORD": self.database_password}
        subprocess.run([str(_binary(program)), *where, *arguments], env=environment, check=True)

    def _s3(self) -> Server:
        folder = self.state / "weed"
        folder.mkdir()
        actions = '["Admin", "Read", "List", "Tagging", "Write"]'
        (folder / "s3.json").write_text(
            f'{{"identities": [{{"name": "wmtp", "actions": {actions}, "credentials": '
            f'[{{"accessKey": "{self.access_key}", "secretKey": "{self.secret_key}"}}]}}]}}'
        )
        ports = self.ports
        command = [
            *(str(_weed()), "-logtostderr=true", "server", f"-dir={folder}"),
            # the defaults are the machine's external address, and telemetry
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"),
            # how long the only master waits for others, at the start and after each kill
            *(f"-master.port={ports['master']}", "-master.electionTimeout=1s"),
            "-master.volumeSizeLimitMB=512",
            *(f"-master.port.grpc={free_port()}", f"-volume.port.grpc={free_port()}"),
            *(f"-volume.port={ports['volume']}", "-volume.max=20", "-volume.preStopSeconds=0"),
            *(f"-filer.port={ports['filer']}", f"-filer.port.grpc={free_port()}"),
            *(f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock"),
            *(
                "-s3",
                f"-s3.port={ports['s3']}",
                f"-s3.port.grpc={free_port()}",
                f"-s3.config={folder}/s3.json",
            ),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        return Server(
            "SeaweedFS",
            command,
            self._s3_works,
            self.state / "log" / "weed.log",
        )

    def _s3_works(self) -> bool:
        """Write and read an object: `/healthz` returns OK before the volumes are available."""
        import botocore.exceptions

        if not _answers(f"{self.s3_endpoint}/healthz"):
            return False
        client = self.s3_client(retries={"total_max_attempts": 1})
        try:
            client.create_bucket(Bucket=BUCKET)
        except client.exceptions.BucketAlreadyOwnedByYou:
            pass
        except (botocore.exceptions.ClientError, botocore.exceptions.HTTPClientError):
            return False
        try:
            client.put_object(Bucket=BUCKET, Key="probe", Body=b"1")
            return client.get_object(Bucket=BUCKET, Key="probe")["Body"].read() == b"1"
        except (botocore.exceptions.ClientError, botocore.exceptions.HTTPClientError):
            return False

    def _mlflow(self) -> Server:
        self.socket.parent.mkdir(mode=0o750)  # everybody can write to the socket, so its folder is protected
        if self.root:
            os.chown(self.socket.parent, 0, pwd.getpwnam("www-data").pw_gid)
        # every user of the machine can read command lines, so no password there
        pgpass = self.state / "pgpass"
        pgpass.write_text(f"127.0.0.1:{self.ports['postgres']}:mlflow:mlflow:{self.database_password}\n")
        pgpass.chmod(0o600)
        host = f"127.0.0.1:{self.ports['nginx']}"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--backend-store-uri", self.database_uri),
            *("--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/mlflow-artifacts"),
            *("--allowed-hosts", f"{host},127.0.0.1"),
            *("--uvicorn-opts", f"--uds {self.socket} --timeout-keep-alive 75"),
        ]
        environment = {
            "PGPASSFILE": str(pgpass),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_MODEL_CATALOG_URI": "",
            **self.s3_environment,
        }
        return Server("MLflow", command, self._mlflow_answers, self.state / "log" / "mlflow.log", environment)

    def _mlflow_answers(self) -> bool:
        """Send a query: `/health` returns OK without the database."""
        query = "/api/2.0/mlflow/experiments/search?max_results=1"
        request = f"GET {query} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(str(self.socket))
                connection.sendall(request.encode())
                return connection.recv(15).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def _nginx(self) -> Server:
        hashed = subprocess.run(
            ["htpasswd", "-nbB", "-C", "5", self.user, self.password],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        (self.state / "htpasswd").write_text(hashed)
        nginx = Server(
            "nginx",
            [str(_binary("nginx")), "-p", str(self.state), "-c", str(self.state / "nginx.conf")],
            lambda: _answers(f"{self.uri}/health", f"{self.user}:{self.password}"),
            self.state / "log" / "nginx.log",
        )
        self.nginx = nginx
        self.configure_nginx()
        return nginx


def _binary(name: str) -> str | None:
    places = [os.environ["PATH"], "/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
    return shutil.which(name, path=os.pathsep.join(places))


def _weed() -> Path | None:
    path = Path(sys.executable).parent / "weed"
    return path if path.exists() else None


def _answers(url: str, login: str = "") -> bool:
    headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"} if login else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
