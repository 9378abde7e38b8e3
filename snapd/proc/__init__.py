"""Child processes: exec, exit watching, fencing and control messages with descriptors.

A crash stays inside one process only if starting, watching and replacing it is done the same way everywhere;
that way lives here.
"""
