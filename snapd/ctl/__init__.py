"""snapctl, the command line: one file a verb.

A verb's file defines the command as a plain function and `register(app)`, which hangs it into its group; `app` lists
the verbs. Standard output carries results only (a table, or JSON with `-o json`); progress and errors go to standard
error. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Whatever a verb needs is imported inside it, so
that `snapctl --help` loads nothing else.
"""
