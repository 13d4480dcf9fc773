"""Which mixture a dense model becomes, and which widths its experts can have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...architectures import families
from ...architectures.base import DenseTarget, Family, MoE
from ...errors import InputError
from ...plan import element_bytes

if TYPE_CHECKING:
    from ...architectures.model import Model


def choose(model: Model, name: str | None, *, sharing: bool) -> tuple[Family, MoE, DenseTarget]:
    """The family to write, its mixture and how it grows.

    Args:
        name: of the family, or None for the first that fits.
        sharing: it has to have a shared expert of any width.

    Raises:
        InputError: none fits, or the named one does not.
    """
    parent = model.family.model_type
    fitting = {
        family.model_type: (family, family.moe, family.target)
        for family in families().values()
        if family.moe is not None
        and family.target is not None
        and parent in family.target.parents
        and (family.target.shared_size is not None or not sharing)
    }
    if not fitting:
        kind = "with a shared expert " if sharing else ""
        raise InputError(
            f"{model.folder}: no supported MoE family {kind}holds the blocks of {parent}"
        )
    if name is None:
        # A family that would need a neutral shared expert comes after those that do without.
        plain = [found for found in fitting.values() if not found[2].neutral_shared]
        return (plain or list(fitting.values()))[0]
    if name not in fitting:
        known = families().get(name)
        holds = known is not None and known.target is not None and parent in known.target.parents
        reason = "it has no shared expert" if holds else "its attention differs"
        raise InputError(
            f"{model.folder}: a {parent} model cannot become {name}: {reason}",
            hint=f"for {parent} use --target {' or '.join(fitting)}",
        )
    return fitting[name]


def check_width(model: Model, width: int) -> None:
    """Refuse widths that stock transformers cannot run: its grouped product takes rows of whole 16 bytes.

    Raises:
        InputError: this is one.
    """
    for layer in model.layers:
        size = element_bytes(model.dtype(layer.ffn["gate"].tensor))
        if width * size % 16:
            raise InputError(
                f"{model.folder}: experts of {width} neurons do not run in stock transformers, "
                f"whose grouped product takes multiples of {16 // size} in this type",
                hint=f"choose a width that is a multiple of {16 // size}",
            )
