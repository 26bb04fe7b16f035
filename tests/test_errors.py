from stlora_peft.errors import message


def test_message_builds_four_lines_in_fixed_order():
    text = message("city 'x', key 'values': wrong", expected="3", got="2", fix="give 3")
    assert text.split("\n") == [
        "city 'x', key 'values': wrong.",
        "  expected: 3",
        "  got:      2",
        "  to fix:   give 3",
    ]
