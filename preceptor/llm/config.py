"""Where a model answers: an address, a command that we start, or a name of which presets.yaml knows the rest."""

import os
import re
import shlex
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from preceptor.core.money import Price

SHORTEST_KEY = 8
"""Characters; a shorter one is a mere filler."""
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_OF_A_MODEL = ("price", "distillation", "logprobs")
"""What a preset may say of one model alone."""


class EndpointConfig(BaseModel):
    """Where a model answers. A recipe may write a plain URL, or a preset's name, such as `textbook` or `deepseek`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = ""
    """Of which presets.yaml knows the fields that are not given here."""
    url: str | None = None
    """Base of the API, such as http://host:8000/v1."""
    start: str | None = None
    """Command that serves the API on {port}; {model} and {python} are filled in too."""
    key_env: tuple[str, ...] = ()
    """Environment variable that holds the key; of several, each key takes its share of the work."""
    name: str = ""
    """Stands for the endpoint in the ledger; by default the preset's name, the URL's host, or the command's name."""
    model: str = ""
    """What the teacher's model is called here, where that differs."""
    answers_as: tuple[str, ...] = ()
    """What else the endpoint may say that the model is called."""
    inside: tuple[str, ...] = ()
    """Hosts, addresses or networks (10.0.0.0/8) that may see the text."""
    privacy: Literal["private", "public"] = "private"
    """`public` attests that the text may go anywhere."""
    json_mode: Literal["none", "object", "schema"] = "none"
    """What holds replies to JSON: nothing, `response_format: json_object`, or a JSON schema."""
    logprobs: int | None = Field(default=None, ge=0)
    """Most alternatives a token that the endpoint gives; 0 for no log-probabilities at all."""
    thinking: bool | None = None
    """Switches the model's thinking, where the preset knows how; elsewhere name the fields in `extra`."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Fields to add to each request's body, such as chat_template_kwargs; null takes one away."""
    price: Price | None = None
    distillation: bool | None = None
    """Whether the terms let replies train another model."""
    rpm: float | None = Field(default=None, gt=0)
    """Most requests a minute, for each key."""
    tpm: float | None = Field(default=None, gt=0)
    """Most tokens a minute, for each key."""
    timeout: float = Field(default=300, gt=0)
    """Seconds for one reply, from the first byte sent to the last received."""
    connect_timeout: float = Field(default=10, gt=0)
    read_timeout: float | None = Field(default=None, gt=0)
    """Longest silence of the server, in seconds; by default as `timeout`."""
    start_timeout: float = Field(default=900, gt=0)
    """Seconds that `start` may take to load the model."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"url": value} if "://" in value else {"preset": value}
        if not isinstance(value, dict) or not value.get("preset"):
            return value
        known = presets()
        if value["preset"] not in known:
            raise ValueError(f"no endpoint {value['preset']!r}; there are {', '.join(known)}; or write http://host/v1")
        given = {"name": value["preset"], **known[value["preset"]]}
        given.pop("models", None)
        switch = given.pop("thinking", None)
        if "url" in value or "start" in value:
            given = {k: v for k, v in given.items() if k not in ("url", "start")}
        if value.get("thinking") is not None and switch:
            given["extra"] = switch[value["thinking"] is True]
        extra = {**given.get("extra", {}), **(value.get("extra") or {})}
        return {**given, **value, "extra": extra}

    @field_validator("key_env", "answers_as", "inside", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value or ()

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.url is None) == (self.start is None):
            raise ValueError("an endpoint needs either `url` or `start`")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError(f"url {self.url!r}: write it as http://host:port/v1")
            if parts.username or parts.password or parts.query:
                raise ValueError("url: leave the key out, and name its environment variable in `key_env`")
        words = shlex.split(self.start or "")
        if self.url is None and not words:
            raise ValueError("start: it is empty; write the command that serves the API")
        if self.thinking is not None and not self.extra:
            raise ValueError("thinking: how it is switched here is not known; name the body's fields in `extra`")
        self._hold_no_key()
        if not self.name:
            default = urlsplit(self.url).hostname if self.url else words[0]
            object.__setattr__(self, "name", Path(str(default)).name.strip("{}"))
        return self

    def _hold_no_key(self) -> None:
        if not all(map(_VARIABLE.fullmatch, self.key_env)) or len(set(self.key_env)) < len(self.key_env):
            raise ValueError("key_env: write the name of the environment variable, not the key, and each once")
        for variable in self.key_env:
            key = os.environ.get(variable, "").strip()
            if len(key) >= SHORTEST_KEY and key in f"{self.start} {self.url} {self.extra}":
                raise ValueError(f"leave the key out: `key_env: {variable}` sends it, and a run writes down the rest")

    def of(self, model: str) -> "EndpointConfig":
        """The endpoint with what its preset knows of a model, where nothing else was said."""
        models = presets().get(self.preset, {}).get("models", {})
        known = models.get(self.model or model, {})
        update = {name: known[name] for name in _OF_A_MODEL if name in known and name not in self.model_fields_set}
        return EndpointConfig.model_validate({**self.model_dump(exclude_unset=True), **update}) if update else self


@cache
def presets() -> Mapping[str, Any]:
    """What is known of endpoints, by name."""
    loaded: Mapping[str, Any] = yaml.safe_load(files("preceptor.llm").joinpath("presets.yaml").read_text("utf-8"))
    return loaded
