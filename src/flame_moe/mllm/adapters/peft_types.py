"""Names of our own in PEFT's list of methods, which has no public door for others (peft issue 2273)."""

from __future__ import annotations

from peft import PeftType


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enumeration with this name, added if it is not there yet.

    `register_peft_method`, which is public, accepts only names that the enumeration already has.

    Example:
        >>> peft_type("FLAME_EXAMPLE") is peft_type("FLAME_EXAMPLE") is PeftType("FLAME_EXAMPLE")
        True
        >>> PeftType.FLAME_EXAMPLE in list(PeftType)
        True
    """
    if name in PeftType._member_map_:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    # Since Python 3.12 members are attributes of the class; the class itself refuses new ones once they are listed.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
