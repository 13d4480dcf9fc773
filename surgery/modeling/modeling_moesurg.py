"""Stock transformers models with parts that no stock class has. Made by moesurg.

Classes are made when asked for: ``MoesurgLlamaForCausalLM`` subclasses ``transformers.LlamaForCausalLM``. What differs
from the stock class is said in `config.json` below a key for each part, and described in that part's file,
``moesurg_<part>.py``. Everything else, such as attention implementations, cache and generation, is the stock
class's own.
"""

from __future__ import annotations

import re
from typing import Any

import transformers

# Imports of this form are those that transformers follows when it copies a folder's code.
from .moesurg_bam import KEY as BAM
from .moesurg_bam import apply as apply_bam
from .moesurg_blocks import modernise
from .moesurg_linears import KEY as LINEARS
from .moesurg_linears import apply as apply_linears
from .moesurg_lowrank_experts import KEY as LOWRANK_EXPERTS
from .moesurg_lowrank_experts import apply as apply_lowrank_experts
from .moesurg_mixed_linears import KEY as MIXED_LINEARS
from .moesurg_mixed_linears import apply as apply_mixed_linears
from .moesurg_mixtures import KEY as MIXTURES
from .moesurg_mixtures import apply as apply_mixtures
from .moesurg_null_experts import KEY as NULL_EXPERTS
from .moesurg_null_experts import apply as apply_null_experts
from .moesurg_read_me import KEY as READ_ME
from .moesurg_read_me import apply as apply_read_me
from .moesurg_routers import KEY as ROUTERS
from .moesurg_routers import apply as apply_routers
from .moesurg_shared_experts import KEY as SHARED_EXPERTS
from .moesurg_shared_experts import apply as apply_shared_experts
from .moesurg_ternary_experts import KEY as TERNARY_EXPERTS
from .moesurg_ternary_experts import apply as apply_ternary_experts

PARTS = (
    (BAM, apply_bam),
    (MIXTURES, apply_mixtures),
    (NULL_EXPERTS, apply_null_experts),
    (ROUTERS, apply_routers),
    (LOWRANK_EXPERTS, apply_lowrank_experts),
    (SHARED_EXPERTS, apply_shared_experts),
    (TERNARY_EXPERTS, apply_ternary_experts),
    (READ_ME, apply_read_me),
    (LINEARS, apply_linears),
    (MIXED_LINEARS, apply_mixed_linears),
)
"""Key in the config and function of every part, in the order in which they change a model."""


def _config_class(stock: Any) -> type:
    return type(
        "Moesurg" + stock.__name__,
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with the keys of the parts that are not stock.",
            "model_type": "moesurg_" + stock.model_type,
            "base_model_tp_plan": {},  # a stock plan would split layers that are not stock
        },
    )


def _model_class(stock: Any, config_class: type) -> type:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        if int(transformers.__version__.split(".")[0]) < 5:
            modernise(getattr(self, "model", self))
        for key, apply in PARTS:
            if getattr(config, key, None):
                # Not `base_model`, whose prefix some stock classes name after a model around them.
                apply(getattr(self, "model", self), config)

    return type(
        "Moesurg" + stock.__name__,
        (stock,),
        {
            "__module__": __name__,
            "__doc__": f"{stock.__name__} with parts that are not stock.",
            "__init__": __init__,
            "config_class": config_class,
            # transformers looks for it in the source of the class's module, which is the stock one's to have.
            "_can_set_experts_implementation": classmethod(
                lambda cls: stock._can_set_experts_implementation()
            ),
        },
    )


def __getattr__(name: str) -> type:
    """The class ``Moesurg<stock class>``, made once."""
    found = re.fullmatch(r"Moesurg(\w+?)(Config|Model|ForCausalLM)", name)
    family, kind = found.groups() if found else ("", "")
    stock = getattr(transformers, family + kind, None) if found else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made: type
    if kind == "Config":
        made = _config_class(stock)
    else:
        # Usually the family's, but Llama 4's text model has a config of its own.
        config = "Moesurg" + stock.config_class.__name__
        made = _model_class(stock, globals().get(config) or __getattr__(config))
    globals()[name] = made
    return made
