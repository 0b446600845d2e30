from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Both engine modules as DeepSpeed has them, as far as the hooks care.
FILES = {
    "deepspeed/__init__.py": "from deepspeed.runtime.engine import DeepSpeedEngine\n",
    "deepspeed/runtime/__init__.py": "",
    "deepspeed/runtime/engine.py": """
        class Config:
            def __init__(self, block):
                self._param_dict = {} if block is None else {"perseus": block}

        class DeepSpeedEngine:
            def __init__(self, config_class=None):
                self._config = config_class
    """,
    "deepspeed/runtime/pipe/__init__.py": "",
    "deepspeed/runtime/pipe/engine.py": """
        # the source of the pipeline engine
        from ..engine import DeepSpeedEngine

        class PipelineEngine(DeepSpeedEngine):
            _INSTRUCTION_MAP = {}

            def __init__(self, *args, **kwargs):
                \"\"\"Stock.\"\"\"
                super().__init__(*args, **kwargs)
                self.built = True
    """,
    "deepspeed/runtime/other.py": "value = 1\n",
}
PIPE = "deepspeed.runtime.pipe.engine"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with a DeepSpeed that is none."""
    for name, content in FILES.items():
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    return tmp_path / "packages"


def run(packages: Path, code: str, *options: str) -> str:
    """Run code in a fresh interpreter that finds the packages; returns what it says."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(REPOSITORY)])}
    environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


INSTALL = "from perseus_plugin.integrations.loading import install_import_hooks; install_import_hooks()"


def test_torch_calls_it() -> None:
    (point,) = (p for p in entry_points(group="torch.backends") if p.name == "perseus_plugin")
    assert point.value == "perseus_plugin.integrations.loading:install_import_hooks"


def test_engines_imported_later_are_patched_and_others_left_alone(packages: Path) -> None:
    out = run(
        packages,
        f"""
        {INSTALL}
        import sys
        assert "perseus_plugin.integrations.deepspeed.adapter" not in sys.modules
        import deepspeed, deepspeed.runtime.other
        from {PIPE} import PipelineEngine
        from deepspeed.runtime.engine import DeepSpeedEngine, Config
        for engine_class in (PipelineEngine, DeepSpeedEngine):
            assert "_perseus_patched" in vars(engine_class), engine_class
        assert PipelineEngine.__init__.__doc__ == "Stock."
        assert PipelineEngine(Config(None)).built
        assert PipelineEngine(config_class=Config({{"enabled": False}})).built
        assert type(deepspeed.runtime.other.__loader__).__name__ == "SourceFileLoader"
        print("fine")
        """,
    )
    assert out == "fine\n"


def test_engines_imported_before_are_patched_too(packages: Path) -> None:
    out = run(
        packages,
        f"""
        from {PIPE} import PipelineEngine
        {INSTALL}
        assert "_perseus_patched" in vars(PipelineEngine)
        print("fine")
        """,
    )
    assert out == "fine\n"


def test_installing_again_changes_nothing(packages: Path) -> None:
    out = run(
        packages,
        f"""
        import sys
        {INSTALL}
        finders = list(sys.meta_path)
        {INSTALL}
        assert sys.meta_path == finders
        from {PIPE} import PipelineEngine
        init = PipelineEngine.__init__
        {INSTALL}
        assert PipelineEngine.__init__ is init
        assert init.__wrapped__.__doc__ == "Stock." and not hasattr(init.__wrapped__, "__wrapped__")
        print("fine")
        """,
    )
    assert out == "fine\n"


def test_what_reads_the_source_still_can(packages: Path) -> None:
    """`inspect`, tracebacks, `pickle` by reference, `importlib.reload` and `pkgutil` all ask the loader."""
    out = run(
        packages,
        f"""
        {INSTALL}
        import importlib, importlib.util, inspect, linecache, pickle, pkgutil
        import {PIPE} as module
        assert "# the source of the pipeline engine" in inspect.getsource(module)
        assert module.__loader__.get_source("{PIPE}").startswith("\\n# the source")
        assert module.__spec__.loader.get_filename("{PIPE}") == module.__file__
        assert b"# the source" in pkgutil.get_data("deepspeed.runtime.pipe", "engine.py")
        assert not module.__loader__.is_package("{PIPE}")
        assert pickle.loads(pickle.dumps(module.PipelineEngine)) is module.PipelineEngine
        assert importlib.util.find_spec("{PIPE}").origin == module.__file__
        try:
            module.__loader__.no_such_thing
        except AttributeError:
            pass
        again = importlib.reload(module)
        assert "_perseus_patched" in vars(again.PipelineEngine)
        print("fine")
        """,
    )
    assert out == "fine\n"


def test_the_byte_code_is_cached_as_ever(packages: Path) -> None:
    run(packages, f"import sys; sys.dont_write_bytecode = False; {INSTALL}; import {PIPE}")
    assert list((packages / "deepspeed/runtime/pipe/__pycache__").glob("engine.*.pyc"))


def test_without_deepspeed_the_import_error_is_the_stock_one(tmp_path: Path) -> None:
    # Without site-packages neither our dependencies nor the real DeepSpeed are found.
    out = run(
        tmp_path,
        f"""
        {INSTALL}
        try:
            import {PIPE}
        except ModuleNotFoundError as error:
            print(error)
        """,
        "-S",
    )
    assert out == "No module named 'deepspeed'\n"


def test_an_error_inside_the_engine_module_is_its_own(packages: Path) -> None:
    (packages / "deepspeed/runtime/pipe/engine.py").write_text("raise ValueError('no CUDA here')\n")
    out = run(
        packages,
        f"""
        {INSTALL}
        try:
            import {PIPE}
        except ValueError as error:
            print(error)
        """,
    )
    assert out == "no CUDA here\n"


def test_a_patch_that_fails_is_a_warning_and_deepspeed_is_as_ever(packages: Path) -> None:
    out = run(
        packages,
        f"""
        import sys
        {INSTALL}
        sys.modules["perseus_plugin.integrations.deepspeed.adapter"] = None  # importing it raises
        from {PIPE} import PipelineEngine
        assert PipelineEngine().built
        """,
    )
    assert "RuntimeWarning: perseus is off: could not hook into DeepSpeed: ModuleNotFoundError" in out
    assert "Traceback" not in out


SABOTAGE = [
    "sys.modules['perseus_plugin.integrations.deepspeed.adapter'] = None",
    "sys.meta_path = None",
    f"sys.modules['{PIPE}'] = None",
    f"sys.modules['{PIPE}'] = 'no module'",
]


@pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["", "warnings are errors"])
def test_installing_never_raises(packages: Path, options: tuple[str, ...]) -> None:
    """Not even where warnings are errors: `import torch` of every program depends on it."""
    out = run(
        packages,
        f"""
        import sys, {PIPE}
        from perseus_plugin.integrations.loading import install_import_hooks
        modules, meta_path = dict(sys.modules), list(sys.meta_path)
        for number, sabotage in enumerate({SABOTAGE!r}):
            exec(sabotage)
            install_import_hooks()
            print("alive", number)
            sys.modules.clear()
            sys.modules.update(modules)
            sys.meta_path = list(meta_path)
        """,
        *options,
    )
    for number in range(len(SABOTAGE)):
        assert f"alive {number}" in out
    assert out.count("perseus is off: could not hook into DeepSpeed") >= 2


def test_deepspeed_imports_where_warnings_are_errors_and_the_patch_fails(packages: Path) -> None:
    out = run(
        packages,
        f"""
        import sys
        {INSTALL}
        sys.modules["perseus_plugin.integrations.deepspeed.adapter"] = None
        from {PIPE} import PipelineEngine
        print("alive")
        """,
        "-W",
        "error",
    )
    assert "alive" in out
    assert "perseus is off: could not hook into DeepSpeed" in out


def test_a_module_still_being_imported_is_left_to_the_finder(packages: Path) -> None:
    """DeepSpeed may import torch for the first time in the middle of its own engine module."""
    (packages / "deepspeed/runtime/engine.py").write_text(f"{INSTALL}\nclass DeepSpeedEngine:\n    pass\n")
    out = run(packages, f"from {PIPE} import PipelineEngine; print('_perseus_patched' in vars(PipelineEngine))")
    assert out == "True\n"


def test_megatrons_parser_knows_the_flags_and_nothing_else_changes(packages: Path) -> None:
    for name, content in {
        "megatron/__init__.py": "",
        "megatron/training/__init__.py": "",
        "megatron/training/arguments.py": """
            def add_megatron_arguments(parser):
                parser.add_argument("--lr")
                return parser
        """,
        "megatron/training/other.py": "value = 1\n",
    }.items():
        path = packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    out = run(
        packages,
        f"""
        {INSTALL}
        import argparse, sys
        assert "perseus_plugin.integrations.megatron.arguments" not in sys.modules
        import megatron.training.arguments as module, megatron.training.other
        parsed = module.add_megatron_arguments(argparse.ArgumentParser()).parse_args(["--lr", "1"])
        assert (parsed.lr, parsed.perseus) == ("1", False)
        heavy = ("torch", "ortools", "pydantic")
        print(sorted(n for n in sys.modules if n.startswith("perseus_plugin.") or n in heavy))
        """,
    )
    loaded = [
        "errors",
        "integrations",
        "integrations.base",
        "integrations.loading",
        "integrations.megatron",
        "integrations.megatron.arguments",
    ]
    assert out == str(sorted(["perseus_plugin._version", *(f"perseus_plugin.{name}" for name in loaded)])) + "\n"


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("asks", ["path finder", "all finders"])
def test_another_tools_finder_patches_the_same_module(packages: Path, place: str, asks: str) -> None:
    """It may stand before or behind ours, and find the module by itself or by asking every finder in its turn."""
    out = run(
        packages,
        f"""
        import importlib.machinery, importlib.util, sys

        class Loader:
            def __init__(self, real):
                self._real = real
            def create_module(self, spec):
                return self._real.create_module(spec)
            def exec_module(self, module):
                self._real.exec_module(module)
                if hasattr(module, "PipelineEngine"):
                    module.PipelineEngine.foreign = True

        class Finder:
            busy = False
            def find_spec(self, name, path, target=None):
                if name != {PIPE!r} or self.busy:
                    return None
                self.busy = True
                try:
                    if {asks!r} == "all finders":
                        spec = importlib.util.find_spec(name)
                    else:
                        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
                finally:
                    self.busy = False
                spec.loader = Loader(spec.loader)
                return spec

        if {place!r} == "before":
            sys.meta_path.insert(0, Finder())
        {INSTALL}
        if {place!r} == "after":
            sys.meta_path.insert(0, Finder())
        from deepspeed.runtime.pipe.engine import PipelineEngine
        print(PipelineEngine.foreign, "_perseus_patched" in vars(PipelineEngine))
        """,
    )
    # One that stands in front and asks nobody else hides every other finder, ours too: `enable` is left.
    hides_us = (place, asks) == ("after", "path finder")
    assert out == f"True {not hides_us}\n"


# What is installed outlives the code.


def test_when_the_code_has_gone_the_docs_name_the_message_and_the_cure(tmp_path: Path) -> None:
    """Nothing of ours runs then, so that nothing of ours can help."""
    stale = tmp_path / "perseus_plugin-0.0.1.dist-info"
    stale.mkdir()
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: perseus-plugin\nVersion: 0.0.1\n")
    installed = next(e for e in entry_points(group="torch.backends") if e.name == "perseus_plugin")
    gone = installed.value.replace("perseus_plugin.", "perseus_plugin_gone.")
    (stale / "entry_points.txt").write_text(f"[torch.backends]\nperseus_plugin = {gone}\n")

    def import_torch(**more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **more}
        environment = {k: v for k, v in environment.items() if k != "TORCH_DEVICE_BACKEND_AUTOLOAD" or k in more}
        command = [sys.executable, "-c", "import torch"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    failed = import_torch()
    assert failed.returncode != 0
    message = "Failed to load the backend extension: perseus_plugin"
    assert message in failed.stderr
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    (row,) = [line for line in page.splitlines() if message in line]
    assert "pip uninstall perseus-plugin" in row
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in row
    assert import_torch(TORCH_DEVICE_BACKEND_AUTOLOAD="0").returncode == 0


def test_the_place_that_installations_name_stays() -> None:
    """One that was made with an older version, from a folder that has a newer one since, must find it."""
    setup = (REPOSITORY / "setup.cfg").read_text()
    assert "perseus_plugin = perseus_plugin.integrations.loading:install_import_hooks" in setup
