"""A checkpoint's config.json read with the defaults of its family, and the spellings loaders expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ..errors import InputError


class Config:
    """Typed access to a config, errors naming the key.

    Args:
        raw: the parsed ``config.json``.
        defaults: what stock transformers assumes for keys the file leaves out.
        where: names the file in errors.
    """

    def __init__(
        self, raw: Mapping[str, object], defaults: Mapping[str, object], where: str
    ) -> None:
        self.raw = raw
        self.where = where
        self._defaults = defaults
        self._all = {**defaults, **raw}

    def get(self, *keys: str) -> object:
        """The value of the first of several spellings that is present, or None."""
        for key in keys:
            if self._all.get(key) is not None:
                return self._all[key]
        return None

    def integer(self, *keys: str) -> int:
        """A positive integer under one of several spellings.

        Two spellings that disagree are an error: loaders differ in which they read.
        """
        # A default stands for one spelling only; it must not outvote another spelling in the file.
        found = {key: self.raw[key] for key in keys if self.raw.get(key) is not None}
        if not found:
            found = {key: self._defaults[key] for key in keys if key in self._defaults}
        if not found:
            raise InputError(f"{self.where}: {' or '.join(keys)} is missing")
        for key, value in found.items():
            if type(value) is not int or value < 1:
                raise InputError(f"{self.where}: {key} should be a positive integer, is {value!r}")
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{key} = {value}" for key, value in found.items())
            raise InputError(f"{self.where}: two spellings of one count disagree ({listed})")
        return cast(int, next(iter(found.values())))

    def flag(self, key: str) -> bool:
        """A boolean; absent counts as false."""
        value = self._all.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key} should be true or false, is {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._all.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where}: {key} should be a number, is {value!r}")
        return float(value)

    @property
    def hidden(self) -> int:
        return self.integer("hidden_size")

    @property
    def layers(self) -> int:
        return self.integer("num_hidden_layers")

    @property
    def heads(self) -> int:
        return self.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        if self.get("num_key_value_heads") is None:
            return self.heads
        return self.integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        if self.get("head_dim") is None:
            return self.hidden // self.heads
        return self.integer("head_dim")

    @property
    def vocab(self) -> int:
        return self.integer("vocab_size")

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.flag("tie_word_embeddings")

    def completed(self) -> dict[str, object]:
        """The raw config with the family's defaults written out."""
        return dict(self._all)


def refuse_flag(config: Config, key: str, reason: str) -> None:
    """Refuse a parent that sets a flag.

    Raises:
        InputError: with the reason.
    """
    if config.flag(key):
        raise InputError(f"{config.where}: {key} is set, and {reason}")


def whole_experts(config: Mapping[str, object], key: str, width: int, family: str) -> int:
    """How many routed experts a shared one is as wide as, for families that count it so.

    Args:
        key: config key of a routed expert's width.

    Raises:
        InputError: not a whole number.
    """
    one = config[key]
    if not isinstance(one, int) or width % one:
        raise InputError(
            f"{family}'s shared expert is as wide as a whole number of routed experts; {width} is no multiple "
            f"of {one}",
            hint="choose an expert width that divides the shared one",
        )
    return width // one


def both_rope_spellings(config: dict[str, object]) -> dict[str, object]:
    """The config with rotary settings as transformers 4 (``rope_theta``, ``rope_scaling``) and 5
    (``rope_parameters``) read them. A loader that finds only the other spelling silently uses defaults.
    """
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling")
    found: dict[str, object] = {}
    if isinstance(scaling, dict):
        found.update(scaling)
    if isinstance(parameters, dict):
        found.update(parameters)
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    if "rope_theta" not in found and config.get("rope_theta") is not None:
        found["rope_theta"] = config["rope_theta"]
    result = dict(config)
    if "rope_theta" in found:
        result["rope_theta"] = found["rope_theta"]
    result["rope_parameters"] = found
    result.pop("rope_scaling", None)
    if found["rope_type"] != "default":
        result["rope_scaling"] = {key: value for key, value in found.items() if key != "rope_theta"}
    return result
