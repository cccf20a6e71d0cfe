"""Packaging of quantlib (distribution `quantlib-torch`; command and import are `quantlib`).

The top-level folders `kernels/`, `search/` and `bench/` are installed as `quantlib.kernels`,
`quantlib.search` and `quantlib.bench`: bare packages with those names would collide with others.

A wheel carries the compiled CPU kernels when a C++ compiler is there, and their sources always: the
rest is compiled at first use, or computed by torch. An editable install compiles nothing, as the
sources may change.

Lower bounds are what the code needs; constraints.txt has the versions that were tested.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

ROOMS = ["kernels", "search", "bench"]

REQUIRES = [
    "torch>=2.10",
    "numpy>=2",
    "scipy>=1.11",  # HiGHS behind scipy.optimize.milp
    "transformers>=5,<6",
    "huggingface_hub>=1",
    "safetensors>=0.5",
    "accelerate>=1",
    "pillow>=10.1",  # pictures of multimodal models
    "typer>=0.12",
    "rich>=13",
    "pydantic>=2",
    "PyYAML>=6",
    "matplotlib>=3.8",
    "jinja2>=3",
]

EXTRAS = {
    "triton": ["triton>=3.6"],  # what torch 2.10 comes with on Linux
    "cuda": ["cupy-cuda12x>=13"],
    "gptq": ["optimum>=2", "gptqmodel>=5"],
    "evolve": ["deap>=1.4"],  # formulas that predict losses (EMQ)
    "trials": ["optuna>=4.2"],  # plans measured by several processes
    "ray": ["ray>=2.40", "optuna>=4.2"],  # and by several machines
    "eval": ["lm-eval>=0.4.9"],
    "datasets": ["datasets>=3"],
    "graph": ["torch-geometric>=2.6"],
    # Weights of the demo model and of the test-beds are published as GGUF and ONNX files; a bed
    # writes its own tokenizer.
    "bench": ["gguf>=0.17", "onnx>=1.16", "tokenizers>=0.20"],
    # What quantlib is measured beside; `make peers` installs them, and llama.cpp from its source.
    "peers": ["onnx>=1.16", "onnxruntime>=1.20", "openvino>=2025.0"],
    # What bench/gpu.py measures beside, on a machine that has a GPU.
    "gpu-peers": ["vllm>=0.10", "gemlite>=0.5"],
    "dev": [
        "compressed-tensors>=0.18",  # the reference of the packed layout, in tests only
        "datasets>=3",
        "deap>=1.4",
        "hypothesis>=6",
        "mypy>=1.15",
        "optuna>=4.2",
        "pre-commit>=4",
        "psutil>=6",
        "pytest>=8",
        "pytest-timeout>=2",
        "pytest-xdist>=3.8",
        "ruff>=0.11",
        "torch-geometric>=2.6",
        "types-PyYAML",
    ],
}

packages = [name for name in find_packages() if name.split(".")[0] == "quantlib"]
package_dir = {"quantlib": "quantlib"}
for room in ROOMS:
    packages += [f"quantlib.{room}", *(f"quantlib.{room}.{sub}" for sub in find_packages(room))]
    package_dir[f"quantlib.{room}"] = room


class BuildWithKernels(build_py):
    """Also compiles kernels/cpu into the package."""

    def run(self) -> None:
        """Copy the modules, then put the library beside its sources; without a compiler, say so."""
        super().run()
        if self.editable_mode:
            return
        # By its path: quantlib is not installed yet, and build.py needs only the standard library.
        spec = importlib.util.spec_from_file_location(
            "build_kernels", ROOT / "kernels/cpu/build.py"
        )
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        try:
            builder.build_for_wheel(Path(self.build_lib, "quantlib", "kernels", "cpu"))
        except builder.BuildError as error:
            self.warn(f"this build has no compiled CPU kernels: {error}")


class PlatformDistribution(Distribution):
    """Compiled code is inside, so the wheel belongs to one platform."""

    def has_ext_modules(self) -> bool:
        """Tell setuptools so."""
        return True


class AnyPythonWheel(bdist_wheel):
    """The library is plain C, loaded by ctypes: one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform in the wheel's name."""
        return "py3", "none", super().get_tag()[2]


setup(
    name="quantlib-torch",
    version="0.1.0",
    description="Mixed-precision compression of models: measure, allocate bits, pack, run",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={
        "quantlib": ["py.typed"],
        "quantlib.kernels": [
            "cpu/src/*",
            "cuda/src/*",
            "cuda/prebuilt/*",
            "emulator/src/*",
            "triton/tables/*",
        ],
        "quantlib.report": ["page/*"],
        "quantlib.bench": ["plans/*.json", "proxies/*.json"],
        "quantlib.bench.beds": ["weights/*", "weights/*/*", "weights/*/*/*"],
    },
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": AnyPythonWheel},
    entry_points={"console_scripts": ["quantlib = quantlib.cli:main"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
