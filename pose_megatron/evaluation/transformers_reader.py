"""Reading with a Hugging Face folder, through transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pose_megatron.errors import ConfigError, gist
from pose_megatron.evaluation.reading import Reader, Scores, first_asked, score
from pose_megatron.models.shape import ModelConfig
from pose_megatron.rope.huggingface import to_hf
from pose_megatron.runtime.device import device


class TransformersReader(Reader):
    """A causal language model of transformers, in one process.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Any, batch_tokens: int):
        super().__init__(model.config.get_text_config().vocab_size, batch_tokens)
        self._model: Any = model
        self._cache: Any = None  # transformers' keys and values

    def _begin(self, rows: int, tokens: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache()
        for rotary in self._rotaries():
            _set_length(rotary, tokens)

    @torch.no_grad()
    def _read(self, chunks: Sequence[tuple[Tensor, Tensor]], start: int) -> list[Scores]:
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :start], layer.values[:, :, :start]
        scores = []
        for tokens, labels in chunks:
            tokens, labels = tokens.to(device()), labels.to(device())
            asked = max(labels.size(1) - first_asked(labels), 1)  # 0 would mean all
            positions = torch.arange(start, start + tokens.size(1), device=device())
            logits = self._model(
                input_ids=tokens,
                position_ids=positions.expand(len(tokens), -1),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=asked,
            ).logits
            found = score(logits, labels[:, -asked:])
            before = (labels.size(1) - asked, 0)
            scores.append(
                Scores(
                    torch.nn.functional.pad(found.loss, before),
                    torch.nn.functional.pad(found.best, before),
                )
            )
            start += tokens.size(1)
            self.progress(tokens.numel())
        return scores

    def _rotaries(self) -> list[Any]:
        return [m for m in self._model.modules() if isinstance(getattr(m, "rope_type", None), str)]


def _set_length(rotary: Any, length: int) -> None:
    """Has transformers compute a rotary embedding's frequencies for this length, and leave them."""
    if (own := getattr(rotary, "pose_rope_type", None)) is not None:
        rotary.rope_type = own
    if rotary.rope_type not in ("dynamic", "longrope"):
        return
    rotary.pose_rope_type = rotary.rope_type
    for last in (0, length - 1):  # a short text sets back what a long one has changed
        at = torch.tensor([[last]], device=device())
        rotary(torch.zeros(1, device=device()), at)
    rotary.rope_type = "default"  # which changes nothing by itself


def load_transformers(
    folder: Path, model: ModelConfig | None, bf16: bool, batch_tokens: int
) -> TransformersReader:
    """Loads a folder's weights.

    Args:
        model: its shape, with the rope to evaluate; None: as the folder says.

    Raises:
        ConfigError: transformers refuses the folder.
    """
    keys: dict[str, Any] = {}
    if model is not None:
        keys = to_hf(
            model.rope_scaling,
            base=model.rotary_base,
            rotary_dim=model.rotary_dim,
            max_position_embeddings=model.max_position_embeddings,
        )
    loaded = load_model(folder, torch.bfloat16 if bf16 else torch.float32, keys)
    return TransformersReader(loaded, batch_tokens)


def load_model(
    folder: Path, dtype: torch.dtype, keys: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """A folder's model as transformers has it, on its device and in evaluation mode.

    Args:
        keys: of config.json, in place of the folder's.
        options: of from_pretrained.

    Raises:
        ConfigError: transformers refuses the folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if keys:
            config = type(config).from_dict(config.to_dict() | dict(keys))
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of many classes, for a config.json that it refuses
        raise ConfigError(f"{folder}: transformers cannot load it ({gist(error)})") from error
    return model.eval().to(device())
