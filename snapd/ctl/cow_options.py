"""Options that several of the offline verbs have."""

from typing import Annotated

import typer

LabelOption = Annotated[
    int | None, typer.Option("--label", min=0, metavar="N", help="Only what lies before this label.")
]
LenientOption = Annotated[
    bool, typer.Option("--lenient", help="Tolerate what some writers get wrong, and say what that was.")
]
IgnoreDigestsOption = Annotated[
    bool, typer.Option("--ignore-digests", help="Do not compare with the digests beside the COW.")
]
