"""Pushing: to a real server on this machine that is as much of a hub as an upload needs."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.model import tiny


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as an upload needs; it takes only the key `may-write`."""

    def _answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        self.server.files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer may-write":
            return self._answer({"error": "Invalid credentials"}, 401)
        here = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self._answer({"url": f"{here}/owner/name"})
        if self.path.endswith("/preupload/main"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in asked}
            return self._answer(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        if self.path.endswith("/objects/batch"):
            sent = json.loads(body)["objects"]
            hrefs = [{**one, "actions": {"upload": {"href": f"{here}/put/{one['oid']}"}}} for one in sent]
            return self._answer({"transfer": "basic", "objects": hrefs})
        if self.path.endswith("/commit/main"):
            self.server.commits += [json.loads(line) for line in body.splitlines()]
            return self._answer({"commitUrl": f"{here}/owner/name/commit/1", "commitOid": "1"})
        return self._answer({"warnings": [], "errors": []})

    def log_message(self, *words):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files, server.made, server.commits = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import sys
from pathlib import Path
from preceptor.core.errors import UserError, WorkError
from preceptor.model import hub
try:
    hub.check_token()
    print(hub.push(Path(sys.argv[1]), "owner/name"))
except (UserError, WorkError) as error:
    print(error)
"""


def pushed(folder: Path, **environment):
    """What a process of its own says; where the hub is and who asks is read when its library is loaded."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    words = [sys.executable, "-c", PUSH, folder]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=clean | environment)
    return done.stdout.strip()


@pytest.mark.slow
def test_a_model_is_pushed_to_a_private_repository(hub, tmp_path):
    model, here = tmp_path / "model", f"http://127.0.0.1:{hub.server_port}"
    tiny.save(tiny.qwen(), model)
    (model / "README.md").write_text("---\ntags: [clinical]\n---\na card")
    known = {"HF_ENDPOINT": here, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    assert pushed(model, **known) == "push: the hub wants a token that may write: set HF_TOKEN"
    told = pushed(model, **known, HF_TOKEN="reads-only")
    assert told.startswith("push: owner/name: ")
    assert "401" in told
    assert "\n" not in told
    assert "reads-only" not in told
    assert pushed(model, **known, HF_TOKEN="may-write") == f"{here}/owner/name"
    assert hub.made == [{"name": "name", "organization": "owner", "visibility": "private"}]
    assert list(hub.files.values()) == [(model / "model.safetensors").read_bytes()]
    paths = {line["value"]["path"] for line in hub.commits if line["key"] in ("file", "lfsFile")}
    assert paths == {file.name for file in model.iterdir()}
    hub.shutdown()
    hub.server_close()
    assert "run it again" in pushed(model, **known, HF_TOKEN="may-write")
