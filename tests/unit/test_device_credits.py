"""Credit: bounds, the lone large request, and who comes next."""

from snapd.device.credits import Credits


def test_bound_and_release() -> None:
    credit: Credits[str] = Credits(100)
    assert credit.admit("a", 60)
    assert credit.admit("a", 40)
    assert not credit.admit("a", 1)
    assert credit.next_in_line() is None
    credit.release(40)
    assert credit.next_in_line() == "a"
    assert credit.admit("a", 40)
    assert credit.next_in_line() is None
    assert credit.in_flight_bytes == 100


def test_large_request_goes_alone() -> None:
    credit: Credits[str] = Credits(100)
    assert credit.admit("a", 10)
    assert not credit.admit("b", 500)
    credit.release(10)
    assert credit.next_in_line() == "b"
    assert credit.admit("b", 500)
    assert not credit.admit("a", 1)


def test_small_requests_do_not_starve_a_large_one() -> None:
    credit: Credits[str] = Credits(100)
    assert credit.admit("a", 50)
    assert not credit.admit("b", 80)
    assert not credit.admit("c", 10)
    assert not credit.admit("a", 10)
    credit.release(50)
    assert credit.next_in_line() == "b"
    assert credit.admit("b", 80)
    assert credit.next_in_line() == "c"
    assert credit.admit("c", 10)
    assert credit.admit("a", 10)


def test_who_leaves_the_line_lets_the_next_in() -> None:
    credit: Credits[str] = Credits(100)
    assert credit.admit("a", 50)
    assert not credit.admit("b", 80)
    assert not credit.admit("c", 10)
    credit.leave_line("b")
    credit.leave_line("b")
    assert credit.next_in_line() == "c"


def test_own_credit_is_not_shared() -> None:
    """Who has credit of its own gets it whatever the others hold, and stands in line for what goes beyond."""
    credit: Credits[str] = Credits(100)
    assert credit.admit("a", 110, 10)
    assert credit.in_flight_bytes == 110
    assert not credit.admit("b", 11, 10)
    assert credit.free_bytes == 0
    assert credit.admit("b", 10, 10)
    assert credit.next_in_line() is None
    credit.release(110, 10)
    credit.release(10, 10)
    assert (credit.in_flight_bytes, credit.free_bytes) == (0, 100)
