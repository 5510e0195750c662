"""`main.py app`: a page in the browser to try a checkpoint on images."""

import os
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from configs.detection import WEIGHTS_OR_EXPORTED, DetectionOptions
from configs.load import Given
from configs.options import Checked, option
from configs.tiles import TileOptions
from engine.app import Trial, build_page, serve
from engine.detector import Detector
from util.console import console
from util.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AppOptions(Checked):
    """What `app` needs; everything else is in the checkpoint."""

    checkpoint: str = option("", WEIGHTS_OR_EXPORTED)
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every one of this machine")
    port: int | None = option(
        None, "port to listen on (default: the first free one from 7860)", low=1, high=65535
    )
    score_threshold: float | None = option(
        None,
        "first minimum score (default: per-class thresholds from the checkpoint, else 0.3)",
        low=0,
        high=1,
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")


SECTIONS = {"app": AppOptions, "detection": DetectionOptions, "tiles": TileOptions}
DEFAULTS = {"detection": "the checkpoint's", "tiles": "as in the checkpoint's training"}


def main(options: AppOptions, detection: DetectionOptions, given: Given) -> int:
    """Serve the page until Ctrl-C."""
    with TemporaryDirectory(prefix="deformable_detr_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what is dropped on the page goes with it
        try:
            import gradio  # noqa: F401 - before the checkpoint, which takes its time
        except ImportError as error:
            raise ConfigError(
                f"app: the page needs gradio, which cannot be imported ({error}). Install it: "
                "pip install gradio"
            ) from None
        return _serve(options, detection, given)


def _serve(options: AppOptions, detection: DetectionOptions, given: Given) -> int:
    detector = Detector.load(options.checkpoint, device=options.device, **asdict(detection))
    detector.take(given)
    title = f"What {Path(options.checkpoint).name} finds"
    page = build_page(Trial(detector), title=title, threshold=options.score_threshold)
    try:
        address = serve(page, host=options.host, port=options.port)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"app: cannot listen on {options.host}, port {options.port or '7860 or later'} "
            f"({' '.join(str(error).split())[:150]}). Choose another `port` or `host`."
        ) from error
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignored
        signal.signal(number, signal.default_int_handler)
    console(f"open {address} in a browser; Ctrl-C ends it")
    with suppress(KeyboardInterrupt):
        Event().wait()
    page.close(verbose=False)
    return 0
