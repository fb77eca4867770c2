"""A Hugging Face model of a configuration file, on the meta device: no weights, no memory, no download.

Attention dropout is left out: the attention of a GPU (flash, memory-efficient) keeps no scores for it, that of the CPU would.
Caches of keys and values are off, as training has them off. A sample is one sequence, not several packed into one.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpuckpt.checks import shown
from gpuckpt.errors import BackendUnavailable

__all__ = [
    "DEPTHS",
    "build",
    "example_inputs",
    "longest_context",
    "one_sequence_a_sample",
    "read_config",
    "reads_tokens",
    "split_config",
    "with_depths",
]

DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Names that configurations have for how many blocks there are."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")


def read_config(source: str | Path | Mapping[str, Any]) -> Any:
    """The configuration (a `transformers.PreTrainedConfig`) that a JSON file or a mapping describes.

    Raises `ValueError` for what is no such configuration, or one of an architecture that the installed transformers lacks;
    `BackendUnavailable` without transformers.
    """
    transformers = _transformers()
    if isinstance(source, Mapping):
        record, where = dict(source), "the configuration"
    else:
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"source is {shown(source)}; expected a Hugging Face config.json, or its contents")
        where = shown(str(source))
        try:
            record = json.loads(Path(source).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"source {where} is no JSON ({error}); expected a Hugging Face config.json") from None
        except (OSError, ValueError) as error:  # the second: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"source {where} cannot be read: {reason}; expected a Hugging Face config.json") from None
    if not isinstance(record, dict) or not isinstance(record.get("model_type"), str):
        raise ValueError(f"{where} has no model_type; expected a Hugging Face config.json")
    kind = record.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{where}: model_type {kind!r} is unknown to transformers {transformers.__version__}; it knows "
            f"{len(transformers.CONFIG_MAPPING)}, such as llama, qwen3, mixtral, gemma3_text, gpt2, bert, t5, vit, whisper"
        )
    try:
        config = transformers.AutoConfig.for_model(kind, **record)
    except Exception as error:  # of whatever type transformers' own checks raise
        raise ValueError(f"{where} is no configuration of {kind!r}: {_first_line(error)}") from None
    for name in _ATTENTION_DROPOUT:
        if getattr(config, name, 0):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def build(config: Any, dtype: torch.dtype) -> Any:
    """The model, in training mode, its parameters on the meta device. Raises `ValueError` for an unknown or impossible one."""
    made = _model_class(config)
    if made.__name__.endswith("LMHeadModel"):
        config.loss_type = "ForCausalLM"  # which transformers takes as well, after a warning
    try:
        with torch.device("meta"):
            model = made._from_config(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # sizes that do not fit together fail in as many ways as there are architectures
        raise ValueError(f"{made.__name__} cannot be built from its configuration: {_first_line(error)}") from None
    return model.train()


def with_depths(config: Any, depths: Mapping[int, int]) -> Any:
    """The configuration with `depths[n]` blocks wherever it has n; lists of one entry a block are cut as well."""
    cut = copy.deepcopy(config)
    for name in DEPTHS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count in depths:
            setattr(cut, name, depths[count])
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) in depths:
            setattr(cut, name, value[: depths[len(value)]])
    return cut


def split_config(config: Any, ranks: int) -> Any:
    """The configuration of what one of `ranks` ranks of tensor parallelism computes: its heads, its part of every MLP.

    Raises `ValueError` where transformers has no such plan for the architecture, or sizes do not divide.
    """
    if ranks == 1:
        return config
    if not getattr(config, "base_model_tp_plan", None):
        raise ValueError(
            f"tp={ranks}: transformers has no tensor-parallel plan for {config.model_type!r}; allowed is tp=1"
        )
    sizes = {name: getattr(config, name) for name in _SPLIT if isinstance(getattr(config, name, None), int)}
    odd = {name: size for name, size in sizes.items() if size % ranks}
    if odd:
        allowed = [n for n in range(1, 65) if not any(size % n for size in sizes.values())]
        raise ValueError(
            f"tp={ranks} does not divide {', '.join(f'{name}={size}' for name, size in odd.items())}; "
            f"allowed are {', '.join(map(str, allowed))}"
        )
    local = copy.deepcopy(config)
    local.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, size in sizes.items():
        setattr(local, name, size // ranks)
    return local


def longest_context(model: Any) -> tuple[int | None, bool]:
    """(tokens a sample that the configuration speaks of, whether more are impossible: a table of positions has an end)."""
    config = model.config
    for name in reversed(_POSITIONS):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            tables = [
                each
                for name, each in model.named_modules()
                if isinstance(each, nn.Embedding) and ("pos" in name or "wpe" in name)
            ]
            return limit, any(limit <= table.num_embeddings <= limit + 2 for table in tables)
    return None, False


def example_inputs(model: Any, batch: int, context: int | None) -> dict[str, Any]:
    """Arguments of the model's forward, on the meta device, labels among them where it takes them.

    `context`: tokens a sample, (batch, context); None for a model that reads no tokens.
    """
    config, main = model.config, model.main_input_name
    takes = inspect.signature(model.forward).parameters
    dtype = next(model.parameters()).dtype
    ids = torch.empty(batch, context or 1, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {}
    if main == "input_ids":
        inputs[main] = ids
    elif main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs[main] = torch.empty(batch, config.num_channels, height, width, dtype=dtype, device="meta")
    elif main == "input_features":
        frames = 2 * config.max_source_positions
        inputs[main] = torch.empty(batch, config.num_mel_bins, frames, dtype=dtype, device="meta")
    else:
        raise ValueError(
            f"{type(model).__name__} takes {main!r}: expected a model of input_ids, pixel_values or input_features"
        )
    if "labels" in takes:
        per_token = main != "pixel_values" and model.get_output_embeddings() is not None
        inputs["labels"] = ids if per_token else ids[:, 0]
    elif getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@contextmanager
def one_sequence_a_sample() -> Iterator[None]:
    """Within the context transformers takes each sample for one sequence, without looking at its positions.

    It looks whether several are packed into a sample, and where tensors have no contents it cannot tell: then it makes a mask of
    context x context for each sample, and with a mask attention repeats grouped keys and values for every head.
    """
    masking = importlib.import_module(f"{_transformers().__name__}.masking_utils")
    name = "find_packed_sequence_indices"
    before = getattr(masking, name, None)
    if before is None:  # a transformers that does not look
        yield
        return
    setattr(masking, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking, name, before)


def reads_tokens(model: Any) -> bool:
    """Whether a sample has a length in tokens: it reads or writes text."""
    return model.main_input_name != "pixel_values"


def _model_class(config: Any) -> Any:
    transformers = _transformers()
    named = getattr(config, "architectures", None)
    if named:
        made = getattr(transformers, str(named[0]), None)
        if made is None or not (inspect.isclass(made) and issubclass(made, nn.Module)):
            raise ValueError(f"architecture {named[0]!r} is unknown to transformers {transformers.__version__}")
        return made
    heads = (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForImageClassification,
        transformers.AutoModel,
    )
    for head in heads:
        if type(config) in head._model_mapping:
            return head._model_mapping[type(config)]
    raise ValueError(f"transformers has no model for {config.model_type!r}; name one under architectures")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise BackendUnavailable("a model of a config.json needs transformers: pip install transformers") from None
    return transformers
