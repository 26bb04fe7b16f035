"""The adapter type inside PEFT: found by every look-up, registered once, never taken from others."""

from __future__ import annotations

import copy
import importlib
import pickle
from enum import StrEnum

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from toys import error_lines

import stlora_peft
from stlora_peft.tuner import registration
from stlora_peft.tuner.registration import PREFIX, register, stlora_type


def refusal(config_class: type, model_class: type) -> dict[str, str]:
    with pytest.raises(ImportError) as caught:
        register(config_class, model_class)
    return error_lines(caught.value)


def test_type_is_found_by_every_look_up():
    member = stlora_type()
    assert PeftType("STLORA") is PeftType["STLORA"] is PeftType.STLORA is member
    assert member in list(PeftType)
    assert "STLORA" in PeftType.__members__
    assert isinstance(member, PeftType)
    assert member == "STLORA"
    assert hash(member) == hash("STLORA")
    assert (member.name, member.value) == ("STLORA", "STLORA")


def test_other_members_stay_as_they_were():
    assert PeftType("LORA") is PeftType.LORA
    assert [member.name for member in PeftType].count("STLORA") == 1
    assert list(PeftType)[-1] is stlora_type()
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("STLORE")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_bare_member_survives_pickle_and_deepcopy(protocol):
    member = stlora_type()
    assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(PeftType.LORA, protocol)) is PeftType.LORA


def test_mappings_hold_our_classes_under_the_member_and_its_text():
    for key in (stlora_type(), "STLORA"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is stlora_peft.STLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is stlora_peft.STLoraModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == PREFIX == "nall_"


def test_registering_again_changes_nothing():
    before = [dict(m) for m in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)]
    register(stlora_peft.STLoraConfig, stlora_peft.STLoraModel)
    assert stlora_type() is PeftType.STLORA
    assert before == [PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING]


def test_reloading_the_package_keeps_the_member():
    member = stlora_type()
    importlib.reload(registration)
    importlib.reload(stlora_peft)
    assert registration.stlora_type() is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING["STLORA"] is stlora_peft.STLoraConfig


def test_reloaded_classes_of_the_same_name_replace_the_old_ones():
    old = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    twin = type("STLoraConfig", (PeftConfig,), {"__module__": "stlora_peft.tuner.config"})
    try:
        register(twin, stlora_peft.STLoraModel)
        assert PEFT_TYPE_TO_CONFIG_MAPPING["STLORA"] is twin
    finally:
        register(old["STLORA"], stlora_peft.STLoraModel)
    assert old == PEFT_TYPE_TO_CONFIG_MAPPING


def test_another_packages_tuner_of_the_same_type_is_not_replaced():
    class STLoraConfig(PeftConfig):
        pass

    lines = refusal(STLoraConfig, object)
    assert lines == {
        "where": "stlora_peft cannot register with PEFT",
        "expected": "the adapter type 'STLORA' to be free",
        "got": "it is registered by stlora_peft.tuner.config.STLoraConfig",
        "fix": "do not import both packages in one process",
    }
    assert PEFT_TYPE_TO_CONFIG_MAPPING["STLORA"] is stlora_peft.STLoraConfig


def test_another_type_of_the_same_prefix_is_refused(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, "OTHER", PREFIX)
    lines = refusal(stlora_peft.STLoraConfig, stlora_peft.STLoraModel)
    assert lines["expected"] == "the parameter prefix 'nall_' to be free"
    assert lines["got"] == "it is registered by OTHER"


def test_enum_that_does_not_take_the_member_is_an_error_that_says_so(monkeypatch):
    class Locked(StrEnum):
        LORA = "LORA"

    monkeypatch.setattr(registration, "PeftType", Locked)
    monkeypatch.setattr(registration, "_extend_str_enum", lambda cls, name: cls._member_map_.update({name: cls.LORA}))
    with pytest.raises(ImportError) as caught:
        stlora_type()
    lines = error_lines(caught.value)
    assert lines["expected"] == "an enum PeftType that takes the member 'STLORA'"
    assert lines["got"] == "a member that lookups do not find"
