"""The subcommands: where models, data and loops meet."""

# Modules of this package; one is imported only when it is chosen.
COMMANDS = {
    "train": "train on your data, or continue a run",
    "plan": "print the options that fit your data, this machine and your hours",
    "eval": "evaluate a checkpoint, or saved detections, on COCO-format data",
    "compare": "show the curves, results and options of several runs on one page",
    "predict": "draw what a checkpoint finds in images or a video, and write it as JSON",
    "explain": "show where a checkpoint looks for what it finds in an image",
    "app": "serve a page to try a checkpoint on images in a browser",
    "benchmark": "measure what a model costs, and how fast it is here",
    "export": "write a checkpoint for ONNX Runtime or OpenVINO, and prove that file",
    "push": "write a folder with a model and its card, and push it to the Hugging Face hub",
    "average": "write the mean of the weights of several checkpoints of a run",
    "check": "look for flaws in images and annotations",
    "preview": "write training images as the model sees them, with boxes",
    "convert": "write a data set as COCO, VOC or YOLO",
    "doctor": "report hardware and op backends, and test them",
}


def usage() -> str:
    """Return what is shown to a user who names no command."""
    lines = [f"  {name:10}{what}" for name, what in COMMANDS.items()]
    last = "`main.py COMMAND --help` lists a command's options."
    return "\n".join(["usage: main.py COMMAND [options]", "", *lines, "", last])
