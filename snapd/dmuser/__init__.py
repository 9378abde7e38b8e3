"""dm-user: block requests as messages between a target and the daemon that serves it.

`message` is the wire, `target` the kernel's part as a pure state machine, `channel` binds it to a socket, `client` is
the daemon's end. `docs/spec/dm-user.md` has the statements (DMU-n).
"""
