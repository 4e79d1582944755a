"""Each framework, for real: 50 steps, the loss falls, and a resumed run repeats the rest of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.distributed.test_examples import run_bounded

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
STEPS = 50
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ON_TWO_RANKS = [*TORCHRUN, "--nproc-per-node", "2"]
DEEPSPEED = [*ON_TWO_RANKS, str(HERE / "deepspeed_by_gloo.py"), "examples/deepspeed_stage0.py"]

VISION = Path(sys.prefix) / "vision"
"""Where `make install` puts timm, apart: see there."""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_losses(first: list[float], resumed: list[float]) -> None:
    """The whole run's losses, and those of a run that resumed from its middle."""
    assert len(first) == STEPS
    assert first[-1] < 0.85 * first[0]
    # The Trainer's log of the first half comes with its checkpoint.
    assert resumed[-STEPS // 2 :] == first[-STEPS // 2 :]


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("transformers_trainer", "accelerate"),
        ("lightning_module", "lightning"),
        ("peft_lora", "peft"),
    ],
)
def test_one_process_trains_and_resumes_to_the_same_loss(name, library, tmp_path):
    pytest.importorskip(library)
    module = example(name)
    check_losses(module.train(STEPS, tmp_path), module.train(STEPS, tmp_path, resume=True))


def in_examples(command: list[str]) -> list[str]:
    """A command with the examples' paths written out."""
    return [str(EXAMPLES.parent / word) if word.endswith(".py") else word for word in command]


def losses_of(command: list[str]) -> list[float]:
    code, out, errors = run_bounded(command)
    assert code == 0, errors[-4000:]
    return [float(loss) for loss in re.findall(r"^step \d+ loss ([\d.]+)$", out, re.M)]


@pytest.mark.parametrize(
    ("library", "command"),
    [
        ("torchtitan", [*ON_TWO_RANKS, "examples/torchtitan_llama.py"]),
        pytest.param(
            "deepspeed",
            DEEPSPEED,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "lightning",
            [sys.executable, "examples/lightning_module.py", "--devices", "2"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "accelerate",  # Under DDP, which Accelerate takes without GPUs.
            [*ON_TWO_RANKS, "examples/accelerate_fsdp2.py"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_several_ranks_train_and_resume_to_the_same_loss(library, command, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: pip install 'normuon[integrations]'")
    command = in_examples(command)
    command += ["--steps", str(STEPS), "--out", str(tmp_path)]
    check_losses(losses_of(command), losses_of([*command, "--resume"]))


def test_accelerates_fsdp2_trains_and_resumes_to_the_same_loss(tmp_path):
    """Its plugin puts the shards into an optimizer that was built before."""
    pytest.importorskip("accelerate")
    script = HERE / "accelerate_fsdp2_on_cpu.py"
    command = [*ON_TWO_RANKS, str(script)]
    command += [str(EXAMPLES / "accelerate_fsdp2.py"), str(tmp_path), str(STEPS)]
    check_losses(losses_of(command), losses_of([*command, "--resume"]))


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(1, marks=pytest.mark.slow),
        2,
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_deepspeed_zero_is_refused_at_the_first_step(stage, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install 'normuon[integrations]'")
    command = [*in_examples(DEEPSPEED), "--stage", str(stage), "--out", str(tmp_path)]
    code, out, errors = run_bounded(command)
    assert code != 0
    assert "step 0" not in out
    assert "as DeepSpeed ZeRO (stages 1 to 3) does; use FSDP2" in errors


WITH_TIMM = """
import sys, torch
try:
    import torchvision
except RuntimeError:
    # PyPI's torchvision is built for CUDA's torch; beside another, its operators are missing, of
    # which these models use none. Their names are all that importing it asks for.
    names = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        names.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

TRAIN_TIMM = """
import json
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import timm_vit
out = Path(sys.argv[2])
print(json.dumps([timm_vit.train(50, out), timm_vit.train(50, out, resume=True)]))
"""

PLACE_TIMM = """
import timm
from normuon import param_groups
for name in sys.argv[1:]:
    with torch.device("meta"):
        model = timm.create_model(name)
    placed = sum(len(group["params"]) for group in param_groups(model))
    assert placed == len(list(model.parameters())), name
    print(name)
"""

ARCHITECTURES = [
    "resnet18",
    "convnext_atto",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224",
    "maxvit_pico_rw_256",
    "levit_128s",
    "xcit_nano_12_p16_224",
    "mixer_s32_224",
]


def run_with_timm(code: str, *arguments: str) -> list[str]:
    """The lines that a process with timm prints."""
    if not VISION.exists() and importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm and torchvision")
    paths = [str(VISION), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", WITH_TIMM + code, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_timm_vision_transformer_trains_and_resumes_to_the_same_loss(tmp_path):
    check_losses(*json.loads(run_with_timm(TRAIN_TIMM, str(EXAMPLES), str(tmp_path))[-1]))


def test_timms_models_are_placed_whole():
    """Convolutions, windows, bias tables and cross covariances need no override."""
    assert run_with_timm(PLACE_TIMM, *ARCHITECTURES) == ARCHITECTURES
