"""The matrix as one HTML file that needs no network, reads on paper and in the dark; ci/matrix.html.j2 is its form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2

import matrix_counts
from matrix_results import ELSE, HOOKS, LOST, MODES, Run

TEMPLATE = "matrix.html.j2"


def page(runs: Sequence[Run]) -> str:
    """Write the whole page; names and messages are escaped by the template engine."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        runs=runs, counts=matrix_counts, hooks=(*HOOKS, ELSE), modes=(*MODES, ELSE), lost=LOST
    )
