"""What ``adapter_config.json`` says, and what of it is refused because the low-rank factors alone do not carry it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError

REFUSED: dict[str, str] = {
    "use_dora": "DoRA scales the whole weight, so its change is no product of the factors",
    "alora_invocation_tokens": "aLoRA is on for a part of the tokens only",
    "use_qalora": "QALoRA pools the inputs, so its factors have other shapes",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "MonteCLoRA draws its factors at random",
    "arrow_config": "Arrow mixes several adapters by the input",
    "megatron_config": "Megatron layers are split over processes",
    "layer_replication": "layer_replication repeats layers, so names mean other layers than the base's",
    "trainable_token_indices": "trained token embeddings are no product of factors",
}
"""Keys that are refused when they are set."""

CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "lorafa")
"""Initialisations after which the factors are relative to a base that was changed, not to the published one."""


class AdapterConfig:
    """The validated facts of an adapter's config.

    Args:
        raw: the parsed file.
        where: its path, for messages.

    Raises:
        InputError: not LoRA, or a setting of the refused kinds; names key and reason.
    """

    def __init__(self, raw: Mapping[str, object], where: str) -> None:
        self.raw, self.where = raw, where
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise InputError(
                f"{where}: peft_type is {kind!r}, expected 'LORA'",
                hint="PEFT's convert_to_lora turns other adapters into LoRA",
            )
        for key, reason in REFUSED.items():
            if raw.get(key):
                raise InputError(f"{where}: {key} is set: {reason}")
        init = raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
            raise InputError(
                f"{where}: init_lora_weights is {init!r}, which changed the base weights, so the factors are not "
                "relative to the published model",
                hint="save it with path_initial_model_for_weight_conversion first, which converts it",
            )
        bias = raw.get("bias", "none")
        if bias != "none":
            raise InputError(
                f"{where}: bias is {bias!r}: it holds trained biases of the base, which no low-rank method can merge",
                hint="only adapters with bias 'none' are supported",
            )
        self.rank = self._positive("r")
        self.alpha = self._number("lora_alpha", raw.get("lora_alpha"))
        self.rank_pattern = self._pattern("rank_pattern")
        self.alpha_pattern = self._pattern("alpha_pattern")

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(r) instead of alpha / r."""
        return self._flag("use_rslora")

    @property
    def lora_bias(self) -> bool:
        """Whether the second factor has a bias."""
        return self._flag("lora_bias")

    @property
    def transposed(self) -> bool:
        """Whether the base stores its weights [in, out], as Conv1D does."""
        return self._flag("fan_in_fan_out")

    @property
    def base(self) -> str | None:
        """Name of the base model."""
        found = self.raw.get("base_model_name_or_path")
        return found if isinstance(found, str) and found else None

    @property
    def saved(self) -> tuple[str, ...]:
        """Modules that are saved in full."""
        return self._names("modules_to_save")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Targeted parameters (stacked experts) instead of modules."""
        return self._names("target_parameters")

    def rank_of(self, module: str) -> int:
        """The rank that the config gives a module."""
        found = _match(self.rank_pattern, module)
        if found is None:
            return self.rank
        if type(found) is not int or found < 1:
            raise InputError(
                f"{self.where}: rank_pattern gives {module} the rank {found!r}, expected a positive integer"
            )
        return found

    def alpha_of(self, module: str) -> float:
        """The alpha that the config gives a module."""
        found = _match(self.alpha_pattern, module)
        return self.alpha if found is None else self._number("alpha_pattern", found)

    def scale_of(self, module: str, rank: int) -> float:
        """What the product of the factors is multiplied by."""
        alpha = self.alpha_of(module)
        return alpha / rank**0.5 if self.rslora else alpha / rank

    def _positive(self, key: str) -> int:
        value = self.raw.get(key, 8)
        if type(value) is not int or value < 1:
            raise InputError(f"{self.where}: {key} should be a positive integer, is {value!r}")
        return value

    def _number(self, key: str, value: object) -> float:
        if value is None:
            return 8.0  # PEFT's default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where}: {key} should be a number, is {value!r}")
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{self.where}: {key} should be true or false, is {value!r}")
        return bool(value)

    def _names(self, key: str) -> tuple[str, ...]:
        value = self.raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise InputError(f"{self.where}: {key} should be a list of names, is {value!r}")
        return tuple(value)

    def _pattern(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key) or {}
        if not isinstance(value, dict):
            raise InputError(f"{self.where}: {key} should be an object, is {value!r}")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"{self.where}: {key} has {pattern!r}, which is no regular expression ({error})"
                ) from None
        return value


def _match(patterns: Mapping[str, Any], module: str) -> Any:
    """The value of the first pattern that is the module's name or a dotted end of it, as PEFT finds it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None
