"""Labelling by the real command, as a user runs it, against a server that somebody else wrote."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.core.records import Case, Language, Prediction, Reply
from preceptor.llm.ledger import Ledger, Summary

ROOT = Path(__file__).parent.parent.parent

# What the embedded `mini` was taught to answer: it writes down what it is told, with the record's words for it.
DICTATION: dict[Language, str] = {
    "en": """=== system
[act: write]
Write what you are told as JSON. Each reason quotes the record's own words.
Reply with JSON alone.
=== user
<record>
{record}
</record>
Diseases: Peptic ulcer, Heart failure. Findings: fever, cough, weakness.
""",
    "zh": """=== system
[act: write]
把所说的内容写成JSON。每条依据引用病历原文。
只回复JSON。
=== user
<record>
{record}
</record>
疾病：急性膀胱炎，胃食管反流病。发现：发热，咳嗽，乏力。
""",
}


@dataclass(frozen=True)
class Labelled:
    """What a section left behind, and what was shown."""

    code: int
    shown: str
    cases: list[Case]
    predictions: list[Prediction]
    replies: list[Reply]
    """The stored reply of each prediction that has one."""
    summary: Summary


def label(
    folder: Path, model: str, endpoint: Mapping[str, Any], cases: int, language: Language = "en", **settings: Any
) -> Labelled:
    """`cases` cases of the textbook labelled in `folder` by a server that starts and ends with the section."""
    recipe = {
        "language": language,
        "seed": 1,
        "teacher": {"model": model, "endpoint": endpoint},
        "prepare": {"source": "textbook", "style": "short", "train": cases, "validation": 1, "test": 1},
        "label": settings,
    }
    path = folder / "foreign.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # JSON is YAML
    run = folder / "runs" / "foreign"
    beside = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),  # not there, as on a machine that never downloaded a model
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-m", "preceptor", "run", str(path), "--runs", str(folder / "runs")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    shown, log = ended.stdout + ended.stderr, "\n".join(lines(run / "label" / "server.log"))
    served = re.search(r"running on http://[\w.]+:(\d+)", log)
    assert served, shown + log[-2000:]
    assert not listens(int(served[1])), "the server outlived its section"
    predictions = [Prediction.model_validate_json(line) for line in lines(run / "label" / "predictions.jsonl")]
    with Ledger(folder / "runs" / "ledger.sqlite") as ledger:
        found = [ledger.find(prediction.reply) for prediction in predictions if prediction.reply]
        return Labelled(
            ended.returncode,
            shown,
            [Case.model_validate_json(line) for line in lines(run / "prepare" / "train.jsonl")],
            predictions,
            [reply for reply in found if isinstance(reply, Reply)],
            ledger.summary("foreign/label"),
        )


def lines(path: Path) -> list[str]:
    """Of a file that may be missing."""
    return path.read_text("utf-8", "replace").split("\n")[:-1] if path.exists() else []


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
