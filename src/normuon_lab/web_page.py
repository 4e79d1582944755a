"""Pages of HTML that stand alone: one file, no network, light and dark, wide and narrow.

The frame is templates/page.html.j2. It adapts figures in the browser: their ink follows the
reader's colour scheme, and panels side by side go one below the other where the window is narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

# A page without figures needs jinja2 alone, which comes with torch.
if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WARNING = "#d9534a"
"""For lines and words of warning; legible on white and on the dark page."""
_CLEAR = "rgba(0, 0, 0, 0)"


def render_page(
    package: str,
    template: str,
    *,
    plots: Mapping[str, go.Figure | None] | None = None,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    undefined: type[jinja2.Undefined] = jinja2.StrictUndefined,
    **values: Any,
) -> str:
    """A page as text.

    Args:
        package: in whose folder `templates` the template lies.
        template: its name; it extends "page.html.j2".
        plots: figures by the `id` of the element that each is drawn in; None for one that there
            is nothing to draw in.
        filters: of the template.
        undefined: what a value that is not given is to the template; by default an error.
        values: of the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(package), jinja2.PackageLoader("normuon_lab")]
        ),
        autoescape=True,
        undefined=undefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    drawn = {name: figure for name, figure in (plots or {}).items() if figure is not None}
    plotly_js = ""
    if drawn:
        from plotly.offline import get_plotlyjs

        plotly_js = get_plotlyjs()
    return environment.get_template(template).render(
        **values,
        plots={name: _figure_json(figure) for name, figure in drawn.items()},
        plotly_js=plotly_js,
    )


def apply_style(figure: go.Figure, *, height: int) -> None:
    """Give a figure the pages' fonts, margins and legend; colours of ink and grid are the page's.

    The height is in pixels, where the window is wide.
    """
    figure.update_layout(
        height=height,
        margin={"l": 70, "r": 30, "t": 50, "b": 60},
        font={"family": FONT, "size": 13},
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        hoverlabel={"font": {"family": FONT}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.0},
    )
    figure.update_xaxes(zeroline=False, ticks="outside")
    figure.update_yaxes(zeroline=False, ticks="outside")


def stack_when_narrow(figure: go.Figure, panels: Sequence[str], *, height: int) -> None:
    """Mark panels to be drawn one below the other in a narrow window.

    Args:
        figure: of `make_subplots`; the titles of its rows and columns are its only annotations yet.
        panels: a title for each, row by row, in place of those of rows and columns.
        height: of one panel there, in pixels.
    """
    figure.update_layout(
        meta={
            "panels": list(panels),
            "panel_height": height,
            "replaced_titles": len(figure.layout.annotations),
        }
    )


def _figure_json(figure: go.Figure) -> str:
    """The figure as JSON that can stand inside a script element."""
    text: str = figure.to_json()
    return text.replace("<", "\\u003c")
