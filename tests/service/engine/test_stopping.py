"""Stop strings: found wherever they come, and nothing is told that may yet belong to one."""

from hypothesis import given
from hypothesis import strategies as st

from service.engine.sequence import DrawnToken
from service.engine.stopping import release

LETTERS = st.text("ab", max_size=4)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def told(pieces: list[str], stop: list[str]) -> tuple[str, bool, list[str]]:
    """The text, whether it was stopped, and what had been told after each piece."""
    held: list[DrawnToken] = []
    text, after = "", []
    for index, piece in enumerate(pieces):
        held.append(DrawnToken(index, 0, piece))
        tokens, has_stopped = release(held, stop)
        text += "".join(token.text for token in tokens)
        after.append(text)
        if has_stopped:
            return text, True, after
    return text + "".join(token.text for token in held), False, after


@given(st.lists(LETTERS, max_size=12), STOPS)
def test_the_text_ends_before_the_stop_string_that_comes_first(pieces: list[str], stop: list[str]) -> None:
    text, has_stopped, after = told(pieces, stop)
    whole = ""
    for piece in pieces:  # by the definition: after every token, look at everything
        whole += piece
        places = [place for each in stop if (place := whole.find(each)) >= 0]
        if places:
            assert (text, has_stopped) == (whole[: min(places)], True)
            break
    else:
        assert (text, has_stopped) == (whole, False)
    assert all(text.startswith(each) for each in after), "what was told has been taken back"


@given(st.text("ab", max_size=12), STOPS)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stop: list[str]) -> None:
    _, has_stopped, after = told(list(text), stop)
    if has_stopped or not after:
        return
    held = text[len(after[-1]) :]
    assert not held or any(each.startswith(held) for each in stop)


def test_tokens_without_a_text_of_their_own_stay_before_a_stop_string_and_go_with_it() -> None:
    held = [DrawnToken(0, 0xC3, ""), DrawnToken(1, 0xA9, "\u00e9"), DrawnToken(2, 0xE2, ""), DrawnToken(3, 33, "!")]
    assert release(list(held), ["!"]) == (held[:2], True)
    assert release(list(held), ["\u00e9"]) == ([], True)
    first_bytes = [DrawnToken(0, 65, "a"), DrawnToken(1, 0xE2, ""), DrawnToken(2, 0x80, "")]
    assert release(first_bytes, ["\u2014"]) == ([DrawnToken(0, 65, "a")], False)
    assert release([*first_bytes, DrawnToken(3, 0x94, "\u2014")], ["\u2014"]) == ([], True)
    waiting = [DrawnToken(0, 65, "a"), DrawnToken(1, 0xC3, "")]
    assert release(waiting, ["ab"]) == ([], False)
    assert len(waiting) == 2


def test_a_token_that_a_stop_string_cuts_keeps_its_beginning_and_its_place() -> None:
    held = [DrawnToken(0, 5, "one two"), DrawnToken(1, 6, " three")]
    assert release(held, ["two t"]) == ([DrawnToken(0, 5, "one ")], True)
    assert held == []
