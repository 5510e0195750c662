"""An exported file in the runtime that it was written for."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.exported.about import KEY
from engine.exported.packages import needed
from util.errors import CheckpointError, ConfigError

# Arrays of a batch -> arrays of its detections.
Run = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Session:
    """A file that can be run; `text` is its metadata, if it carries ours."""

    runtime: str
    text: str | None
    run: Run


def open_session(path: Path) -> Session:
    """Open an exported file; its suffix says which runtime runs it, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or no exported file.
        ConfigError: the runtime is not installed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Check the path.")
    try:
        return _OPENERS[path.suffix](path)
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # each runtime has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: cannot be opened ({type(error).__name__}: {reason}). Export the checkpoint "
            "again."
        ) from error


def _open_onnx(path: Path) -> Session:
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(arrays: Sequence[Tensor]) -> list[Tensor]:
        given = {name: a.numpy() for name, a in zip(names, arrays, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    return Session(f"onnxruntime {runtime.__version__}", text, run)


def _open_openvino(path: Path) -> Session:
    if not path.with_suffix(".bin").is_file():
        raise CheckpointError(
            f"{path}: the weights, {path.with_suffix('.bin').name}, are not beside it. Keep both "
            "files in one folder."
        )
    runtime = needed("openvino")
    core = runtime.Core()
    model = core.read_model(str(path))
    text = str(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else None
    settings = {
        # half precision, its choice on some processors, would round scores to 3 digits
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(model, "CPU", settings)

    def run(arrays: Sequence[Tensor]) -> list[Tensor]:
        found = compiled([a.numpy() for a in arrays])
        # the results are the runtime's memory, which the next call writes over
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return Session(f"openvino {runtime.__version__.split('-')[0]}", text, run)


def _open_torch_export(path: Path) -> Session:
    from engine.exported import same_conv  # noqa: F401 - an operator that a graph may have

    if not zipfile.is_zipfile(path):  # PyTorch would print its traceback before it raises
        raise CheckpointError(
            f"{path}: is damaged or no exported file. Export the checkpoint again."
        )
    carried = {KEY: ""}
    program = torch.export.load(str(path), extra_files=carried)
    module = program.module()

    def run(arrays: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*arrays))

    text = carried[KEY]
    if isinstance(text, bytes):
        text = text.decode()
    return Session(f"torch.export of PyTorch {torch.__version__}", text or None, run)


_OPENERS: dict[str, Callable[[Path], Session]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
    ".pt2": _open_torch_export,
}
