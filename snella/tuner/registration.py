"""SNELLA in PEFT's tables: a member of ``PeftType``, and its configuration, tuner and prefix."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method


def peft_type() -> Any:
    """PEFT's enum member ``PeftType.SNELLA``, made on first use.

    PEFT's own methods are listed in the enum's source; one from outside is appended here, in the
    way the enum module itself fills it, so that look-ups by name and value, iteration, and
    ``register_peft_method`` treat it as the others.
    """
    if "SNELLA" not in PeftType.__members__:
        member: Any = str.__new__(PeftType, "SNELLA")
        member._name_ = member._value_ = "SNELLA"
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append("SNELLA")
        PeftType._member_map_["SNELLA"] = member
        PeftType._value2member_map_["SNELLA"] = member
        type.__setattr__(PeftType, "SNELLA", member)
    return PeftType("SNELLA")


def register(config_cls: type, model_cls: Any) -> None:
    """Make ``get_peft_model``, ``PeftModel.from_pretrained`` and others know SNELLA."""
    if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name="snella", config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
