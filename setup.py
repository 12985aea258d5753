"""Package metadata. The versions that were tested together are pinned in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"

# The one place of the version is the package itself: it has one without being installed, too.
INIT = (ROOT / "lth_plugins/__init__.py").read_text()
VERSION = re.search(r'^__version__ = "([^"]+)"', INIT, re.MULTILINE)
if VERSION is None:
    raise SystemExit('lth_plugins/__init__.py must have a line such as: __version__ = "0.1.0"')

CORE = [
    "numpy>=1.26",
    "omegaconf>=2.3",
    "pillow>=10",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4",
    "shtab>=1.7",
    "torch>=2.5",
    "torchvision>=0.20",
    "tqdm>=4.66",
    "zstandard>=0.22",
]

# detectron2 is not among the extras: it is on no package index, and nobody owns its name there.
# `make setup` installs it from a local wheel or from its Git repository.
EXTRAS = {
    # mmcv-lite must follow by hand, with `pip install --no-deps mmcv-lite`: it requires the
    # upstream mmengine, whose files would overwrite those of onedl-mmengine. What else it requires
    # stands here instead: addict, opencv-python, yapf.
    "mmseg": [
        "addict",
        "onedl-mmengine>=0.10.8",
        "onedl-mmsegmentation>=1.4",
        "opencv-python",
        "yapf",
    ],
    # 2.6: what resumes inside an epoch, bit for bit, was only seen to do so with it.
    "pretrain": ["lightly>=1.5", "pytorch-lightning>=2.6", "scikit-learn>=1.4", "tensorboard"],
    "transfer": ["fvcore>=0.1.5", "pytorch-lightning>=2.6", "scipy>=1.11"],
    "digits": ["pycocotools", "scikit-learn>=1.4"],
    "timm": ["timm>=1.0"],
    # accelerate is what transformers' own Trainer asks for.
    "transformers": ["accelerate>=1.1", "timm>=1.0", "transformers>=5.23"],
    "smp": ["segmentation-models-pytorch>=0.5"],
    "sweep": ["submitit>=1.5"],
    # NumPy 2 brought bitwise_count.
    "study": [
        "fvcore>=0.1.5",
        "jinja2>=3.1",
        "markupsafe",
        "matplotlib>=3.8",
        "numpy>=2.0",
        "scipy>=1.11",
    ],
    # What PyTorch's own exporter needs, and what its files are checked with.
    "export": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"],
    "slim": ["torch-pruning>=1.6.1"],
    "hub": ["huggingface-hub>=0.23"],
    # The site, and the notebook that a test runs.
    "docs": [
        "ipykernel",
        "mkdocs>=1.6",
        "mkdocs-material>=9.7",
        "mkdocstrings[python]>=1.0",
        "nbclient",
        "nbformat",
    ],
    "dev": [
        # The fuzzer has wheels for these alone; without it its soak is skipped.
        "atheris>=3.0 ; sys_platform == 'linux' and platform_machine == 'x86_64' "
        "and python_version >= '3.11' and python_version < '3.14'",
        "build",
        "hypothesis",
        "import-linter",
        "mypy",
        "pre-commit",
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
    ],
}

SHIPPED = sorted(
    path
    for pattern in ("zoo/*.ticket", "zoo/*.md", "configs/**/*.py", "configs/**/*.yaml")
    for path in ROOT.glob(pattern)
)


class BuildWithShipped(build_py):
    """A wheel has the tickets of zoo/ and the configurations of configs/ inside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in SHIPPED:
            target = Path(self.build_lib, "lth_plugins", path.relative_to(ROOT))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(f"{path.relative_to(ROOT)}" for path in SHIPPED)]


setup(
    cmdclass={"build_py": BuildWithShipped},
    name="lth_plugins",
    version=VERSION[1],
    description="Lottery tickets as backbones for stock detection and segmentation frameworks",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["lth_plugins", "lth_plugins.*"]),
    package_data={
        "lth_plugins": ["py.typed"],
        "lth_plugins.study.report": ["templates/*.html", "templates/*.css"],
    },
    entry_points={"console_scripts": ["lth = lth_plugins.__main__:start"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2012.06908"},
    install_requires=CORE,
    extras_require=EXTRAS,
)
