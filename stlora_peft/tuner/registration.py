"""Make PEFT know the type ``STLORA``. The only file that touches PEFT's enum and mappings.

PEFT 0.18 to 0.21 looks adapter types up in an enum that it owns and offers no plug-in point, so a
member is added to it. Registration can be repeated (module reload) and refuses to replace somebody
else's tuner of the same name.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from stlora_peft.errors import message

TYPE_NAME = "STLORA"
PREFIX = "nall_"


def restore_type() -> Enum:
    """Return the enum member; pickles of it call this, so that a fresh process registers first."""
    return stlora_type()


def stlora_type() -> Enum:
    """Return the member ``PeftType.STLORA``, adding it on the first call.

    Raises:
        ImportError: If this Python's enum machinery does not take the new member.
    """
    if TYPE_NAME not in PeftType.__members__:
        _extend_str_enum(PeftType, TYPE_NAME)
    member: Enum = PeftType.__members__[TYPE_NAME]
    try:
        found = PeftType(TYPE_NAME) is getattr(PeftType, TYPE_NAME) is member and member in list(PeftType)
    except (ValueError, AttributeError):
        found = False
    if not found:
        raise ImportError(
            message(
                "stlora_peft cannot register with PEFT",
                expected=f"an enum PeftType that takes the member '{TYPE_NAME}'",
                got="a member that lookups do not find",
                fix="use a peft version that stlora_peft supports (see its pyproject.toml)",
            )
        )
    return member


def _extend_str_enum(enum_class: Any, name: str) -> None:
    """Add a member to a ``(str, Enum)`` class; ``EnumMeta.__setattr__`` refuses it, so go around."""
    member = str.__new__(enum_class, name)
    member._name_ = member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    # A bare member must be readable by a process that has not imported this package yet.
    member.__reduce_ex__ = lambda protocol: (restore_type, ())
    type.__setattr__(enum_class, name, member)
    enum_class._member_map_[name] = member
    enum_class._member_names_.append(name)
    enum_class._value2member_map_[name] = member
    if hasattr(enum_class, "_hashable_values_"):
        enum_class._hashable_values_.append(name)


def register(config_class: type, model_class: type) -> None:
    """Enter the tuner in PEFT's mappings; calling it again (reload) replaces only our own entries.

    Args:
        config_class: The adapter's config class.
        model_class: The tuner class.

    Raises:
        ImportError: If another package registered the type or the parameter prefix.
    """
    member: Any = stlora_type()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(member)
    if known is not None and _identity(known) != _identity(config_class):
        _refuse(f"the adapter type '{TYPE_NAME}'", _identity(known))
    for other, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items():
        if prefix == PREFIX and other != member:
            _refuse(f"the parameter prefix '{PREFIX}'", str(other))
    PEFT_TYPE_TO_CONFIG_MAPPING[member] = config_class
    PEFT_TYPE_TO_TUNER_MAPPING[member] = model_class
    PEFT_TYPE_TO_PREFIX_MAPPING[member] = PREFIX


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _refuse(what: str, owner: str) -> None:
    raise ImportError(
        message(
            "stlora_peft cannot register with PEFT",
            expected=f"{what} to be free",
            got=f"it is registered by {owner}",
            fix="do not import both packages in one process",
        )
    )
