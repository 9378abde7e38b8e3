"""A batch is answered once, when the last piece of it has ended and no more will come."""

import errno

from snapd.block.bio import Bio, BioOp
from snapd.device.batch import Batch


def test_batch_is_ready_once() -> None:
    """When it is sealed and every piece has ended, in whichever order, and never again."""
    for order in (["seal", "one", "two"], ["one", "seal", "two"], ["one", "two", "seal"]):
        ready: list[dict[int, int]] = []
        batch = Batch(None, lambda batch, ready=ready: ready.append(dict(batch.errors)))  # type: ignore[misc]
        batch.pending += 2
        for step in order:
            assert ready == []
            if step == "seal":
                batch.seal()
            elif step == "one":
                batch.piece_done(7, errno.EIO)
            else:
                batch.piece_done(8, 0)
        assert ready == [{7: errno.EIO}]


def test_empty_batch_is_ready_when_sealed() -> None:
    ready: list[Batch] = []
    batch = Batch(None, ready.append)
    assert ready == []
    batch.seal()
    assert ready == [batch]


def test_a_piece_that_was_a_bio_fails_its_own_request() -> None:
    """The bio says by its tag whose piece it was; a later success does not hide a failure."""
    ready: list[Batch] = []
    batch = Batch(None, ready.append)
    for tag, number in ((1, 0), (2, errno.EIO), (2, 0)):
        batch.pending += 1
        batch.bio_done(Bio(BioOp.READ, 0, 512, None, batch.bio_done, tag=tag), number)
    batch.seal()
    assert ready == [batch]
    assert batch.errors == {2: errno.EIO}
