"""The connection itself: over TLS too, and closed by the server between two requests."""

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from preceptor.llm import endpoint as endpoints
from preceptor.llm.completer import ProviderError
from preceptor.llm.config import EndpointConfig
from preceptor.llm.endpoint import Endpoint
from preceptor.llm.zone import zone
from tests.llm.conftest import ask
from tests.llm.server import ANSWER, Hostile


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


class Secure(Hostile):
    """Speaks TLS."""

    def __init__(self, cert: Path, key: Path) -> None:
        super().__init__()
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(cert, key)


def ask_twice(server: Hostile, trusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(endpoints.httpx2, "create_ssl_context", lambda: trusted)

    async def main() -> list[str]:
        endpoint = Endpoint(EndpointConfig(url=server.url, timeout=5), "m")
        said = [(await endpoint.complete(ask(f"question {n} do: echo"))).text for n in range(2)]
        await endpoint.close()
        return said

    return asyncio.run(main())


def test_over_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with Secure(*certificate) as server:
        trusted = ssl.create_default_context(cafile=certificate[0])
        said = ask_twice(server, trusted, monkeypatch)
    assert [text.partition(" do")[0] for text in said] == ["question 0", "question 1"]


def test_a_certificate_that_nobody_vouches_for(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with Secure(*certificate) as server:
        with pytest.raises(ProviderError, match="certificate") as caught:
            ask_twice(server, ssl.create_default_context(), monkeypatch)
        assert not caught.value.sent
        assert not server.bodies


def test_a_connection_that_the_server_closed_is_made_anew(hostile: Hostile) -> None:
    async def main() -> None:
        endpoint = Endpoint(EndpointConfig(url=hostile.url, timeout=5), "m")
        for n in range(3):
            assert (await endpoint.complete(ask(f"question {n}"))).text == ANSWER
            hostile.hang_up()
            await asyncio.sleep(0.05)
        await endpoint.close()

    asyncio.run(main())
    assert len(hostile.bodies) == 3


def test_a_long_reply_comes_whole(hostile: Hostile) -> None:
    async def main() -> str:
        endpoint = Endpoint(EndpointConfig(url=hostile.url, timeout=20), "m")
        reply = await endpoint.complete(ask("x" * 6_000_000 + " do: echo"))
        await endpoint.close()
        return reply.text

    assert len(asyncio.run(main())) == 6_000_009


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"url": "http://127.0.0.1:8000/v1"}, ("private", "127.0.0.1")),
        ({"url": "http://ward:8000/v1", "inside": ["ward", "10.0.0.0/8"]}, ("inside: ward, 10.0.0.0/8", "ward")),
        ({"url": "https://api.example.com/v1", "privacy": "public"}, ("public", "api.example.com")),
        ("textbook", ("private", "this machine")),
    ],
)
def test_what_the_user_attests(config: Any, said: tuple[str, str]) -> None:
    assert zone(EndpointConfig.model_validate(config)) == said
