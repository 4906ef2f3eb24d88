"""Colours for light and dark, and the one script: pointing at a recipe shows it everywhere."""

from kvpack.picture.markup import Markup

COLOURS = Markup("""
:root, svg { --back: #ffffff; --text: #1b1f24; --soft: #5b6470; --grid: #dfe3e8; --other: #6b7683;
  --best: #0a6cc4; --source: #a8480b; --heat: #b3261e; --lost: #a3210f; }
@media (prefers-color-scheme: dark) {
  :root, svg { --back: #14171b; --text: #e9edf2; --soft: #a7b0bb; --grid: #30363d; --other: #9aa5b1;
    --best: #6cb6ff; --source: #f0a35e; --heat: #ff8a7a; --lost: #ff9c8f; }
}
""")
"""Custom properties; the contrast of text on the background is above 4.5 in both."""

PLOT = Markup("""
svg text { font: 11px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; fill: var(--text); }
svg .soft { fill: var(--soft); }
svg .title { font-size: 13px; font-weight: 600; }
svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .point circle { fill: var(--other); stroke: var(--other); stroke-width: 1.5; }
svg .point.best circle { fill: var(--best); stroke: var(--best); }
svg .point.best text { font-weight: 600; }
svg .point text { paint-order: stroke; stroke: var(--back); stroke-width: 3; stroke-linejoin: round; }
svg .point.open circle { fill: var(--back); }
svg .lead { stroke: var(--soft); stroke-width: 0.7; }
svg .frontier { fill: none; stroke: var(--best); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .source { stroke: var(--source); stroke-width: 1.2; }
svg .source-text { fill: var(--source); }
svg .budget { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
svg .cell { fill: var(--heat); }
svg .hot circle { stroke: var(--text); stroke-width: 3; }
svg .hot text { text-decoration: underline; }
""")

PAGE = Markup("""
body { background: var(--back); color: var(--text); margin: 2rem auto; padding: 0 1rem; max-width: 60rem;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p.soft, figcaption, caption { color: var(--soft); text-align: left; }
figure { margin: 1rem 0; }
svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child, td.text { text-align: left; }
td:first-child { overflow-wrap: anywhere; }
tr.best td:first-child { color: var(--best); font-weight: 600; }
tr.lost td { color: var(--lost); }
tr.hot td { background: var(--grid); }
""")

SCRIPT = Markup("""
addEventListener("mouseover", function (event) {
  var near = event.target.closest ? event.target.closest("[data-r]") : null;
  document.querySelectorAll("[data-r]").forEach(function (one) {
    one.classList.toggle("hot", !!near && one.dataset.r === near.dataset.r);
  });
});
""")
