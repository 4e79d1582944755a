"""What is built and installed: the wheel, the sdist, the public names, the library on its own."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import normuon
import normuon.integrations.lightning
import normuon.integrations.loggers
import normuon.integrations.qk_clip
import normuon.integrations.torchtitan
import normuon.integrations.transformers

ROOT = Path(__file__).parents[2]


def test_the_public_names_are_these():
    """Removing or renaming one is a breaking change; adding one is a decision."""
    assert sorted(normuon.__all__) == [
        "MatrixView",
        "NorMuon",
        "convert_state",
        "describe_groups",
        "param_groups",
        "plan_for",
        "suggest_lr",
    ]
    assert all(hasattr(normuon, name) for name in normuon.__all__)


@pytest.mark.parametrize(
    ("public", "positional", "keywords"),
    [
        (
            normuon.NorMuon,
            "params lr weight_decay momentum beta2 nesterov ns_coefficients ns_steps eps "
            "adjust_lr_fn",
            "neuron_axis orthogonalizer ns_backend ns_dtype momentum_dtype compute_device "
            "equilibrate cautious_weight_decay skip_nonfinite maximize kahan_sum betas adamw_eps "
            "max_scratch_bytes fused process_group balance bucket_bytes teams",
        ),
        (normuon.param_groups, "model", "overrides hidden other split_heads hidden_required"),
        (normuon.describe_groups, "groups", "collapse"),
        (normuon.convert_state, "sources", "to params quiet"),
        (normuon.suggest_lr, "lr", "coming_from to"),
        (normuon.MatrixView, "neuron_dim batch_dims blocks heads", ""),
        (normuon.NorMuon.record_statistics, "self every", ""),
        (normuon.NorMuon.statistics, "self", ""),
        (normuon.statistics.Statistics.to_dict, "self", "per_matrix"),
        (
            normuon.integrations.loggers.log_statistics,
            "optimizer to",
            "every per_matrix prefix step",
        ),
        (
            normuon.integrations.transformers.log_statistics,
            "trainer",
            "every per_matrix prefix",
        ),
        (normuon.integrations.lightning.statistics_callback, "", "every per_matrix prefix"),
        (
            normuon.integrations.torchtitan.build_optimizers,
            "model_parts optimizer_config parallel_dims ft_manager",
            "overrides options",
        ),
        (
            normuon.integrations.qk_clip.QKClip,
            "model",
            "tau alpha every only process_group",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_public_signatures_are_these(public, positional, keywords):
    """Positional ones in this order; the others by keyword only."""
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(public).parameters.values()
    assert [p.name for p in parameters if p.kind not in by_keyword] == positional.split()
    assert sorted(p.name for p in parameters if p.kind in by_keyword) == sorted(keywords.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The wheel and the sdist, built from this checkout without downloading a build backend."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return out


def test_the_version_is_the_wheels(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.split("-")[:2] == ["normuon", normuon.__version__]


def test_the_wheel_holds_both_packages_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"normuon", "normuon_lab"}
    assert "normuon/py.typed" in names
    assert "normuon_lab/study/search/tuned.json" in names
    assert any(name.startswith("normuon_lab/study/compare/templates/") for name in names)
    tables = {path.relative_to(ROOT / "src").as_posix() for path in ROOT.glob("src/**/*.toml")}
    assert tables
    assert tables <= set(names)
    assert not any("__pycache__" in name for name in names)


def test_the_sdist_can_be_built_and_tested_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = (
        "src/normuon/py.typed pyproject.toml LICENSE README.md constraints.txt tests/conftest.py"
    )
    assert set(wanted.split()) <= names


def test_the_wheel_depends_on_torch_alone(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    needed = [
        line
        for line in archive.read(name).decode().splitlines()
        if line.startswith("Requires-Dist")
    ]
    assert [line for line in needed if "extra ==" not in line] == ["Requires-Dist: torch>=2.9"]


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory) -> Path:
    """A Python that has the wheel and torch with what torch needs, and nothing of the lab."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    here = Path(metadata.distribution("torch").locate_file(""))
    for name in ("torch", "torchgen", "functorch", "numpy", "numpy.libs", "typing_extensions.py"):
        if (here / name).exists():
            (packages / name).symlink_to(here / name)
    for needed in ("sympy", "mpmath", "networkx", "filelock", "jinja2", "markupsafe", "fsspec"):
        (packages / needed).symlink_to(here / needed)
    return home / "bin" / "python"


def run(python: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_library_steps_without_the_lab(bare):
    code = (
        "import torch, normuon; m = torch.nn.Linear(4, 8); "
        "o = normuon.NorMuon(normuon.param_groups(m)); m(torch.ones(2, 4)).sum().backward(); "
        "o.step(); print('stepped', normuon.__version__)"
    )
    done = run(bare, code)
    assert done.stdout == f"stepped {normuon.__version__}\n", done.stderr


def test_the_command_without_its_extra_names_the_extra(bare):
    done = run(bare, "import sys; from normuon_lab.entry import main; sys.exit(main(['doctor']))")
    assert done.returncode == 2
    assert done.stderr == (
        "normuon: error: the normuon command needs tyro: pip install 'normuon[lab]'\n"
    )


def test_torchtitans_adapter_without_torchtitan_says_what_to_install(bare):
    code = (
        "from normuon.integrations.torchtitan import build_optimizers; "
        "build_optimizers([], None, None)"
    )
    done = run(bare, code)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: normuon.integrations.torchtitan needs torchtitan: pip install "
        "'normuon[integrations]'"
    )
