"""The X-LoRA scaffold of ``adapter to-moe``: its config and how PEFT loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import UsageError

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from .to_moe import Options

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers of decoder blocks that read hidden states, as most families call them."""


def call(names: Sequence[str], folder: str) -> dict[str, str]:
    """How PEFT loads an X-LoRA: experts go by their number."""
    paths = ", ".join(f"'{index}': FOLDER + '/{name}'" for index, name in enumerate(names))
    found = (
        f"base_model.config.use_cache = False; config = peft.XLoraConfig.from_pretrained(FOLDER + '/{folder}'); "
        f"config.adapters = {{{paths}}}; "
        f"model = peft.PeftModel.from_pretrained(base_model, FOLDER + '/{folder}', config=config)"
    )
    return {"call": found}


def config_of(options: Options, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The classifier's config."""
    first = adapters[0].config
    found: dict[str, Any] = {
        "peft_type": "XLORA",
        "base_model_name_or_path": first.base,
        "task_type": first.raw.get("task_type"),
        "hidden_size": options.hidden_size or _hidden_size(adapters),
        "adapters": {str(index): str(index) for index in range(len(adapters))},
        "enable_softmax": True,
        "softmax_temperature": options.temperature,
        "layerwise_scalings": False,
        "top_k_lora": None if options.top_k is None else min(options.top_k, len(adapters)),
        "xlora_depth": 1,
    }
    return found


def _hidden_size(adapters: Sequence[Adapter]) -> int:
    """What layers that read hidden states take, if all agree.

    Raises:
        UsageError: no such layer, or several widths.
    """
    sizes = {
        module.inputs
        for adapter in adapters
        for module in adapter.modules.values()
        if module.name.rpartition(".")[2] in READERS
    }
    if len(sizes) != 1:
        raise UsageError(
            "the width of the base's hidden states cannot be told from these adapters",
            hint="--hidden-size, as the base's config.json has it",
        )
    return sizes.pop()
