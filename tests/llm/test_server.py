"""Servers that we start: up before use, gone after, whatever happens to us."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from preceptor.core.errors import UserError, WorkError
from preceptor.llm.config import EndpointConfig
from preceptor.llm.server import started

# A model server with a worker process, which is slow to answer and deaf to polite requests to end.
SERVER = """
import http.server, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN) if "deaf" in sys.argv else None
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("pids", os.getpid(), worker.pid, sys.argv[2], flush=True)
time.sleep(0.3)
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Models).serve_forever()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "serve it.py"
    path.write_text(SERVER)
    return path


def pids(log: Path) -> list[int]:
    line = next(line for line in log.read_text().split("\n") if line.startswith("pids"))
    return [int(word) for word in line.split()[1:3]]


def gone(pid: int) -> bool:
    """Ended: no process, or one whose parent has not yet looked."""
    for _ in range(80):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_up_within_and_gone_after(script: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"
    config = EndpointConfig(start=f"{{python}} '{script}' {{port}} {{model}}")
    with started(config, "some/model", log) as url:
        assert httpx2.get(f"{url}/models").status_code == 200
        assert "some/model" in log.read_text()
        both = pids(log)
        assert all(Path(f"/proc/{pid}").exists() for pid in both)
    assert all(gone(pid) for pid in both)


def test_gone_when_we_are_killed(script: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    code = (
        "import sys, os; from pathlib import Path\n"
        "from preceptor.llm.server import *\n"
        f"with started(EndpointConfig(start=\"{{python}} '{script}' {{port}} m\"), 'm', Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(log)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert all(gone(pid) for pid in pids(log))


def test_a_server_that_dies_is_quoted(tmp_path: Path) -> None:
    config = EndpointConfig(start="{python} -c 'import sys; sys.exit(\"no such model {model}\")'")
    with (
        pytest.raises(WorkError, match="no such model big") as caught,
        started(config, "big", tmp_path / "log"),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_server_that_never_answers(tmp_path: Path) -> None:
    config = EndpointConfig(start="{python} -c 'import time; time.sleep(60)'", start_timeout=0.3)
    with pytest.raises(WorkError, match=r"0\.3 s"), started(config, "m", tmp_path / "log"):
        pass


def test_no_such_command(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no command 'vlllm'"),
        started(EndpointConfig(start="vlllm serve"), "m", tmp_path / "log"),
    ):
        pass


def test_a_url_needs_no_start(tmp_path: Path) -> None:
    with started(EndpointConfig(url="http://host/v1"), "m", tmp_path / "log") as url:
        assert url == "http://host/v1"
    assert not list(tmp_path.iterdir())
