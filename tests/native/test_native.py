"""Availability, instruction-set level and thread count of the native kernels."""

import ast
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lowlat.ops import native
from lowlat.utils.errors import UserError

from .inputs import LEVELS, needs_native
from .processes import run

CPU_INFO = Path("/proc/cpuinfo")
COMPILERS = ("c++", "g++", "clang++")
HIDE = "import sys; sys.modules['lowlat._native'] = None\n"
"""Makes `from lowlat import _native` fail as in an install without it."""
USE = """
import torch
from tests.fakes import mla_config, tiny_model
from lowlat.attention.metadata import AttentionBatch
from lowlat.engine.runner import Chunk, ModelRunner
model = tiny_model(mla_config(), torch.bfloat16)
for _ in range(2):
    runner = ModelRunner(model)
    pages = []
    runner.reserve(pages, 5)
    ids = [3, 1, 4, 1, 5]
    logits = runner.run(
        [Chunk(pages=pages, start=0, tokens=ids, num_logits=1, path="absorbed")]
    )
print(logits.shape[0], bool(logits.isfinite().all()), runner._native is None)
"""

OWN, TOP = "proc/self/cgroup", "sys/fs/cgroup/"


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_compiler_means_native_kernels() -> None:
    """Regression: a build that fails and leaves lowlat slow, with every test here skipped."""
    is_off = os.environ.get(native.ISA_VARIABLE) == native.OFF
    if is_off or not (native.available() or any(map(shutil.which, COMPILERS))):
        pytest.skip(native.reason())
    assert native.available(), native.reason()
    assert native.level() in native.levels()
    assert native.levels()[-1] == "portable"


@pytest.mark.network
@pytest.mark.slow
def test_without_a_compiler_lowlat_installs_as_plain_python(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    if not (root / "CMakeLists.txt").exists():
        pytest.skip("the sources are not here")
    options = ["--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    building = ["--config-settings", f"build-dir={tmp_path / 'build'}"]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(root), *options, *building],
        env=os.environ | {"CC": str(tmp_path / "none"), "CXX": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    if "No matching distribution found for" in result.stderr:
        pytest.skip("what builds lowlat cannot be fetched")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("lowlat-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    assert "lowlat/__main__.py" in names
    assert "lowlat/models/minnow/model.safetensors" in names
    assert not any(name.endswith(".so") for name in names)


NEEDED_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {
        *("avx512f", "avx512bw", "avx512dq", "avx512vl"),
        *("avx512_bf16", "avx512_vnni", "avx512vbmi"),
    },
}
"""Processor flags of a level, as Linux spells them."""


@needs_native
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPU_INFO.exists(), reason="levels are of x86-64 on Linux"
)
def test_a_build_has_the_levels_of_its_processor() -> None:
    """Regression: a linker or compiler that quietly leaves out the fast ones."""
    flags = next(line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags"))
    expected = {level for level, needed in NEEDED_FLAGS.items() if needed <= set(flags.split())}
    assert expected <= set(native.levels())


@pytest.mark.slow
@needs_native
def test_the_environment_chooses_the_level() -> None:
    code = "from lowlat.ops import native; print(native.level())"
    assert run(code).stdout.strip() == LEVELS[0]
    for level in LEVELS:
        assert run(code, level).stdout.strip() == level


FINGERPRINT = """
import torch
from tests.fakes import mla_config, tiny_model
from lowlat.engine.cache_fingerprint import fingerprint_of
from lowlat.engine.runner import ModelRunner
model = tiny_model(mla_config(), torch.bfloat16)
print(fingerprint_of(ModelRunner(model), context=97).hex())
"""


@needs_native
def test_pages_of_each_level_have_their_own_fingerprint() -> None:
    """Levels round differently."""
    isas = [*LEVELS, native.OFF]
    found = [run(FINGERPRINT, isa).stdout.strip() for isa in isas]
    assert all(len(each) == 64 for each in found)
    assert len(set(found)) == len(isas)
    assert run(FINGERPRINT).stdout.strip() == found[0]


@needs_native
def test_an_unknown_level_is_the_users_error() -> None:
    code = "from lowlat.ops import native; native.available()"
    last = run(code, "avx1024").stderr.strip().splitlines()[-1]
    names = ", ".join([*LEVELS, "none"])
    assert last == (
        f"lowlat.utils.errors.UserError: LOWLAT_ISA=avx1024 is none of the levels of this "
        f"machine and build: {names}"
    )
    hidden = run(HIDE + code, "avx2").stderr
    assert "UserError: LOWLAT_ISA=avx2 asks for native kernels" in hidden
    assert "apt install g++" in hidden


def test_without_the_module_models_run_and_say_once_that_they_are_slow() -> None:
    result = run(HIDE + USE)
    assert result.stdout.split() == ["1", "True", "True"], result.stderr
    assert result.stderr.count("runs slow") == 1
    assert "apt install g++" in result.stderr


@pytest.mark.slow
def test_turned_off_models_run_in_silence() -> None:
    result = run(USE, "none")
    assert result.stdout.split() == ["1", "True", "True"], result.stderr
    assert result.stderr == ""


@needs_native
def test_with_the_module_models_use_it() -> None:
    result = run(USE)
    assert result.stdout.split() == ["1", "True", "False"], result.stderr


@needs_native
def test_threads_are_limited_by_processors() -> None:
    before, most = native.threads(), native.processors()
    assert 1 <= before <= most
    before_torch = torch.get_num_threads()
    try:
        native.use_threads(1)
        assert native.threads() == torch.get_num_threads() == 1
        native.use_threads(most)
        assert native.threads() == torch.get_num_threads() == most
    finally:
        native.use_threads(before)
        torch.set_num_threads(before_torch)
    for count in (0, most + 1):
        with pytest.raises(UserError, match=f"--threads {count}: .* {most} "):
            native.use_threads(count)


@pytest.mark.slow
@needs_native
def test_default_threads_follow_openmp() -> None:
    code = "from lowlat.ops import native; print(native.threads())"
    assert run("import os; os.environ['OMP_NUM_THREADS'] = '1'\n" + code).stdout.strip() == "1"
    unset = "import os; os.environ.pop('OMP_NUM_THREADS', None)\n"
    assert run(unset + code).stdout.strip() == str(native.processors())


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({TOP + "cpu.max": "max 100000"}, None),
        ({TOP + "cpu.max": "150000 100000"}, 2),
        ({TOP + "cpu.max": "50000 100000"}, 1),
        ({TOP + "cpu/cpu.cfs_quota_us": "-1", TOP + "cpu/cpu.cfs_period_us": "100000"}, None),
        ({TOP + "cpu/cpu.cfs_quota_us": "300000", TOP + "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, None),
    ],
)
def test_container_limits(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert native._cgroup_limit(written(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        # Its own, one between it and the topmost, and the lowest of several.
        ({OWN: "0::/a/b/c", TOP + "a/b/c/cpu.max": "200000 100000"}, 2),
        ({OWN: "0::/a/b/c", TOP + "a/b/cpu.max": "300000 100000", TOP + "cpu.max": "max 9"}, 3),
        (
            {OWN: "0::/a/b", TOP + "a/b/cpu.max": "max 100000", TOP + "a/cpu.max": "400000 100000"},
            4,
        ),
        (
            {
                OWN: "0::/a/b",
                TOP + "a/b/cpu.max": "500000 100000",
                TOP + "a/cpu.max": "150000 100000",
            },
            2,
        ),
        # Not that of a sibling group.
        ({OWN: "0::/a/b", TOP + "a/c/cpu.max": "100000 100000"}, None),
        (
            {
                OWN: "5:cpu,cpuacct:/d/e\n4:memory:/m\n0::/",
                TOP + "cpu/d/cpu.cfs_quota_us": "200000",
                TOP + "cpu/d/cpu.cfs_period_us": "100000",
                TOP + "cpu/m/cpu.cfs_quota_us": "100000",
                TOP + "cpu/m/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_limits_of_the_own_group_and_those_above_count(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    """Regression: a service with a quota of its own that starts a thread for every processor."""
    assert native._cgroup_limit(written(tmp_path, files)) == limit


@needs_native
def test_the_stub_names_what_the_module_has() -> None:
    stub = ast.parse((Path(native.__file__).parents[1] / "_native.pyi").read_text())
    named = {
        node.name: {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        for node in stub.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    module = native.module()
    assert set(named) == {name for name in dir(module) if not name.startswith("_")}
    for name, members in named.items():
        for member in members:
            assert hasattr(getattr(module, name), member), f"{name}.{member}"
