"""What a docstring says that its file does not know, and what of that the file's source can show.

`claims_of` reads the sentences "Knows nothing of A, B or C", "Does not know A", "Knows no A" and
"Knows neither A nor B". `VOCABULARY` says what breaks such a claim: imports, calls, names.
`UNCHECKED` has the words that no import shows. Both lists together hold every word that is used.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

CLAIM = re.compile(
    r"\bnothing\s+(?:of|about)\s+(?P<of>[^.;:(]+)"
    r"|\bdoes\s+not\s+know\s+(?P<not>[^.;:(]+)"
    r"|\bknows?\s+no\s+(?P<no>[^.;:(]+)"
    r"|\b(?:knows?|needs?)\s+neither\s+(?P<neither>[^.;:(]+)",
    flags=re.IGNORECASE,
)
SEPARATOR = re.compile(
    r",\s*(?:(?:or|nor|and)\s+)?(?:nothing\s+|no\s+)?(?:of\s+|about\s+)?"
    r"|\s+(?:or|nor|and)\s+(?:nothing\s+|no\s+)?(?:of\s+|about\s+)?"
)
NEW_CLAUSE = re.compile(r"\s*(?:so|for the|for a|which|imports?|reads?|it|that is)\b")
EXCEPTION = re.compile(r"\b(?:other than|but|except|beyond|only|until|unless)\b")
"""A claim with an exception cannot be held against imports: "files other than the model's"."""
QUESTION = re.compile(r"(?:how|what|who|whom|whose|where|which|when|why|whether)\b")
"""What no import shows either: "how a sample is made"."""


def claims_of(docstring: str) -> list[str]:
    """The things that a docstring says its file does not know, one phrase each.

    >>> claims_of("Packs rows. Knows nothing of Ray, HTTP or the flow: rows come packed.")
    ['ray', 'http', 'flow']
    >>> claims_of("Knows torch; nothing of Ray, how rows are read or files other than its own.")
    ['ray']
    """
    text = re.sub(r"\([^()]*\)", "", docstring.replace("`", ""))
    text = re.sub(r"\b(\w+)\.(?=\w)", r"\1/", text)  # media.errors: that dot ends no sentence
    phrases: list[str] = []
    for match in CLAIM.finditer(re.sub(r"\s+", " ", text)):
        things = next(group for group in match.groups() if group)
        for thing in SEPARATOR.split(things):
            if NEW_CLAUSE.match(thing):
                break
            words = re.sub(r"^(?:the|a|an|any|no|its|their)\s+", "", thing.strip().lower())
            if words and not EXCEPTION.search(words) and not QUESTION.match(words):
                phrases.append(words)
    return phrases


@dataclass(frozen=True)
class Sign:
    """What shows that a file knows a thing.

    Attributes:
        imports: modules, with all that is below them.
        calls: names of functions and methods that are called.
        names: attributes that are read, whatever they are of: `environ`.
    """

    imports: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def _imports(*modules: str) -> Sign:
    return Sign(imports=modules)


_FILES = Sign(
    imports=("shutil", "tempfile", "flowreel.files", "pyarrow.fs", "flow.model_folder"),
    calls=(
        "open", "read_text", "write_text", "read_bytes", "write_bytes", "unlink", "mkdir",
        "iterdir", "glob", "rglob", "is_file", "is_dir", "exists", "rename", "touch", "safe_open",
        "load_file",
    ),
)  # fmt: skip
_HTTP = (
    "httpx",
    "fastapi",
    "starlette",
    "aiohttp",
    "urllib.request",
    "http",
    "requests",
    "uvicorn",
)
_FLOW = ("flow.flow", "flow.block", "flow.denoiser", "flow.sampling", "flow.likelihood")
_NETWORKS = (*_FLOW, "flow.model_folder", "flow.text", "diffusers", "transformers")
_DECODING = ("av", "decord", "media.read", "media.read_child", "data_prep.clips.decode")

VOCABULARY: dict[str, Sign] = {
    # Libraries.
    "ray": _imports("ray"),
    "torch": _imports("torch"),
    "mlflow": _imports("mlflow", "training.record.tracking"),
    "diffusers": _imports("diffusers"),
    "transformers": _imports("transformers"),
    "pydantic": _imports("pydantic"),
    "vllm": _imports("vllm", "ray.data.llm"),
    "parquet": _imports("pyarrow.parquet"),
    "scenes": _imports("data_prep.world.scene", "data_prep.world.draw"),
    # What the machine gives.
    "http": _imports(*_HTTP),
    "http routes": _imports("fastapi", "starlette", "uvicorn", "serving.api"),
    "endpoints": _imports(*_HTTP),
    "file": _FILES,
    "files": _FILES,
    "object stores": _imports("pyarrow.fs", "data_prep.storage.store"),
    "environment": Sign(names=("environ",), calls=("getenv",)),
    "time": _imports("time", "datetime"),
    "logs": _imports("logging", "mlflow", "training.record.tracking", "training.record.history"),
    "processes": _imports("subprocess", "multiprocessing", "torch.distributed"),
    "workers": _imports("torch.distributed", "training.parallel", "ray"),
    "devices": Sign(imports=("torch.cuda",), names=("cuda", "device")),
    "tensors": _imports("torch", "safetensors"),
    # The flow.
    "flow": _imports(*_FLOW),
    "flows": _imports(*_FLOW),
    "deep block": _imports("flow.sampling", "flow.sliding", "flow.stream_batch"),
    "flow's blocks": _imports("flow.block"),
    "networks": _imports(*_NETWORKS, "torch.nn"),
    "released checkpoints": _imports("flow.released_checkpoint"),
    "model": _imports(*_NETWORKS),
    "models": _imports(*_NETWORKS),
    "weights": _imports(*_NETWORKS),
    "attention": _imports("flow.attention"),
    "caches": _imports("flow.attention"),
    "key-value caches": _imports("flow.attention"),
    "guidance": _imports("flow.guidance"),
    "solvers": _imports("flow.inverse", "flow.sliding"),
    "score": _imports("flow.score"),
    "streams": _imports("flow.stream_batch", "flow.sampling"),
    "codec": _imports("flow.codec", "diffusers"),
    "codecs": _imports("flow.codec", "diffusers"),
    "prompts": _imports("flow.prompt", "flow.text"),
    "text": _imports("flow.text", "flow.prompt"),
    "texts": _imports("flow.text", "flow.prompt"),
    "text encoders": _imports("flow.text", "transformers"),
    "orders": _imports("flow.tokens", "flow.flow"),
    "grids": _imports("flow.tokens"),
    # Data preparation.
    "data preparation": _imports("data_prep"),
    "decoders": _imports(*_DECODING),
    "decoding": _imports(*_DECODING),
    "containers": _imports("av", "decord"),
    "captioners": _imports("data_prep.captions"),
    "captions": _imports("data_prep.captions", "data_prep.world.captions"),
    "pixels": _imports("media", "data_prep.world.render", "data_prep.world.background", "PIL"),
    "back ends": _imports(*(f"data_prep.captions.{name}" for name in ("http", "vlm", "vllm"))),
    "latents": _imports("data_prep.latents", "flow.codec"),
    "latent shards": _imports("data_prep.latents"),
    "shards": _imports("data_prep.sources", "webdataset"),
    "samples": _imports("data_prep.sources.samples"),
    "rows": _imports("data_prep.row"),
    "buckets": _imports("data_prep.config"),
    # Training.
    "training": _imports("training", "torch.optim"),
    "training state": _imports(
        "training.state.checkpoint", "training.optimizer.optim", "training.step"
    ),
    "optimizers": _imports("torch.optim", "training.optimizer.optim"),
    "losses": _imports("training.objective", "training.step"),
    "loop": _imports("training.loop"),
    "steps": _imports("training.step", "training.loop"),
    # Serving and the pipeline.
    "sessions": _imports("serving.session"),
    "queues": _imports("serving.dispatcher", "queue", "asyncio"),
    "replicas": _imports("serving.replica", "serving.on_ray"),
    "requests": _imports("serving.requests", *_HTTP),
    "recipes": _imports("pipeline.recipes", "yaml"),
    "command line": _imports("typer", "argparse", "click", "pipeline.cli"),
    "pages": _imports("jinja2"),
    "tables": _imports("rich"),
}  # fmt: skip

UNCHECKED = {
    "bad", "bars", "batches' origin", "data", "deadlines", "denoising step's scale", "figures",
    "frames", "models' insides", "moments", "our model folders", "particular schema", "pipes",
    "project's own packages", "sampling schedules of the deep block",
    "scale of the denoising step", "schedules of checkpoints",
    "seeds", "setting", "shapes", "speed", "steps' insides", "videos", "cluster", "written",
}  # fmt: skip
"""Words that a docstring may use and that no import, call or name shows."""


def imports_of(tree: ast.Module) -> set[str]:
    """Every module that is imported anywhere in a file; `from a import b` as `a` and as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def sign_of(claim: str) -> Sign | None:
    """What would break a claim; None where nothing would show it. A module stands for itself."""
    if "/" in claim:
        return Sign(imports=(claim.replace("/", "."),))
    return VOCABULARY.get(claim)


def signs_in(tree: ast.Module, sign: Sign) -> Iterator[str]:
    """What a file has of a sign, in words, with its lines where it is a call or a name."""
    for name in sorted(imports_of(tree)):
        if any(name == module or name.startswith(f"{module}.") for module in sign.imports):
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in sign.calls:
                yield f"calls {called} in line {node.lineno}"
        elif isinstance(node, ast.Attribute) and node.attr in sign.names:
            yield f"reads {node.attr} in line {node.lineno}"
