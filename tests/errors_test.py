from nanoflax.errors import listed


def test_a_list_of_problems_ends_with_how_many_more_there_are():
    assert listed([]) == ""
    assert listed(["a", "b"], limit=2) == "a; b"
    assert listed(["a", "b", "c", "d"], limit=2) == "a; b; and 2 more"
