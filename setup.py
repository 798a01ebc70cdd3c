"""Package metadata and dependencies; `constraints.txt` pins what CI passes with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "pose_megatron/__init__.py").read_text())[1]

setup(
    name="pose-megatron",
    version=version,
    description="PoSE context-window extension of RoPE language models on megatron-core",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["pose_megatron", "pose_megatron.*"]),
    install_requires=[
        "torch>=2.6",
        "megatron-core==0.16.1",
        "numpy",
        "sentencepiece",
        "transformers>=5",
        "tokenizers",
        "gigatoken>=0.10",  # a faster implementation of both, used where its ids are the same
        "orjson",
        "pyarrow",  # corpora in Parquet
        "safetensors",
        "psutil",  # megatron-core's checkpoint writer imports it and does not say so
        "pyyaml",
        "tqdm",
        "zstandard",
        "matplotlib",
    ],
    extras_require={
        # The range that megatron-core 0.16.1 itself declares.
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
        "track": ["tensorboard", "wandb"],
        "dev": [
            "pytest",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            "tensorboard",
            "wandb",
        ],
    },
)
