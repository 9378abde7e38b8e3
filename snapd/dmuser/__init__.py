"""dm-user: block requests as messages between a target and the daemon that serves it.

`message` is the wire; `target` is the kernel's part as a pure state machine, with `admission` and `filter` before its
queue and `inflight` behind it. `channel` binds it to a stream socket, of which `listener` takes many, `arenachannel` to
one with shared memory beside it; `node` is the control node in memory, the reference for both. `client` is the
daemon's end. `docs/spec/dm-user.md` has the statements (DMU-n).
"""
